"""Controls elimination for one model: which phase a step belongs to, which blocks a pass keeps, and what to report."""

from __future__ import annotations

import copy
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lemo import ops
from lemo.engine.checks import check_modules, check_randomness, loose_modules, trained_parameters
from lemo.engine.config import LemoConfig, Phase
from lemo.engine.families.base import Family
from lemo.engine.layout import Kept
from lemo.engine.packing import Packed
from lemo.engine.participation import Participation, may_keep_output, outputs_of, trains_before_layers
from lemo.engine.policies import Policy, StepContext, make_policy, mix_seed
from lemo.engine.stack import Stack, Step
from lemo.engine.wrappers import base_model
from lemo.integration import trl_head
from lemo.integration.callback import LemoCallback
from lemo.integration.checks_peft import check_adapters, check_device, check_weights
from lemo.integration.entries import controller_of
from lemo.integration.reference import Pass, Passes, adapters_disabled
from lemo.integration.replay import Draw, Draws, under_checkpoint
from lemo.integration.schedule import Schedule
from lemo.integration.trainers import refuse_comparisons, running_trainer, skips_tokens

logger = logging.getLogger(__name__)

_EVAL_MODE = (
    "the model is in eval mode, as from_pretrained returns it (inside a PeftModel too, whose own flag says otherwise). "
    "Call model.train() to train, or use torch.no_grad() to evaluate"
)


