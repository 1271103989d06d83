"""Text for the quality study as token files: train*.bin, dev_DOMAIN.bin, adapt_DOMAIN.bin (uint16, as numpy writes it).

Without files of one's own it is the text that is on any machine with this project's dependencies: sources (python),
documentation (docs) and C++ headers (headers) of installed packages, by default of those that `pip install .[dev]` and
the build bring. Their versions decide the text: they are in FOLDER/packages.json, and the study's results have them
with the digests of the token files. One domain is not trained on but adapted to (setting B). Files are split into
training and held-out text, and ordered, by a hash of their path.

  python benchmarks/quality_data.py --model smollm2 --out tokens                       # what is installed here
  python benchmarks/quality_data.py --model smollm2 --out tokens --recode OLD --recode-with lm46   # other token files
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import random
import sys
import sysconfig
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

DOMAINS = {
    "python": ("*.py",),
    "docs": ("*.md", "*.rst", "METADATA", "*.txt"),
    "headers": ("*.h", "*.hpp", "*.cuh"),
}
ADAPTED = "headers"
# With most of the text that such an environment has. Not lemo: its text would change with every commit.
PACKAGES = (
    "cmake",
    "cutlass_library",  # of nvidia_cutlass
    "huggingface_hub",
    "networkx",
    "numpy",
    "nvidia_cutlass",
    "peft",
    "sympy",
    "torch",
    "transformers",
)
PACKAGES_FILE = "packages.json"
SMALLEST, LARGEST = 8_000, 300_000  # bytes of a file; longer ones are tables
HELD_OUT_PERCENT = {"python": 15, "headers": 15, "docs": 50}  # a few windows of 32K tokens even of the scarcest
PIECE = 1 << 17  # tokens of a file that are translated at a time


def digest(name: str) -> bytes:
    return hashlib.sha256(name.encode()).digest()


def held_out(domain: str, name: str) -> bool:
    return int.from_bytes(digest(name)[:4], "big") % 100 < HELD_OUT_PERCENT[domain]


def tops_of(folder: Path) -> list[tuple[str, Path]]:
    """Names without versions of the folders in a folder of installed packages."""
    return [(top.name.partition("-")[0], top) for top in folder.iterdir() if top.is_dir()]


def files_of(domain: str, folder: Path, packages: Collection[str]) -> list[tuple[str, Path]]:
    """Name and path of the domain's files in folders of these packages, in an order that further files do not change.
    A version in a folder's name does not count."""
    tops = [top for name, top in tops_of(folder) if name in packages]
    found = {p for pattern in DOMAINS[domain] for top in tops for p in top.rglob(pattern)}
    named = []
    for path in found:
        if path.is_file() and SMALLEST <= path.stat().st_size <= LARGEST:
            top, *rest = path.relative_to(folder).parts
            named.append(("/".join([top.partition("-")[0], *rest]), path))
    return sorted(named, key=lambda file: digest(file[0]))


def encoded(tokenizer: Any, texts: Iterator[str], at_most: int) -> np.ndarray:
    """Texts with the end-of-text token after each, until there are enough."""
    ids: list[int] = []
    for text in texts:
        ids += tokenizer(text, add_special_tokens=False)["input_ids"]
        if tokenizer.eos_token_id is not None:
            ids.append(tokenizer.eos_token_id)
        if len(ids) >= at_most:
            break
    return np.array(ids[:at_most], dtype=np.uint16)


def readable(paths: Iterator[Path]) -> Iterator[str]:
    for path in paths:
        try:
            yield path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue


def versions(folder: Path, packages: Collection[str]) -> dict[str, str]:
    """Of what is installed in the folder, which need not be what runs this: by the packages that have files of it."""
    found: dict[str, str] = {}
    for one in importlib.metadata.distributions(path=[str(folder)]):
        tops = {file.parts[0].partition("-")[0] for file in one.files or ()}
        found |= {name: one.version for name in packages if name in tops}
    return dict(sorted(found.items()))


def write_installed(
    tokenizer: Any, out: Path, folder: Path, packages: Collection[str], train_tokens: int, dev_tokens: int
) -> None:
    """packages: names of folders, without versions."""
    trained = [d for d in DOMAINS if d != ADAPTED]
    for domain in DOMAINS:
        files = files_of(domain, folder, packages)
        dev = encoded(tokenizer, readable(p for name, p in files if held_out(domain, name)), dev_tokens)
        share = train_tokens if domain == ADAPTED else train_tokens // len(trained)
        train = encoded(tokenizer, readable(p for name, p in files if not held_out(domain, name)), share)
        if not len(dev) or not len(train):
            raise SystemExit(
                f"no text of the domain {domain} below {folder} in {', '.join(sorted(packages))}: are they installed "
                "there? --only names others"
            )
        name = f"adapt_{domain}" if domain == ADAPTED else f"train_{domain}"
        train.tofile(out / f"{name}.bin")
        dev.tofile(out / f"dev_{domain}.bin")
        print(f"{domain}: {len(train)} tokens to train on, {len(dev)} held out", flush=True)


