"""What a model must be for lemo to run its layers: checked by `lemo.apply`, and at every step for what came later.

lemo computes decoder layers itself. A layer, attention, MLP or norm that someone replaced, patched or hooked would run
in evaluation and not in training; it is refused by name. Projections are different: if the cheap path does not cover
one, the module itself is called, with its hooks and whatever it does (linear.py).
"""

from __future__ import annotations

import functools
import importlib
import weakref
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from lemo.engine.config import Phase
from lemo.engine.families.base import Family, UnsupportedModelError
from lemo.engine.linear import HOOKS, hooked, projection, unwrap
from lemo.engine.randomness import draws
from lemo.engine.wrappers import kind_of, tree

# Who may define what runs in a layer: transformers itself, torch's wrappers (compile), Liger's equivalents, ourselves.
_TRUSTED = ("transformers.", "torch.", "kernels.", "liger_kernel.", "lemo.")
_WATCHING = ("transformers.utils.output_capturing", "torch.utils.", "torch.distributed.fsdp.")
_GLOBAL_HOOKS = tuple(f"_global{name}" for name in HOOKS)

_INSTEAD = (
    "lemo computes this part itself in training, so the change would only take part in evaluation. Undo it before "
    "lemo.apply, or train this model without lemo (lemo.remove)"
)


def _refuse(where: str, what: str) -> None:
    raise UnsupportedModelError(f"lemo does not support {where}: {what}; {_INSTEAD}")


# --- modules and functions that lemo stands in for --------------------------------------------------------------------


def _function(value: Any) -> Any:
    while isinstance(value, functools.partial):
        value = value.func
    return getattr(value, "__func__", value)


def _home(function: Any) -> str:
    """The module that defines a function: functools.wraps copies __module__, but not the globals."""
    names = getattr(function, "__globals__", {})
    return str(names.get("__name__", type(function).__module__))


# What `_trusted` found, by function; weak, because closures hold models.
_known: weakref.WeakKeyDictionary[Any, bool] = weakref.WeakKeyDictionary()


def _trusted(function: Any) -> bool:
    """Whether a function and all that it wraps come from those who may define one."""
    function = _function(function)
    try:
        known = _known.get(function)
    except TypeError:  # neither a function nor hashable
        return _defined_by_trusted(function)
    if known is None:
        known = _known[function] = _defined_by_trusted(function)
    return known


def _defined_by_trusted(function: Any) -> bool:
    while function is not None:
        function = _function(function)
        if not _home(function).startswith(_TRUSTED):
            return False
        function = getattr(function, "__wrapped__", None)
    return True


def _name(function: Any) -> str:
    function = _function(function)
    return f"{_home(function)}.{getattr(function, '__qualname__', function)}"


def _stays_on_device(hook: Any) -> bool:
    """Accelerate's hooks that only move inputs to the device the whole model is on."""
    if not type(hook).__module__.startswith("accelerate."):
        return False
    if hasattr(hook, "hooks"):
        return all(_stays_on_device(h) for h in hook.hooks)
    return type(hook).__name__ == "AlignDevicesHook" and not getattr(hook, "offload", False)


def _instance_forward(module: nn.Module) -> Any:
    """The forward method set on an instance; None if it is the class's."""
    own = module.__dict__.get("forward")
    if own is not None and _stays_on_device(module.__dict__.get("_hf_hook")):
        own = module.__dict__.get("_old_forward")
    return None if own is None or _function(own) is type(module).forward else own


def _foreign_hook(hooks: Iterable[Any]) -> Any:
    """A hook other than transformers' own recording of outputs (inactive in training), torch's counters, and FSDP2's
    gathering of weights, which `lemo.engine.weights` does itself."""
    return next((h for h in hooks if not _home(_function(h)).startswith(_WATCHING)), None)


def _check_module(module: Any, path: str, allowed: Sequence[tuple[str, str]], equivalents: frozenset[str]) -> None:
    inner = unwrap(module)
    kind = kind_of(inner)
    if (kind.__module__, kind.__qualname__) not in allowed and not _of_liger(kind, equivalents):
        expected = " or ".join(name for _, name in allowed)
        _refuse(path, f"expected {expected} of {allowed[0][0]}, got {kind.__module__}.{kind.__qualname__}")
    if not _trusted(kind.forward):
        _refuse(path, f"{kind.__qualname__}.forward was replaced by {_name(kind.forward)}")
    for m in (module,) if inner is module else (module, inner):
        state = m.__dict__
        if "forward" in state:
            own = _instance_forward(m)
            if own is not None and not _trusted(own):
                _refuse(path, f"its forward method was replaced by {_name(own)}")
        for name in HOOKS:
            if state[name]:
                hook = _foreign_hook(state[name].values())
                if hook is not None:
                    _refuse(path, f"it has a hook, {_name(hook)} (in {name})")


