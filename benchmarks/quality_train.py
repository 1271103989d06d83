"""One run of the quality study: an adapter is trained by a schedule and evaluated on the dense model."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lemo.data import questions
from lemo.training import longrange
from quality_data import sequences, token_files, windows
from quality_schedules import PREDICTING, Row, Segment
from torch import Tensor

BLOCK = 64
LORA_R, LORA_ALPHA = 8, 16
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj"]
SWEEP_SEED = 1000  # of the runs that choose batch size and learning rate; no run of the tables has it
HEAD_ROWS = 4096  # rows whose logits exist at a time


class OutOfTime(Exception):
    """The run would not end before the deadline; nothing of it is kept."""


@dataclass(frozen=True)
class Task:
    """What all runs of a study share. items: windows per domain (A, B) or documents (C) in an evaluation."""

    setting: str
    model: str
    tokens: str | None
    context: int
    items: int
    adapt: str = "headers"
    calibration: str | None = None


@dataclass(frozen=True)
class Spec:
    """One run. purpose "sweep" is evaluated on other held-out text than "final"."""

    segments: tuple[Segment, ...]
    batch: int
    rate: float
    seed: int
    purpose: str
    edges: bool = False

    @property
    def predicts(self) -> bool:
        """Whether it needs predictors."""
        return any(s.phase.get("policy") in PREDICTING for s in self.segments)

    def to_dict(self) -> dict[str, Any]:
        values = dataclasses.asdict(self)
        values["segments"] = [[s.steps, dict(s.phase), str(s.window)] for s in self.segments]
        return values


def name_of(spec: Spec) -> str:
    """Of the run's file: everything that decides its result."""
    return hashlib.sha256(json.dumps(spec.to_dict(), sort_keys=True).encode()).hexdigest()[:16]


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def load_base(task: Task) -> Any:
    """The model at the study's context; by position interpolation if its own is shorter."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(task.model, trust_remote_code=False)
    native = config.max_position_embeddings
    if native < task.context:
        config.rope_parameters = {
            **config.rope_parameters,
            "rope_type": "linear",
            "factor": task.context / native,
        }
        config.max_position_embeddings = task.context
    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    model = AutoModelForCausalLM.from_pretrained(
        task.model, config=config, dtype=dtype, attn_implementation="sdpa", trust_remote_code=False
    )
    return model.to(device())


# ---- documents -------------------------------------------------------------------------------------------------------


def train_files(task: Task) -> dict[str, np.ndarray]:
    assert task.tokens is not None
    return token_files(Path(task.tokens), f"adapt_{task.adapt}" if task.setting == "B" else "train")


def question_source(task: Task, purpose: str) -> questions.Source:
    """Filler of the study's text if there is a tokenizer; of random ids if the model has none."""
    from transformers import AutoConfig, AutoTokenizer

    if task.tokens is None:
        return questions.raw_source(AutoConfig.from_pretrained(task.model).vocab_size)
    files = train_files(task) if purpose == "train" else token_files(Path(task.tokens), "dev_")
    return questions.tokenizer_source(
        AutoTokenizer.from_pretrained(task.model), np.concatenate(list(files.values())).astype(np.int64)
    )


def too_short(task: Task, row: Row) -> str | None:
    """Why documents as long as the row's windows cannot be made, or None."""
    shortest = min(stage.window for stage in row.stages)
    return None if task.setting != "C" or shortest == 1 else _no_room(task, int(task.context * shortest))


@functools.cache
def _no_room(task: Task, length: int) -> str | None:
    if not Path(task.model).is_dir():
        return None  # a plan needs no model
    try:
        questions.document(question_source(task, "train"), length, SWEEP_SEED, 0)
    except ValueError as error:
        return str(error)
    return None


def batches(task: Task, spec: Spec) -> Iterator[dict[str, Tensor]]:
    """The inputs of every step. Sequence k of a seed is the same in every run; a window is a part of it."""
    text = None if task.setting == "C" else sequences(train_files(task), task.context, spec.seed)
    source = question_source(task, "train") if task.setting == "C" else None
    rng = np.random.default_rng([spec.seed, 1])
    index = 0
    for segment in spec.segments:
        length = int(task.context * segment.window)
        for _ in range(segment.steps):
            rows, labels, positions = [], [], []
            for _ in range(spec.batch):
                offset = int(rng.integers(0, task.context - length + 1))
                if source is not None:  # a shorter document with the same questions, at shifted positions
                    made = questions.document(source, length, spec.seed, index)
                    rows.append(made.ids)
                    labels.append(made.labels)
                else:
                    assert text is not None
                    rows.append(next(text)[offset : offset + length])
                    labels.append(rows[-1])
                positions.append(np.arange(offset, offset + length))
                index += 1
            found = {"input_ids": rows, "labels": labels}
            if segment.window < 1:
                found["position_ids"] = positions
            yield {name: torch.from_numpy(np.stack(values)).to(device()) for name, values in found.items()}


