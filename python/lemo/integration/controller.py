"""Controls elimination for one model and reports on it: what a run keeps from one forward pass to the next."""

from __future__ import annotations

import copy
import functools
import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lemo.engine import stack
from lemo.engine.checks import check_modules, check_randomness, fingerprint, loose_modules, trained_parameters
from lemo.engine.config import LemoConfig, Phase, Recompute
from lemo.engine.cost import PassShares, cost_ratio
from lemo.engine.families.base import Family
from lemo.engine.policies import Policy, make_policy, mix_seed
from lemo.engine.randomness import process_rank
from lemo.engine.sequence import Group, Share
from lemo.engine.step import Step
from lemo.engine.tiles import TileChooser, TilePolicy, longest_complete, make_tile_policy
from lemo.engine.wrappers import base_model, sharded
from lemo.integration import training_pass, trl_head
from lemo.integration.callback import LemoCallback
from lemo.integration.checks_peft import check_adapters, check_device, check_weights
from lemo.integration.entries import controller_of
from lemo.integration.evaluation import LossOnly
from lemo.integration.graphs import Graphs
from lemo.integration.reference import Pass, Passes, adapters_disabled
from lemo.integration.replay import Draw, Draws
from lemo.integration.saving import Savings
from lemo.integration.schedule import Schedule
from lemo.integration.trainers import refuse_comparisons, running_trainer
from lemo.integration.training_pass import Inputs, Plan

if TYPE_CHECKING:  # loaded only if a run has a calibration
    from lemo.predictors.store import PredictorSet

logger = logging.getLogger(__name__)

_EVAL_MODE = (
    "the model is in eval mode, as from_pretrained returns it (also inside a PeftModel whose own flag differs). "
    "Call model.train() to train, or use torch.no_grad() to evaluate"
)