def _of_liger(kind: type, equivalents: frozenset[str]) -> bool:
    return kind.__module__.startswith("liger_kernel.") and kind.__qualname__ in equivalents


def _check_functions(family: Family, lm: Any) -> None:
    modeling = importlib.import_module(family.modeling)
    for name in family.functions:
        function = getattr(modeling, name, None)
        if function is not None and not _trusted(function):
            _refuse(f"{family.modeling}.{name}", f"it was replaced by {_name(function)}")
    implementation = getattr(lm.config, "_attn_implementation", None)
    registered = getattr(modeling, "ALL_ATTENTION_FUNCTIONS", {}).get(implementation)
    if registered is not None and not _trusted(registered):
        _refuse(f"attention {implementation!r}", f"it is {_name(registered)}, not transformers' own")
    for name in _GLOBAL_HOOKS:
        hooks = getattr(torch_module, name, None)
        hook = _foreign_hook(hooks.values()) if hooks else None
        if hook is not None:
            _refuse("hooks for all modules", f"{_name(hook)} is registered (torch.nn.modules.module.{name})")


def _at(module: Any, path: str) -> Any:
    """The module at a path from `module`, None if there is not one."""
    for name in path.split("."):
        module = getattr(module, name, None)
    return module


def check_modules(family: Family, lm: Any) -> None:
    """Raises UnsupportedModelError, naming the module, if lemo would not run what the model runs."""
    family.check(lm)
    _check_functions(family, lm)
    for path, allowed in family.outer_modules.items():
        module = _at(lm, path)
        if module is not None:
            _check_module(module, path, allowed, family.liger)
    decoder = family.decoder(lm)
    for i, layer in enumerate(family.layers(decoder)):
        for name, allowed in family.layer_modules_of(layer).items():
            module = _at(layer, name) if name else layer
            path = f"{family.layers_path}.{i}" + (f".{name}" if name else "")
            _check_module(module, path, allowed, family.liger)
        family.check_layer(layer, f"{family.layers_path}.{i}")


def fingerprint(layers: Sequence[nn.Module]) -> tuple[Any, ...]:
    """Changes if a module, parameter, hook or adapter of the layers does, if a weight moves in memory, and if it begins
    or ceases to train. As long as it is the same, so is what depends on these alone: `trained_parameters`,
    `loose_modules`, and addresses."""
    found: list[Any] = []
    for module in tree(*layers):
        state = module.__dict__
        found.append(id(module))
        for p in state["_parameters"].values():
            if p is not None:
                found += (id(p), _address(p), p.requires_grad)
        if state["_buffers"]:
            found += [_address(b) for b in state["_buffers"].values() if b is not None]
        for name in HOOKS:
            if state[name]:
                found += map(id, state[name].values())
        if "forward" in state:
            found.append(id(state["forward"]))
        scales = state.get("scaling")
        if isinstance(scales, dict):  # a layer of PEFT's
            active = state.get("_active_adapter")
            found += (tuple(scales.items()), active if isinstance(active, str) else tuple(active or ()))
            found += (state.get("_disable_adapters"), tuple(state.get("merged_adapters", ())))
            found.append(tuple(map(id, state.get("lora_variant", {}).values())))
    return tuple(found)


def _address(tensor: Tensor) -> int:
    """0 for tensors that are put together of others (DTensors, torchao's)."""
    return tensor.data_ptr() if type(tensor) in (nn.Parameter, Tensor) else 0


# --- parameters -------------------------------------------------------------------------------------------------------


def _live(module: nn.Module, pieces: set[int], inside: bool) -> Iterator[tuple[nn.Parameter, bool]]:
    """Trained parameters of a module without those of adapters that are not active; and whether in one of `pieces`."""
    inside = inside or id(module) in pieces
    for p in module._parameters.values():
        if p is not None and p.requires_grad:
            yield p, inside
    if "modules_to_save" in module._modules and "original_module" in module._modules:
        yield from _live(unwrap(module), pieces, inside)
        return
    by_adapter: Any = module.__dict__.get("adapter_layer_names") or getattr(type(module), "adapter_layer_names", ())
    active: Any = ()
    if by_adapter and not (getattr(module, "disable_adapters", False) or getattr(module, "merged", False)):
        active = module.active_adapters
    for name, child in module._modules.items():
        if child is None:
            continue
        if name not in by_adapter or not hasattr(child, "keys"):
            yield from _live(child, pieces, inside)
            continue
        entries: Any = child
        for key in entries.keys():  # noqa: SIM118 - a ParameterDict
            entry = entries[key]
            if key not in active:
                continue
            if isinstance(entry, nn.Module):
                yield from _live(entry, pieces, inside)
            elif isinstance(entry, nn.Parameter) and entry.requires_grad:
                yield entry, inside


