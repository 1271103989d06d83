"""The bytes that the layers of a step save for its backward pass, counted."""

import lemo
import lemo.engine.stack
import torch
from lemo.engine.attend import TileChoice, Tiles
from lemo.engine.forward import forward
from lemo.engine.records import Record, SavedList


def tensors_of(value, seen):
    """Tensors reachable from records, without looking into the model."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for v in value:
            yield from tensors_of(v, seen)
    elif isinstance(value, (Record, SavedList, TileChoice, Tiles)) and id(value) not in seen:
        seen.add(id(value))
        for v in vars(value).values():
            yield from tensors_of(v, seen)


def count(model, settings, monkeypatch, context=128):
    """Bytes of unique storages that the layers hold after a forward pass: graphs' saved tensors and the records'.

    Storages that died in the forward pass are not saved; parameters and what belongs to the step are not the layers'.
    """
    packs: list[torch.Tensor] = []
    records: list[Record] = []

    def spy(step, x):
        def pack(t):
            packs.append(t.detach())
            return len(packs) - 1

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda i: packs[i]):
            forward(step, x)
        shared.extend([x, *(step.attention.tables or ())])
        records.extend(step.records)

    shared = list(model.parameters())
    monkeypatch.setattr(lemo.engine.stack, "forward", spy)
    controller = lemo.apply(model, settings)
    ids = torch.randint(3, 80, (2, context // 2))
    model(input_ids=ids, labels=ids)
    everything = all(r == 1.0 for r in controller.kept_ratios)
    held = [*packs, *tensors_of(records, set())]
    if everything:  # the lists are the step's then
        shared.extend(t for r in records for t in (r.saved_list.rows, r.saved_list.cu_seqlens))
    owned = {t.untyped_storage().data_ptr() for t in shared}
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in held if t.numel()}
    rows = [r.saved_list.count for r in records]
    return sum(n for p, n in storages.items() if p not in owned), rows, everything
