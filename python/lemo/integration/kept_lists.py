"""Which kept list each layer of a pass works on: the policy's choice, every block, or the list of an earlier pass."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from lemo.engine.config import Phase
from lemo.engine.layout import Blocks, Kept, KeptPair
from lemo.engine.participation import Participation
from lemo.engine.policies import Policy
from lemo.engine.sequence import Share
from lemo.integration.reference import Pass


class ChosenLists:
    """The kept lists of one pass, chosen layer by layer.

    policy: None keeps every block. layers: those that eliminate, None: all. earlier: a pass whose lists are repeated;
    remembered: gets the lists, so that other passes can repeat them. kept_ratios, mlp_kept_ratios: kept
    blocks over all blocks, of every layer so far. share: what this process holds of the blocks, None: all of them.
    """

    def __init__(
        self,
        policy: Policy | None,
        phase: Phase,
        blocks: Blocks,
        layers: Collection[int] | None,
        participation: Participation,
        earlier: Pass | None = None,
        remembered: Pass | None = None,
        share: Share | None = None,
    ) -> None:
        self.policy, self.phase, self.blocks, self.layers = policy, phase, blocks, layers
        self.participation, self.earlier, self.remembered = participation, earlier, remembered
        self.share = share
        self.kept_ratios: list[float] = []
        self.mlp_kept_ratios: list[float] = []
        self._everything = Kept.everything(blocks)

    def choose(self, layer: int, x: Tensor) -> KeptPair:
        """Kept lists of a layer's attention and MLP for its input x [T, d]; see `lemo.engine.step.Step.choose`."""
        if self.earlier is not None:
            return self._own(self.earlier.kept(layer, self.blocks))
        pair = self._choose(layer, x)
        for ratios, kept in zip((self.kept_ratios, self.mlp_kept_ratios), pair, strict=True):
            ratios.append(0.0 if kept is None else kept.num_blocks / self.blocks.num_blocks)
        if self.remembered is not None:
            self.remembered.add(pair)
        pair = self._own(pair)
        for kept in pair:
            self.participation.add(kept)
        return pair

    def _own(self, pair: KeptPair) -> KeptPair:
        """The parts of this process, which are one object if the lists are."""
        if self.share is None:
            return pair
        attention, mlp = pair
        own = self.share.kept(attention)
        return own, own if mlp is attention else self.share.kept(mlp)

    def _choose(self, layer: int, x: Tensor) -> KeptPair:
        if self.policy is None or (self.layers is not None and layer not in self.layers):
            return self._everything, self._everything
        attention, mlp = self.policy.choose(layer, x)
        return self._one_everything(attention), self._one_everything(mlp)

    def _one_everything(self, kept: Kept | None) -> Kept | None:
        """One object for all that keep everything, so that its tensors exist once; but a weighted draw that happens to
        keep everything keeps its weights."""
        everything = kept is not None and kept.is_everything and not self.phase.weighted
        return self._everything if everything else kept


def required_blocks(keep_labelled: bool | None, phase: Phase, blocks: Blocks, labelled: Tensor | None) -> Tensor | None:
    """Blocks that a skipping phase has to keep for their labels, bool [nb], or None. labelled: bool [T], or unknown."""
    if not phase.skips or labelled is None or keep_labelled is False:
        return None
    count = int(labelled.sum())
    if count == 0 or (keep_labelled is None and 2 * count >= blocks.num_tokens):
        return None
    token = torch.arange(blocks.num_tokens, dtype=torch.int32, device=labelled.device)
    block = torch.bucketize(token, blocks.offsets[1:], right=True)
    return labelled.new_zeros(blocks.num_blocks).index_put_((block[labelled],), labelled.new_ones(()))
