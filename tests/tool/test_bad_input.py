"""Every entry of the table of bad input: the message says the key words, and nothing was written or changed."""

from __future__ import annotations

import dataclasses
import errno
import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lemo
import pytest
import torch
import transformers
from lemo import _native, ops
from lemo.cli import main
from lemo.predictors import PredictorSet
from support.attention_cases import Attention
from support.bad_input import NB, SPLIT, TABLE, Bad, CommandError, M, P, T
from support.cases import Draw
from support.models import base as make_base
from support.models import batch, tuned
from torch import Tensor

# --- the valid starting points ----------------------------------------------------------------------------------------


def layout() -> dict[str, Any]:
    b = P.blocks("cpu")
    return {"block_offsets": b.offsets, "documents": b.documents, "block_size": b.block_size}


def base(op: str) -> dict[str, Any]:
    """Valid keyword arguments of an operation, in memory that nothing else has."""
    return {name: value.clone() if isinstance(value, Tensor) else value for name, value in valid(op).items()}


@functools.cache  # what attention gives takes longer than everything that an entry does with it
def valid(op: str) -> dict[str, Any]:
    draw, rows = Draw("cpu", torch.float32), P.tensor("rows", "cpu")
    if op == "gather":
        return {"x": draw.normal(T, 16), "rows": rows, "weights": torch.ones(NB), "slots": P.tensor("row_slots", "cpu")}
    if op == "scatter_add_":
        return {"x": draw.normal(T, 16), "rows": rows, "y": draw.normal(M, 16), "base": draw.normal(M, 16)}
    if op == "gather_norm":
        names = {"x": draw.normal(T, 16), "rows": rows, "residual": draw.normal(M, 16)}
        return names | {"weight": draw.normal(16), "bias": draw.normal(16), "norm": "layer", "eps": 1e-5}
    if op == "gather_norm_backward":
        names = {"dy": draw.normal(M, 16), "s": draw.normal(M, 16), "weight": draw.normal(16)}
        return names | {"ds_extra": draw.normal(M, 16), "norm": "rms", "eps": 1e-5}
    if op == "gather_norm_backward_":
        return {"dx": draw.normal(T, 16), "rows": rows} | valid("gather_norm_backward")
    if op == "rotary":
        angle = draw.normal(T, 8).repeat(1, 2)
        return {"x": draw.normal(M, 4, 16), "cos": angle.cos(), "sin": angle.sin(), "rows": rows}
    if op in ("relu_", "relu_backward_"):
        x = draw.normal(M, 24)
        return {"x": x} if op == "relu_" else {"dout": x, "bits": torch.zeros(M, 3, dtype=torch.uint8)}
    if op in ("swiglu", "swiglu_backward"):
        names = {"gate": draw.normal(M, 24), "up": draw.normal(M, 24)}
        return names if op == "swiglu" else {"dout": draw.normal(M, 24)} | names
    if op in ("attention_forward", "attention_backward"):
        case = Attention("documents", 4, 2, 16, "rows", given=True)
        t = case.inputs("cpu", torch.float32)
        fields = ["q", "k", "v", "cu_seqlens", "rows"]
        fields += ["dout", "out", "lse", "key_weights", "row_slots"] if op == "attention_backward" else []
        return {n: t[n] for n in fields} | {"max_seqlen": case.max_seqlen, "scale": 0.25}
    if op == "attention_forward:lists":
        case = Attention("all_64", 4, 2, 16, lists=True)
        t = case.inputs("cpu", torch.float32)
        fields = ["q", "k", "v", "cu_seqlens", "tile_offsets", "tiles"]
        return {n: t[n] for n in fields} | {"rows": None, "max_seqlen": case.max_seqlen, "scale": 0.25}
    if op in ("attention_forward:keys", "attention_backward:keys"):
        t = SPLIT.inputs("cpu", torch.float32)
        fields = ["q", "k", "v", "cu_seqlens", "rows"]
        backward = ["dout", "out", "lse", "key_weights", "row_slots", "row_slots_k"]
        fields += backward if "backward" in op else []
        return {n: t[n] for n in fields} | SPLIT.key_rows(t) | {"max_seqlen": SPLIT.max_seqlen, "scale": 0.25}
    if op in ("attention_forward:window", "attention_backward:window"):
        case = dataclasses.replace(SPLIT, window=70, sinks=True)
        t = case.inputs("cpu", torch.float32)
        options = {"softcap": 5.0} | ({"want_dsinks": True} if "backward" in op else {})
        return valid(op.replace("window", "keys")) | case.key_rows(t) | options
    if op == "select_blocks":
        rule = {"mode": "budget", "keep": 0.5, "threshold": 0.0, "always_first": 0, "always_last": 0, "seed": 0}
        return {"scores": draw.uniform(NB, low=0.1, high=0.9), "num_tokens": T} | layout() | rule
    if op == "block_scores":
        return {"q": draw.normal(T, 4, 16), "k": draw.normal(T, 2, 16), "scale": 0.25, "want_map": True} | layout()
    if op == "predict":
        shapes = {"wq1": (8, 16), "wq2": (8, 8), "wq3": (8, 8), "wk1": (16, 16), "wk2": (8, 16), "wk3": (8, 8)}
        return {"x": draw.normal(T, 16)} | {n: draw.normal(*s) for n, s in shapes.items()} | layout()
    if op in ("tile_scores", "select_tiles_", "list_tiles"):
        return tiles(op)
    assert op == "linear_cross_entropy"
    names = {"hidden": draw.normal(20, 16), "weight": draw.normal(30, 16), "bias": draw.normal(30)}
    names |= {"lora_a": draw.normal(4, 16), "lora_b": draw.normal(30, 4), "lora_scale": 0.5}
    wants = dict.fromkeys(("want_dhidden", "want_dweight", "want_dbias", "want_dlora"), True)
    return names | {"targets": draw.integers(30, 20)} | wants


