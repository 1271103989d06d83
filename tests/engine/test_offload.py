"""Saved rows that wait in host memory: equal results, few on the device, memory that is reused."""

import gc
import itertools

import lemo
import lemo.engine.forward
import lemo.engine.offload as offload
import lemo.engine.stack
import pytest
import torch
from lemo.engine.forward import forward
from lemo.engine.memory import saved_bytes
from lemo.engine.offload import HostMemory, OffloadedRecords, _Meter
from lemo.engine.records import Stream
from lemo.engine.segments import address
from lemo.integration.kept_lists import ChosenLists
from support.models import FAMILIES, LINEARS, base, batch, gradients, lora, tuned

LAYERS, BLOCK = 4, 8
PHASES = {
    "dense": {"mode": "dense"},
    "skip": {"policy": "random"},
    "two-lists": {"policy": "random", "mlp_keep": 0.25},
    "nothing-for-attention": {"policy": "random", "keep": 0.0, "mlp_keep": 0.5},
    "backward": {"mode": "backward", "weighted": True},
    "sparse": {"mode": "sparse", "density": 0.5},
}


@pytest.fixture(autouse=True)
def chunks(monkeypatch):
    """Small ones, that rows do not fill evenly."""
    monkeypatch.setattr(offload, "CHUNK_BYTES", 1000)


def settings(phase="skip", **options):
    return lemo.LemoConfig(block_size=BLOCK, phases=[lemo.Phase(**PHASES[phase])], seed=3, **options)


def host(controller):
    return controller.savings._host


@pytest.mark.parametrize(
    ("phase", "options"),
    [
        *itertools.product(PHASES, [{"recompute": "attention"}, {"recompute": "full"}]),
        *((phase, {}) for phase in PHASES if phase != "backward"),
        ("backward", {"recompute": "none"}),
        ("backward", {"recompute": "none", "recompute_layers": 2}),
        ("skip", {"recompute": "attention", "recompute_layers": 2}),
        ("two-lists", {"recompute": "full", "recompute_layers": 2}),
    ],
    ids=str,
)
def test_results_are_those_without(phase, options, monkeypatch):
    """Bit for bit, with all layers or some of them offloaded; without `recompute`, the others save everything. What is
    reported to be in host memory has been there."""
    sent, send = set(), offload._Moved.send

    def counted(self):
        sent.add(self.record.layer)
        send(self)

    monkeypatch.setattr(offload._Moved, "send", counted)
    inputs, found = batch("packed"), []
    for layers in (False, True, 2):
        sent.clear()
        controller = lemo.apply(model := tuned("llama", layers=LAYERS), settings(phase, offload=layers, **options))
        found.append(gradients(model, inputs))
        if layers:
            assert host(controller).chunks == len(host(controller)._free) > 0
            assert controller.report()["memory"]["offloaded"] == len(sent) > 0
    (loss, grads), *others = found
    for other, theirs in others:
        assert torch.equal(loss, other)
        assert all(torch.equal(theirs[n], g) for n, g in grads.items())


def by_layer(first, *following):
    """Events of a pass: of the first layer, and of every following one i after the layer j before it."""
    return [*first, *(event.format(i=i, j=i - 1) for i in range(1, LAYERS) for event in following)]


ONE_LIST = by_layer(["choose 0", "put 0"], "choose {i}", "copy {j}", "put {i}")
TWO_LISTS = by_layer(
    ["choose 0", "put 0", "copy 0", "put 0"], "choose {i}", "copy {j}", "put {i}", "copy {i}", "put {i}"
)
SEGMENTS = [
    *("put stream 0", "choose 0", "copy stream 0", "choose 1"),
    *("choose 2", "put 2", "choose 3", "copy 2", "put 3"),
    *("put 0", "copy 0", "put 1"),  # again
]


