"""Jobs in several processes that talk to each other through gloo, on the CPU."""

from __future__ import annotations

import socket
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.fixtures import one_thread, own_accelerate_state
from support.scripts import Server, launched

__all__ = ["one_thread", "own_accelerate_state"]

_IMPORTS = """
import torch, peft, transformers, accelerate
import torch.distributed.fsdp, torch.distributed.tensor
from transformers import LlamaForCausalLM, MistralForCausalLM, OPTForCausalLM, Qwen2ForCausalLM, Trainer
torch.set_num_threads(1)
"""

# argv: folders that hold the job and its helpers, the job (MODULE.FUNCTION), and the folder for what it returns.
_SCRIPT = textwrap.dedent(
    """
    import datetime, importlib, os, sys
    import torch
    job, folder, *paths = sys.argv[1:]
    sys.path[:0] = paths
    torch.distributed.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
    module, _, function = job.rpartition(".")
    result = getattr(importlib.import_module(module), function)()
    torch.save(result, os.path.join(folder, os.environ["RANK"]))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    """
)


Ranks = Callable[[int, str], list[Any]]


@pytest.fixture(scope="session")
def launch(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., list[tuple[int, str]]]]:
    """launch(count, script, *arguments): (exit code, what it printed) of `count` processes, as torchrun starts them."""
    server = Server(_IMPORTS, lambda: tmp_path_factory.mktemp("ranks"))

    def run(count: int, script: str, *arguments: str) -> list[tuple[int, str]]:
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        return server.run(launched(count, port), script, *arguments)

    yield run
    server.close()


@pytest.fixture(scope="session")
def ranks(launch: Callable[..., list[tuple[int, str]]], tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    """ranks(count, job): what a function, by its name MODULE.FUNCTION, returns in each of `count` processes."""
    paths = [str(Path(__file__).parents[1])]
    done: dict[tuple[int, str], list[Any]] = {}

    def run(count: int, job: str) -> list[Any]:
        if (count, job) not in done:  # several tests may look at one run
            folder = tmp_path_factory.mktemp("results")
            ended = launch(count, _SCRIPT, job, str(folder), *paths)
            assert [code for code, _ in ended] == [0] * count, "\n".join(text for _, text in ended)
            done[count, job] = [torch.load(folder / str(r), weights_only=False) for r in range(count)]
        return done[count, job]

    return run
