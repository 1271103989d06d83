"""Fine-tuning with token elimination: transformers' Trainer, a PEFT LoRA adapter, a run folder that survives crashes.

A run folder holds

  run.json          the run's identity (lemo.training.run_folder), written before the first step, and what changed since
  log.jsonl         one line per logged step, and one per event (start, resume, held-out evaluation, end)
  maps.jsonl        what layers kept at a few steps (lemo.training.maps), for `lemo report --html`
  checkpoint-STEP/  the last few complete checkpoints (lemo.training.checkpoint), in transformers' own layout
  adapter/          the finished PEFT adapter; exists only when the run is complete

Checkpoints and adapter also say for which positions they were trained, if these were stretched
(lemo.training.positions).

Resuming a run gives, bit for bit, what an uninterrupted run would have given on the same machine: optimizer,
scheduler, random states, the place in the data and the place in the schedule of phases all come from the checkpoint.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import set_seed

from lemo.data import Documents, PackedWindows, split_held_out
from lemo.engine.budget import planned_together
from lemo.engine.config import LemoConfig
from lemo.training.checkpoint import Checkpoint, CheckpointError, Checkpoints, locked, write_folder
from lemo.training.evaluate import check_scorable
from lemo.training.maps import MAPS_FILE, MapRecorder
from lemo.training.phases import planned_phases, stopped
from lemo.training.positions import Positions
from lemo.training.processes import Processes
from lemo.training.run_folder import (
    ADAPTER,
    RUN_FILE,
    check_complete,
    check_identity,
    check_same,
    continue_run,
    environment,
    is_complete,
    processes_of,
    run_checkpoints,
    run_settings,
    start_run,
)
from lemo.training.run_log import LOG_FILE, RunLog, read_log
from lemo.training.settings import FinetuneSettings
from lemo.training.trainer import Report, RunInProgress, RunTrainer, training_arguments
from lemo.training.windows import training_windows

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


def with_adapter(model: Any, settings: FinetuneSettings) -> Any:
    """The model wrapped by PEFT with a fresh LoRA adapter. Raises ValueError."""
    from peft import LoraConfig, get_peft_model

    from lemo.engine.families import find

    targets: Any = list(settings.lora_targets or find(model)[0].lora_targets)
    saved = list(settings.modules_to_save or ())
    names = {name for path, _ in model.named_modules() for name in (path, path.rpartition(".")[2])}
    if unknown := [name for name in saved if name not in names]:
        raise ValueError(f"modules_to_save {saved}: the model has no module {', '.join(unknown)}")
    if both := [name for name in saved if name.rpartition(".")[2] in targets]:
        raise ValueError(
            f"modules_to_save {saved}: {', '.join(both)} would have no LoRA, which lora_targets {targets} asks for; "
            "name it in one of the two"
        )
    try:
        return get_peft_model(
            model,
            LoraConfig(
                r=settings.lora_rank,
                lora_alpha=settings.lora_alpha,
                lora_dropout=settings.lora_dropout,
                target_modules=targets[0] if targets == ["all-linear"] else targets,
                use_dora=settings.dora,
                use_rslora=settings.rslora,
                modules_to_save=saved or None,
                task_type="CAUSAL_LM",
            ),
        )
    except ValueError as error:
        raise ValueError(f"lora_targets {targets}: {str(error).splitlines()[0]}") from error


def _identity(model: Any, documents: Documents, settings: FinetuneSettings, more: dict[str, Any]) -> dict[str, Any]:
    """What the run is (see lemo.training.run_folder). Raises CalibrationError if the calibration cannot be read."""
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


# Many arguments, but four of them positional: what decides the result is in `settings`, the rest are options by name.
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
    maps: int = 0,
    progress: bool = True,
    report: Callable[[str], None] = lambda line: None,
) -> FinetuneResult:
    """Train a LoRA adapter on `documents` and leave it in OUT/adapter.

    model: a transformers causal LM on its device; it is wrapped by PEFT in place.
    identity: what else must be equal for a resumed run to be the same run (merged into run.json). Under "inputs", the
    places "model", "tokenizer" and "data" may differ: what they hold is compared instead.
    save_every: steps between checkpoints, 0 = none.  log_every: steps per log line.
    evaluate_every: steps between dense evaluations of the held-out part, 0 = only at the end.
    maps: steps at which kept blocks and tiles are recorded for the run's page, 0 = none.
    Started by torchrun or accelerate launch, each process trains on its own share of every step's windows (see
    `FinetuneSettings.batch`), and the first alone writes, logs and reports.
    Raises ValueError for settings or data, CheckpointError for the run folder, and AnotherProcessFailed if another
    process raised one of these.
    """
    out = Path(out).expanduser()  # as Trainer does with its own output folder
    settings = settings.spelled_out()
    processes = Processes.join(next(model.parameters()).device)
    report = report if processes.first else _silent
    checkpoints = run_checkpoints(out, keep_checkpoints)
    with contextlib.ExitStack() as lock:  # the folder is held until the adapter is in it
        with contextlib.ExitStack() as applied:
            # Everything that can be wrong with the settings shows before the run folder is made.
            more = {"processes": processes.count, **(identity or {})}
            inputs = processes.together(
                lambda: _inputs(model, documents, settings, more, out if resume else None, report)
            )
            check_same(processes, inputs.identity)
            set_seed(settings.seed)
            wrapped = processes.together(lambda: with_adapter(model, settings))
            controller = processes.together(lambda: applied.enter_context(_applied(wrapped, settings.lemo_config())))
            processes.together(lambda: _report_memory(controller, settings, report))
            opened = processes.on_first(lambda: _open(lock, out, inputs.identity, resume, checkpoints, report))
            if opened.complete:
                return FinetuneResult(out / ADAPTER, 0, settings.steps)
            start = opened.start
            _report_other_keep(controller, report)
            _report_warmup(settings, report)
            processes.together(lambda: _check_visible(start))
            log = RunLog(out / LOG_FILE, processes.first)
            _log_start(log, wrapped, inputs.documents, start, processes.count)
            data = (inputs.held, inputs.windows)
            positions = Positions.of(model.config, settings.context)
            run = RunInProgress(
                wrapped, settings, log, controller, *data, log_every, evaluate_every, progress, processes, positions
            )
            size = settings.block_size
            recorder = MapRecorder(controller, out / MAPS_FILE, size, maps, processes.first, inputs.windows)
            _train(run, checkpoints, inputs.identity, save_every, start, recorder, report)
        processes.on_first(lambda: write_folder(out / ADAPTER, run.save_adapter, manifest=False))
        log.write(event="end", step=settings.steps)
    return FinetuneResult(out / ADAPTER, settings.steps - (start.step if start else 0), start.step if start else None)


def _silent(line: str) -> None:
    """The report of every process but the first."""


@dataclass(frozen=True)
class _Inputs:
    """The run's identity, the documents to train on, those held out, and the windows of all steps and processes."""

    identity: dict[str, Any]
    documents: Documents
    held: Documents | None
    windows: PackedWindows


