"""invoke interpret.steer: a text with a direction added to the residual stream, beside the same without."""

import click

from tools.interpret.options import with_model
from tools.options import Number


def places(context, parameter, value):
    """all, prompt, generated, or a slice such as 4: or 0:8."""
    if value in ("all", "prompt", "generated"):
        return value
    try:
        ends = [int(end) if end else None for end in value.split(":")]
        if not 2 <= len(ends) <= 3:
            raise ValueError
    except ValueError:
        raise click.BadParameter(f"expected all, prompt, generated or a slice such as 4:, got {value!r}") from None
    return slice(*ends)


@click.command()
@click.option("--prompt", required=True, metavar="TEXT", help="What is continued.")
@click.option(
    "--positive", required=True, multiple=True, metavar="TEXT", help="Towards this; may be given several times."
)
@click.option(
    "--negative", required=True, multiple=True, metavar="TEXT", help="Away from this; may be given several times."
)
@click.option("--layer", type=click.IntRange(min=0), metavar="N", help="After this block (default: the middle one).")
@click.option(
    "--scale",
    type=Number(-1000, 1000),
    default=1.0,
    show_default=True,
    help="How far: 1 is the distance of the two sets.",
)
@click.option(
    "--positions", default="all", show_default=True, metavar="WHICH", callback=places,
    help="all, prompt, generated, or a slice of positions such as 4:.",
)  # fmt: skip
@click.option("--max-new-tokens", type=click.IntRange(min=0), default=40, show_default=True, help="Of each text.")
@with_model
def steer(**given):
    """Continue a prompt with the mean difference of two sets of texts added to the stream, beside the plain text."""
    from tools.interpret import steer_view

    return steer_view.show(given)
