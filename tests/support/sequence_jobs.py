"""What the processes of test_sequence.py do: one batch in all of them, and the same model alone."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from typing import Any
from unittest import mock

import lemo
import torch
from lemo.engine.families.base import AttentionOptions
from lemo.engine.families.llama import Llama
from lemo.predictors import PredictorNetwork, PredictorSet, model_fingerprint
from support.fsdp_jobs import gradients as sharded_gradients
from support.fsdp_jobs import shard
from support.models import ATTENTION, LINEARS, VOCAB, base, lora
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

BLOCK = 8


def packed(lengths: tuple[int, ...] = (150, 7, 300, 64), seed: int = 3) -> dict[str, Any]:
    ids = torch.randint(3, VOCAB, (1, sum(lengths)), generator=torch.Generator().manual_seed(seed))
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    labels = ids.masked_fill(positions == 0, -100)
    labels[:, ::3] = -100
    return {"input_ids": ids, "labels": labels, "position_ids": positions, "use_cache": False}


def padded() -> dict[str, Any]:
    ids = torch.randint(3, VOCAB, (3, 60), generator=torch.Generator().manual_seed(4))
    mask = torch.ones_like(ids)
    mask[1, 41:] = mask[2, 13:] = 0
    return {"input_ids": ids, "labels": ids.masked_fill(mask == 0, -100), "attention_mask": mask}


def gaps() -> dict[str, Any]:
    """Padding between the tokens of a document."""
    inputs = padded()
    inputs["attention_mask"][0, 20:30] = 0
    inputs["labels"][0, 20:31] = -100
    return inputs


def answers() -> dict[str, Any]:
    """Labels in the last document alone: the first process has none."""
    inputs = packed()
    inputs["labels"][:, :457] = -100
    return inputs


def counted() -> dict[str, Any]:
    return {**packed(), "num_items_in_batch": 100}


SKIP = {"keep": 0.4, "policy": "random"}
# By name: phase, and what differs from the usual: settings, batch, family, what else trains, number of passes.
CASES: dict[str, dict[str, Any]] = {
    "dense": {"phase": lemo.Phase("dense")},
    "dense recomputed": {"phase": lemo.Phase("dense"), "options": {"recompute": "full"}},
    "dense with attention saved": {"phase": lemo.Phase("dense"), "options": {"recompute": "attention"}},
    "padded": {"phase": lemo.Phase("dense"), "batch": padded},
    "opt": {"phase": lemo.Phase("skip", **SKIP), "family": "opt", "batch": padded},
    "skip": {"phase": lemo.Phase("skip", **SKIP)},
    "skip recomputed": {"phase": lemo.Phase("skip", **SKIP), "options": {"recompute": "full"}},
    "labels of one process": {"phase": lemo.Phase("skip", **SKIP), "batch": answers},
    "num_items_in_batch": {"phase": lemo.Phase("skip", **SKIP), "batch": counted},
    "update_norm": {"phase": lemo.Phase("skip", keep=0.4, policy="update_norm", policy_options={"carry": True})},
    "sampled": {"phase": lemo.Phase("skip", keep=0.4, policy="sampled", policy_options={"shared": True})},
    "another list for the MLP": {"phase": lemo.Phase("skip", mlp_keep=0.7, **SKIP)},
    "some layers": {"phase": lemo.Phase("skip", **SKIP), "options": {"layers": [1]}},
    "backward recomputed": {
        "phase": lemo.Phase("backward", keep=0.5, policy="random"),
        "options": {"recompute": "full"},
    },
    "backward weighted": {"phase": lemo.Phase("backward", keep=0.5, policy="sampled", weighted=True)},
    "sparse": {"phase": lemo.Phase("sparse", keys=256, local=0)},
    "sparse recomputed": {"phase": lemo.Phase("sparse", mass=0.8, local=0), "options": {"recompute": "full"}},
    "sparse and skip": {"phase": lemo.Phase("sparse", keys=128, local=0, **SKIP)},
    "attention's options": {"phase": lemo.Phase("dense"), "options of layers": True},
    "attention's options, skip": {
        "phase": lemo.Phase("skip", **SKIP),
        "options of layers": True,
        "batch": gaps,
        "options": {"recompute": "full"},
    },
    "predictors": {"phase": lemo.Phase("skip", keep=0.4, policy="predictors"), "predicts": True},
    "predictors, threshold": {"phase": lemo.Phase("skip", policy="predictors", select="threshold"), "predicts": True},
    "drawn by predictors": {
        "phase": lemo.Phase("sparse", keys=128, local=0, keep=0.4, policy="sampled"),
        "predicts": True,
    },
    "gemma3_text": {"phase": lemo.Phase("skip", **SKIP), "family": "gemma3_text", "batch": padded},
    "gpt_oss": {"phase": lemo.Phase("skip", **SKIP), "family": "gpt_oss", "batch": padded},
    "qwen3_moe": {"phase": lemo.Phase("dense"), "family": "qwen3_moe", "batch": padded},
    "everything trains": {"phase": lemo.Phase("dense"), "trains": True},
    "everything trains, skip": {"phase": lemo.Phase("skip", **SKIP), "trains": True},
}
# With 4 processes: two key/value heads, and rows that some processes have none of.
FOUR = ("dense recomputed", "skip", "labels of one process", "backward weighted", "sparse", "everything trains, skip")


def few() -> dict[str, Any]:
    """Blocks of which one process keeps none."""
    return packed((200,), 5)


def model(family: str = "llama", trains: bool = False) -> Any:
    made = base(family, max_position_embeddings=512)
    if trains:
        return made.train()
    return lora(made, (LINEARS if family in ("llama", "opt") else ATTENTION)[family]).train()


def options_of(layer: Any) -> AttentionOptions:
    """A window and sinks, a soft-cap alone, and all of them, in turns."""
    a = layer.self_attn
    kinds = ((10, 0.0, a.sinks), (None, 2.0, None), (10, 2.0, a.sinks))
    return AttentionOptions(float(a.scaling), *kinds[a.layer_idx % 3])


@contextlib.contextmanager
def predictors_of(tuned: Any) -> Iterator[str]:
    """A calibration folder of predictors that were not trained: the same in every process."""
    g = torch.Generator().manual_seed(0)
    config = tuned.get_base_model().config
    made = PredictorSet(
        layers=[PredictorNetwork(config.hidden_size, 8, 4, generator=g).export() for _ in range(3)],
        norm="rms",
        pool="mean",
        eps=1e-5,
        normalize=True,
        thresholds=(0.0, 0.01, -0.01),
        keep=(0.5,) * 3,
        block_size=BLOCK,
        context=512,
        fingerprint=model_fingerprint(tuned),
    )
    with tempfile.TemporaryDirectory() as folder:
        made.save(f"{folder}/calibration")
        yield f"{folder}/calibration"


def run(case: dict[str, Any], group: Any) -> dict[str, Any]:
    """Loss, gradients, kept ratios and densities of the second step."""
    if case.get("options of layers"):
        with mock.patch.object(Llama, "attention_options", lambda self, layer: options_of(layer)):
            return _run(case, group, sinks=True)
    return _run(case, group)


def _run(case: dict[str, Any], group: Any, sinks: bool = False) -> dict[str, Any]:
    tuned: nn.Module = model(case.get("family", "llama"), case.get("trains", False))
    for i, layer in enumerate(tuned.get_base_model().model.layers if sinks else ()):  # type: ignore[operator]
        drawn = torch.randn(4, generator=torch.Generator().manual_seed(i))
        layer.self_attn.sinks = None if i % 3 == 1 else nn.Parameter(drawn)
    options = case.get("options", {})
    with predictors_of(tuned) if case.get("predicts") else contextlib.nullcontext() as calibration:
        options = {**options, "calibration": calibration}
        settings = lemo.LemoConfig(block_size=BLOCK, phases=[case["phase"]], seed=7, **options)
        controller = lemo.apply(tuned, settings, sequence_group=group)
    controller.data_rank = 0
    loss = torch.zeros(())
    for _ in range(2):
        tuned.zero_grad()
        loss = tuned(**case.get("batch", packed)()).loss
        loss.backward()
        report = controller.report()
        controller.step()
    found = {n: p.grad.clone() for n, p in tuned.named_parameters() if p.grad is not None}
    names = ("kept", "mlp_kept", "loss_tokens", "density")
    return {"loss": loss.item(), "gradients": found, **{name: report[name] for name in names}}


def all_cases() -> dict[str, Any]:
    found: dict[str, Any] = {name: run(case, distributed.group.WORLD) for name, case in CASES.items()}
    return {**found, "refused": refused()}


def refused() -> dict[str, str]:
    """The messages of what is refused, and at which call."""
    found = {}

    def attempt(name: str, phase: lemo.Phase, batch: dict[str, Any] | None = None, **options: Any) -> None:
        tuned = model()
        settings = lemo.LemoConfig(block_size=BLOCK, phases=[phase], **options)
        try:
            lemo.apply(tuned, settings, sequence_group=distributed.group.WORLD)
            if batch is not None:
                tuned(**batch)
        except ValueError as error:
            found[name] = str(error)

    dense = lemo.Phase("dense")
    attempt("other batches", dense, packed(seed=distributed.get_rank()))
    attempt("no labels", dense, {k: v for k, v in packed().items() if k != "labels"})
    attempt("one block", dense, {"input_ids": torch.full((1, BLOCK), 5), "labels": torch.full((1, BLOCK), 5)})
    attempt("exact", lemo.Phase("skip", keep=0.5, policy="exact"))
    attempt("predicted tiles", lemo.Phase("sparse", tile_policy="predictors"), calibration="nowhere")
    attempt("logits", dense, return_logits=True)
    attempt("budget", dense, memory_budget=2**30)
    attempt("offload", dense, offload=True)
    return found


def some_cases() -> dict[str, Any]:
    found = {name: run(CASES[name], distributed.group.WORLD) for name in FOUR}
    case = {"phase": lemo.Phase("skip", keep=0.1, policy="random"), "batch": few}
    return {**found, "few": run(case, distributed.group.WORLD), "data parallel": data_parallel()}


# ---- groups next to data parallelism ---------------------------------------------------------------------------------

# By name: as CASES, and what surrounds the model.
DATA_PARALLEL: dict[str, dict[str, Any]] = {
    "ddp": {"phase": lemo.Phase("skip", **SKIP)},
    "ddp among those of one place": {"phase": lemo.Phase("sparse", keys=128, local=0, **SKIP), "across": True},
    "ddp, everything trains": {"phase": lemo.Phase("skip", **SKIP), "trains": True},
    "fsdp": {"phase": lemo.Phase("skip", **SKIP), "options": {"recompute": "full"}, "divided": (4,)},
    "fsdp within groups": {"phase": lemo.Phase("dense"), "divided": (2, 2)},
    "fsdp, everything trains": {"phase": lemo.Phase("skip", **SKIP), "trains": True, "divided": (4,)},
}


def document(number: int) -> dict[str, Any]:
    """The batch of a group: others have other lengths and numbers of labels."""
    return packed(((150, 7, 60), (90, 33))[number], 10 + number)


def data_parallel() -> dict[str, Any]:
    """Losses and gradients of two groups of two processes, each with a batch, in the second step."""
    groups = [distributed.new_group([2 * i, 2 * i + 1]) for i in range(2)]
    across = [distributed.new_group([i, i + 2]) for i in range(2)]
    number, place = divmod(distributed.get_rank(), 2)
    found = {}
    for name, case in DATA_PARALLEL.items():
        tuned = model(trains=case.get("trains", False))
        if "divided" in case:
            shard(tuned, mesh=case["divided"])
        settings = lemo.LemoConfig(block_size=BLOCK, phases=[case["phase"]], seed=7, **case.get("options", {}))
        controller = lemo.apply(tuned, settings, sequence_group=groups[number])
        outer: Any = tuned
        if "divided" not in case:
            outer = DistributedDataParallel(tuned, process_group=across[place] if case.get("across") else None)
        loss = torch.zeros(())
        for _ in range(2):
            outer.zero_grad()
            loss = outer(**document(number)).loss
            loss.backward()
            controller.step()
        found[name] = loss.item(), sharded_gradients(tuned)
    return found


def data_parallel_alone(case: dict[str, Any]) -> tuple[list[float], dict[str, torch.Tensor]]:
    """The same in one process, by accumulation."""
    tuned = model(trains=case.get("trains", False))
    settings = lemo.LemoConfig(block_size=BLOCK, phases=[case["phase"]], seed=7, **case.get("options", {}))
    controller = lemo.apply(tuned, settings)
    losses = []
    for number in range(2):
        controller.data_rank = 2 * number  # a group draws as its first process
        controller.seek(1)
        loss = tuned(**document(number)).loss
        (loss / 2).backward()
        losses.append(loss.item())
    return losses, sharded_gradients(tuned)
