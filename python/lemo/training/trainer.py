"""The transformers Trainer of `lemo finetune`: windows in their order, atomic checkpoints, progress and log lines."""

from __future__ import annotations

import functools
import math
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from lemo.data import IGNORE_INDEX, Documents, PackedWindows
from lemo.training.checkpoint import Checkpoints
from lemo.training.evaluate import score
from lemo.training.positions import Positions
from lemo.training.processes import Processes
from lemo.training.run_log import RunLog
from lemo.training.settings import FinetuneSettings


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


class RunTrainer(Trainer):
    """Trainer that reads its windows in order (they are shuffled already) and publishes checkpoints atomically."""

    def __init__(
        self, *args: Any, checkpoints: Checkpoints, run: RunInProgress, identity: dict[str, Any], **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self._checkpoints, self._run, self._identity = checkpoints, run, identity
        self._random_states: list[tuple[str, bytes]] = []
        self._writing = False

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        scheduler: Any = getattr(self, "lr_scheduler", None)
        if scheduler is None:
            rate = functools.partial(learning_rate_factor, self._run.settings, num_training_steps)
            scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer or self.optimizer, rate)
            self.lr_scheduler, self._created_lr_scheduler = scheduler, True
        return scheduler

    def _get_train_sampler(self, *_: Any) -> torch.utils.data.Sampler:
        return torch.utils.data.SequentialSampler(self.train_dataset)

    def store_flos(self) -> None:
        if not self._writing:  # a sum over the processes, of which only the first is writing
            super().store_flos()

    def _random_state(self) -> tuple[str, bytes]:
        """Name and content of the file that Trainer writes for this process's random state."""
        with tempfile.TemporaryDirectory() as folder:
            super()._save_rng_state(folder)
            (path,) = Path(folder).iterdir()
            return path.name, path.read_bytes()

    def _save_rng_state(self, output_dir: str) -> None:
        if self._run.processes.count == 1:
            super()._save_rng_state(output_dir)
        for name, content in self._random_states:
            (Path(output_dir) / name).write_bytes(content)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """The first process writes everything, the others' random states included, so that one rename publishes it."""
        root, processes = self.args.output_dir, self._run.processes
        processes.together(lambda: self._run.check_finite(self.state.global_step))
        self.store_flos()
        if processes.count > 1:
            self._random_states = processes.gather(processes.together(self._random_state))

        def write(folder: Path) -> None:
            # Trainer names the folder itself, below its output folder: let it write there, then lift the files out.
            self.args.output_dir, self._writing = str(folder), True
            try:
                super(RunTrainer, self)._save_checkpoint(*args, **kwargs)
            finally:
                self.args.output_dir, self._writing = root, False
            inner = folder / f"checkpoint-{self.state.global_step}"
            for path in list(inner.iterdir()):
                path.rename(folder / path.name)
            inner.rmdir()
            self._run.save_positions(folder)

        processes.on_first(lambda: self._checkpoints.save(self.state.global_step, write, self._identity))


class Report(TrainerCallback):
    """Progress bar and log lines."""

    def __init__(self, run: RunInProgress) -> None:
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
            disable=not (self.run.progress and self.run.processes.first),
        )
        peak_memory(self.run.device)
        self.started = self.last = time.perf_counter()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        if not logs or "loss" not in logs:
            return
        loss = float(logs["loss"])
        if self.run.processes.first:
            self._write(loss, state.global_step, logs)
        if not math.isfinite(loss):
            raise FloatingPointError(
                f"the loss is {loss} at step {state.global_step}; earlier checkpoints are intact. "
                + self.run.advice(state.global_step)
            )

    def _write(self, loss: float, step: int, logs: dict[str, Any]) -> None:
        now = time.perf_counter()
        tokens = self.run.tokens(step)
        self.run.log.write(
            step=step,
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

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.bar.update(state.global_step - self.bar.n)
        if self.run.evaluate_every and state.global_step % self.run.evaluate_every == 0:
            before = time.perf_counter()
            self.run.evaluate(state.global_step)
            spent = time.perf_counter() - before  # the step's own line of the log follows, without it
            self.last, self.started = self.last + spent, self.started + spent

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.bar.close()


@dataclass(frozen=True)
class RunInProgress:
    """What the Trainer and its callback need to know of the run.

    held: documents that are scored and never trained on. log_every, evaluate_every: in steps; 0 = never.
    processes: of which the first alone writes and shows progress. positions: those of the model, if they are stretched.
    """

    model: Any
    settings: FinetuneSettings
    log: RunLog
    controller: Any
    held: Documents | None
    windows: PackedWindows
    log_every: int
    evaluate_every: int
    progress: bool
    processes: Processes
    positions: Positions | None = None

    @property
    def windows_per_step(self) -> int:
        """Windows of one optimizer step, in all processes."""
        return self.settings.batch * self.settings.accumulate * self.processes.count

    def tokens(self, step: int) -> int:
        """Of the steps up to `step` that a line of the log is about, in all processes."""
        first = range(step - self.log_every, step)
        return sum(self.windows_per_step * self.windows.tokens(s * self.windows_per_step) for s in first if s >= 0)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def save_adapter(self, folder: Path) -> None:
        self.model.save_pretrained(folder)
        self.save_positions(folder)

    def save_positions(self, folder: Path) -> None:
        """Next to an adapter: wherever it is copied, it says for which positions it was trained."""
        if self.positions is not None:
            self.positions.write(folder)

    def check_finite(self, step: int) -> None:
        """Raises FloatingPointError before weights that are not finite reach the disk."""
        bad = [n for n, p in self.model.named_parameters() if p.requires_grad and not bool(p.isfinite().all())]
        if bad:
            raise FloatingPointError(
                f"{len(bad)} weights of the adapter are not finite at step {step}, {bad[0]} for one. They were not "
                f"saved; earlier checkpoints are intact. {self.advice(step)}"
            )

    def advice(self, step: int) -> str:
        """What to look at after a step without a finite result."""
        per_step = self.windows_per_step
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
        window = self.settings.stages()[report["phase"]].window
        record = {
            "phase": {
                "index": report["phase"],
                **{k: report[k] for k in ("mode", "keep", "policy")},
                **report["limits"],
                **({} if window == 1 else {"window": float(window)}),
            },
            "kept": [round(r, 4) for r in report["kept"]],
        }
        if report["loss_tokens"] is not None:
            record["loss_tokens"] = report["loss_tokens"]
        if report["mlp_kept"] != report["kept"]:
            record["mlp_kept"] = [round(r, 4) for r in report["mlp_kept"]]
        if report["memory"]:
            record["memory"] = report["memory"]
        if report["density"]:
            record["density"] = [round(r, 4) for r in report["density"]]
            if None not in report["covered"]:
                record["covered"] = [round(r, 4) for r in report["covered"]]
        return record

    def evaluate(self, step: int) -> None:
        if self.held is None:
            return
        scores = score(self.model, self.held, self.settings.context, processes=self.processes)
        p = scores.perplexity()
        interval = [p.low, p.high] if math.isfinite(p.high) else None
        self.log.write(event="held-out", step=step, perplexity=p.value, interval=interval)


def training_arguments(
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
        ddp_find_unused_parameters=False,  # every trained parameter belongs to the graph of every pass
    )
    args._n_gpu = min(1, args.n_gpu)  # one process, one GPU: Trainer would replicate the model over all it sees
    return args