def _inputs(
    model: Any,
    documents: Documents,
    settings: FinetuneSettings,
    more: dict[str, Any],
    resumed: Path | None,
    report: Callable[[str], None],
) -> _Inputs:
    """more: of the identity. resumed: the folder of a run that must have it. Raises ValueError or CheckpointError."""
    identity = _identity(model, documents, settings, more)
    held: Documents | None = None
    if settings.held_out:
        documents, held = split_held_out(documents, settings.held_out, settings.seed, report)
        check_scorable(held, settings.context, "the held-out part")  # it is scored last: not after hours of training
        identity["training_sha256"] = documents.fingerprint()  # another lemo may split in another way
    if resumed:
        check_identity(resumed, identity)  # before the calibration refuses another model with a less specific message
    _report_cut_answers(documents, settings, report)
    windows = training_windows(documents, settings, processes=identity["processes"], report=report)
    return _Inputs(identity, documents, held, windows)


@dataclass(frozen=True)
class _Opened:
    """A run folder that this run holds. complete: there is nothing left to do; start: where training resumes."""

    complete: bool
    start: Checkpoint | None


def _open(
    lock: contextlib.ExitStack,
    out: Path,
    identity: dict[str, Any],
    resume: bool,
    checkpoints: Checkpoints,
    report: Callable[[str], None],
) -> _Opened:
    """Locks the run folder and prepares it. Raises CheckpointError."""
    lock.enter_context(locked(out))
    if resume and is_complete(out):
        check_complete(out, identity, checkpoints, report)
        report(f"{out} is complete already: {identity['settings']['steps']} steps")
        return _Opened(True, None)
    start = _begin(out, identity, resume, checkpoints, report)
    if resume:
        last = start.step if start else 0
        RunLog(out / LOG_FILE).cut(last, report)
        if (out / MAPS_FILE).exists():
            RunLog(out / MAPS_FILE).cut(last, report)
    return _Opened(False, start)


