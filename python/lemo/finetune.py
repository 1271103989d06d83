"""Fine-tuning with token elimination: transformers' Trainer, a PEFT LoRA adapter, and a run folder that survives.

A run folder holds

  run.json          the settings, versions and fingerprints of model and data; written before the first step
  log.jsonl         one line per logged step, and one per event (start, resume, held-out evaluation, end)
  checkpoint-STEP/  the last few complete checkpoints (lemo.checkpoint), in transformers' own layout
  adapter/          the finished PEFT adapter; exists only when the run is complete

Continuing a run gives bit for bit what an uninterrupted run would have given on the same machine: optimizer,
scheduler, random states, the place in the data and the place in the schedule of phases all come from the checkpoint.
"""

from __future__ import annotations

import contextlib
import functools
import json
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

from lemo.checkpoint import Checkpoint, CheckpointError, Checkpoints, compare_settings, locked, write_folder, write_text
from lemo.config import LemoConfig
from lemo.data import Documents, PackedWindows, split_held_out
from lemo.evaluate import score
from lemo.settings import FinetuneSettings

RUN_FILE, LOG_FILE, ADAPTER = "run.json", "log.jsonl", "adapter"


# ---- the log ---------------------------------------------------------------------------------------------------------


def read_log(path: Path) -> list[dict[str, Any]]:
    """The complete lines of a log; a last line cut short by a crash is left out."""
    records = []
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return records


