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
import functools
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed

from lemo.data import IGNORE_INDEX, Documents, PackedWindows, split_held_out
from lemo.engine.config import LemoConfig
from lemo.training.checkpoint import Checkpoint, CheckpointError, Checkpoints, locked, write_folder
from lemo.training.evaluate import check_scorable, score
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

__all__ = ["ADAPTER", "LOG_FILE", "RUN_FILE", "FinetuneResult", "RunLog", "finetune", "read_log", "run_settings"]


def peak_memory(device: torch.device) -> int:
    """Bytes: the CUDA allocator's peak since the last call, or the process's peak resident set on the CPU."""
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return peak
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


# ---- Trainer ---------------------------------------------------------------------------------------------------------


def learning_rate_factor(settings: FinetuneSettings, steps: int, step: int) -> float:
    """Factor on the learning rate in `step` (from 0): a linear rise over `warmup` steps, then the schedule.

    The first step already moves (1 / warmup); linear and cosine end just above 0 in the last step.
    """
    if step < settings.warmup:
        return (step + 1) / settings.warmup
    left = (steps - step) / max(1, steps - settings.warmup)
    return {"constant": 1.0, "linear": left, "cosine": 0.5 - 0.5 * math.cos(math.pi * left)}[settings.lr_schedule]


class _Trainer(Trainer):
    """Trainer that reads its windows in order (they are shuffled already) and publishes checkpoints atomically."""

    def __init__(
        self, *args: Any, checkpoints: Checkpoints, run: _Run, identity: dict[str, Any], **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self._checkpoints, self._run, self._identity = checkpoints, run, identity

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        scheduler: Any = getattr(self, "lr_scheduler", None)
        if scheduler is None:
            rate = functools.partial(learning_rate_factor, self._run.settings, num_training_steps)
            scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer or self.optimizer, rate)
            self.lr_scheduler, self._created_lr_scheduler = scheduler, True
        return scheduler

    def _get_train_sampler(self, *_: Any) -> torch.utils.data.Sampler:
        return torch.utils.data.SequentialSampler(self.train_dataset)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        root = self.args.output_dir
        self._run.check_finite(self.state.global_step)

        def write(folder: Path) -> None:
            # Trainer names the folder itself, below its output folder: let it write there, then lift the files out.
            self.args.output_dir = str(folder)
            try:
                super(_Trainer, self)._save_checkpoint(*args, **kwargs)
            finally:
                self.args.output_dir = root
            inner = folder / f"checkpoint-{self.state.global_step}"
            for path in list(inner.iterdir()):
                path.rename(folder / path.name)
            inner.rmdir()

        self._checkpoints.save(self.state.global_step, write, self._identity)


class _Report(TrainerCallback):
    """Progress bar and log lines."""

    def __init__(self, run: _Run) -> None:
        self.run = run
        self.started = self.last = time.perf_counter()
        self.bar: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        from tqdm import tqdm

        self.bar = tqdm(
            total=state.max_steps,
            initial=state.global_step,
            desc="fine-tuning",
            unit=" steps",
            file=sys.stderr,
            dynamic_ncols=True,
            disable=not self.run.progress,
        )
        peak_memory(self.run.device)
        self.started = self.last = time.perf_counter()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        if not logs or "loss" not in logs:
            return
        loss = float(logs["loss"])
        now = time.perf_counter()
        settings = self.run.settings
        tokens = settings.context * settings.batch * settings.accumulate * self.run.log_every
        self.run.log.write(
            step=state.global_step,
            loss=loss,
            lr=logs.get("learning_rate"),
            grad_norm=logs.get("grad_norm"),
            tokens_per_second=round(tokens / (now - self.last), 2),
            peak_memory_bytes=peak_memory(self.run.device),
            **self.run.elimination(),
        )
        self.last = now
        self.bar.set_postfix_str(f"loss {loss:.4f}, {tokens / max(now - self.started, 1e-9):.0f} tok/s", refresh=False)
        self.started = now
        if not math.isfinite(loss):
            raise FloatingPointError(
                f"the loss is {loss} at step {state.global_step}; earlier checkpoints are intact. "
                + self.run.advice(state.global_step)
            )

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.bar.update(state.global_step - self.bar.n)
        if self.run.evaluate_every and state.global_step % self.run.evaluate_every == 0:
            self.run.evaluate(state.global_step)
            self.last = time.perf_counter()

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.bar.close()