def trained_parameters(family: Family, decoder: Any) -> list[Tensor]:
    """The parameters that the layers of a decoder train, each once, wherever and however often it stands.

    Raises UnsupportedModelError for one that no part of its layer uses, and for one of the decoder outside the layers
    (in its rotary embedding, for example): it would silently get no gradient.
    """
    found: dict[int, Tensor] = {}
    stray: dict[int, tuple[int, nn.Parameter]] = {}
    layers = family.layers(decoder)
    for i, layer in enumerate(layers):
        modules = (*family.attention_modules(layer), *family.mlp_modules(layer))
        # Of a norm lemo reads these tensors, not whatever else its module may hold; of an attention, its sinks.
        read = {id(p) for n in family.norms(layer) for p in n.parameters}
        read.add(id(family.attention_options(layer).sinks))
        for p, inside in _live(layer, {id(m) for m in modules}, False):
            if inside or id(p) in read:
                found[id(p)] = p
            else:
                stray[id(p)] = i, p
    for key, (i, p) in stray.items():
        if key not in found:
            _refuse_parameter(f"{family.layers_path}.{i}", layers[i], p)
    for p in _outside(family, decoder):
        _refuse_parameter(family.layers_path.rpartition(".")[0], decoder, p)
    return list(found.values())


def _outside(family: Family, decoder: Any) -> Iterator[nn.Parameter]:
    """Trained parameters of a decoder that are neither in its layers nor in what the family computes around them."""
    norm = family.final_norm(decoder)
    known = set() if norm is None else {id(p) for p in norm.parameters}
    pieces = {id(m) for m in family.outside_modules(decoder)}
    yield from (p for p in decoder._parameters.values() if p is not None and p.requires_grad)
    for child in decoder.children():
        if child is not decoder.layers:
            yield from (p for p, inside in _live(child, pieces, False) if not inside and id(p) not in known)


def _refuse_parameter(path: str, module: nn.Module, parameter: nn.Parameter) -> None:
    name = next(n for n, q in module.named_parameters() if q is parameter)
    raise UnsupportedModelError(
        f"lemo does not support {path}.{name}: the parameter trains, but no projection, MLP, norm or embedding that "
        "lemo runs uses it, so it would get no gradient; freeze it (requires_grad_(False)) or train without lemo "
        "(lemo.remove)"
    )


# --- phases -----------------------------------------------------------------------------------------------------------


def loose_modules(family: Family, layers: Sequence[nn.Module]) -> list[nn.Module]:
    """Modules of the layers that are called as they are: neither a projection of the cheap path, nor an activation
    function of torch or transformers, nor one that lemo stands in for (`check_modules` has checked those)."""
    stood_in = {kind for kinds in family.layer_modules.values() for kind in kinds}
    modules = [m for layer in layers for m in (*family.attention_modules(layer), *family.mlp_modules(layer))]
    return [m for m in modules if projection(m) is None and not _plain_activation(m) and not _is(m, stood_in, family)]


def _is(module: nn.Module, kinds: Collection[tuple[str, str]], family: Family) -> bool:
    """Whether a module is of one of these classes, or of Liger's equivalents."""
    kind = type(unwrap(module))
    return (kind.__module__, kind.__qualname__) in kinds or _of_liger(kind, family.liger)


def _plain_activation(module: nn.Module) -> bool:
    home = type(module).__module__
    known = home in ("torch.nn.modules.activation", "transformers.activations")
    return known and not isinstance(module, nn.RReLU) and not hooked(module) and not module._parameters


def check_randomness(family: Family, lm: Any, loose: Sequence[nn.Module], phases: Sequence[Phase]) -> bool | None:
    """Whether layers draw random numbers; None: they may. ValueError if one of the phases cannot have that."""
    found = True if family.dropout(lm) > 0 else draws(loose)
    if found and any(phase.mode == "backward" for phase in phases):
        raise ValueError(
            'mode "backward" recomputes kept tokens only and cannot draw the same random numbers for them again: set '
            "the model's dropout, lora_dropout and whatever else the adapter draws (rank_dropout, module_dropout, "
            "sampling) to 0, or leave mode backward out of the phases"
        )
    return found
