"""Invoke's entry: every click command of tools/cli.py is a task. `invoke --list` shows them."""

import os

# Before torch loads OpenMP: threads that wait soon sleep. Where others compute too, threads that spin take the time
# from those that work, and training becomes several times slower; on a quiet machine it makes next to no difference.
os.environ.setdefault("GOMP_SPINCOUNT", "3000")
# Before CUDA begins: without a workspace of its own cuBLAS may add in another order, and equal runs would differ.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

from invoke.main import program

from tools.bridge import mirror, refuse_with_2
from tools.cli import main

refuse_with_2(program)
ns = mirror(main)