class Controller:
    """Steers a model that lemo was applied to, and tells what it does.

    total_steps: optimizer steps of the run; set it in a loop of your own if the schedule has several phases (the
    Trainer's callback does it for you). kept_ratios, mlp_kept_ratios: of the last forward pass, kept blocks over all
    blocks, by layer.
    """

    def __init__(self, family: Family, model: Any, config: LemoConfig, predictors: Any) -> None:
        self.family, self.model, self.config, self.predictors = family, model, config, predictors
        self.schedule = Schedule(config.phases or ())
        self.total_steps: int | None = None
        self.step_index = 0
        self.micro_batch = 0
        self.kept_ratios: list[float] = []
        self.mlp_kept_ratios: list[float] = []
        self._tokens = self._blocks = 0
        self._loss_tokens: Tensor | None = None
        self._last_phase: int | None = None
        self._policies = self._make_policies()
        self._draws = Draws()
        self._passes = Passes()
        self.referring = False
        self._seen_forward: Any = None
        self._notes: set[str] = set()

    def _make_policies(self) -> list[Policy | None]:
        return [
            None if p.mode == "dense" else make_policy(*self.config.policy(p), self.predictors)
            for p in self.schedule.phases
        ]

    def __deepcopy__(self, memo: dict[int, Any]) -> Controller:
        """The controller of a copy of the model: at the same step, with policies that remember no batch."""
        twin = memo[id(self)] = object.__new__(type(self))
        plain = {name: value for name, value in self.__dict__.items() if name != "_policies"}
        twin.__dict__.update(copy.deepcopy(plain, memo))
        twin._policies = twin._make_policies()
        return twin

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError(
            "a lemo Controller cannot be pickled: save the model (it loads without lemo), keep the LemoConfig "
            "(`config.to_dict()`), and call lemo.apply and controller.seek(step) after loading"
        )

    # --- progress ---

    @property
    def applied(self) -> bool:
        """Whether lemo still is applied to this controller's model."""
        return controller_of(self.model) is self

    def step(self) -> None:
        """One optimizer step is done. Call it in a loop of your own after `optimizer.step()`."""
        self.end_step()
        self.seek(self.step_index + 1)

    def seek(self, step: int) -> None:
        """Continues at optimizer step `step` (from 0), as after a resume."""
        if step < 0:
            raise ValueError(f"step must not be negative; got {step}")
        self.step_index, self.micro_batch = int(step), 0
        self._passes.clear()

    def begin_training(self, model: Any, arguments: Any, trainer: Any) -> None:
        """A Trainer begins, with the model that it trains. Raises ValueError where lemo must not run."""
        if model is not None and base_model(model) is not self.model:
            raise ValueError(
                f"LemoCallback: the Trainer trains another {type(base_model(model)).__name__} than the one lemo was "
                "applied to: call lemo.apply(trainer.model) and give the Trainer the callback of that controller"
            )
        refuse_comparisons(self.schedule.phases, trainer, arguments)
        self.cover_heads()

    def end_step(self) -> None:
        """Says so, once, where a step went by without a forward pass of lemo's."""
        if self.micro_batch > 0:
            return
        if not self.applied:
            reason = "lemo was removed from the model, or applied to it again with another controller"
        elif not self.model.training:
            reason = _EVAL_MODE
        else:
            reason = "no forward pass with gradients reached this model: is it the one that is trained?"
        self._note(f"a step was made without lemo: {reason}")

    def stepped_aside(self, module: nn.Module, named: dict[str, Any]) -> None:
        """A forward pass goes to transformers. Says so, once, where it looks as if lemo should see it."""
        if torch.is_grad_enabled():
            if not module.training and named.get("labels") is not None:
                self._note(f"a loss is computed with gradients, but without lemo: {_EVAL_MODE}")
            return
        ids = named.get("input_ids")
        if (
            ids is not None
            and module.training
            and self._passes.has_shape(tuple(ids.shape))
            and adapters_disabled(self.model)
        ):
            self._note(
                "a pass without adapters sees every token, while the training passes of this step left some out: where "
                "the two are compared (a preference loss), run it inside `with controller.reference_pass():`"
            )

    @contextmanager
    def reference_pass(self) -> Iterator[None]:
        """Forward passes inside leave out what this step's training pass over the same batch did, layer by layer.

        For losses that compare the two. Gradients are off inside; the model may be in any mode, its adapters disabled.
        Raises RuntimeError, at the forward pass, where no training pass had the batch. In phases whose forward pass is
        exact there is nothing to repeat, and transformers runs.
        """
        before = self.referring
        self.referring = skips_tokens(self.phase)
        try:
            with torch.no_grad():
                yield
        finally:
            self.referring = before

    def cover_heads(self) -> None:
        """Covers the head again if another library has put its own loss over ours (see `integration.trl_head`)."""
        present = self.model.__dict__.get("forward")
        if present is not self._seen_forward:
            trl_head.cover(self.model)
            self._seen_forward = self.model.__dict__.get("forward")

    def callback(self) -> LemoCallback:
        """The callback that moves this controller under the transformers Trainer."""
        return LemoCallback(self)

    @property
    def phase(self) -> Phase:
        """The phase of the coming step."""
        return self.schedule.phase(self.step_index, self.total_steps)

    def report(self) -> dict[str, Any]:
        """The last forward pass in plain values, for logs.

        loss_tokens: targets the loss was over (read from the device); None where lemo did not compute it.
        """
        index = self._last_phase
        phase = None if index is None else self.schedule.phases[index]
        return {
            "step": self.step_index,
            "phase": index,
            "mode": None if phase is None else phase.mode,
            "keep": None if phase is None else phase.keep,
            "policy": None if phase is None or phase.mode == "dense" else self.config.policy(phase)[0],
            "tokens": self._tokens,
            "blocks": self._blocks,
            "loss_tokens": None if self._loss_tokens is None else int(self._loss_tokens),
            "kept": list(self.kept_ratios),
            "mlp_kept": list(self.mlp_kept_ratios),
        }

    def warn_of_unreached(self) -> None:
        """Says which phases a run that ends now never reached (early stopping)."""
        last, total = self._last_phase, self.total_steps
        if last is None or total is None:
            return
        for i, steps in enumerate(self.schedule.steps(total)):
            if i > last and steps > 0:
                self._note(
                    f"training ended in phase {last} ({self.schedule.phases[last].mode}): phase {i} "
                    f"({self.schedule.phases[i].mode}, {steps} of {total} steps) was never reached"
                )

    def _warn_of_empty_phases(self) -> None:
        total = self.total_steps
        if total is None or len(self.schedule.phases) == 1:
            return
        for i, steps in enumerate(self.schedule.steps(total)):
            if steps == 0:
                phase = self.schedule.phases[i]
                self._note(
                    f"phase {i} ({phase.mode}) has none of the run's {total} steps: with a share of {phase.share:g} it "
                    "needs a longer run, or a larger share"
                )

    # --- one training forward pass ---

    def run(
        self, packed: Packed, ids: Tensor | None, embeddings: Tensor | None, labelled: Tensor | None = None
    ) -> tuple[Tensor, Step]:
        """The residual stream [T, d] after the last layer, before the final norm; from ids [B, S] or embeddings.

        labelled: bool [T], tokens that have a target; None where that is unknown.
        """
        family, decoder = self.family, self.family.decoder(self.model)
        layers = family.layers(decoder)[: self.model.config.num_hidden_layers]
        batch = ids if embeddings is None else embeddings
        assert batch is not None
        if self.micro_batch == 0:
            self._check_surroundings(layers, batch)
        check_modules(family, self.model)
        params, loose = trained_parameters(family, layers), loose_modules(family, layers)
        draw, again, earlier = self._which_pass(batch, packed)
        index = self.schedule.index(draw.step, self.total_steps)
        self._warn_of_empty_phases()
        random = check_randomness(family, self.model, loose, self.schedule.phases[index:])
        phase = self.schedule.phases[index]
        policy = self._policies[index] if earlier is None else None
        remembered = self._passes.begin(batch, packed.blocks) if skips_tokens(phase) and not again else None
        embedding = self.model.get_input_embeddings()
        with outputs_of(embedding) as embedded:
            # Hooks on the embedding (NEFTune) see the batch as it is.
            given = decoder.embed_tokens(ids) if embeddings is None else embeddings
            x = family.embed(decoder, None, packed.take(given), packed.positions)
        took_part = Participation(phase.mode != "skip" or trains_before_layers(x, embedded))
        embedded.clear()
        x = x.to(self._compute_dtype(x))
        tables = family.tables(decoder, x.detach(), packed.positions)
        everything = Kept.everything(packed.blocks)
        if policy is not None:
            policy.begin(self._step_context(packed, phase, layers, tables, draw, labelled))
        kept_ratios: tuple[list[float], list[float]] = ([], [])
        if not again:  # a recomputation may end half-way, and has nothing new to report
            self.micro_batch += 1
            (self.kept_ratios, self.mlp_kept_ratios), self._loss_tokens = kept_ratios, None
        self._tokens, self._blocks, self._last_phase = packed.blocks.num_tokens, packed.blocks.num_blocks, index

        def choose(i: int, rows: Tensor) -> tuple[Kept | None, Kept | None]:
            if earlier is not None:
                return earlier.kept(i, packed.blocks)
            kept = self._choose(policy, phase, everything, i, rows)
            for ratios, part in zip(kept_ratios, kept, strict=True):
                ratios.append(0.0 if part is None else part.num_blocks / packed.blocks.num_blocks)
                took_part.add(part)
            if remembered is not None:
                remembered.add(kept)
            return kept

        # Nothing is eliminated: the exact layers, with what `recompute` says. (Mode "backward" over everything too.)
        step = Step(
            family=family,
            layers=layers,
            blocks=packed.blocks,
            tables=tables,
            mode=phase.mode,
            recompute=self._recompute() if earlier is None else "full",
            weighted=phase.weighted,
            deterministic=self.config.deterministic,
            random=random,
            general=bool(loose),
            choose=choose,
            observe=policy.observe if policy is not None and policy.needs_update else None,
            borrowed=embeddings is not None or x.requires_grad or may_keep_output(embedding),
            autocast=self._autocast(x),
            part=took_part,
        )
        return Stack.apply(x, step, *params), step

    def _check_surroundings(self, layers: list[nn.Module], batch: Tensor) -> None:
        """What may have changed since `lemo.apply`: who trains, adapters, how weights are spread."""
        if "trl" in sys.modules:
            refuse_comparisons((self.phase,), running_trainer())
        check_adapters(self.model)
        check_device(batch, self.model.get_input_embeddings().weight.device)
        check_weights(layers)

    def _which_pass(self, batch: Tensor, packed: Packed) -> tuple[Draw, bool, Pass | None]:
        """The draw of a pass; whether an earlier pass had it; that pass, where its very lists are to be repeated."""
        draw = Draw(self.step_index, self.micro_batch)
        if self.referring:
            return draw, True, self._passes.find(batch, packed.blocks)
        return *self._draws.next(draw, not skips_tokens(self.phase)), None

    def _choose(
        self, policy: Policy | None, phase: Phase, everything: Kept, layer: int, rows: Tensor
    ) -> tuple[Kept | None, Kept | None]:
        if policy is None or (self.config.layers is not None and layer not in self.config.layers):
            return everything, everything
        shared, mlp = policy.choose(layer, rows)
        # One object for all that keep everything, so that its tensors exist once; but a weighted draw of everything
        # still has its weights.
        shared_all = shared is not None and shared.is_everything and not phase.weighted
        mlp_all = mlp is not None and mlp.is_everything and not phase.weighted
        return everything if shared_all else shared, everything if mlp_all else mlp

    def _required(self, packed: Packed, phase: Phase, labelled: Tensor | None) -> Tensor | None:
        """Blocks that mode "skip" has to keep for their labels, bool [nb], or None."""
        wanted = self.config.keep_labelled
        if phase.mode != "skip" or labelled is None or wanted is False:
            return None
        blocks = packed.blocks
        count = int(labelled.sum())
        if count == 0 or (wanted is None and 2 * count >= blocks.num_tokens):
            return None
        token = torch.arange(blocks.num_tokens, dtype=torch.int32, device=labelled.device)
        block = torch.bucketize(token, blocks.offsets[1:], right=True)
        return labelled.new_zeros(blocks.num_blocks).index_put_((block[labelled],), labelled.new_ones(()))

    def _step_context(
        self, packed: Packed, phase: Phase, layers: list[nn.Module], tables: Any, draw: Draw, labelled: Tensor | None
    ) -> StepContext:
        def queries_keys(i: int, x: Tensor) -> tuple[Tensor, Tensor]:
            n = self.family.norms(layers[i])[0]
            h, _ = ops.gather_norm(x, None, None, *n.contiguous, n.kind, n.eps)
            return self.family.queries_keys_values(layers[i], h, tables, None)[:2]

        return StepContext(
            blocks=packed.blocks,
            phase=phase,
            seed=mix_seed(self.config.seed, draw.step, draw.micro_batch),
            always_first=self.config.always_first,
            always_last=self.config.always_last,
            queries_keys=queries_keys,
            scale=lambda i: self.family.scale(layers[i]),
            required=self._required(packed, phase, labelled),
        )

    def _recompute(self) -> str:
        # A checkpoint around the model would recompute all of it for every local graph that a layer keeps.
        wanted = under_checkpoint() or any(getattr(m, "gradient_checkpointing", False) for m in self.model.modules())
        if self.config.recompute == "auto":
            return "full" if wanted else "none"
        if wanted:
            self._note(
                f"gradient checkpointing is switched on in the model; lemo runs the layers itself, with "
                f'recompute="{self.config.recompute}"'
            )
        return self.config.recompute

    def _note(self, text: str) -> None:
        if text not in self._notes:
            self._notes.add(text)
            logger.warning(text)

    @staticmethod
    def _compute_dtype(x: Tensor) -> torch.dtype:
        if not x.is_cuda:
            if x.dtype != torch.float32:
                raise ValueError(
                    f"lemo computes in float32 on the CPU; the model's embeddings are {x.dtype}: call model.float()"
                )
            return torch.float32
        dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else x.dtype
        if dtype not in (torch.float16, torch.bfloat16):
            raise ValueError(
                f"lemo computes in float16 or bfloat16 on CUDA; the model's embeddings are {dtype}: load the model "
                "with dtype=torch.bfloat16 or train under torch.autocast"
            )
        return dtype

    @staticmethod
    def _autocast(x: Tensor) -> tuple[str, torch.dtype, bool]:
        # On the CPU everything is fp32: autocast is switched off inside the stack, whatever it was.
        return x.device.type, x.dtype if x.is_cuda else torch.bfloat16, x.is_cuda and torch.is_autocast_enabled("cuda")
