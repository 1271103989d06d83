"""Scripts in processes of their own, started quickly: a server imports what takes seconds once, and forks for each."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

# The server itself computes nothing, so that no thread pool is there to be lost in a fork.
_SERVER = """
import json, os, signal, sys, traceback
{imports}
for line in sys.stdin:
    request = json.loads(line)
    children = []
    for i, environment in enumerate(request["environments"]):
        children.append(os.fork())
        if children[-1]:
            continue
        os.environ.update(environment)
        null = os.open(os.devnull, os.O_RDWR)
        said = os.open(request["said"] + (str(i) if i else ""), os.O_RDWR | os.O_CREAT)
        os.dup2(null, 0), os.dup2(said, 1), os.dup2(said, 2)
        sys.argv = ["script", *request["arguments"]]
        code = 1
        try:
            exec(request["script"], {{"__name__": "__main__"}})
            code = 0
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 1
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)
    codes = {{}}
    while len(codes) < len(children):
        child, status = os.wait()
        codes[child] = os.waitstatus_to_exitcode(status)
        if codes[child] < 0:  # as torchrun does, so that none waits for one that was killed
            for other in set(children) - codes.keys():
                os.kill(other, signal.SIGKILL)
    print(json.dumps([codes[child] for child in children]), flush=True)
"""


class Server:
    """imports: statements that every script starts after. folder(): a new one, for what a script prints."""

    def __init__(self, imports: str, folder: Callable[[], Path]) -> None:
        self._folder = folder
        # One thread, as in the process that asks: the order of sums decides the last bit.
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-c", _SERVER.format(imports=imports)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def run(self, environments: list[dict[str, str]], script: str, *arguments: str) -> list[tuple[int, str]]:
        """(exit code, or minus the signal; what it printed) of separate processes that run at the same time, one for
        every dictionary of environment variables."""
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None and stdout is not None
        said = self._folder() / "said"
        request = {"script": script, "arguments": arguments, "said": str(said), "environments": environments}
        stdin.write(json.dumps(request) + "\n")
        stdin.flush()
        answer = stdout.readline()
        assert answer, "the server of scripts has died"
        texts = [said.with_name(said.name + (str(i) if i else "")).read_text() for i in range(len(environments))]
        return list(zip(json.loads(answer), texts, strict=True))

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


def launched(count: int, port: int) -> list[dict[str, str]]:
    """The environment variables that torchrun gives `count` processes of one machine."""
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count)}
    common["LOCAL_WORLD_SIZE"] = str(count)
    return [common | {"RANK": str(r), "LOCAL_RANK": str(r)} for r in range(count)]
