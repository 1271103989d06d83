"""examples/cpp: built against the installed library, it computes what transformers, PEFT and lemo.apply compute, lowers
the loss on real text, writes an adapter that PEFT reads, and refuses what it cannot train."""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lemo
import numpy as np
import pytest
import torch
from lemo.predictors import PredictorNetwork, PredictorSet, model_fingerprint
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "demo" / "model"
CONTEXT = 256
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
EVERY_LINEAR = [*ATTENTION, "gate_proj", "up_proj", "down_proj"]


def run(*command: object) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """lemo_train, built on its own against an installed CPU-only library. The library's build folder is the one of
    tests/consumers; both are kept between test runs."""
    library = Path(os.environ.get("LEMO_TEST_BUILD_DIR", ROOT / "build" / "consumers"))
    build = library.with_name(f"{library.name}-example")
    prefix = tmp_path_factory.mktemp("prefix")
    generator = ["-G", "Ninja"] if shutil.which("ninja") else []
    run("cmake", "-S", ROOT, "-B", library, *generator, "-DLEMO_CUDA=OFF", f"-DPython_EXECUTABLE={sys.executable}")
    run("cmake", "--build", library, "--parallel", "2")
    run("cmake", "--install", library, "--prefix", prefix)
    source = ROOT / "examples" / "cpp"
    options = [f"-Dlemo_DIR={next(prefix.glob('lib*/cmake/lemo'))}", "-DLEMO_EXAMPLE_CUDA=OFF"]
    run("cmake", "-S", source, "-B", build, *generator, *options, "-DCMAKE_CXX_FLAGS=-Werror")
    run("cmake", "--build", build, "--parallel", "2")
    return build / "lemo_train"


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    """The models are so small that threads only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def tokens() -> np.ndarray:
    """Real text, which the demo's model knows in part: a module of the standard library."""
    text = Path(argparse.__file__).read_text(encoding="utf-8")
    ids = Tokenizer.from_file(str(MODEL / "tokenizer.json")).encode(text).ids
    return np.array(ids[: 20 * CONTEXT], dtype="<u2")


@pytest.fixture(scope="module")
def token_file(tokens: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokens") / "tokens.bin"
    tokens.tofile(path)
    return path


def window(tokens: np.ndarray, i: int) -> torch.Tensor:
    return torch.tensor(tokens[i * CONTEXT : (i + 1) * CONTEXT].astype(np.int64))[None]


def with_lora(folder: Path, targets: list[str], out: Path) -> Any:
    """The model in float32 with an adapter neither of whose matrices is zero, which is saved in `out`."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=targets, task_type="CAUSAL_LM")
    adapted: Any = get_peft_model(model, config)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    adapted.save_pretrained(out)
    return adapted.train()


def long_rope_model(folder: Path) -> Path:
    """What the demo's model has not: scaled rotary positions, an untied head, several key heads, and float32 shards."""
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=1024,
        rms_norm_eps=1e-6,
        tie_word_embeddings=False,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 500.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    )
    LlamaForCausalLM(config).save_pretrained(folder, max_shard_size="1MB")
    assert (folder / "model.safetensors.index.json").exists()
    return folder


