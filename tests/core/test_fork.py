"""A child forked while threads of the library work has its own pool."""

from __future__ import annotations

import os
import subprocess
import sys

CODE = """
import os, threading
import torch
from lemo import ops

torch.set_num_threads(3)
q, cu_seqlens = torch.randn(300, 4, 16), torch.tensor([0, 300], dtype=torch.int32)
work = lambda: ops.attention_forward(q, q, q, cu_seqlens, None, 300, 0.25)[0]
expected, stop = work(), threading.Event()

def others():
    while not stop.is_set():
        work()

thread = threading.Thread(target=others)
thread.start()
for _ in range(15):
    child = os.fork()
    if child == 0:
        os._exit(0 if torch.equal(work(), expected) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
stop.set()
thread.join()
"""


def test_children_forked_during_an_operation() -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", CODE], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