def tiles(op: str) -> dict[str, Any]:
    """Slots 0 to 2 have the tiles of the first document, 4 to 7 those of the third."""
    draw, cu_seqlens = Draw("cpu", torch.float32), torch.tensor([0, 300, 300, 800], dtype=torch.int32)
    chosen = torch.zeros(9, 2, dtype=torch.int32)
    if op == "tile_scores":
        heads = {"q": draw.normal(800, 4, 16), "k": draw.normal(800, 2, 16), "cu_seqlens": cu_seqlens}
        strip = {"first_slot": 2, "slots": 4, "width": 4}
        return heads | {"rows": torch.arange(800).int(), "max_seqlen": 500, "scale": 0.25, "probes": 2} | strip
    if op == "select_tiles_":
        rule = {"keys": 256, "density": 0.5, "mass": 0.9, "first": 1, "local": 1}
        scores = {"scores": draw.uniform(6, 40), "masses": draw.uniform(6, 40)}
        return {"chosen": chosen, "cu_seqlens": cu_seqlens, "first_slot": 2} | scores | rule
    chosen[[1, 2, 5, 6, 7], 0] = torch.tensor([1, 3, 1, 3, 7], dtype=torch.int32)  # everything: 9 bits
    return {"chosen": chosen, "cu_seqlens": cu_seqlens, "capacity": 9}


# --- the world --------------------------------------------------------------------------------------------------------


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def content(t: Tensor) -> bytes:
    return t.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def state(model: torch.nn.Module) -> dict[str, Any]:
    """Attributes of every module, and every number."""
    attributes = {name: sorted(module.__dict__) for name, module in model.named_modules()}
    return attributes | {f"value of {name}": t.double().sum().item() for name, t in model.state_dict().items()}


