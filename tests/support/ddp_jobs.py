"""What the processes of test_ddp.py do."""

from __future__ import annotations

import contextlib
from typing import Any

import lemo
import torch
from support.models import VOCAB, tuned
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

BLOCK = 8
SKIP = lemo.Phase("skip", keep=0.5, policy="random")


def documents(rank: int) -> dict[str, Any]:
    """A packed batch of every rank: other lengths, and in rank 1 fewer tokens and labels than in rank 0."""
    lengths = ([17, 40, 9], [25, 8], [33], [8, 8, 8, 30])[rank]
    generator = torch.Generator().manual_seed(100 + rank)
    ids = torch.randint(3, VOCAB, (1, sum(lengths)), generator=generator)
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    labels = ids.masked_fill(positions == 0, -100)
    labels[:, :: 3 + rank] = -100
    return {"input_ids": ids, "labels": labels, "position_ids": positions, "use_cache": False}


def unlabelled(rank: int) -> dict[str, Any]:
    """No label in rank 1."""
    inputs = documents(rank)
    if rank == 1:
        inputs["labels"] = torch.full_like(inputs["labels"], -100)
    return inputs


def config(phase: lemo.Phase, **options: Any) -> lemo.LemoConfig:
    return lemo.LemoConfig(block_size=BLOCK, phases=[phase], seed=7, **options)


# What is compared, by name: phase, settings, batches and options of DistributedDataParallel.
CASES: dict[str, dict[str, Any]] = {
    "dense": {"phase": lemo.Phase("dense")},
    "skip": {"phase": SKIP},
    "sparse": {"phase": lemo.Phase("sparse", keys=128, policy="random", keep=0.5)},
    "backward weighted": {"phase": lemo.Phase("backward", keep=0.5, policy="sampled", weighted=True)},
    "recomputed": {"phase": SKIP, "options": {"recompute": "full"}},
    "no label in one": {"phase": SKIP, "batch": unlabelled},
    "nothing kept in one": {"phase": lemo.Phase("skip", keep=0.0, policy="random"), "batch": unlabelled},
    "static graph": {"phase": SKIP, "wrapped": {"static_graph": True}},
}


def gradients(model: Any) -> dict[str, torch.Tensor]:
    return {n.removeprefix("module."): p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def run(
    phase: lemo.Phase, batch: Any = documents, options: Any = None, wrapped: Any = None, passes: int = 1
) -> tuple[list[float], dict[str, torch.Tensor], list[float]]:
    """Losses, averaged gradients, and kept ratios of this rank's documents, after two steps of which one counts."""
    rank = distributed.get_rank()
    model = tuned("llama")
    controller = lemo.apply(model, config(phase, **(options or {})))
    parallel = DistributedDataParallel(model, **(wrapped or {}))
    losses: list[float] = []
    for _ in range(2):
        parallel.zero_grad()
        losses = []
        for i in range(passes):
            last = i == passes - 1
            with contextlib.nullcontext() if last else parallel.no_sync():
                loss = parallel(**batch((rank + 2 * i) % 4)).loss / passes
                loss.backward()
            losses.append(loss.item())
        controller.step()
    return losses, gradients(parallel), controller.kept_ratios


def cases() -> dict[str, Any]:
    found: dict[str, Any] = {name: run(**case) for name, case in CASES.items()}
    found["no_sync"] = run(SKIP, passes=2)
    found["uneven"] = uneven()
    return found


def skip() -> Any:
    return run(SKIP)


def uneven() -> dict[str, torch.Tensor]:
    """The adapter after rank 0 made two steps and rank 1 one, inside `join`."""
    model, rank = tuned("llama"), distributed.get_rank()
    controller = lemo.apply(model, config(SKIP))
    parallel = DistributedDataParallel(model)
    optimizer = torch.optim.SGD([p for p in parallel.parameters() if p.requires_grad], lr=0.1)
    with parallel.join():
        for i in range(2 - rank):
            parallel(**documents(rank + 2 * i)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            controller.step()
    return {n.removeprefix("module."): p.detach().clone() for n, p in parallel.named_parameters() if p.requires_grad}


def trainer() -> dict[str, Any]:
    """A Trainer of transformers over Accelerate: the adapter after three steps, and what it logged."""
    import tempfile

    from transformers import Trainer, TrainingArguments

    model = tuned("llama")
    phases = [lemo.Phase("skip", keep=0.5, policy="random", share=0.5), lemo.Phase("dense", share=0.5)]
    controller = lemo.apply(model, lemo.LemoConfig(block_size=BLOCK, phases=phases, seed=7))
    rows = [{k: v[0] for k, v in documents(i % 4).items() if k in ("input_ids", "labels")} for i in range(8)]
    rows = [{k: v[:30] for k, v in row.items()} for row in rows]
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
            ddp_find_unused_parameters=False,
            learning_rate=1e-2,
        )
        Trainer(model, arguments, train_dataset=rows, callbacks=[controller.callback()]).train()
    weights = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    return {"weights": weights, "phase": controller.report()["phase"], "step": controller.step_index}