def _report_other_keep(controller: Any, report: Callable[[str], None]) -> None:
    """Reports phases that keep another share of the blocks than their predictors were calibrated for."""
    config, predictors = controller.config, controller.predictors
    if predictors is None:
        return
    calibrated, others = predictors.calibrated_keep, set()
    for phase in config.phases:
        policy, options = config.policy(phase)
        predicted = policy in ("predictors", "sampled") and options.get("source", "predictors") == "predictors"
        if phase.chooses_blocks and predicted and abs(phase.keep - calibrated) > 0.005:
            others.add(phase.keep)
    if others:
        report(
            f"WARNING: the calibration was made for --keep {calibrated:g}, the schedule keeps "
            f"{' and '.join(f'{keep:g}' for keep in sorted(others))}: its scores still rank the blocks, but were "
            "learned from layers that see another share of them; calibrate with the same --keep"
        )


def _report_warmup(settings: FinetuneSettings, report: Callable[[str], None]) -> None:
    """Reports a run that ends before its learning rate is reached."""
    if settings.steps < settings.warmup:
        report(
            f"WARNING: the learning rate rises over {settings.warmup} steps (--warmup), of which the run has "
            f"{settings.steps}: it ends at {settings.steps / settings.warmup:.0%} of {settings.lr:g}"
        )


def _report_cut_answers(documents: Documents, settings: FinetuneSettings, report: Callable[[str], None]) -> None:
    """Reports a schedule that trains on parts of windows where few tokens are labels: on answers, most likely."""
    shortest = min(settings.window_lengths())
    if documents.trained is None or shortest == settings.context:
        return
    labels = int(documents.trained.sum())
    if labels < documents.num_tokens / 2:
        report(
            f"WARNING: {labels} of {documents.num_tokens} tokens are labels, and the schedule trains on "
            f"{shortest} tokens of a window of {settings.context} at a time: an answer may be cut off from what it is "
            "about; --schedule whole-documents keeps them together"
        )


def _report_memory(controller: Any, settings: FinetuneSettings, report: Callable[[str], None]) -> None:
    """Reports what layers save, if a budget or offload decides. Raises ValueError, naming every phase that does not
    fit."""
    if not settings.lemo_config().plans_memory:
        return
    element = controller.model.get_input_embeddings().weight.element_size()
    phases = controller.config.phases
    # Of whole windows: those of several documents need about as much.
    plans = planned_together(
        functools.partial(controller.savings.planned, phase, (tokens,) * settings.batch, element)
        for phase, tokens in zip(phases, settings.window_lengths(), strict=True)
    )
    for phase, planned, plan in zip(phases, planned_phases(settings), plans, strict=True):
        report(f"planned for {planned.steps}, {phase.mode} keep {phase.keep:g}: {plan}")


def _check_visible(start: Checkpoint | None) -> None:
    if start is not None and not start.folder.is_dir():
        raise CheckpointError(
            f"{start.folder} is not visible to every process; to resume on several machines, keep the run folder on a "
            "file system that they share"
        )


def _log_start(log: RunLog, model: Any, documents: Documents, start: Checkpoint | None, processes: int) -> None:
    log.write(
        event="resume" if start else "start",
        step=start.step if start else 0,
        trainable_parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
        tokens=documents.num_tokens,
        documents=len(documents),
        processes=processes,
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
    recorder: MapRecorder,
    report: Callable[[str], None],
) -> None:
    from transformers import PrinterCallback

    trainer = RunTrainer(
        model=run.model,
        args=training_arguments(run.settings, checkpoints.root, run.device, save_every, run.log_every),
        train_dataset=run.windows,
        callbacks=[run.controller.callback(), Report(run), recorder],
        checkpoints=checkpoints,
        run=run,
        identity=identity,
    )
    if trainer.args.world_size != run.processes.count:
        raise RuntimeError(
            f"transformers sees {trainer.args.world_size} processes, lemo {run.processes.count}; start several with "
            "torchrun or accelerate launch"
        )
    if run.processes.count > 1:
        # For dropout; the adapter's first weights, equal in all processes, were drawn before.
        set_seed((run.settings.seed + run.processes.rank) % (1 << 32))
    if start and processes_of(start.settings) != run.processes.count:
        # A process without a random state in the checkpoint must not draw what it drew in the first steps.
        set_seed((run.settings.seed + run.processes.rank + 65537 * start.step) % (1 << 32))
    trainer.remove_callback(PrinterCallback)
    run.model.config.use_cache = False
    try:
        trainer.train(resume_from_checkpoint=str(start.folder) if start else None)
    except BaseException as error:
        done, by_hand = trainer.state.global_step, isinstance(error, KeyboardInterrupt)
        run.controller.total_steps = None  # or it would name the phases to come as those that training ended without
        if by_hand:
            run.log.write(event="interrupted", step=done)
        if by_hand or done:
            report(stopped(run.settings, done))
        raise
    last = run.settings.steps
    run.processes.together(lambda: run.check_finite(last))
    if not run.evaluate_every or last % run.evaluate_every:
        run.evaluate(last)