@pytest.mark.parametrize(
    ("phase", "expected", "options"),
    [
        ("skip", ONE_LIST, {"recompute": "attention"}),
        ("backward", ONE_LIST, {"recompute": "attention"}),
        ("backward", ONE_LIST, {"recompute": "none"}),
        ("two-lists", TWO_LISTS, {"recompute": "full"}),
        ("skip", SEGMENTS, {"recompute": "full", "recompute_layers": 2}),
    ],
    ids=["skip", "backward", "backward-none", "two-lists", "segments"],
)
def test_a_copy_starts_once_the_next_layer_has_its_lists(phase, expected, options, monkeypatch):
    """So that no size of a list waits for rows on their way to the host. The last rows stay where they are."""
    events: list[str] = []

    def name(record):
        return f"{'stream ' if isinstance(record, Stream) else ''}{record.layer}"

    def spy(owner, method, event):
        original = getattr(owner, method)

        def logged(self, *args):
            events.extend(event(self, *args))
            return original(self, *args)

        monkeypatch.setattr(owner, method, logged)

    spy(ChosenLists, "choose", lambda _, layer, x: [f"choose {layer}"])
    for method in ("put", "put_stream"):
        spy(OffloadedRecords, method, lambda _, record: [f"put {name(record)}"])
    spy(offload._Moved, "send", lambda moved: [] if moved.sent else [f"copy {name(moved.record)}"])
    lemo.apply(model := tuned("llama", layers=LAYERS), settings(phase, offload=True, **options))
    gradients(model, batch("packed"))
    assert events == expected


def on_device(*records):
    """Bytes of records' rows and of what their graphs hold, on the device, each memory once."""
    rows = [t for r in records for t in (r.x_kept, r.x_mlp, r.x_out, r.out, r.lse) if t is not None]
    graphs = [t for r in records for graph in r.graphs if graph.held is not None for t in graph.held.memory]
    return sum({address(t): t.untyped_storage().nbytes() for t in (*rows, *graphs) if t.numel()}.values())


@pytest.mark.parametrize(
    ("phase", "recompute", "layers"),
    [
        *(("skip", *case) for case in itertools.product(["full", "attention"], [1, 2, 3, True])),
        ("backward", "none", True),
    ],
)
def test_the_plan_has_what_is_on_the_device_at_most(phase, recompute, layers, monkeypatch):
    """To the byte, counted after every put and pop: two layers' rows, and those that stay."""
    most: list[int] = []
    after_forward: list[int] = []

    def rows(records):
        assert on_device(*(r for r in records if id(r) in records._moved)) == 0
        moved = sum(t.nbytes for m in records._moved.values() for t in m.tensors.values())
        return moved + on_device(*(r for r in records if id(r) not in records._moved))

    for name in ("put", "pop"):
        original = getattr(OffloadedRecords, name)

        def counted(self, given, original=original):
            found = original(self, given)
            most.append(rows(self) + (on_device(found) if found else 0))
            return found

        monkeypatch.setattr(OffloadedRecords, name, counted)

    def spy(step, x):
        forward(step, x)
        after_forward.append(rows(step.records))

    monkeypatch.setattr(lemo.engine.stack, "forward", spy)
    phases = [lemo.Phase(phase, policy="random")]
    config = lemo.LemoConfig(block_size=BLOCK, phases=phases, recompute=recompute, offload=layers)
    controller = lemo.apply(model := tuned("llama", layers=LAYERS), config)
    ids = torch.randint(3, 80, (2, 64))  # of whole blocks, so that all lists are equally long
    gradients(model, {"input_ids": ids, "labels": ids})
    plan = controller.savings.plan
    needs = controller.savings.needs(controller.phase, (64, 64), 4)
    sizes = [needs.of(i, level) for i, level in enumerate(plan.recompute)]
    others = sum(size.others for size in sizes)
    offloaded = LAYERS if layers is True else layers
    # Offloaded are the first layers. The rows of the last layer leave only if another one follows.
    assert plan.offloaded == set(range(offloaded))
    stay = sum(size.rows for i, size in enumerate(sizes) if i not in plan.offloaded)
    ends = sizes[-1].rows if offloaded == LAYERS else 0
    assert after_forward == [stay + ends]
    # Those that stay come last: only one of them is there while another layer's rows go or come.
    assert max(most) == plan.saved - others == max(stay, 2 * sizes[0].rows)
    assert plan.host == sum(sizes[i].rows for i in plan.offloaded) - ends


