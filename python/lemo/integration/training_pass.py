"""One training forward pass: from a batch, and what the controller decided about it, to a `Step` of the engine."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lemo.engine.attend import Attention, TileChoice
from lemo.engine.config import LemoConfig, Phase
from lemo.engine.families.base import Family, Tables
from lemo.engine.packing import Packed
from lemo.engine.participation import Participation, may_keep_output, outputs_of, trains_before_layers
from lemo.engine.policies import Policy, StepContext
from lemo.engine.records import SavedList
from lemo.engine.sequence import SequenceAttention, Share
from lemo.engine.step import Autocast, Step
from lemo.engine.tiles import LayerRows, TileChooser, TilePolicy
from lemo.integration.kept_lists import ChosenLists, required_blocks
from lemo.integration.reference import Pass
from lemo.integration.saving import Saving, Savings


@dataclass(frozen=True, eq=False)
class Inputs:
    """A batch as the model was called with it.

    ids: int64 [B, S], or None with embeddings [B, S, d]; labelled: bool [T], tokens that have a target; None: unknown;
    targets: int64 [T], if known.
    """

    packed: Packed
    ids: Tensor | None
    embeddings: Tensor | None
    labelled: Tensor | None = None
    targets: Tensor | None = None

    @property
    def batch(self) -> Tensor:
        given = self.ids if self.embeddings is None else self.embeddings
        assert given is not None
        return given


@dataclass(frozen=True, eq=False)
class Plan:
    """What a pass is to do.

    policy: None keeps everything, or repeats the lists of `earlier`; tile_policy: None attends to all tiles; seed: of
    the policy's draws; saving: decides what layers save (None: as little as they can); random: whether layers draw
    random numbers (None: they may); general: some modules are called as they are; remembered: gets the lists, so that
    other passes can repeat them; share: what this process holds of the batch, None: all of it; when_done: called once
    the backward pass is.
    """

    phase: Phase
    policy: Policy | None
    tile_policy: TilePolicy | None
    seed: int
    saving: Savings | None
    random: bool | None
    general: bool
    earlier: Pass | None = None
    remembered: Pass | None = None
    share: Share | None = None
    when_done: Callable[[], None] | None = None


@dataclass(frozen=True, eq=False)
class Made:
    """A step, and what chooses its lists and tiles."""

    step: Step
    lists: ChosenLists
    tiles: TileChooser | None


@dataclass(frozen=True, eq=False)
class Begun:
    """A pass whose layers have not run. x [T, d]: the stream before the first layer; tables: of its tokens' positions;
    borrowed: x belongs to someone else. trained: something trains before the layers. required: see `StepContext`."""

    family: Family
    model: Any
    config: LemoConfig
    layers: list[nn.Module]
    packed: Packed
    plan: Plan
    x: Tensor
    tables: Tables
    borrowed: bool
    trained: bool
    required: Tensor | None

    def make(self, tables: Tables, *, remember: bool = True) -> Made:
        """The step that takes the stream through the layers, with these tables in place of the pass's own. remember:
        so that other passes can repeat it."""
        packed, plan, config, layers = self.packed, self.plan, self.config, self.layers
        phase, share = plan.phase, plan.share
        remembered = plan.remembered if remember else None
        attention = _attention(self.family, layers, packed, tables, config, share)
        participation = Participation(not phase.skips or self.trained)
        lists = ChosenLists(
            plan.policy, phase, packed.blocks, config.layers, participation, plan.earlier, remembered, share
        )
        if plan.policy is not None:
            plan.policy.begin(self._context(attention))
        tiles = _tile_chooser(config, plan, len(layers), remembered)
        saving = Saving.full(len(layers))
        if plan.saving is not None:
            saving = plan.saving.of(phase, packed.blocks.lengths, self.x.element_size(), self.required is not None)
        step = Step(
            family=self.family,
            layers=layers,
            blocks=packed.blocks if share is None else share.own,
            attention=attention,
            mode=phase.mode,
            recompute=saving.recompute,
            segments=saving.segments,
            records=saving.records(),
            weighted=phase.weighted,
            random=plan.random,
            general=plan.general,
            choose=lists.choose,
            tiles=None if tiles is None else _tiles_of_layers(tiles, attention, layers),
            observe=plan.policy.observe if plan.policy is not None and plan.policy.needs_update else None,
            share=share,
            borrowed=self.borrowed,
            autocast=_autocast(self.x),
            participation=participation,
            when_done=plan.when_done,
        )
        return Made(step, lists, tiles)

    def _context(self, attention: Attention) -> StepContext:
        layers, config = self.layers, self.config
        return StepContext(
            blocks=self.packed.blocks,
            phase=self.plan.phase,
            seed=self.plan.seed,
            always_first=config.always_first,
            always_last=config.always_last,
            queries_keys=lambda i, x: attention.queries_keys(layers[i], x),
            attention=lambda i: attention.options(layers[i]),
            required=self.required,
            share=self.plan.share,
            layers=[i for i in range(len(layers)) if config.layers is None or i in config.layers],
        )


def begin(family: Family, model: Any, config: LemoConfig, layers: list[nn.Module], inputs: Inputs, plan: Plan) -> Begun:
    """Embeds a batch."""
    packed, share = inputs.packed, plan.share
    decoder, embedding = family.decoder(model), model.get_input_embeddings()
    with outputs_of(embedding) as embedded:
        # Hooks on the embedding (NEFTune) see the batch as it is.
        given = decoder.embed_tokens(inputs.ids) if inputs.embeddings is None else inputs.embeddings
        x = family.embed(decoder, None, packed.take(given), packed.positions)
    trained = trains_before_layers(x, embedded)
    embedded.clear()
    x = x.to(_compute_dtype(x))
    tables = family.tables(decoder, x.detach(), packed.positions)
    if share is not None:
        x, tables = share.take(x if trained else x.detach()), share.cut(tables)
    required = None
    if plan.policy is not None:
        required = required_blocks(config.keep_labelled, plan.phase, packed.blocks, inputs.labelled)
    borrowed = inputs.embeddings is not None or x.requires_grad or may_keep_output(embedding)
    return Begun(family, model, config, layers, packed, plan, x, tables, borrowed, trained, required)


def _attention(
    family: Family,
    layers: Sequence[nn.Module],
    packed: Packed,
    tables: Tables,
    config: LemoConfig,
    share: Share | None,
) -> Attention:
    """Attention that knows where a window's tokens lie, if there is a window that the batch's rows exceed."""
    kind = Attention if share is None else functools.partial(SequenceAttention, share)
    windows = [family.attention_options(layer).window for layer in layers]
    longest = packed.blocks.max_seqlen
    if not any(window is not None and window < packed.shape[1] for window in windows):
        return kind(family, tables, config.deterministic, longest=longest)
    gaps = packed.gaps
    longest = longest if gaps is None else packed.shape[1]
    return kind(family, tables, config.deterministic, gaps, longest=longest)


def _tile_chooser(config: LemoConfig, plan: Plan, num_layers: int, remembered: Pass | None) -> TileChooser | None:
    if plan.tile_policy is None:
        return None
    layers = None if config.layers is None else frozenset(config.layers)
    return TileChooser(
        plan.tile_policy,
        plan.phase,
        num_layers,
        layers,
        earlier=None if plan.earlier is None else plan.earlier.tiles,
        remembered=None if remembered is None else remembered.tiles,
        share=plan.share,
    )


def _tiles_of_layers(
    chooser: TileChooser, attention: Attention, layers: list[nn.Module]
) -> Callable[[int, Tensor, SavedList], TileChoice]:
    def tiles(i: int, x: Tensor, rows: SavedList) -> TileChoice:
        scale = attention.options(layers[i]).scale
        whole = rows.whole or rows  # those of q and k
        return TileChoice(lambda q, k: chooser.choose(LayerRows(i, x, q, k, whole, scale)))

    return tiles


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


def _autocast(x: Tensor) -> Autocast:
    # On the CPU everything is fp32: autocast is switched off inside the stack, whatever it was.
    enabled = x.is_cuda and torch.is_autocast_enabled("cuda")
    return Autocast(x.device.type, x.dtype if x.is_cuda else torch.bfloat16, enabled)