def write_recoded(tokenizer: Any, other: Any, out: Path, folder: Path, train_tokens: int, dev_tokens: int) -> None:
    """The texts of other token files in this vocabulary."""
    for path in sorted(folder.glob("*.bin")):
        tokens = np.fromfile(path, dtype=np.uint16)
        starts = list(range(0, len(tokens), PIECE))
        if not path.name.startswith("dev_"):  # a part of the file has a part of all its kinds of text
            random.Random(1).shuffle(starts)
        pieces = (tokens[i : i + PIECE] for i in starts)
        texts = (other.decode(piece.tolist(), skip_special_tokens=True) for piece in pieces)
        made = encoded(tokenizer, texts, dev_tokens if path.name.startswith("dev_") else train_tokens)
        made.tofile(out / path.name)
        print(f"{path.name}: {len(tokens)} tokens became {len(made)}", flush=True)


# ---- reading ---------------------------------------------------------------------------------------------------------


def token_files(folder: Path, prefix: str) -> dict[str, np.ndarray]:
    """By name without the prefix. Raises SystemExit if there is none."""
    files = sorted(folder.glob(f"{prefix}*.bin"))
    if not files:
        raise SystemExit(f"--tokens: no {prefix}*.bin in {folder}; benchmarks/quality_data.py makes such files")
    return {f.stem.removeprefix(prefix): np.fromfile(f, dtype=np.uint16) for f in files}


def sequences(files: dict[str, np.ndarray], context: int, seed: int) -> Iterator[np.ndarray]:
    """Random windows of `context` tokens, files drawn by their length: the same for every way of training."""
    arrays = [a for a in files.values() if len(a) > context]
    if not arrays:
        longest = max(map(len, files.values()))
        raise SystemExit(f"--tokens: a window takes {context} tokens, but the longest file has {longest}")
    weights = np.array([len(a) for a in arrays], float)
    rng = np.random.default_rng(seed)
    while True:
        a = arrays[rng.choice(len(arrays), p=weights / weights.sum())]
        start = rng.integers(0, len(a) - context)
        yield a[start : start + context].astype(np.int64)


def windows(tokens: np.ndarray, context: int, count: int, second: bool) -> np.ndarray:
    """`count` windows that do not overlap, evenly spread; second: those between them, for another purpose."""
    whole = tokens[: len(tokens) // context * context].reshape(-1, context)
    half = whole[int(second) :: 2]
    if not len(half):
        raise SystemExit(f"--tokens: held-out files need two windows of {context} tokens; one has {len(tokens)} tokens")
    return half[np.unique(np.linspace(0, len(half) - 1, min(count, len(half))).astype(int))]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder with the tokenizer")
    parser.add_argument("--out", required=True, type=Path, metavar="FOLDER")
    parser.add_argument("--packages", type=Path, default=Path(sysconfig.get_path("purelib")), help="installed packages")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="packages to take, by the names of their folders")
    parser.add_argument("--recode", type=Path, metavar="FOLDER", help="token files to translate instead")
    parser.add_argument("--recode-with", metavar="MODEL", help="folder with the tokenizer of these")
    parser.add_argument("--train-tokens", type=int, default=4_000_000, help="of all training text, and to adapt to")
    parser.add_argument("--dev-tokens", type=int, default=600_000, help="at most, of every domain")
    args = parser.parse_args(arguments)
    if (args.recode is None) != (args.recode_with is None):
        parser.error("--recode and --recode-with go together")
    if not args.packages.is_dir():
        parser.error(f"--packages: {args.packages} is not a folder")
    taken = list(dict.fromkeys(args.only or PACKAGES))
    there = {name for name, _ in tops_of(args.packages)}
    if args.recode is None and (missing := [name for name in taken if name not in there]):
        what = f"{args.packages} has no folder of {', '.join(missing)}"
        if args.only:
            parser.error(f"--only: {what}; name packages as their folders are called")
        print(f"{what}: the text is without them", file=sys.stderr)
    from lemo.storage import write_folder
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    if len(tokenizer) > 1 << 16:
        raise SystemExit(f"--model: token files hold 16 bits, but this tokenizer has {len(tokenizer)} tokens")
    if args.out.exists():
        raise SystemExit(f"--out: {args.out} exists already; name a folder that does not")

    def write(folder: Path) -> None:
        if args.recode is None:
            write_installed(tokenizer, folder, args.packages, taken, args.train_tokens, args.dev_tokens)
            (folder / PACKAGES_FILE).write_text(json.dumps(versions(args.packages, taken), indent=1) + "\n")
        else:
            other = AutoTokenizer.from_pretrained(args.recode_with)
            write_recoded(tokenizer, other, folder, args.recode, args.train_tokens, args.dev_tokens)

    write_folder(args.out, write)
    return 0


if __name__ == "__main__":
    sys.exit(main())
