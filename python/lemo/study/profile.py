"""Where a training step's time and memory go, by part and by layer: ours and dense LoRA with transformers and PEFT.

torch.profiler records operators (on a GPU, with the kernels they launched). An operator belongs to one part, by its
name, by the sizes of its operands, or by the range that it ran in. Nothing is estimated: what no operator accounts for
is shown as such, and the step is also timed without the profiler, which slows it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from lemo.data import Documents
from lemo.engine.families import find
from lemo.engine.step import Step
from lemo.engine.tiles import TileChooser
from lemo.integration.kept_lists import ChosenLists
from lemo.study.steps import synchronize, training_steps
from lemo.training.settings import FinetuneSettings

PEER = "transformers + PEFT"
PARTS = (
    "attention forward",
    "attention backward",
    "matrix products",
    "adapter",
    "norms, elementwise, copies",
    "choosing",
    "loss",
    "optimizer",
    "other",
)
_PRODUCTS = ("mm", "addmm", "addmm_", "bmm", "baddbmm", "matmul", "linear", "mv", "addmv", "_scaled_mm", "_int_mm")
_ATTENTION = ("lemo::attention", "scaled_dot_product", "flash_attention", "efficient_attention", "cudnn_attention")
_LOSS = ("cross_entropy", "log_softmax", "nll_loss")
_LAYER, _CHOOSING = "lemo.layer ", "lemo.choosing"


@dataclass(frozen=True)
class Profile:
    """One way of training, per step. wall_ms: without the profiler; profiled_ms: with it, which the parts belong to.

    parts, layers: milliseconds; of layers those of forward and backward, of the peer forward (and recomputation) alone.
    device: whether times are of the GPU's kernels, else of operators on the CPU. allocated: bytes that the operators of
    a part allocated, summed over a step: not a peak. peak_bytes: on a GPU, the allocator's peak, weights included; on
    the CPU, the most that a step held on top of what was there before it.
    """

    name: str
    wall_ms: float
    profiled_ms: float
    parts: dict[str, float]
    layers: dict[int, float]
    allocated: dict[str, int]
    peak_bytes: int | None
    device: bool
    error: str = ""

    @property
    def attributed_ms(self) -> float:
        return sum(self.parts.values())


def profile_steps(
    model: Any, documents: Documents, settings: FinetuneSettings, name: str, *, steps: int = 3, with_lemo: bool = True
) -> Profile:
    """Profiles steps of one way of training; the model is as it was afterwards. Out of memory becomes the error."""
    device = next(model.parameters()).device
    cuda = device.type == "cuda"
    try:
        with _ranges(model, with_lemo), training_steps(model, documents, settings, with_lemo) as step:
            step()
            walls = sorted(_timed(step, device) for _ in range(steps))
            peak = _peak_of(step, device) if cuda else None
            activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
            with profile(activities=activities, record_shapes=True, profile_memory=True) as recorded:
                profiled = sum(_timed(step, device) for _ in range(steps))
    except torch.OutOfMemoryError as error:
        torch.cuda.empty_cache()
        return Profile(name, 0.0, 0.0, {}, {}, {}, None, True, f"out of memory: {str(error).splitlines()[0]}")
    parts, layers, allocated = Sorter(model, settings.lora_rank).sums(recorded.events(), cuda)
    return Profile(
        name,
        1000 * walls[len(walls) // 2],
        1000 * profiled / steps,
        {part: parts[part] / steps / 1000 for part in PARTS},
        {layer: layers[layer] / steps / 1000 for layer in sorted(layers)},
        {part: allocated[part] // steps for part in PARTS},
        peak if cuda else _peak_growth(recorded),
        cuda,
    )


def profile_modes(
    model: Any,
    documents: Documents,
    settings: FinetuneSettings,
    modes: list[str],
    *,
    peer: bool = True,
    steps: int = 3,
    report: Callable[[str], None] = lambda line: None,
) -> list[Profile]:
    """A profile of every mode (phases as `lemo finetune --schedule` takes them), the peer's first."""
    found = []
    if peer:
        report(f"profiling {PEER}")
        dense = dataclasses.replace(settings, schedule="dense", calibration=None)
        found.append(profile_steps(model, documents, dense, PEER, steps=steps, with_lemo=False))
    for mode in modes:
        report(f"profiling lemo, {mode}")
        ours = dataclasses.replace(settings, schedule=mode)
        found.append(profile_steps(model, documents, ours, f"lemo, {mode}", steps=steps))
    return found


def _timed(step: Callable[[], None], device: torch.device) -> float:
    synchronize(device)
    start = time.perf_counter()
    step()
    synchronize(device)
    return time.perf_counter() - start


def _peak_of(step: Callable[[], None], device: torch.device) -> int:
    torch.cuda.reset_peak_memory_stats(device)
    step()
    return torch.cuda.max_memory_allocated(device)