def compare(dumped: dict[str, torch.Tensor], loss: torch.Tensor, model: Any) -> None:
    """Loss and every LoRA gradient to 1e-4 of the largest element of its kind."""
    assert dumped["loss"].item() == pytest.approx(loss.item(), rel=1e-4)
    expected = {name.replace(".default", ""): p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert {name for name in dumped if name.startswith("base_model.")} == set(expected)
    for kind in ("lora_A", "lora_B"):
        largest = max(grad.abs().max().item() for name, grad in expected.items() if kind in name)
        assert largest > 0
        for name, grad in expected.items():
            if kind in name:
                worst = (dumped[name] - grad).abs().max().item()
                assert worst <= 1e-4 * largest, f"{name}: off by {worst}, largest {largest}"


@pytest.mark.parametrize("targets", [ATTENTION, EVERY_LINEAR], ids=["demo", "long_rope"])
def test_dense_loss_and_gradients_are_those_of_transformers(
    targets: list[str], program: Path, token_file: Path, tokens: np.ndarray, tmp_path: Path
) -> None:
    folder = MODEL if targets is ATTENTION else long_rope_model(tmp_path / "model")
    model = with_lora(folder, targets, tmp_path / "adapter")
    ids = window(tokens, 0)
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    dump = tmp_path / "gradients.safetensors"
    arguments = ("--adapter", tmp_path / "adapter", "--steps", 1, "--dense-steps", 1, "--dump-gradients", dump)
    run(program, "--model", folder, "--tokens", token_file, "--context", CONTEXT, *arguments)
    dumped = load_file(dump)
    assert dumped["rows.0"].tolist() == list(range(CONTEXT))
    compare(dumped, loss, model)


def calibration(model: Any, folder: Path) -> Path:
    """Predictors that were never trained: what matters here is that both engines read and use them alike."""
    inner = model.get_base_model()
    generator = torch.Generator().manual_seed(3)
    networks = [PredictorNetwork(256, 12, 8, generator=generator) for _ in inner.model.layers]
    n = len(networks)
    fixed = {"norm": "rms", "pool": "mean", "eps": 1e-5, "normalize": True, "block_size": 32, "context": CONTEXT}
    layers = [network.export() for network in networks]
    PredictorSet(layers, thresholds=(0.0,) * n, keep=(0.5,) * n, fingerprint=model_fingerprint(inner), **fixed).save(
        folder
    )
    return folder


@pytest.mark.parametrize("policy", ["random", "exact", "predictors"])
def test_elimination_is_that_of_lemo_apply(
    policy: str, program: Path, token_file: Path, tokens: np.ndarray, tmp_path: Path
) -> None:
    """The same blocks, drawn or scored, the same loss and the same gradients."""
    model = with_lora(MODEL, ATTENTION, tmp_path / "adapter")
    folder = calibration(model, tmp_path / "calibration") if policy == "predictors" else None
    phase = lemo.Phase("skip", keep=0.5, policy=policy, policy_options={"shared": True} if policy == "random" else {})
    lemo.apply(model, lemo.LemoConfig(block_size=32, seed=7, phases=[phase], calibration=folder))
    ids = window(tokens, 0)
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    dump = tmp_path / "gradients.safetensors"
    choice = ["--keep", 0.5, "--block", 32, "--seed", 7, "--policy", policy]
    choice += ["--calibration", folder] if folder else []
    arguments = ("--adapter", tmp_path / "adapter", "--steps", 1, "--dense-steps", 0, "--dump-gradients", dump, *choice)
    run(program, "--model", MODEL, "--tokens", token_file, "--context", CONTEXT, *arguments)
    dumped = load_file(dump)
    lists = {tuple(dumped[f"rows.{i}"].tolist()) for i in range(6)}
    assert {len(rows) for rows in lists} == {CONTEXT // 2}
    assert (len(lists) == 1) == (policy == "random")  # others choose anew in every layer
    compare(dumped, loss, model)


def held_out(output: str, when: str) -> float:
    found = re.search(rf"held-out loss {when} +([0-9.]+)", output)
    assert found, output
    return float(found[1])


def dense_loss(model: Any, tokens: np.ndarray, windows: range) -> float:
    with torch.no_grad():
        return float(np.mean([model(input_ids=ids, labels=ids).loss for ids in (window(tokens, i) for i in windows)]))


def test_training_lowers_the_loss_and_peft_reads_the_adapter(
    program: Path, token_file: Path, tokens: np.ndarray, tmp_path: Path
) -> None:
    out = tmp_path / "new" / "adapter"
    arguments = ("--steps", 15, "--dense-steps", 5, "--lr", 3e-3, "--block", 32, "--eval-windows", 3, "--out", out)
    output = run(program, "--model", MODEL, "--tokens", token_file, "--context", CONTEXT, *arguments)
    before, after = held_out(output, "before"), held_out(output, "after")
    assert after < before - 0.05
    assert len(re.findall(r"^step .* skip .* kept 0\.500 ", output, re.MULTILINE)) == 10
    assert len(re.findall(r"^step .* dense .* kept 1\.000 ", output, re.MULTILINE)) == 5
    assert sorted(path.name for path in out.parent.rglob("*")) == [
        "adapter",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]

    base = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    assert dense_loss(base, tokens, range(17, 20)) == pytest.approx(before, abs=1e-4)
    model = PeftModel.from_pretrained(base, out)
    assert dense_loss(model, tokens, range(17, 20)) == pytest.approx(after, abs=1e-4)

    # And the program reads its own adapter back.
    check = ("--steps", 0, "--eval-windows", 3, "--adapter", out, "--threads", 1)
    again = run(program, "--model", MODEL, "--tokens", token_file, "--context", CONTEXT, *check)
    assert held_out(again, "before") == pytest.approx(after, abs=2e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_other_stored_types(dtype: torch.dtype, program: Path, token_file: Path, tmp_path: Path) -> None:
    """Small bfloat16 weights are subnormal in float16: both kinds of float16 numbers are read."""
    arguments = ("--tokens", token_file, "--context", CONTEXT, "--steps", 0)
    expected = held_out(run(program, "--model", MODEL, *arguments), "before")
    folder = changed_model(tmp_path, weights=lambda w: {name: x.to(dtype) for name, x in w.items()})
    assert held_out(run(program, "--model", folder, *arguments), "before") == pytest.approx(expected, abs=1e-4)


def test_text_is_tokenized_almost_as_by_the_tokenizer(program: Path, tokens: np.ndarray, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    shutil.copy(argparse.__file__, text)
    everything = Tokenizer.from_file(str(MODEL / "tokenizer.json")).encode(text.read_text(encoding="utf-8")).ids
    output = run(program, "--model", MODEL, "--text", text, "--context", CONTEXT, "--steps", 0)
    found = re.search(r"(\d+) tokens", output)
    assert found
    assert int(found[1]) == pytest.approx(len(everything), rel=0.03)
    assert 1.0 < held_out(output, "before") < 3.5  # text that the model can read; other tokens would be near 8


def test_help_explains_every_option(program: Path) -> None:
    text = run(program, "--help")
    names = set(re.findall(r'\{"(--[a-z-]+)"', (ROOT / "examples" / "cpp" / "options.cc").read_text(encoding="utf-8")))
    assert {"--model", "--tokens", "--keep", "--out"} <= names
    for name in names:
        assert re.search(rf"^  {name} [A-Za-z|]", text, re.MULTILINE), name


# ---- what it refuses -------------------------------------------------------------------------------------------------


def changed_model(
    folder: Path,
    config: dict[str, Any] | None = None,
    weights: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]] | None = None,
) -> Path:
    target = folder / "changed"
    shutil.copytree(MODEL, target)
    path = target / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | (config or {})))
    if weights is not None:
        save_file(weights(load_file(target / "model.safetensors")), target / "model.safetensors")
    return target