@pytest.mark.parametrize("layers", [True, 1, 3], ids=str)
@pytest.mark.parametrize(
    ("phase", "options"),
    [
        *itertools.product(
            ["dense", "skip", "two-lists", "nothing-for-attention", "sparse", "nothing-for-the-mlp"],
            [{"recompute": "attention"}, {"recompute": "full"}, {"recompute": "full", "recompute_layers": 2}],
        ),
        ("exact", {"recompute": "attention"}),
        ("exact", {"recompute": "none"}),
        ("exact", {"recompute": "none", "recompute_layers": 2}),
        ("skip", {"recompute": "attention", "recompute_layers": 3}),
    ],
    ids=str,
)
def test_the_plan_has_the_host_memory_that_a_step_takes(phase, options, layers, monkeypatch):
    """To the byte: what the last layer, or the last of a segment, has put is never copied."""
    monkeypatch.setattr(offload, "CHUNK_BYTES", 32)  # divides the rows of a block
    added = {
        "nothing-for-the-mlp": {"policy": "random", "mlp_keep": 0.0},
        "exact": {"mode": "backward", "policy": "random"},
    }
    config = lemo.LemoConfig(
        block_size=BLOCK, phases=[lemo.Phase(**{**PHASES, **added}[phase])], seed=3, offload=layers, **options
    )
    controller = lemo.apply(model := tuned("llama", layers=LAYERS), config)
    ids = torch.randint(3, 80, (2, 64))  # of whole blocks, so that all lists are equally long
    gradients(model, {"input_ids": ids, "labels": ids})
    assert host(controller).nbytes == controller.savings.plan.host > 0


@pytest.mark.parametrize(
    ("family", "trains"),
    [*((family, "adapters") for family in FAMILIES), ("llama", "everything"), ("opt", "everything")],
)
def test_graphs_are_moved_with_all_that_they_save(family, trains, monkeypatch):
    """Of every family, exactly the bytes of the plan if they can be counted; and never a weight."""
    inputs, found, moved = batch("right"), [], []
    move = OffloadedRecords._move

    def spy(records, record):
        move(records, record)
        moved.append(records._moved[id(record)])
        held = {address(t) for t in moved[-1].tensors.values()}
        assert record.graphs and held.isdisjoint(address(p) for p in model.parameters())

    monkeypatch.setattr(OffloadedRecords, "_move", spy)
    for layers in (False, True):
        torch.manual_seed(0)
        model = base(family)
        model = model.train() if trains == "everything" else lora(model, LINEARS[family]).train()
        controller = lemo.apply(model, settings("backward", offload=layers, recompute="none"))
        found.append(gradients(model, inputs))
    (loss, grads), (other, theirs) = found
    assert torch.equal(loss, other) and len(moved) == 3 and all(m.chunks == [] for m in moved)
    assert grads.keys() == theirs.keys() and all(torch.equal(theirs[n], g) for n, g in grads.items())
    needs = controller.savings.needs(controller.phase, (12, 12), 4)
    kept = [m.record.saved_list.count for m in moved]
    sizes = [
        saved_bytes(shape, m, recompute="none", mode="backward", everything=True)
        for shape, m in zip(needs.shapes, kept, strict=True)
    ]
    assert not needs.countable or [m.nbytes for m in moved] == sizes


def test_memory_is_reused_over_steps_of_varying_lengths():
    controller = lemo.apply(model := tuned("llama"), settings("dense", offload=True, recompute="attention"))
    memory, sizes = host(controller), []
    for length in (60, 30, 64, 7, 64, 50, 64):
        ids = torch.randint(3, 80, (1, length))
        gradients(model, {"input_ids": ids, "labels": ids})
        sizes.append(memory.chunks)
    assert sizes[0] < sizes[2] == sizes[-1]
    assert len(memory._free) == memory.chunks and memory.nbytes == 1000 * memory.chunks
    assert memory.nbytes - controller.savings.plan.host < 1000 * 3


