"""invoke interpret.*: what goes on inside a run. To add a command: an import and a name.

A command is two modules: its options (logit_lens.py), light, and what it does and prints (lens_view.py). What they
share stands in options.py, tokens.py and looking.py.
"""

import click

interpret = click.Group("interpret", commands=[], help="Look inside a run.")
