"""Invoke's entry: every click command of tools/cli.py is a task. `invoke --list` shows them."""

from invoke.main import program

from tools.bridge import mirror, refuse_with_2
from tools.cli import main

refuse_with_2(program)
ns = mirror(main)
