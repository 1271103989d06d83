"""What the processes of test_fsdp.py do."""

from __future__ import annotations

from typing import Any

import lemo
import torch
from support.ddp_jobs import config, documents, unlabelled
from support.models import LINEARS, base, lora
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
    "opt": {"phase": SKIP, "family": "opt", "options": {"recompute": "full"}},
}


def build(family: str = "llama", trains: bool = False) -> Any:
    made = base(family)
    return made.train() if trains else lora(made, LINEARS[family]).train()


def layers_of(model: Any) -> Any:
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return inner, inner.model.decoder.layers if hasattr(inner.model, "decoder") else inner.model.layers


def shard(model: Any, apart: bool = False, root: bool = True, mesh: Any = None, **options: Any) -> None:
    if mesh is not None:
        options["mesh"] = init_device_mesh("cpu", mesh, mesh_dim_names=("replicate", "shard"))
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
    losses = []
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
    return found


def accelerated() -> dict[str, Any]:
    """Accelerate's FSDP2 plugin by way of transformers' Trainer: the adapter after four steps."""
    import os
    import tempfile

    from transformers import Trainer, TrainingArguments

    os.environ["ACCELERATE_USE_CPU"] = "true"
    model = build()
    phases = [lemo.Phase("skip", keep=0.5, policy="random", share=0.5), lemo.Phase("dense", share=0.5)]
    controller = lemo.apply(model, lemo.LemoConfig(block_size=8, phases=phases, seed=7))
    rows = [{k: v[0, :30] for k, v in documents(i % 4).items() if k in ("input_ids", "labels")} for i in range(8)]
    fsdp = {
        "version": 2,
        "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"],
        "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
    }
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            max_steps=4,
            per_device_train_batch_size=1,
            use_cpu=True,
            report_to=[],
            logging_steps=1,
            disable_tqdm=True,
            save_strategy="no",
            learning_rate=1e-2,
            **({"fsdp": True, "fsdp_config": fsdp} if distributed.get_world_size() > 1 else {}),
        )
        trainer = Trainer(model, arguments, train_dataset=rows, callbacks=[controller.callback()])
        trainer.train()
        log = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    weights = {n: whole(p).detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    divided = all(isinstance(p, DTensor) for layer in layers_of(model)[1] for p in layer.parameters())
    return {"weights": weights, "losses": log, "divided": divided}