# ---- evaluation ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def window_losses(model: Any, rows: np.ndarray) -> list[float]:
    """Mean loss of every window [n, context]."""
    found = []
    for row in rows:
        ids = torch.from_numpy(row.astype(np.int64))[None].to(device())
        hidden = model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state[0, :-1]
        total = 0.0
        for part, target in zip(hidden.split(HEAD_ROWS), ids[0, 1:].split(HEAD_ROWS), strict=True):
            logits = model.get_output_embeddings()(part).float()
            total += torch.nn.functional.cross_entropy(logits, target, reduction="sum").item()
        found.append(round(total / (len(row) - 1), 6))
    return found


def evaluate(task: Task, model: Any, purpose: str) -> dict[str, dict[str, list[float]]]:
    """By group (a domain; a task at a distance), an entry per window or document: loss, and for answers correct."""
    model.eval()
    final = purpose == "final"
    if task.setting == "C":
        source = question_source(task, purpose)
        seed = 900_001 if final else 900_002
        made = [questions.document(source, task.context, seed, i) for i in range(task.items)]
        return longrange.evaluate(model, made)
    assert task.tokens is not None
    files = token_files(Path(task.tokens), "dev_")
    return {
        name: {"loss": window_losses(model, windows(a, task.context, task.items, second=final))}
        for name, a in files.items()
    }


# ---- training --------------------------------------------------------------------------------------------------------


def config_of(task: Task, spec: Spec, layers: int) -> Any:
    """Phases by numbers of steps. Exact steps between others make a phase each."""
    import lemo

    recompute = "full" if task.context * spec.batch > 16384 else "none"
    return lemo.LemoConfig(
        block_size=BLOCK,
        seed=spec.seed,
        recompute=recompute,
        calibration=task.calibration if spec.predicts else None,
        layers=range(1, layers - 1) if spec.edges else None,
        phases=[lemo.Phase(**{**s.phase, "share": s.steps}) for s in spec.segments],
    )


def train(task: Task, spec: Spec, deadline: float = math.inf) -> dict[str, Any]:
    """Losses by group, and what the run took. Raises OutOfTime at the deadline (of time.time())."""
    import lemo
    from peft import LoraConfig, get_peft_model

    start = time.time()
    torch.manual_seed(spec.seed)
    lora = LoraConfig(r=LORA_R, lora_alpha=LORA_ALPHA, target_modules=TARGETS, task_type="CAUSAL_LM")
    model: Any = get_peft_model(load_base(task), lora)
    trained = [p for p in model.parameters() if p.requires_grad]
    for p in trained:
        p.data = p.data.float()
    total = sum(s.steps for s in spec.segments)
    losses: list[Tensor] = []
    if total:
        controller = lemo.apply(model, config_of(task, spec, model.config.num_hidden_layers))
        controller.total_steps = total
        optimizer = torch.optim.AdamW(trained, lr=spec.rate, betas=(0.9, 0.95), weight_decay=0.0)
        warm = max(1, min(20, total // 10))
        model.train()
        for step, inputs in enumerate(batches(task, spec)):
            if time.time() > deadline:
                raise OutOfTime
            for group in optimizer.param_groups:
                group["lr"] = spec.rate * min(1.0, (step + 1) / warm)
            loss = model(**inputs).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            controller.step()
            losses.append(loss.detach())
        train_loss = torch.stack(losses[-20:]).mean().item()
        lemo.remove(model)
    train_s = time.time() - start
    found = evaluate(task, model.get_base_model(), spec.purpose)
    result = {"steps": total, "train_s": round(train_s, 1), "wall_s": round(time.time() - start, 1), "losses": found}
    if total:
        result["train_loss"] = round(train_loss, 4)
    if torch.cuda.is_available():
        result["peak_mib"] = torch.cuda.max_memory_allocated() >> 20
        torch.cuda.reset_peak_memory_stats()
    return result


def calibrate(task: Task, out: Path, steps: int) -> None:
    """Predictors for the base at the study's context, from its training text."""
    from lemo.predictors import calibrate as fit

    if task.setting == "C":
        documents = (b["input_ids"] for b in batches(task, plain_spec(11)))
    else:
        documents = (torch.from_numpy(row)[None].to(device()) for row in sequences(train_files(task), task.context, 11))
    model = load_base(task)
    fit(model, documents, block_size=BLOCK, keep=0.5, steps=steps, max_documents=48, progress=False).save(out)


def plain_spec(seed: int) -> Spec:
    """Dense documents without end."""
    return Spec((Segment(1 << 30, {"mode": "dense"}, Fraction(1)),), 1, 0.0, seed, "train")


def mean_loss(result: dict[str, Any], groups: Sequence[str] | None = None) -> float:
    """Over groups, each by its mean."""
    losses = result["losses"]
    return float(np.mean([np.mean(losses[g]["loss"]) for g in groups or losses]))