def without(name: str) -> Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    return lambda weights: {key: value for key, value in weights.items() if key != name}


NORM, QUERY = "model.norm.weight", "model.layers.3.self_attn.q_proj.weight"
MODELS: list[tuple[dict[str, Any], Any, str]] = [
    ({"model_type": "qwen2"}, None, r'model_type: "qwen2" is not supported'),
    ({"attention_bias": True}, None, r"attention_bias: projections with biases are not supported"),
    ({"hidden_act": "gelu"}, None, r'hidden_act: expected "silu", got "gelu"'),
    ({"rope_parameters": {"rope_type": "yarn"}}, None, r'rope_type: "yarn" is not supported'),
    ({"num_key_value_heads": 3}, None, r"3 key heads do not divide 2 query heads"),
    ({"hidden_size": "large"}, None, r"hidden_size: expected a number"),
    ({"hidden_size": None}, None, r"hidden_size is missing"),
    ({"quantization_config": {"bits": 4}}, None, r"quantised weights are not supported"),
    ({"tie_word_embeddings": False}, None, r"tensor lm_head\.weight is missing"),
    ({"intermediate_size": 700}, None, r"has shape \[768, 256\], expected \[700, 256\]"),
    ({}, without(NORM), r"tensor model\.norm\.weight is missing"),
    ({}, lambda w: w | {QUERY: w[QUERY].to(torch.int8)}, r"q_proj\.weight: dtype I8 is not supported"),
]


def refused(program: Path, message: str, *arguments: object) -> None:
    done = subprocess.run([str(part) for part in (program, *arguments)], capture_output=True, text=True)
    assert done.returncode == 1, done.stdout + done.stderr
    assert re.match(r"error: .*" + message, done.stderr), done.stderr
    assert done.stderr.count("\n") == 1
    assert not re.search("^step", done.stdout, re.MULTILINE)


