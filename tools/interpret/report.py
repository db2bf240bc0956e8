"""invoke interpret.report: one page of HTML with all that can be seen in a run."""

import click

from tools.interpret.options import with_machine
from tools.options import Number


@click.command()
@click.option("--text", metavar="TEXT", help="The text to look at (default: the clean one).")
@click.option("--demo", is_flag=True, help="Look at texts of our own.")
@click.option("--clean", metavar="TEXT", help="Patching: a text that leads to the target.")
@click.option("--corrupted", metavar="TEXT", help="Patching: much the same text, which does not.")
@click.option("--target", metavar="TEXT", help="Patching: what follows the clean text.")
@click.option("--foil", metavar="TEXT", help="Patching: what to weigh it against (default: what corrupted leads to).")
@click.option("--out", default="report.html", show_default=True, metavar="FILE", help="Where the page goes.")
@click.option(
    "--max-mb",
    type=Number(min=0, min_open=True),
    default=8,
    show_default=True,
    help="Above this size the page keeps the patterns of the best heads only, and says so.",
)
@with_machine
def report(**given):
    """Look at one text with every tool, and write it all on one page of HTML that needs nothing else."""
    from tools.interpret import report_view

    report_view.show(given)