def test_a_pass_without_backward_gives_its_memory_back():
    controller = lemo.apply(model := tuned("llama"), settings("dense", offload=True, recompute="full"))
    inputs = batch("plain")
    loss = model(**inputs).loss
    assert len(host(controller)._free) == 0
    del loss
    gc.collect()
    assert len(host(controller)._free) == host(controller).chunks
    # Two passes in flight have separate memory.
    expected = gradients(model, inputs)[1]
    first, second = model(**inputs).loss, model(**inputs).loss
    used = host(controller).chunks
    model.zero_grad()
    first.backward()
    assert host(controller).chunks == used == 2 * len(host(controller)._free)
    assert all(torch.equal(p.grad, expected[n]) for n, p in model.named_parameters() if p.grad is not None)
    del second


@pytest.mark.parametrize("options", [{"recompute": "attention"}, {"recompute": "full", "recompute_layers": 2}], ids=str)
def test_a_pass_that_fails_gives_its_memory_back(options, monkeypatch):
    controller = lemo.apply(model := tuned("llama", layers=LAYERS), settings("dense", offload=True, **options))
    inputs, taken = batch("plain"), []
    expected = gradients(model, inputs)[1]
    step = lemo.engine.forward._kept_layer

    def fail(step_, i, *args):
        if i == 2:
            taken.append(host(controller).chunks - len(host(controller)._free))
            raise RuntimeError("layer 2 fails")
        step(step_, i, *args)

    with monkeypatch.context() as patched, pytest.raises(RuntimeError, match="layer 2 fails"):
        patched.setattr(lemo.engine.forward, "_kept_layer", fail)
        gradients(model, inputs)
    gc.collect()
    assert taken[0] > 0 and len(host(controller)._free) == host(controller).chunks
    again = gradients(model, inputs)[1]
    assert all(torch.equal(again[n], g) for n, g in expected.items())


def test_no_more_host_memory(monkeypatch):
    empty, count = torch.empty, []

    def refuse(*args, **options):
        if options.get("dtype") is torch.uint8:
            count.append(options)
            if len(count) > 3:
                raise RuntimeError("CUDA error: out of memory\nmore")
        return empty(*args, **options)

    controller = lemo.apply(model := tuned("llama"), settings(offload=True))
    monkeypatch.setattr(torch, "empty", refuse)
    with pytest.raises(
        ValueError, match=r"offload: the host gave no more host memory after .*MiB \(CUDA error: out of"
    ):
        gradients(model, batch("plain"))
    gc.collect()
    assert len(host(controller)._free) == host(controller).chunks > 0


def test_inside_an_activation_checkpoint_offload_is_off(caplog):
    from torch.utils.checkpoint import checkpoint

    controller = lemo.apply(model := tuned("llama"), settings("dense", offload=True, recompute="full"))
    inputs = batch("plain")
    checkpoint(lambda: model(**inputs).loss, use_reentrant=False).backward()
    assert host(controller).chunks == 0 and "offload is off" in caplog.text


class Event:
    def __init__(self, at, done=True):
        self.at, self.done = at, done

    def query(self):
        return self.done

    def elapsed_time(self, other):
        return other.at - self.at


def test_a_slow_host_is_reported_once():
    notes: list[str] = []
    memory = HostMemory(notes.append)
    memory.chunks = 1

    def measured(wait, done=True):
        memory.begin(torch.device("cuda"))
        meter = memory.meter
        if meter is not None:
            meter.copies.append((Event(0), Event(50), 10**9))
            meter.waits.append((Event(0), Event(wait)))
            meter.waits.append((Event(100 - wait), Event(100, done)))
        return meter

    assert measured(1) is not None
    assert measured(20, done=False) is not None  # the first one was fast
    assert measured(20) is None and notes == []  # the second one is not over
    memory._pending.waits[-1][1].done = True
    measured(20)
    assert len(notes) == 1 and "waited for copies 40% of a step's time" in notes[0] and "20.0 GB/s" in notes[0]
    assert measured(50) is None and len(notes) == 1
    assert _Meter().slow() == "" and _Meter().complete()