class Controller:
    """Controls elimination for a model that lemo was applied to, and reports on it.

    total_steps: optimizer steps of the run; set it in a custom loop if the schedule has several phases (the Trainer's
    callback does it for you). kept_ratios, mlp_kept_ratios: of the last forward pass, kept blocks over all blocks, by
    layer. data_rank: whose blocks are drawn, for processes that share a batch (tensor or context parallelism), which
    have to set the same number; None: this process's rank in torch.distributed, so that each draws for its own data, or
    the number of its `sequence_group`. sequence: the processes that share every batch.
    """

    def __init__(
        self,
        family: Family,
        model: Any,
        config: LemoConfig,
        predictors: PredictorSet | None,
        sequence: Group | None = None,
    ) -> None:
        self.family, self.model, self.config, self.predictors = family, model, config, predictors
        self.sequence = sequence
        self.schedule = Schedule(config.phases or ())
        self.total_steps: int | None = None
        self.data_rank: int | None = None
        self.step_index = 0
        self.micro_batch = 0
        self.kept_ratios: list[float] = []
        self.mlp_kept_ratios: list[float] = []
        self._tokens = self._blocks = 0
        self._loss_tokens: Tensor | None = None
        self._lengths: tuple[int, ...] = ()
        self._recomputed: Recompute | Sequence[Recompute] = "none"
        self._again = 0
        self._last_phase: int | None = None
        self._policies, self._tile_policies = self._make_policies(), self._make_tile_policies()
        self._tiles: TileChooser | None = None
        self._draws = Draws()
        self._passes = Passes()
        self.referring = False
        self._watching = False
        self._watched: tuple[Pass, TileChooser | None] | None = None
        self.loss_only_passes = LossOnly()
        self._covered_forward: Any = None
        self._notes: set[str] = set()
        # Fingerprint, trained parameters and loose modules of the layers when they were looked at last.
        self._looked: tuple[tuple[Any, ...], list[Tensor], list[nn.Module]] | None = None
        self._tiled_phases: set[int] = set()  # in mode "sparse", that have had a pass
        self._skipping_phases: set[int] = set()  # that leave tokens out, and have had a pass
        self.savings = Savings(family, model, config, self.note)
        self.graphs = Graphs(self.note)

    def _make_policies(self) -> list[Policy | None]:
        return [
            make_policy(*self.config.policy(p), self.predictors) if p.chooses_blocks else None
            for p in self.schedule.phases
        ]

    def _make_tile_policies(self) -> list[TilePolicy | None]:
        return [
            make_tile_policy(p.tile_policy, p.tile_options, self.predictors) if p.mode == "sparse" else None
            for p in self.schedule.phases
        ]

    def __deepcopy__(self, memo: dict[int, Any]) -> Controller:
        """The controller of a copy of the model: at the same step, with policies that remember no batch."""
        twin = memo[id(self)] = object.__new__(type(self))
        anew = ("_policies", "_tile_policies", "_tiles", "_watched", "savings", "graphs", "_looked")
        plain = {name: value for name, value in self.__dict__.items() if name not in anew}
        twin.__dict__.update(copy.deepcopy(plain, memo))
        twin._policies, twin._tile_policies = twin._make_policies(), twin._make_tile_policies()
        twin._tiles = twin._watched = twin._looked = None
        twin.savings = Savings(twin.family, twin.model, twin.config, twin.note)
        twin.graphs = Graphs(twin.note)
        return twin

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError(
            "a lemo Controller cannot be pickled: save the model (it loads without lemo), keep the LemoConfig "
            "(`config.to_dict()`), and call lemo.apply and controller.seek(step) after loading"
        )

    # --- progress ---

    @property
    def applied(self) -> bool:
        """Whether lemo is still applied to this controller's model."""
        return controller_of(self.model) is self

    def step(self) -> None:
        """One optimizer step is done. Call it in a custom loop after `optimizer.step()`."""
        self.end_step()
        self.seek(self.step_index + 1)

    def seek(self, step: int) -> None:
        """Moves to optimizer step `step` (from 0), as after a resume."""
        if step < 0:
            raise ValueError(f"step must not be negative; got {step}")
        self.step_index, self.micro_batch = int(step), 0
        self._passes.clear()

    def begin_training(self, model: Any, arguments: Any, trainer: Any) -> None:
        """A Trainer begins, with the model that it trains. Raises ValueError if lemo must not run under it."""
        if model is not None and base_model(model) is not self.model:
            raise ValueError(
                f"LemoCallback: the Trainer trains another {type(base_model(model)).__name__} than the one lemo was "
                "applied to: call lemo.apply(trainer.model) and give the Trainer the callback of that controller"
            )
        refuse_comparisons(self.schedule.phases, trainer, arguments)
        self.cover_heads()

    def end_step(self) -> None:
        """An optimizer step is done. Notes, once, that none of its forward passes ran through lemo, if so."""
        if self.micro_batch > 0:
            return
        if not self.applied:
            reason = "lemo was removed from the model, or applied to it again with another controller"
        elif not self.model.training:
            reason = _EVAL_MODE
        else:
            reason = "no forward pass with gradients reached this model: is it the one that is trained?"
        self.note(f"a step was made without lemo: {reason}")

    def stepped_aside(self, module: nn.Module, named: dict[str, Any]) -> None:
        """A forward pass goes to transformers. Notes that, once, if it looks as if lemo should see it."""
        if torch.is_grad_enabled():
            if not module.training and named.get("labels") is not None:
                self.note(f"a loss is computed with gradients, but without lemo: {_EVAL_MODE}")
            return
        ids = named.get("input_ids")
        if (
            ids is not None
            and module.training
            and self._passes.has_shape(tuple(ids.shape))
            and adapters_disabled(self.model)
        ):
            self.note(
                "a pass without adapters sees every token, while the training passes of this step left some out: if "
                "the two are compared (a preference loss), run it inside `with controller.reference_pass():`"
            )

    @contextmanager
    def reference_pass(self) -> Iterator[None]:
        """Forward passes inside leave out what this step's training pass over the same batch did, layer by layer.

        For losses that compare the two. Gradients are off inside; the model may be in any mode, its adapters disabled.
        The forward pass raises RuntimeError if no training pass had the batch, and in mode "sparse" if that has had its
        backward pass, with which lists of tiles are freed. In phases whose forward pass is exact
        there is nothing to repeat, and transformers runs.
        """
        before = self.referring
        self.referring = not self.phase.exact
        try:
            with torch.no_grad():
                yield
        finally:
            self.referring = before

    def loss_only(self) -> AbstractContextManager[None]:
        """Evaluation passes inside that are given labels return the dense model's loss, without its logits.

        Logits are then made for slices of tokens only. For evaluation in a loop of one's own, with the model in eval
        mode and gradients off; under a Trainer that asks for the loss alone (no `compute_metrics`) it happens by
        itself.
        """
        return self.loss_only_passes.everywhere()

    def cover_heads(self) -> None:
        """Covers the head again if another library has put its own loss over ours (see `integration.trl_head`)."""
        if self.model.__dict__.get("forward") is not self._covered_forward:
            trl_head.cover(self.model)
            self._covered_forward = self.model.__dict__.get("forward")

    def callback(self) -> LemoCallback:
        """The callback that moves this controller along with a transformers Trainer."""
        return LemoCallback(self)

    @property
    def phase(self) -> Phase:
        """The phase of the coming step."""
        return self.schedule.phase(self.step_index, self.total_steps)

    def report(self) -> dict[str, Any]:
        """The last forward pass in plain values, for logs.

        loss_tokens: targets the loss was over (read from the device); None if lemo did not compute it. Of mode
        "sparse": limits, those of the phase; by layer and read from the device, density, the share of the pairs of
        tiles that causality allows, and covered, the share of attention that these hold, as the tile policy estimates
        it (None: it does not); both 1 for a layer with a sliding window, which sees all of it. cost_ratio: products of
        the pass over those of a dense one (`lemo.engine.cost`); None before the first pass. memory: if a budget
        or offload decides, how many layers save what, and its bytes.
        """
        index = self._last_phase
        phase = None if index is None else self.schedule.phases[index]
        density, covered = ([], []) if self._tiles is None else self._tiles.report()
        return {
            "step": self.step_index,
            "phase": index,
            "mode": None if phase is None else phase.mode,
            "keep": None if phase is None else phase.keep,
            "policy": None if phase is None or not phase.chooses_blocks else self.config.policy(phase)[0],
            "limits": {} if phase is None else phase.limits,
            "tokens": self._tokens,
            "blocks": self._blocks,
            "loss_tokens": None if self._loss_tokens is None else int(self._loss_tokens),
            "kept": list(self.kept_ratios),
            "mlp_kept": list(self.mlp_kept_ratios),
            "density": density,
            "covered": covered,
            "memory": self.savings.report(),
            "cost_ratio": None if phase is None else self._cost_ratio(phase, density),
        }

    def _cost_ratio(self, phase: Phase, density: list[float]) -> float:
        kept = self.kept_ratios, self.mlp_kept_ratios
        shares = PassShares(phase.mode, self._recomputed, *kept, density, again=self._again)
        return cost_ratio(self.family.shape(self.model.config), self._lengths, shares)

    def count_loss_tokens(self, count: Tensor) -> None:
        """The loss of the last forward pass was over so many targets: int64 [], on the device."""
        self._loss_tokens = count

    def note(self, text: str) -> None:
        """Logs a warning, once per text."""
        if text not in self._notes:
            self._notes.add(text)
            logger.warning(text)

    def warn_of_unreached(self) -> None:
        """Notes which phases a run that ends now never reached (early stopping)."""
        last, total = self._last_phase, self.total_steps
        if last is None or total is None:
            return
        for i, steps in enumerate(self.schedule.steps(total)):
            if i > last and steps > 0:
                self.note(
                    f"training ended in phase {last} ({self.schedule.phases[last].mode}): phase {i} "
                    f"({self.schedule.phases[i].mode}, {steps} of {total} steps) was never reached"
                )

    def _warn_of_empty_phases(self) -> None:
        total = self.total_steps
        if total is None or len(self.schedule.phases) == 1:
            return
        for i, steps in enumerate(self.schedule.steps(total)):
            if steps == 0:
                phase, least = self.schedule.phases[i], self.schedule.least_steps(i)
                longer = "a longer run" if least is None else f"a run of {least} steps or more"
                self.note(
                    f"phase {i} ({phase.mode}) has none of the run's {total} steps: with a share of {phase.share:g} it "
                    f"needs {longer}, or a larger share"
                )

    def watch(self, on: bool) -> tuple[Pass, TileChooser | None] | None:
        """Whether coming passes keep their lists for a report. Returns those of the last one that did, once."""
        watched, self._watched, self._watching = self._watched, None, on
        return watched

    # --- one training forward pass ---

    def run(self, inputs: Inputs) -> tuple[Tensor, Step]:
        """The residual stream [T, d] after the last layer, before the final norm, and the step that made it."""
        decoder = self.family.decoder(self.model)
        layers = self.family.layers(decoder)
        self.family.check_kernels(self.model.config, inputs.batch.device)
        weights = fingerprint(layers) if self.config.cuda_graphs else ()
        if self._looked is not None and self._looked[0] != weights:
            self._looked = None
        if self.micro_batch == 0:
            self._check_surroundings(layers, inputs.batch)
        check_modules(self.family, self.model)
        params, loose = self._trained_and_loose(decoder, layers, weights)
        draw, again, earlier = self._which_pass(inputs)
        index = self.schedule.index(draw.step, self.total_steps)
        self._warn_of_empty_phases()
        random = check_randomness(self.family, self.model, loose, self.schedule.phases[index:])
        share = None
        if self.sequence is not None:
            self.sequence.check_same(inputs.batch, inputs.packed.positions, inputs.targets)
            share = Share(self.sequence, inputs.packed.blocks)
        phase = self.schedule.phases[index]
        if any(self.config.scores_exactly(p) for p in self.schedule.phases[index:]):
            longest, device = inputs.packed.blocks.max_seqlen, inputs.batch.device
            self.family.check_score_kernels(self.model.config, longest, device)
        remember = not phase.exact and not again
        kept = self._passes.begin(draw, inputs.batch, inputs.packed.blocks) if remember else None
        # Inside an activation checkpoint, the backward pass is that of a recomputation.
        ended = self._passes.of(draw) if again and earlier is None else kept
        if self._watching and kept is None and not again:  # a pass that nothing repeats
            kept = Pass(inputs.batch.detach(), inputs.packed.blocks.lengths)
        plan = Plan(
            phase=phase,
            policy=self._policies[index] if earlier is None else None,
            tile_policy=self._tile_policies[index],
            seed=self._seed(draw),
            saving=self.savings if earlier is None else None,
            random=random,
            general=bool(loose),
            earlier=earlier,
            remembered=kept,
            share=share,
            when_done=None if ended is None else functools.partial(self._end_pass, ended),
        )
        begun = training_pass.begin(self.family, self.model, self.config, layers, inputs, plan)
        made = begun.make(begun.tables)
        step, lists, tiles = made.step, made.lists, made.tiles
        if not again:  # a recomputation may end half-way, and has nothing new to report
            self.micro_batch += 1
            self.kept_ratios, self.mlp_kept_ratios = lists.kept_ratios, lists.mlp_kept_ratios
            self._loss_tokens, self._tiles = None, tiles
            self._watched = (kept, tiles) if self._watching and kept is not None else None
        blocks = inputs.packed.blocks
        self._tokens, self._blocks, self._last_phase = blocks.num_tokens, blocks.num_blocks, index
        self._lengths, self._recomputed = tuple(blocks.lengths), step.recompute
        self._again = sum(step.segments[:-1])
        if self.config.cuda_graphs and not again:
            stream = self.graphs.run(begun, made, params, weights, self._watching)
        else:
            stream = stack.run(step, begun.x, params)
        if tiles is not None and earlier is None and index not in self._tiled_phases:
            self._tiled_phases.add(index)
            self._note_complete_tiles(phase, tiles, step)
        if phase.skips and earlier is None and index not in self._skipping_phases:
            self._skipping_phases.add(index)
            self._note_kept_blocks(phase, lists.kept_ratios + lists.mlp_kept_ratios, blocks.lengths)
        return stream, step

    def _trained_and_loose(
        self, decoder: Any, layers: list[nn.Module], weights: tuple[Any, ...]
    ) -> tuple[list[Tensor], list[nn.Module]]:
        """Those of `lemo.engine.checks`. weights: the layers' fingerprint, if it is taken: as long as it is the same,
        so are they."""
        if self._looked is not None:
            return self._looked[1:]
        params, loose = trained_parameters(self.family, decoder), loose_modules(self.family, layers)
        self._looked = (weights, params, loose) if weights else None
        return params, loose

    def _end_pass(self, of: Pass) -> None:
        """A training pass's backward pass is done."""
        of.end(keep_tiles=self._watched is not None and self._watched[0] is of)

    def _note_kept_blocks(self, phase: Phase, ratios: list[float], lengths: Sequence[int]) -> None:
        """Notes that the first pass of a phase that leaves tokens out kept all, if so. (Known on the host.)"""
        if phase.select == "budget" and ratios and min(ratios) == 1.0:
            self.note(
                f'mode "{phase.mode}" kept every block in the first pass of phase {self._last_phase}: with '
                f"keep={phase.keep:g} and what is always kept, documents of at most {max(lengths)} tokens have too few "
                f"blocks of {self.config.block_size} tokens. Give longer documents or a smaller block_size, or use "
                'mode "dense"'
            )

    def _note_complete_tiles(self, phase: Phase, tiles: TileChooser, step: Step) -> None:
        """Notes that the first pass of a phase in mode "sparse" attended to everything, if so. (Known on the host.)"""
        if tiles.chosen:
            return
        most = longest_complete(phase)
        limits = ", ".join(f"{name}={value:g}" for name, value in [*phase.limits.items(), ("local", phase.local)])
        eliminating = range(len(step.layers)) if self.config.layers is None else self.config.layers
        if all(step.attention.options(step.layers[i]).window is not None for i in eliminating):
            reason = "every layer has a sliding window, all of which is computed"
        elif most is None:
            reason = f"its limits ({limits}) leave nothing out of any document"
        else:
            reason = (
                f"its limits ({limits}) leave something out of documents of more than {most} tokens in a layer, and "
                "this batch has none"
            )
        self.note(
            f'mode "sparse" left no tile of attention out in the first pass of phase {self._last_phase}: {reason}. '
            "Such a step costs what full attention costs: give longer documents or lower limits (density, keys, mass), "
            f'or use mode "{"skip" if phase.skips else "dense"}"'
        )

    def _check_surroundings(self, layers: list[nn.Module], batch: Tensor) -> None:
        """Checks what may have changed since `lemo.apply`: who trains, adapters, how weights are spread."""
        if "trl" in sys.modules:
            refuse_comparisons((self.phase,), running_trainer())
        check_adapters(self.model)
        embedding = self.model.get_input_embeddings()
        check_device(batch, embedding.weight.device)
        if self._looked is None:
            check_weights(layers)
        if any(sharded(m) for m in (self.model, embedding)) and not any(sharded(layer) for layer in layers):
            self.note(
                "FSDP2 divides the model, but no decoder layer by itself, so every process gathers the whole model for "
                "a pass: name the layers' class in transformer_layer_cls_to_wrap (transformers' Trainer overrides that "
                "for PEFT's models; see lemo's guide to several GPUs), or call fully_shard on every layer"
            )

    def _which_pass(self, inputs: Inputs) -> tuple[Draw, bool, Pass | None]:
        """The draw of a pass; whether an earlier pass had it; that pass, if its very lists are to be repeated."""
        draw = Draw(self.step_index, self.micro_batch)
        if self.referring:
            return draw, True, self._passes.find(inputs.batch, inputs.packed.blocks)
        return *self._draws.next(draw, self.phase.exact), None

    def _seed(self, draw: Draw) -> int:
        """Of a pass's random choices. Every process draws for its own data; phases are the same in all."""
        rank = self.data_rank
        if rank is None:
            rank = process_rank() if self.sequence is None else self.sequence.number
        # Rank 0 draws what a single process draws.
        seed = self.config.seed if rank == 0 else mix_seed(self.config.seed, rank)
        return mix_seed(seed, draw.step, draw.micro_batch)
