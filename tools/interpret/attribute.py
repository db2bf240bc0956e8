"""invoke interpret.attribute: what each part of the model adds to a logit."""

import click

from tools.interpret.options import with_model


@click.command()
@click.option("--text", required=True, metavar="TEXT", help="The text to look at.")
@click.option("--target", metavar="TEXT", help="The token explained (default: the model's own answer).")
@click.option(
    "--foil", metavar="TEXT", help="Explain the difference to this token (default: the target's logit alone)."
)
@click.option(
    "--position", type=int, default=-1, show_default=True, help="The token after which is read; -1: the last one."
)
@click.option(
    "--by", type=click.Choice(["component", "head", "neuron"]), default="component", show_default=True,
    help="Whole layers of attention and MLPs, heads apart, or neurons.",
)  # fmt: skip
@click.option("--top-k", type=click.IntRange(min=1), default=10, show_default=True, help="Largest parts shown.")
@with_model
def attribute(**given):
    """Split a logit, or the difference of two, over the parts of the model: they sum to it exactly."""
    from tools.interpret import attribute_view

    return attribute_view.show(given)