class World:
    """Where an entry finds its inputs and does what is wrong; remembers all that must stay as it is."""

    folder: Path
    model_folder: Path
    text: Path
    good_calibration: Path

    def __init__(
        self,
        folder: Path,
        model: Path,
        text: Path,
        good_calibration: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        self.folder, self.model_folder, self.text, self.good_calibration = folder, model, text, good_calibration
        self.monkeypatch, self.capsys = monkeypatch, capsys
        self.tensors: list[tuple[str, Tensor, bytes]] = []
        self.models: list[tuple[torch.nn.Module, dict[str, Any]]] = []
        self.remember_files()

    def remember_files(self) -> None:
        self.files = self.all_files()

    def all_files(self) -> dict[str, bytes]:
        found = [tree(f) for f in (self.folder, self.model_folder, self.text, self.good_calibration)]
        files = {name: content for part in found for name, content in part.items()}
        files.pop(str(self.folder / "out" / ".lock"), None)
        return files

    def watch(self, name: str, tensor: Tensor) -> None:
        self.tensors.append((name, tensor, content(tensor)))

    def watch_model(self, model):
        self.models.append((model, state(model)))
        return model

    def check_nothing_changed(self) -> None:
        assert self.all_files() == self.files
        for name, tensor, before in self.tensors:
            assert content(tensor) == before, f"{name} was written"
        for model, unchanged in self.models:
            assert state(model) == unchanged

    # operations

    def operate(self, op: str, argument: str, change: Callable[[Any], Any], others: dict[str, Any]) -> None:
        """Calls the operation as it should be, then with the changed argument; every tensor that reaches the library
        is watched, outputs among them."""
        convert = _native._value

        def watched(name: str, given: Any, device: torch.device) -> object:
            if isinstance(given, Tensor):
                self.watch(name, given)
            return convert(name, given, device)

        self.monkeypatch.setattr(_native, "_value", watched)
        run = getattr(ops, op.split(":")[0])
        run(**base(op))  # the starting point is accepted
        assert self.tensors
        self.tensors.clear()
        arguments = base(op)
        arguments[argument] = change(arguments.get(argument))
        for name, other in others.items():
            arguments[name] = change(arguments[name]) if isinstance(other, tuple) else other
        run(**arguments)

    # the engine

    def settings(self, **options: Any) -> lemo.LemoConfig:
        phases = [lemo.Phase("skip", keep=0.5, policy="random")]
        return lemo.LemoConfig(**{"block_size": 8, "phases": phases, **options})

    def model(self, family: str = "llama", **options: Any):
        return self.watch_model(make_base(family, **options))

    def bad_model(self, kind: str):
        if kind == "family":
            return transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=11))
        if kind == "head":
            return transformers.LlamaModel(make_base("llama").config)
        if kind == "layerdrop":
            return make_base("opt", layerdrop=0.1)
        return make_base("llama" if kind == "attention_dropout" else "opt", attention_dropout=0.1)

    def apply(self, model) -> None:
        lemo.apply(self.watch_model(model), self.settings())

    def applied(self):
        model = make_base("llama")
        lemo.apply(model, self.settings())
        return model

    def apply_under(self, version: str) -> None:
        model = make_base("llama")
        self.monkeypatch.setattr("importlib.metadata.version", lambda package: version)
        self.apply(model)

    def forward(
        self,
        family: str = "llama",
        mode: str = "skip",
        dtype: torch.dtype = torch.float32,
        dropout: float = 0.0,
        **changed: Any,
    ) -> None:
        """One training step's forward pass, on a good batch but for what is given."""
        model = tuned(family, **({"dropout": dropout} if dropout else {})).to(dtype)
        lemo.apply(model, self.settings(phases=[lemo.Phase(mode, keep=0.5)]))
        self.watch_model(model).get_base_model()(**{**batch("plain"), **changed})

    # calibrations

    def load_calibration(self, damage: Callable[[Path], object] | None, another_model: bool = False) -> None:
        if damage is not None:
            self.calibration(damage)
        self.remember_files()
        model = make_base("llama", layers=2) if another_model else None
        PredictorSet.load(self.folder / "calibration", model=model)

    def save_calibration(self, kind: str = "calibration", overwrite: bool = False, full: bool = False) -> None:
        """Over a calibration, or over a "thesis" that lies in the folder; full: the disk is."""
        predictors = PredictorSet.load(self.good_calibration)
        if kind == "calibration":
            self.calibration(lambda folder: None)
        else:
            self.file("calibration/thesis.txt", "years of work")
        self.remember_files()
        if full:

            def no_space(path: Path) -> None:
                raise OSError(errno.ENOSPC, "No space left on device", str(path))

            self.monkeypatch.setattr("lemo.storage.flush", no_space)
        predictors.save(self.folder / "calibration", overwrite=overwrite)

    # commands

    def file(self, name: str, content: str | bytes) -> str:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return str(path)

    def empty_folder(self) -> str:
        (self.folder / "empty").mkdir()
        return str(self.folder / "empty")

    def finetune(self, *options: str, data: str | None = None, model: str | None = None) -> list[str]:
        return [
            *(
                "finetune",
                "--model",
                model or str(self.model_folder),
                "--data",
                str(self.text) if data is None else data,
            ),
            *("--out", str(self.folder / "out"), "--context", "64", "--block-size", "8", "--steps", "2", *options),
        ]

    def evaluate(self, *options: str, data: str | None = None) -> list[str]:
        return [
            "evaluate",
            "--model",
            str(self.model_folder),
            "--data",
            str(self.text) if data is None else data,
            "--context",
            "64",
            *options,
        ]

    def calibrate(self, *options: str) -> list[str]:
        return [
            *("calibrate", "--model", str(self.model_folder), "--data", str(self.text), "--context", "64"),
            *("--block-size", "8", "--out", str(self.folder / "out"), *options),
        ]

    def run_folder(self, settings: dict | None = None, **more: object) -> str:
        """A run folder that has been started with the default settings changed by these."""
        from lemo.training.settings import FinetuneSettings

        values = FinetuneSettings().to_json() | (settings or {})
        inputs = {"model": str(self.model_folder), "data": [str(self.text)]}
        self.file("out/run.json", json.dumps({"settings": values, "inputs": inputs} | more))
        return str(self.folder / "out")

    def another_model(self, kind: str = "llama", **options: Any) -> str:
        from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

        sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
        config = AutoConfig.for_model(kind, vocab_size=48, num_key_value_heads=2, eos_token_id=0, **sizes, **options)
        AutoModelForCausalLM.from_config(config).save_pretrained(self.folder / kind)
        AutoTokenizer.from_pretrained(self.model_folder).save_pretrained(self.folder / kind)
        return str(self.folder / kind)

    def large_tokenizer(self) -> str:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(self.model_folder)
        tokenizer.add_tokens([f"word{i}" for i in range(60)])
        tokenizer.save_pretrained(self.folder / "tokenizer")
        return str(self.folder / "tokenizer")

    def classifier(self) -> str:
        from transformers import AutoConfig, AutoModelForSequenceClassification

        config = AutoConfig.from_pretrained(self.model_folder)
        AutoModelForSequenceClassification.from_config(config).save_pretrained(self.folder / "classifier")
        return str(self.folder / "classifier")

    def settings_alone(self, **values: object) -> str:
        self.file("alone/config.json", json.dumps(values))
        return str(self.folder / "alone")

    def broken_model(self, name: str, change: Callable[[Path], None], kind: str | None = None) -> str:
        folder = self.folder / name
        shutil.copytree(self.another_model(kind) if kind else self.model_folder, folder)
        change(folder)
        return str(folder)

    def calibration(self, change: Callable[[Path], object]) -> str:
        folder = self.folder / "calibration"
        shutil.copytree(self.good_calibration, folder)
        change(folder)
        return str(folder)

    def config_with(self, **values: object) -> str:
        def change(folder: Path) -> None:
            config = json.loads((folder / "config.json").read_text())
            (folder / "config.json").write_text(json.dumps(config | values))

        return self.broken_model("changed", change)

    def command(self, words: list[str]) -> None:
        """Exit code 2, one line on stderr without a traceback, nothing on stdout."""
        self.remember_files()
        self.capsys.readouterr()
        code = main([*words, "--quiet"])
        out, err = self.capsys.readouterr()
        assert code == 2, err
        assert out == "" and "Traceback" not in err
        message = err.strip().splitlines()[-1]
        assert message.startswith(f"lemo {words[0]}: ")
        raise CommandError(message)


@pytest.mark.parametrize("bad", TABLE, ids=lambda bad: bad.name)
def test_the_message_says_it_and_nothing_changed(
    bad: Bad,
    model_folder: Path,
    text_folder: Path,
    calibration_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    world = World(tmp_path, model_folder, text_folder, calibration_folder, monkeypatch, capsys)
    with pytest.raises(bad.error) as caught:
        bad.act(world)
    message = str(caught.value)
    for word in bad.words:
        assert word in message, message
    world.check_nothing_changed()


def test_debug_shows_where(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such folder"):
        main(["info", str(tmp_path / "none"), "--debug"])


def test_unknown_options_are_usage_errors(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["finetune", "--fast"])
    assert stopped.value.code == 2
    assert "usage: lemo finetune" in capsys.readouterr().err