class RunLog:
    """Appends JSON lines, each flushed at once."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def cut(self, step: int) -> None:
        """Drop what was logged after `step`: those steps are about to be done again."""
        records = [r for r in read_log(self.path) if r.get("step", 0) <= step and r.get("event") != "end"]
        write_text(self.path, "".join(json.dumps(r) + "\n" for r in records))

    def write(self, **record: Any) -> None:
        try:
            with self.path.open("a") as f:
                f.write(json.dumps(record) + "\n")
        except OSError as error:
            raise CheckpointError(f"cannot write {self.path}: {error.strerror}; checkpoints are intact") from error


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
        self, *args: Any, checkpoints: Checkpoints, settings: FinetuneSettings, identity: dict[str, Any], **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self._checkpoints, self._finetune, self._identity = checkpoints, settings, identity

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        scheduler: Any = getattr(self, "lr_scheduler", None)
        if scheduler is None:
            rate = functools.partial(learning_rate_factor, self._finetune, num_training_steps)
            scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer or self.optimizer, rate)
            self.lr_scheduler, self._created_lr_scheduler = scheduler, True
        return scheduler

    def _get_train_sampler(self, *_: Any) -> torch.utils.data.Sampler:
        return torch.utils.data.SequentialSampler(self.train_dataset)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        root = self.args.output_dir

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
                f"the loss is {loss} at step {state.global_step}; earlier checkpoints are intact. Lower --lr or raise "
                "--warmup, and check the data"
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
    ) -> None:
        self.model, self.settings, self.log, self.controller, self.held = model, settings, log, controller, held
        self.log_every, self.evaluate_every, self.progress = log_every, evaluate_every, progress
        self.device = next(model.parameters()).device

    def elimination(self) -> dict[str, Any]:
        """The phase of the step just done and the kept ratio of every layer in it."""
        report = self.controller.report()
        record = {
            "phase": {"index": report["phase"], **{k: report[k] for k in ("mode", "keep", "policy")}},
            "kept": [round(r, 4) for r in report["kept"]],
        }
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


def run_settings(folder: Path | str) -> dict[str, Any]:
    """What `run.json` of a run folder holds. Raises CheckpointError."""
    path = Path(folder) / RUN_FILE
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        raise CheckpointError(
            f"{folder}: no readable {RUN_FILE}, so this is no run folder; start a run with lemo finetune --out {folder}"
        ) from None


def _prepare_folder(
    out: Path, identity: dict[str, Any], resume: bool, checkpoints: Checkpoints, report: Callable[[str], None]
) -> Checkpoint | None:
    """Create or check the run folder; the checkpoint to go on from, or None for a fresh start."""
    if not (out / RUN_FILE).exists():
        if resume:
            run_settings(out)
        others = sorted(p.name for p in out.iterdir() if p.name != ".lock") if out.exists() else []
        if others:
            raise CheckpointError(f"{out} is not empty (it holds {others[0]}) and is no run; choose another --out")
        write_text(out / RUN_FILE, json.dumps({**identity, "started": time.strftime("%Y-%m-%dT%H:%M:%S%z")}, indent=1))
        return None
    if not resume:
        raise CheckpointError(f"{out} holds a run already; continue it with --resume, or choose another --out")
    saved = run_settings(out)
    now = json.loads(json.dumps(identity))
    compare_settings(_flat(saved, now), _flat(now, now))
    found = checkpoints.find()
    for line in found.ignored:
        report(f"not used: {line}")
    checkpoints.remove_leftovers()
    return found.checkpoints[-1] if found.checkpoints else None


def _flat(values: dict[str, Any], like: dict[str, Any]) -> dict[str, Any]:
    """Settings and identity as one level of names, so that an error can name the field."""
    flat = {k: v for k, v in values.items() if k in like and k != "settings"}
    return {**flat, **values.get("settings", {})}


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
    identity: what else must be equal for a resumed run to be the same run (merged into run.json).
    save_every: steps between checkpoints, 0 = none.  log_every: steps per log line.
    evaluate_every: steps between dense evaluations of the held-out part, 0 = only at the end.
    Raises ValueError for settings or data, CheckpointError for the run folder.
    """
    from peft import LoraConfig, get_peft_model

    from lemo.predictors import model_fingerprint

    out = Path(out)
    device = next(model.parameters()).device
    held: Documents | None = None
    fingerprints = {"data_sha256": documents.fingerprint(), "model_fingerprint": model_fingerprint(model)}
    if settings.held_out:
        documents, held = split_held_out(documents, settings.held_out, settings.seed, report)
    windows = PackedWindows(
        documents,
        settings.context,
        seed=settings.seed,
        length=settings.steps * settings.batch * settings.accumulate,
        report=report,
    )
    full_identity = {
        "settings": settings.to_json(),
        "device": device.type,
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        **fingerprints,
        **(identity or {}),
    }
    set_seed(settings.seed)
    targets: Any = list(settings.lora_targets)
    try:
        wrapped: Any = get_peft_model(
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
    checkpoints = Checkpoints(out, keep_checkpoints)
    # Everything that can be wrong with the settings shows before the run folder is made.
    with _applied(wrapped, settings.lemo_config()) as controller, locked(out):
        if resume and (out / ADAPTER).is_dir():
            compare_settings(
                _flat(run_settings(out), full_identity), _flat(json.loads(json.dumps(full_identity)), full_identity)
            )
            report(f"{out} is complete already: {settings.steps} steps")
            return FinetuneResult(out / ADAPTER, 0, settings.steps)
        start = _prepare_folder(out, full_identity, resume, checkpoints, report)
        log = RunLog(out / LOG_FILE)
        if resume:
            log.cut(start.step if start else 0)
            report(
                f"going on from step {start.step}" if start else "no complete checkpoint: starting again from step 0"
            )
        log.write(
            event="resume" if start else "start",
            step=start.step if start else 0,
            trainable_parameters=sum(p.numel() for p in wrapped.parameters() if p.requires_grad),
            tokens=documents.num_tokens,
            documents=len(documents),
            pid=os.getpid(),
        )
        run = _Run(wrapped, settings, log, controller, held, log_every, evaluate_every, progress)
        trainer = _Trainer(
            model=wrapped,
            args=_training_arguments(settings, out, device, save_every, log_every),
            train_dataset=windows,
            callbacks=[controller.callback(), _Report(run)],
            checkpoints=checkpoints,
            settings=settings,
            identity=full_identity,
        )
        from transformers import PrinterCallback

        trainer.remove_callback(PrinterCallback)
        wrapped.config.use_cache = False
        trainer.train(resume_from_checkpoint=str(start.folder) if start else None)
        if not evaluate_every or settings.steps % evaluate_every:
            run.evaluate(settings.steps)
    with locked(out):
        write_folder(out / ADAPTER, lambda folder: wrapped.save_pretrained(str(folder)), manifest=False)
        log.write(event="end", step=settings.steps)
    return FinetuneResult(out / ADAPTER, settings.steps - (start.step if start else 0), start.step if start else None)