def _peak_growth(recorded: Any) -> int | None:
    """The most bytes that the steps held on the CPU on top of what was there; None if torch does not record it."""
    try:
        events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
        ordered = sorted(events, key=lambda e: e.start_ns())
    except AttributeError:
        return None
    held = most = 0
    for event in ordered:
        held += event.nbytes()
        most = max(most, held)
    return most


# ---- ranges ----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _ranges(model: Any, with_lemo: bool) -> Iterator[None]:
    """Names, for the profiler, work on a layer and choosing. Everything is as before afterwards."""
    undo: list[Callable[[], None]] = []
    if with_lemo:
        undo += [_wrap(owner, "choose", _named_call) for owner in (ChosenLists, TileChooser)]
        undo.append(_wrap(Step, "layer", _named_layer))
    else:
        family, inner = find(model)
        for i, layer in enumerate(family.layers(family.decoder(inner))):
            running: list[Any] = []
            undo.append(layer.register_forward_pre_hook(functools.partial(_enter, i, running)).remove)
            undo.append(layer.register_forward_hook(functools.partial(_leave, running), always_call=True).remove)
    try:
        yield
    finally:
        for each in undo:
            each()


def _wrap(owner: Any, method: str, wrapper: Callable[[Any], Any]) -> Callable[[], None]:
    original = owner.__dict__[method]
    setattr(owner, method, wrapper(original))
    return lambda: setattr(owner, method, original)


def _named_call(original: Any) -> Any:
    @functools.wraps(original)
    def call(*args: Any, **kwargs: Any) -> Any:
        with record_function(_CHOOSING):
            return original(*args, **kwargs)

    return call


def _named_layer(original: Any) -> Any:
    @functools.wraps(original)
    @contextlib.contextmanager
    def layer(self: Any, i: int) -> Iterator[Any]:
        with record_function(f"{_LAYER}{i}"), original(self, i) as module:
            yield module

    return layer


def _enter(i: int, running: list[Any], module: Any, args: Any) -> None:
    running.append(record_function(f"{_LAYER}{i}"))
    running[-1].__enter__()


def _leave(running: list[Any], module: Any, args: Any, output: Any) -> None:
    running.pop().__exit__(None, None, None)


# ---- sorting ---------------------------------------------------------------------------------------------------------


class Sorter:
    """Operators into parts. What is recognized by a size is so only if no other size of the model is the same."""

    def __init__(self, model: Any, rank: int) -> None:
        config: Any = find(model)[1].config
        names = ("hidden_size", "intermediate_size", "ffn_dim", "head_dim", "num_attention_heads")
        sizes = {getattr(config, name, None) for name in names}
        sizes |= {p.shape[0] for n, p in model.named_parameters() if n.endswith(("k_proj.weight", "q_proj.weight"))}
        self.rank = None if rank in sizes else rank
        self.vocab = None if config.vocab_size in sizes else config.vocab_size

    def sums(self, events: Any, device: bool) -> tuple[dict[str, float], dict[int, float], dict[str, int]]:
        """Microseconds by part and by layer, and bytes by part."""
        parts: dict[str, float] = defaultdict(float)
        layers: dict[int, float] = defaultdict(float)
        allocated: dict[str, int] = defaultdict(int)
        for event in events:
            if event.device_type.name != "CPU":
                continue  # kernels: counted with the operators that launched them
            took = event.self_device_time_total if device else event.self_cpu_time_total
            held = event.self_device_memory_usage if device else event.self_cpu_memory_usage
            above = _ancestors(event)
            part = self.part(event.name, event.input_shapes or [], above)
            parts[part] += took
            allocated[part] += max(0, held)
            layer = next((name for name in (event.name, *above) if name.startswith(_LAYER)), None)
            if layer is not None:
                layers[int(layer.removeprefix(_LAYER))] += took
        return parts, layers, allocated

    def part(self, name: str, shapes: Any, above: list[str]) -> str:
        """Of an operator with operands of these shapes, below these names."""
        if name == _CHOOSING or _CHOOSING in above:
            return "choosing"
        if any(a.startswith("Optimizer.step") for a in (name, *above)):
            return "optimizer"
        room, _, operator = name.partition("::")
        if room not in ("aten", "lemo"):
            return "other"
        if any(a in name for a in _ATTENTION):
            return "attention backward" if "backward" in name else "attention forward"
        sizes = {n for shape in shapes if isinstance(shape, (list, tuple)) for n in shape if isinstance(n, int)}
        if any(a in name for a in _LOSS) or self.vocab in sizes:
            return "loss"
        if operator in _PRODUCTS:
            return "adapter" if self.rank in sizes else "matrix products"
        return "norms, elementwise, copies"


def _ancestors(event: Any) -> list[str]:
    names, parent = [], event.cpu_parent
    while parent is not None:
        names.append(parent.name)
        parent = parent.cpu_parent
    return names