@pytest.mark.parametrize(("config", "weights", "message"), MODELS, ids=[m[:40] for _, _, m in MODELS])
def test_models_it_cannot_train(
    config: dict[str, Any], weights: Any, message: str, program: Path, token_file: Path, tmp_path: Path
) -> None:
    model = changed_model(tmp_path, config, weights)
    refused(program, message, "--model", model, "--tokens", token_file, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"format_version": 2, "target": "mass"}, r"made for the target mass; expected importance"),
        ({"format_version": 3}, r"format version 3 is not supported; expected 1 or 2"),
    ],
)
def test_calibrations_it_cannot_use(
    config: dict[str, Any], message: str, program: Path, token_file: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "calibration"
    folder.mkdir()
    (folder / "lemo_config.json").write_text(json.dumps(config))
    common = ("--model", MODEL, "--tokens", token_file, "--out", tmp_path / "out")
    refused(program, message, *common, "--policy", "predictors", "--calibration", folder)


def test_truncated_and_malformed_files(program: Path, token_file: Path, tmp_path: Path) -> None:
    model = changed_model(tmp_path)
    path = model / "model.safetensors"
    whole = path.read_bytes()
    for part, message in [
        (whole[:4], r"4 bytes is too short for a safetensors file"),
        (whole[:100], r"the header ends beyond the file"),
        (whole[:-10], r"do not fit its shape or the file: truncated\?"),
        (whole[:8] + b"x" + whole[9:], r"not JSON at byte 0"),
    ]:
        path.write_bytes(part)
        refused(program, message, "--model", model, "--tokens", token_file)
    path.unlink()
    refused(program, r"holds neither model\.safetensors nor", "--model", model, "--tokens", token_file)
    (model / "config.json").write_text('{"model_type": "llama",')
    refused(program, r"config\.json: not JSON at byte 23", "--model", model, "--tokens", token_file)


ARGUMENTS: list[tuple[list[object], str]] = [
    (["--context", 8192], r"--context: the model has 4096 positions"),
    (["--context", 4000], r"5120 tokens make 1 windows of 4000; 2 of them are held out"),
    (["--keep", 0], r"--keep: expected a number above 0 and at most 1, got '0'"),
    (["--keep", "half"], r"--keep: expected a number above 0 and at most 1, got 'half'"),
    (["--keep", "nan"], r"--keep: expected a number"),
    (["--steps", -1], r"--steps: expected a whole number of at least 0, got '-1'"),
    (["--steps", 3, "--dense-steps", 4], r"--dense-steps: expected at most --steps 3, got 4"),
    (["--targets", "q_proj,w_proj"], r"LoRA target w_proj: the model has no projection of this name"),
    (["--policy", "best"], r"--policy: expected random, exact or predictors, got 'best'"),
    (["--policy", "predictors"], r"--policy predictors needs --calibration FOLDER"),
    (["--device", "tpu"], r"--device: expected cpu or cuda, got 'tpu'"),
    (["--device", "cuda"], r"--device cuda: this program was built without CUDA"),
    (["--text", "README.md"], r"expected one of --tokens and --text"),
    (["--rank"], r"--rank: a value is missing"),
    (["--learning-rate", 1], r"unknown argument '--learning-rate'; see --help"),
    (["--adapter", "nowhere", "--rank", 4], r"--rank: --adapter brings its own"),
    (["--keep", 0.5, "--keep", 0.4], r"--keep: given twice"),
    (["--calibration", "folder"], r"--calibration is used by --policy predictors only"),
    (["--adapter", "nowhere"], r"nowhere/adapter_config\.json: cannot be read"),
    (["--out", "/"], r"--out: / exists already"),
]


@pytest.mark.parametrize(("arguments", "message"), ARGUMENTS, ids=[" ".join(map(str, a)) for a, _ in ARGUMENTS])
def test_arguments_it_refuses(arguments: list[object], message: str, program: Path, token_file: Path) -> None:
    refused(program, message, "--model", MODEL, "--tokens", token_file, *arguments)


def test_inputs_that_are_something_else(program: Path, tmp_path: Path) -> None:
    path = tmp_path / "tokens.bin"
    path.write_bytes(b"123")
    refused(program, r"3 bytes is not a whole number of uint16 tokens", "--model", MODEL, "--tokens", path)
    np.array([5, 4095, 4096], dtype="<u2").tofile(path)
    message = r"token 4096 at position 2 lies outside the model's vocabulary of 4096"
    refused(program, message, "--model", MODEL, "--tokens", path)
    refused(program, r"cannot be read", "--model", MODEL, "--tokens", tmp_path / "none.bin")
    refused(program, r"expected a file, found a folder", "--model", MODEL, "--tokens", tmp_path)
    refused(program, r"--model: .*/none is not a folder", "--model", tmp_path / "none", "--tokens", path)


@pytest.mark.parametrize(("held_out", "message"), [(2, r"held-out loss is nan"), (0, r"step 1: the loss is nan")])
def test_a_loss_that_is_no_number_ends_the_run(
    held_out: int, message: str, program: Path, token_file: Path, tmp_path: Path
) -> None:
    model = changed_model(tmp_path, weights=lambda w: w | {NORM: torch.full_like(w[NORM], torch.nan)})
    out = tmp_path / "out"
    arguments = ("--context", CONTEXT, "--eval-windows", held_out, "--out", out)
    refused(program, message, "--model", model, "--tokens", token_file, *arguments)
    assert not out.exists()


def test_a_folder_that_cannot_be_written(program: Path, token_file: Path, tmp_path: Path) -> None:
    """The adapter is saved after the training, so the reason has to be clear and nothing half-written may stay."""
    (tmp_path / "file").write_text("in the way")
    arguments = ("--context", CONTEXT, "--steps", 0, "--out", tmp_path / "file" / "adapter")
    refused(program, r"--out: ", "--model", MODEL, "--tokens", token_file, *arguments)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
