"""invoke interpret.induction-heads: who goes on with what followed last time."""

import click

from tools.interpret.options import with_html, with_model


@click.command("induction-heads")
@click.option(
    "--num-sequences", type=click.IntRange(min=2), default=100, show_default=True, help="Random sequences, each twice."
)
@click.option(
    "--seq-length", type=int, metavar="N", help="Tokens of a sequence (default: 40, or as many as fit in twice)."
)
@click.option("--top-k", type=click.IntRange(min=1), default=10, show_default=True, help="Heads to show.")
@click.option("--history", is_flag=True, help="The moving picture: the same over every saved step of the run.")
@click.option("--svg", metavar="FILE", help="With --history: draw it.")
@with_model
@with_html
def induction_heads(**given):
    """Find induction heads on random tokens twice: scores, copying, the heads that feed them, what each is worth."""
    from tools.interpret import induction_view

    return induction_view.show(given)
