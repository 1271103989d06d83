"""What predictors learn from: layer inputs of the frozen dense model and the exact block scores of its own queries and
keys (paper section 4.2), collected while the model reads a document. Memory is linear in its length."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lemo import ops
from lemo.engine.attend import Attention
from lemo.engine.checks import check_modules
from lemo.engine.families import NormWeights, find
from lemo.engine.forward import forward
from lemo.engine.layout import Blocks, Kept, select
from lemo.engine.step import Autocast, Step

# consume(layer, x [T, d], exact scores float32 [nb], blocks)
Consumer = Callable[[int, Tensor, Tensor, Blocks], None]
# visit(layer, x [T, d], blocks)
Visitor = Callable[[int, Tensor, Blocks], None]


class Teacher:
    """Runs a model densely over documents and hands every layer's input and exact scores to a consumer.

    model: a causal language model of transformers that lemo supports, or a PeftModel around one (its adapters are
    switched off). block_size: tokens per block; normalize: exact scores divided by the number of query blocks.
    """

    def __init__(self, model: nn.Module, block_size: int, normalize: bool) -> None:
        self.model, self.block_size, self.normalize = model, block_size, normalize
        self.family, lm = find(model)
        self.config = lm.config
        check_modules(self.family, lm)
        self.decoder = self.family.decoder(lm)
        self.layers = self.family.layers(self.decoder)
        self.device = next(lm.parameters()).device

    @property
    def norm(self) -> NormWeights:
        """The norm of the first layer's attention: kind and eps decide how predictors read the residual stream."""
        return self.family.norms(self.layers[0])[0]

    def read(self, ids: Tensor, consume: Consumer) -> None:
        """One document: ids int64 [T]."""
        self.check_scores(ids.shape[0])
        self.visit(ids, lambda i, x, blocks: consume(i, x, self.exact(i, x, blocks), blocks))

    @torch.no_grad()
    def visit(self, ids: Tensor, visitor: Visitor) -> None:
        """One document, without exact scores."""
        ids = ids.to(self.device)
        blocks = Blocks.from_lengths([ids.shape[0]], self.block_size, self.device)

        def hook(index: int) -> Callable[..., None]:
            def before(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                visitor(index, (args[0] if args else kwargs["hidden_states"])[0], blocks)

            return before

        was_training = self.model.training
        handles = [m.register_forward_pre_hook(hook(i), with_kwargs=True) for i, m in enumerate(self.layers)]
        disable = getattr(self.model, "disable_adapter", None)
        try:
            self.model.eval()
            with disable() if disable is not None else contextlib.nullcontext():
                self.decoder(input_ids=ids[None], use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
            self.model.train(was_training)

    @torch.no_grad()
    def read_eliminating(self, ids: Tensor, consume: Consumer, keep: float) -> None:
        """One document with elimination: every layer works on the share ``keep`` of blocks that exact scores choose.

        Predictors meet such a residual stream in training, where eliminated tokens carry what an earlier layer left in
        them; learned from dense activations alone they score those tokens by chance.
        """
        self.family.check_kernels(self.config, self.device)
        self.check_scores(ids.shape[0])
        ids = ids.to(self.device)
        blocks = Blocks.from_lengths([ids.shape[0]], self.block_size, self.device)
        disable = getattr(self.model, "disable_adapter", None)

        def choose(index: int, x: Tensor) -> tuple[Kept, Kept]:
            exact = self.exact(index, x, blocks)
            consume(index, x, exact, blocks)
            kept = select(exact, blocks, mode="budget", keep=keep)
            return kept, kept

        with disable() if disable is not None else contextlib.nullcontext():
            x = self.family.embed(self.decoder, ids, None, blocks.positions)
            # The kernels' dtypes: fp32 on the CPU, 16 bits on CUDA.
            x = x.float() if not x.is_cuda else x.bfloat16() if x.dtype == torch.float32 else x
            step = Step(
                family=self.family,
                layers=self.layers,
                blocks=blocks,
                attention=Attention(
                    self.family, self.family.tables(self.decoder, x, blocks.positions), longest=blocks.max_seqlen
                ),
                mode="skip",
                recompute="full",
                random=False,
                choose=choose,
                autocast=Autocast(x.device.type, x.dtype, False),
            )
            forward(step, x.clone())

    def check_scores(self, tokens: int) -> None:
        """Raises UnsupportedModelError if the model's device cannot compute `exact` in documents of so many tokens."""
        self.family.check_score_kernels(self.config, tokens, self.device)

    def exact(self, index: int, x: Tensor, blocks: Blocks) -> Tensor:
        """Exact informativeness float32 [nb] of layer ``index`` for its input x [T, d]."""
        q, k, scale = self.queries_keys(index, x, blocks)
        where = (blocks.offsets, blocks.documents, self.block_size, scale, self.normalize)
        options = self.family.attention_options(self.layers[index]).within(blocks.max_seqlen)
        return ops.block_scores(q, k, *where, window=options.window or 0, softcap=options.softcap)[0]

    def queries_keys(self, index: int, x: Tensor, blocks: Blocks) -> tuple[Tensor, Tensor, float]:
        """q [T, Hq, D] and k [T, Hk, D] of layer ``index`` for its input, positions applied, and their scale."""
        layer = self.layers[index]
        norm = self.family.norms(layer)[0]
        width = x.shape[-1:]
        weight, bias = (None if t is None else t.to(x.dtype) for t in norm.operands)
        if norm.after:
            h = x
        elif norm.kind == "rms":
            h = F.rms_norm(x, width, weight, norm.eps)
        else:
            h = F.layer_norm(x, width, weight, bias, norm.eps)
        tables = self.family.tables(self.decoder, x, blocks.positions)
        q, k, _ = self.family.queries_keys_values(layer, h, tables, None)
        if not x.is_cuda:
            q, k = q.float(), k.float()
        elif q.dtype == torch.float32:  # the kernels on CUDA take 16 bits
            q, k = q.bfloat16(), k.bfloat16()
        return q, k, self.family.attention_options(layer).scale


def documents(batches: Iterable[Any], context: int | None, block_size: int) -> Iterator[Tensor]:
    """Single documents int64 [T] out of what a data loader gives, cut to ``context`` tokens.

    batches: sequences of token ids; tensors [T] or [B, T]; or mappings with "input_ids" and optionally "attention_mask"
    (padding is dropped) and "position_ids" (a document begins wherever they are 0). Pieces of fewer than two blocks are
    left out: there is nothing to choose in them.
    """
    for batch in batches:
        mask = positions = None
        if isinstance(batch, Mapping):
            mask, positions, batch = batch.get("attention_mask"), batch.get("position_ids"), batch["input_ids"]
        ids = torch.atleast_2d(torch.as_tensor(batch, dtype=torch.int64))
        for i, row in enumerate(ids):
            kept = torch.ones_like(row, dtype=torch.bool)
            if mask is not None:
                kept = torch.atleast_2d(torch.as_tensor(mask))[i].to(row.device).bool()
            starts = [0]
            if positions is not None:
                place = torch.atleast_2d(torch.as_tensor(positions))[i].to(row.device)[kept]
                starts = sorted({0, *(place == 0).nonzero().flatten().tolist()})
            row = row[kept]
            for first, last in zip(starts, [*starts[1:], row.shape[0]], strict=True):
                step = context or max(last - first, 1)
                for begin in range(first, last, step):
                    piece = row[begin : min(begin + step, last)]
                    if piece.shape[0] > block_size:
                        yield piece
