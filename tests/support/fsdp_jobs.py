"""What the processes of test_fsdp.py do."""

from __future__ import annotations

from typing import Any

import lemo
import torch
from support.ddp_jobs import config, documents, unlabelled
from support.models import ATTENTION, FAMILIES, LINEARS, base, lora
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

SKIP = lemo.Phase("skip", keep=0.5, policy="random")
# By name: phase, and what differs from the usual: settings, batch, which modules apart from layers and model are
# divided by themselves ("apart"), what trains, what fully_shard is given, whether lemo is applied before it.
CASES: dict[str, dict[str, Any]] = {
    "dense": {"phase": lemo.Phase("dense")},
    "recomputed": {"phase": SKIP, "options": {"recompute": "full"}},
    "attention saved, applied first": {"phase": SKIP, "options": {"recompute": "attention"}, "first": True},
    "backward weighted": {"phase": lemo.Phase("backward", keep=0.5, policy="sampled", weighted=True)},
    "nothing kept in one": {"phase": lemo.Phase("skip", keep=0.0, policy="random"), "batch": unlabelled},
    "head and embedding apart": {"phase": SKIP, "apart": True},
    "everything trains": {"phase": SKIP, "trains": True},
    "everything trains, apart": {"phase": lemo.Phase("dense"), "trains": True, "apart": True},
    "replicated and sharded": {"phase": SKIP, "mesh": (2, 1)},
    "layers alone": {"phase": SKIP, "root": False},
    "gemma2": {"phase": SKIP, "family": "gemma2"},
    "qwen3_moe": {"phase": SKIP, "family": "qwen3_moe", "options": {"recompute": "full"}},
    "opt": {"phase": SKIP, "family": "opt", "options": {"recompute": "full"}},
    "opt_350m": {"phase": SKIP, "family": "opt_350m", "options": {"recompute": "full"}},
    "opt_350m, everything trains": {"phase": lemo.Phase("dense"), "family": "opt_350m", "trains": True},
}


def build(family: str = "llama", trains: bool = False) -> Any:
    made = base(family)
    targets = [*(LINEARS if family == "llama" else ATTENTION)[family], *FAMILIES[family].outside]
    return made.train() if trains else lora(made, targets).train()


def layers_of(model: Any) -> Any:
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return inner, inner.model.decoder.layers if hasattr(inner.model, "decoder") else inner.model.layers


def shard(model: Any, apart: bool = False, root: bool = True, mesh: Any = None, **options: Any) -> None:
    if mesh is not None:
        options["mesh"] = init_device_mesh("cpu", mesh, mesh_dim_names=("replicate", "shard")[-len(mesh) :])
    inner, layers = layers_of(model)
    for layer in layers:
        fully_shard(layer, **options)
    if apart:
        fully_shard(inner.model.embed_tokens, **options)
        fully_shard([inner.model.norm, inner.lm_head], **options)
    if root:
        fully_shard(model, **options)


def whole(p: Any) -> torch.Tensor:
    return p.full_tensor() if isinstance(p, DTensor) else p


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {n: whole(p.grad).detach().clone() for n, p in model.named_parameters() if p.grad is not None}


def run(case: dict[str, Any], passes: int = 1) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses and averaged gradients of this rank's documents in the second step."""
    model = build(case.get("family", "llama"), case.get("trains", False))
    settings = config(case["phase"], **case.get("options", {}))
    controller = lemo.apply(model, settings) if case.get("first") else None
    shard(model, **{name: case[name] for name in ("apart", "root", "mesh") if name in case})
    controller = controller or lemo.apply(model, settings)
    losses: list[float] = []
    for _ in range(2):
        model.zero_grad()
        losses = []
        for i in range(passes):
            loss = model(**case.get("batch", documents)((distributed.get_rank() + 2 * i) % 4)).loss / passes
            loss.backward()
            losses.append(loss.item())
        controller.step()
    assert all(isinstance(p, DTensor) for layer in layers_of(model)[1] for p in layer.parameters())
    return losses, gradients(model)


def cases() -> dict[str, Any]:
    found: dict[str, Any] = {name: run(case) for name, case in CASES.items()}
    found["accumulated"] = run(CASES["dense"], passes=2)
    found["precision"] = precision()
    found["refused"] = refused()
    found["accelerated"] = accelerated()
    found["by PEFT"] = by_peft()
    return found


def precision() -> tuple[float, dict[str, torch.Tensor], set[torch.dtype]]:
    """Weights kept in float64 and gathered in float32, in which the CPU computes."""
    model = build().double()
    shard(model, mp_policy=MixedPrecisionPolicy(param_dtype=torch.float32))
    lemo.apply(model, config(lemo.Phase("dense")))
    loss = model(**documents(distributed.get_rank())).loss
    loss.backward()
    found = gradients(model)
    return loss.item(), {n: g.float() for n, g in found.items()}, {g.dtype for g in found.values()}


def refused() -> dict[str, str]:
    """The messages of what cannot be computed."""
    found = {}

    def attempt(name: str, model: Any) -> None:
        try:
            lemo.apply(model, config(SKIP))
        except ValueError as error:
            found[name] = str(error)

    model = build()
    fully_shard(model)
    attempt("model alone", model)
    model = build()
    for layer in layers_of(model)[1]:
        fully_shard(layer.mlp)
        fully_shard(layer)
    attempt("inside", model)
    model = build()
    for layer in layers_of(model)[1]:
        fully_shard(layer, ignored_params={p for n, p in layer.named_parameters() if "lora" in n})
    attempt("ignored", model)
    try:
        run({"phase": lemo.Phase("dense"), "options": {"memory_budget": 2**40}})
    except ValueError as error:
        found["budget"] = str(error)
    return found


def accelerated(policy: Any = "transformer_based_wrap") -> tuple[list[float], dict[str, torch.Tensor], list[str]]:
    """As `run`, divided as Accelerate's plugin does it (its Accelerator uses the plugin on accelerators alone); and
    what the controller noted."""
    from types import SimpleNamespace

    from accelerate import FullyShardedDataParallelPlugin
    from accelerate.utils.fsdp_utils import fsdp2_prepare_model

    model = build()
    controller = lemo.apply(model, config(SKIP))
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy=policy,
        transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
        cpu_ram_efficient_loading=False,
    )
    state = SimpleNamespace(fsdp_plugin=plugin)
    accelerator = SimpleNamespace(state=state, mixed_precision="no", is_main_process=True, device=torch.device("cpu"))
    plugin.auto_wrap_policy = policy if callable(policy) else plugin.auto_wrap_policy
    model = fsdp2_prepare_model(accelerator, model)
    losses: list[float] = []
    for _ in range(2):
        model.zero_grad()
        loss = model(**documents(distributed.get_rank())).loss
        loss.backward()
        losses = [loss.item()]
        controller.step()
    return losses, gradients(model), sorted(controller._notes)


def by_peft() -> Any:
    """With the policy that transformers' Trainer puts in place for PEFT's models: no layer is divided by itself."""
    from peft.utils.other import fsdp_auto_wrap_policy

    return accelerated(fsdp_auto_wrap_policy(build()))
