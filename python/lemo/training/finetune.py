"""Fine-tuning with token elimination: transformers' Trainer, a PEFT LoRA adapter, and a run folder that survives.

A run folder holds

  run.json          the run's identity (lemo.training.run_folder), written before the first step, and what changed since
  log.jsonl         one line per logged step, and one per event (start, resume, held-out evaluation, end)
  checkpoint-STEP/  the last few complete checkpoints (lemo.training.checkpoint), in transformers' own layout
  adapter/          the finished PEFT adapter; exists only when the run is complete

Continuing a run gives bit for bit what an uninterrupted run would have given on the same machine: optimizer,
scheduler, random states, the place in the data and the place in the schedule of phases all come from the checkpoint.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import set_seed

from lemo.data import Documents, PackedWindows, split_held_out
from lemo.engine.config import LemoConfig
from lemo.training.checkpoint import Checkpoint, CheckpointError, Checkpoints, locked, write_folder
from lemo.training.evaluate import check_scorable
from lemo.training.run_folder import (
    ADAPTER,
    RUN_FILE,
    check_complete,
    check_identity,
    continue_run,
    environment,
    is_complete,
    run_checkpoints,
    run_settings,
    start_run,
)
from lemo.training.run_log import LOG_FILE, RunLog, read_log
from lemo.training.settings import FinetuneSettings
from lemo.training.trainer import Report, RunInProgress, RunTrainer, training_arguments

__all__ = ["ADAPTER", "LOG_FILE", "RUN_FILE", "FinetuneResult", "RunLog", "finetune", "read_log", "run_settings"]


# ---- the run ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FinetuneResult:
    """adapter: folder of the PEFT adapter. steps: done in this call. resumed_from: a step, or None (fresh start)."""

    adapter: Path
    steps: int
    resumed_from: int | None


@contextlib.contextmanager
def _applied(model: Any, config: LemoConfig) -> Iterator[Any]:
    import lemo

    controller = lemo.apply(model, config)
    try:
        yield controller
    finally:
        lemo.remove(model)


def _with_adapter(model: Any, settings: FinetuneSettings) -> Any:
    """The model wrapped by PEFT with a fresh LoRA adapter. Raises ValueError."""
    from peft import LoraConfig, get_peft_model

    targets: Any = list(settings.lora_targets)
    try:
        return get_peft_model(
            model,
            LoraConfig(
                r=settings.lora_rank,
                lora_alpha=settings.lora_alpha,
                lora_dropout=settings.lora_dropout,
                target_modules=targets[0] if targets == ["all-linear"] else targets,
                task_type="CAUSAL_LM",
            ),
        )
    except ValueError as error:
        raise ValueError(f"lora_targets {targets}: {str(error).splitlines()[0]}") from error


def _identity(model: Any, documents: Documents, settings: FinetuneSettings, more: dict[str, Any]) -> dict[str, Any]:
    """What the run is (see lemo.training.run_folder). Raises CalibrationError where the calibration cannot be read."""
    from lemo.predictors import model_fingerprint
    from lemo.predictors.store import calibration_digest

    parameter = next(model.parameters())
    return {
        "settings": settings.to_json(),
        "device": parameter.device.type,
        "dtype": str(parameter.dtype).removeprefix("torch."),
        "data_sha256": documents.fingerprint(),
        "model_fingerprint": model_fingerprint(model),
        "calibration_sha256": None if settings.calibration is None else calibration_digest(settings.calibration),
        "environment": environment(parameter.device),
        **more,
    }


def finetune(
    model: Any,
    documents: Documents,
    settings: FinetuneSettings,
    out: Path | str,
    *,
    identity: dict[str, Any] | None = None,
    resume: bool = False,
    save_every: int = 0,
    keep_checkpoints: int = 2,
    log_every: int = 1,
    evaluate_every: int = 0,
    progress: bool = True,
    report: Callable[[str], None] = lambda line: None,
) -> FinetuneResult:
    """Train a LoRA adapter on `documents` and leave it in OUT/adapter.

    model: a transformers causal LM on its device; it is wrapped by PEFT in place.
    identity: what else must be equal for a resumed run to be the same run (merged into run.json). Under "inputs", the
    places "model", "tokenizer" and "data" may differ: what they hold is compared instead.
    save_every: steps between checkpoints, 0 = none.  log_every: steps per log line.
    evaluate_every: steps between dense evaluations of the held-out part, 0 = only at the end.
    Raises ValueError for settings or data, CheckpointError for the run folder.
    """
    out = Path(out).expanduser()  # as Trainer does with its own output folder
    full_identity = _identity(model, documents, settings, identity or {})
    checkpoints = run_checkpoints(out, keep_checkpoints)
    held: Documents | None = None
    if settings.held_out:
        documents, held = split_held_out(documents, settings.held_out, settings.seed, report)
        check_scorable(held, settings.context, "the held-out part")  # it is scored last: not after hours of training
        full_identity["training_sha256"] = documents.fingerprint()  # another lemo may split in another way
    if resume:
        check_identity(out, full_identity)  # another model would also be refused by its calibration, with less to say
    length = settings.steps * settings.batch * settings.accumulate
    windows = PackedWindows(documents, settings.context, seed=settings.seed, length=length, report=report)
    set_seed(settings.seed)
    wrapped = _with_adapter(model, settings)
    with contextlib.ExitStack() as lock:  # the folder is held until the adapter is in it
        # Everything that can be wrong with the settings shows before the run folder is made.
        with _applied(wrapped, settings.lemo_config()) as controller:
            lock.enter_context(locked(out))
            if resume and is_complete(out):
                check_complete(out, full_identity, checkpoints, report)
                report(f"{out} is complete already: {settings.steps} steps")
                return FinetuneResult(out / ADAPTER, 0, settings.steps)
            start = _begin(out, full_identity, resume, checkpoints, report)
            log = RunLog(out / LOG_FILE)
            if resume:
                log.cut(start.step if start else 0, report)
            _log_start(log, wrapped, documents, start)
            run = RunInProgress(wrapped, settings, log, controller, held, windows, log_every, evaluate_every, progress)
            _train(run, checkpoints, full_identity, save_every, start)
            run.check_finite(settings.steps)
            if not evaluate_every or settings.steps % evaluate_every:
                run.evaluate(settings.steps)
        write_folder(out / ADAPTER, lambda folder: wrapped.save_pretrained(str(folder)), manifest=False)
        log.write(event="end", step=settings.steps)
    return FinetuneResult(out / ADAPTER, settings.steps - (start.step if start else 0), start.step if start else None)


def _log_start(log: RunLog, model: Any, documents: Documents, start: Checkpoint | None) -> None:
    log.write(
        event="resume" if start else "start",
        step=start.step if start else 0,
        trainable_parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
        tokens=documents.num_tokens,
        documents=len(documents),
        pid=os.getpid(),
    )


def _begin(
    out: Path, identity: dict[str, Any], resume: bool, checkpoints: Checkpoints, report: Callable[[str], None]
) -> Checkpoint | None:
    """The checkpoint that training resumes from, or None. Raises CheckpointError."""
    if not resume:
        if (out / RUN_FILE).exists():
            raise CheckpointError(f"{out} holds a run already; continue it with --resume, or choose another --out")
        start_run(out, identity)
        return None
    start = continue_run(out, identity, checkpoints, report)
    report(f"resuming from step {start.step}" if start else "no complete checkpoint: starting again from step 0")
    return start


def _train(
    run: RunInProgress,
    checkpoints: Checkpoints,
    identity: dict[str, Any],
    save_every: int,
    start: Checkpoint | None,
) -> None:
    from transformers import PrinterCallback

    trainer = RunTrainer(
        model=run.model,
        args=training_arguments(run.settings, checkpoints.root, run.device, save_every, run.log_every),
        train_dataset=run.windows,
        callbacks=[run.controller.callback(), Report(run)],
        checkpoints=checkpoints,
        run=run,
        identity=identity,
    )
    trainer.remove_callback(PrinterCallback)
    run.model.config.use_cache = False
    trainer.train(resume_from_checkpoint=str(start.folder) if start else None)
