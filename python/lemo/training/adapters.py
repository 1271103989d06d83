"""One PEFT adapter at a time in a base model, which afterwards is exactly what it was.

Adapters are never loaded side by side: some kinds cannot share a model (trainable tokens, `modules_to_save`, LoRA on
the head), and PEFT turns adapter names into module names, where `train` or `eval` would hide a method. PEFT's own
`unload` does not exist for every kind and does not undo everything, so the base model's module tree is recorded before
an adapter is loaded and restored afterwards, and the weights are compared.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lemo.training.positions import check_positions

# Kinds known not to change the base model's weights; before any other is loaded, the weights are copied.
_LEAVES_BASE_ALONE = {"IA3", "LN_TUNING", "TRAINABLE_TOKENS", "VERA"}
_HARMLESS_LORA_INIT = (True, False, "gaussian", "eva", "orthogonal")


def adapter_name(adapter: str) -> tuple[str, str]:
    """(label, folder) of `[NAME=]FOLDER`."""
    name, equals, folder = adapter.partition("=")
    if equals and name and "/" not in name and not Path(adapter).exists():
        return name, os.path.expanduser(folder)
    adapter = os.path.expanduser(adapter)
    path = Path(adapter).resolve()
    # A run's adapter lies in RUN/adapter: the run's name is the more useful label.
    return (path.parent.name if path.name == "adapter" else path.name), adapter


def check_adapter(folder: str, model: Any = None) -> None:
    """Raises ValueError unless `folder` holds a PEFT adapter of a kind that can be measured. model: with the positions
    for which it was trained."""
    if not (Path(folder) / "adapter_config.json").is_file():
        # Of a run; or, of a model with several adapters, PEFT gives each a folder of its name.
        nested = sorted(path.parent for path in Path(folder).glob("*/adapter_config.json"))
        usual = Path(folder) / "adapter"
        meant = [usual] if usual in nested else nested
        hint = f"; did you mean {' or '.join(map(str, meant))}?" if meant else ""
        raise ValueError(f"{folder}: no adapter_config.json, so this is not a PEFT adapter{hint}")
    _read_config(folder)
    if model is not None:
        check_positions(folder, model.config)


def base_model(folder: str) -> str | None:
    """The model that an adapter says it was trained on; None if it does not. Raises ValueError if `check_adapter`
    does."""
    check_adapter(folder)
    named = _read_config(folder).base_model_name_or_path
    return named if isinstance(named, str) and named.strip() else None


def _read_config(folder: str) -> Any:
    from peft import PeftConfig

    try:
        config = PeftConfig.from_pretrained(folder)
    except Exception as error:  # json, PEFT and dataclasses each raise their own kinds
        raise ValueError(f"{folder}: its adapter_config.json cannot be used ({_first_line(error)})") from error
    kind = _kind(config)
    if config.is_prompt_learning:
        reason = "it adds virtual tokens in front of the text"
    elif kind in ("XLORA", "POLY"):
        reason = "what it does depends on more than the text"
    elif getattr(config, "alora_invocation_tokens", None):
        reason = "as an activated LoRA it only acts after its invocation tokens"
    else:
        return config
    raise ValueError(
        f"{folder}: an adapter of kind {kind} cannot be measured by the perplexity of plain text: {reason}. "
        "Leave it out of --adapter"
    )


def _kind(config: Any) -> str:
    return str(getattr(config.peft_type, "value", config.peft_type))


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


# ---- the base model, recorded and restored ---------------------------------------------------------------------------


class _Record:
    """The module tree of a model: every attribute of every module, and what its parameters are."""

    def __init__(self, model: nn.Module) -> None:
        self._modules = [(m, type(m), dict(m.__dict__), self._containers(m)) for m in model.modules()]
        self._trainable = [(p, p.requires_grad) for p in model.parameters()]
        config = getattr(model, "config", None)
        self._config = None if config is None else (config, dict(vars(config)))

    @staticmethod
    def _containers(module: nn.Module) -> list[tuple[Any, Any]]:
        """Dictionaries and lists that live in the module itself: children, parameters, buffers, hooks, tied names."""
        held = [v for v in module.__dict__.values() if isinstance(v, (dict, list))]
        return [(v, v.copy()) for v in held]

    def put_back(self) -> None:
        for module, kind, attributes, containers in self._modules:
            module.__class__ = kind
            module.__dict__.clear()
            module.__dict__.update(attributes)
            for container, content in containers:
                container.clear()
                container.update(content) if isinstance(container, dict) else container.extend(content)
        for parameter, trainable in self._trainable:
            parameter.requires_grad_(trainable)
        if self._config is not None:
            config, values = self._config
            vars(config).clear()
            vars(config).update(values)


def _tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


@torch.no_grad()
def _checksums(model: nn.Module) -> dict[str, int]:
    """One number per tensor, from its bits: one pass over the memory, and nothing is copied."""
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    sums = {}
    for name, tensor in _tensors(model):
        flat = tensor.detach().contiguous().reshape(-1)
        sums[name] = flat.view(integers.get(flat.element_size(), torch.int8)).sum(dtype=torch.int64)
    return {name: int(total) for name, total in sums.items()}


def _copies(model: nn.Module, config: Any) -> dict[str, torch.Tensor]:
    """The weights in host memory, if loading an adapter of this kind may change them (PiSSA, OLoRA, ...)."""
    init = getattr(config, "init_lora_weights", None)
    if _kind(config) in _LEAVES_BASE_ALONE or (_kind(config) == "LORA" and init in _HARMLESS_LORA_INIT):
        return {}
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in _tensors(model)}


@contextlib.contextmanager
def loaded_adapter(model: nn.Module, folder: str) -> Iterator[Any]:
    """The model with the adapter of `folder` alone in it, wrapped by PEFT; afterwards the model is as it was.

    Raises ValueError for an adapter that does not fit the model or its positions, RuntimeError if the model could not
    be restored.
    """
    config = _read_config(folder)
    check_positions(folder, getattr(model, "config", None))
    record, sums, copies = _Record(model), _checksums(model), _copies(model, config)
    try:
        yield _load(model, folder)
    finally:
        record.put_back()
        with torch.no_grad():
            tensors = dict(_tensors(model))
            for name, copy in copies.items():
                tensors[name].copy_(copy)
    after = _checksums(model)
    changed = sorted(n for n in sums.keys() | after.keys() if sums.get(n) != after.get(n))
    if changed:
        raise RuntimeError(
            f"{folder}: loading this adapter of kind {_kind(config)} changed the base model ({changed[0]}) and that "
            "could not be undone, so nothing can be measured after it; measure this adapter in a separate call"
        )


@contextlib.contextmanager
def restored_modules(model: nn.Module) -> Iterator[None]:
    """Whatever wraps or replaces modules of the model inside is undone afterwards. Weights must not be changed."""
    record = _Record(model)
    try:
        yield
    finally:
        record.put_back()


def _load(model: Any, folder: str) -> Any:
    from peft import PeftModel

    device = str(next(model.parameters()).device)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what PEFT would warn of is an error below
        try:
            wrapped = PeftModel.from_pretrained(model, folder, is_trainable=False, torch_device=device)
            result = wrapped.load_adapter(folder, "default", torch_device=device)  # again, for what it returns
        except Exception as error:  # torch, safetensors and PEFT's many kinds each raise their own
            raise ValueError(
                f"{folder}: the adapter does not fit this model ({_first_line(error)}); was it trained on another?"
            ) from error
    missing = _not_loaded(wrapped, result.missing_keys)
    for keys, what in ((missing, "lacks"), (result.unexpected_keys, "has weights that the model has no place for:")):
        if keys:
            raise ValueError(
                f"{folder}: the adapter does not fit this model: its file {what} {sorted(keys)[0]}"
                f"{f' and {len(keys) - 1} more' if len(keys) > 1 else ''}; was it trained on another, or is it damaged?"
            )
    return wrapped.eval()


def _not_loaded(wrapped: nn.Module, missing: list[str]) -> list[str]:
    """Those of the missing names whose tensor was not loaded under another name either (some kinds share tensors)."""
    named = dict(wrapped.named_parameters(remove_duplicate=False))
    loaded = {id(p) for name, p in named.items() if name not in set(missing)}
    return [name for name in missing if name not in named or id(named[name]) not in loaded]