class _Run:
    """What the callback needs to know of a run in progress."""

    def __init__(
        self,
        model: Any,
        settings: FinetuneSettings,
        log: RunLog,
        controller: Any,
        held: Documents | None,
        log_every: int,
        evaluate_every: int,
        progress: bool,
        windows: PackedWindows,
    ) -> None:
        self.model, self.settings, self.log, self.controller, self.held = model, settings, log, controller, held
        self.windows = windows
        self.log_every, self.evaluate_every, self.progress = log_every, evaluate_every, progress
        self.device = next(model.parameters()).device

    def check_finite(self, step: int) -> None:
        """Raises FloatingPointError before weights that are no numbers reach the disk."""
        bad = [n for n, p in self.model.named_parameters() if p.requires_grad and not bool(p.isfinite().all())]
        if bad:
            raise FloatingPointError(
                f"{len(bad)} weights of the adapter are not finite at step {step}, {bad[0]} for one. They were not "
                f"saved; earlier checkpoints are intact. {self.advice(step)}"
            )

    def advice(self, step: int) -> str:
        """What to look at after a step without a finite result."""
        per_step = self.settings.batch * self.settings.accumulate
        read = range(max(0, step - self.log_every) * per_step, min(step * per_step, len(self.windows)))
        empty = sum(bool((self.windows[i]["labels"] == IGNORE_INDEX).all()) for i in read)
        if empty:
            return (
                f"{empty} of the {len(read)} windows since the last line of the log have no label to learn from "
                "(documents of one token?): look at the data"
            )
        return "Lower --lr or raise --warmup, and check the data"

    def elimination(self) -> dict[str, Any]:
        """The phase of the step just done and the kept ratio of every layer in it."""
        report = self.controller.report()
        record = {
            "phase": {"index": report["phase"], **{k: report[k] for k in ("mode", "keep", "policy")}},
            "kept": [round(r, 4) for r in report["kept"]],
        }
        if report["loss_tokens"] is not None:
            record["loss_tokens"] = report["loss_tokens"]
        if report["mlp_kept"] != report["kept"]:
            record["mlp_kept"] = [round(r, 4) for r in report["mlp_kept"]]
        return record

    def evaluate(self, step: int) -> None:
        if self.held is None:
            return
        scores = score(self.model, self.held, self.settings.context)
        p = scores.perplexity()
        interval = [p.low, p.high] if math.isfinite(p.high) else None
        self.log.write(event="held-out", step=step, perplexity=p.value, interval=interval)


# ---- the run ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FinetuneResult:
    """adapter: folder of the PEFT adapter. steps: done in this call. resumed_from: a step, or None (fresh start)."""

    adapter: Path
    steps: int
    resumed_from: int | None


def _training_arguments(
    settings: FinetuneSettings, out: Path, device: torch.device, save_every: int, log_every: int
) -> TrainingArguments:
    args = TrainingArguments(
        output_dir=str(out),
        max_steps=settings.steps,
        per_device_train_batch_size=settings.batch,
        gradient_accumulation_steps=settings.accumulate,
        learning_rate=settings.lr,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        optim="adamw_torch",
        adam_beta2=0.95,
        seed=settings.seed,
        logging_steps=log_every,
        logging_nan_inf_filter=False,
        save_strategy="steps" if save_every else "no",
        save_steps=save_every or settings.steps,
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=device.type == "cuda",
        use_cpu=device.type == "cpu",
    )
    args._n_gpu = min(1, args.n_gpu)  # one process, one GPU: Trainer would replicate the model over all it sees
    return args


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
            run = _Run(wrapped, settings, log, controller, held, log_every, evaluate_every, progress, windows)
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
    """The checkpoint that training goes on from, or None. Raises CheckpointError."""
    if not resume:
        if (out / RUN_FILE).exists():
            raise CheckpointError(f"{out} holds a run already; continue it with --resume, or choose another --out")
        start_run(out, identity)
        return None
    start = continue_run(out, identity, checkpoints, report)
    report(f"going on from step {start.step}" if start else "no complete checkpoint: starting again from step 0")
    return start


def _train(
    run: _Run,
    checkpoints: Checkpoints,
    identity: dict[str, Any],
    save_every: int,
    start: Checkpoint | None,
) -> None:
    from transformers import PrinterCallback

    trainer = _Trainer(
        model=run.model,
        args=_training_arguments(run.settings, checkpoints.root, run.device, save_every, run.log_every),
        train_dataset=run.windows,
        callbacks=[run.controller.callback(), _Report(run)],
        checkpoints=checkpoints,
        run=run,
        identity=identity,
    )
    trainer.remove_callback(PrinterCallback)
    run.model.config.use_cache = False
    trainer.train(resume_from_checkpoint=str(start.folder) if start else None)
