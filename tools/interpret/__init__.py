"""invoke interpret.*: what goes on inside a run. To add a command: an import and a name.

A command is two modules: its options (logit_lens.py), light, and what it does and prints (lens_view.py). What they
share stands in options.py, tokens.py and looking.py.
"""

import click

from tools.interpret.attention import attention
from tools.interpret.attribute import attribute
from tools.interpret.induction_heads import induction_heads
from tools.interpret.logit_lens import logit_lens
from tools.interpret.patch import patch
from tools.interpret.report import report
from tools.interpret.steer import steer

interpret = click.Group(
    "interpret",
    commands=[attention, attribute, induction_heads, logit_lens, patch, report, steer],
    help="Look inside a run.",
)
