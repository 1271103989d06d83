"""Training steps of a model on its own data, one at a time: what the studies measure."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformers import set_seed

from lemo.data import Documents
from lemo.training.adapters import restored_modules
from lemo.training.finetune import with_adapter
from lemo.training.settings import FinetuneSettings
from lemo.training.windows import training_windows


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextlib.contextmanager
def training_steps(
    model: Any, documents: Documents, settings: FinetuneSettings, with_lemo: bool = True
) -> Iterator[Callable[[], None]]:
    """A function that makes one optimizer step of a fresh adapter, as `lemo finetune` makes them. The model is as it
    was afterwards. with_lemo: False trains with transformers and PEFT alone, recomputing layers if `settings` do.
    """
    import lemo

    device = next(model.parameters()).device
    windows = training_windows(documents, settings, length=1 << 30)
    with restored_modules(model):
        set_seed(settings.seed)
        wrapped = with_adapter(model, settings)
        controller = lemo.apply(wrapped, settings.lemo_config()) if with_lemo else None
        if controller is not None:
            controller.total_steps = settings.steps
        elif settings.recompute == "full":
            wrapped.enable_input_require_grads()
            wrapped.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        wrapped.config.use_cache = False
        wrapped.train()
        trained = [p for p in wrapped.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=settings.lr, betas=(0.9, 0.95), weight_decay=settings.weight_decay)
        number = 0

        def step() -> None:
            nonlocal number
            items = [windows[number + i] for i in range(settings.batch)]
            number += settings.batch
            batch = {name: torch.stack([item[name] for item in items]).to(device) for name in items[0]}
            wrapped(**batch, use_cache=False).loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if controller is not None:
                controller.step()

        try:
            yield step
        finally:
            if controller is not None:
                lemo.remove(wrapped)
            for p in trained:
                p.grad = None


def step_seconds(model: Any, documents: Documents, settings: FinetuneSettings, steps: int = 3) -> float:
    """Median time of a step after one that pays for set-up. The model is as it was afterwards."""
    device, times = next(model.parameters()).device, []
    with training_steps(model, documents, settings) as step:
        step()
        for _ in range(steps):
            synchronize(device)
            start = time.perf_counter()
            step()
            synchronize(device)
            times.append(time.perf_counter() - start)
    return sorted(times)[len(times) // 2]
