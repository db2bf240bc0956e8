"""invoke interpret.logit-lens: what the model would say if it stopped after each block."""

import click

from tools.interpret.options import with_html, with_model, with_text
from tools.options import Number, in_cache


def place(context, parameter, value):
    """A position is a whole number, negative from the end, or all."""
    if value == "all":
        return value
    try:
        return int(value)
    except ValueError:
        raise click.BadParameter(f"expected a whole number or all, got {value!r}") from None


@click.command("logit-lens")
@with_text
@click.option("--top-k", type=click.IntRange(min=1), default=5, show_default=True, help="Tokens a row.")
@click.option(
    "--temperature", type=Number(min=0, min_open=True), default=1.0, show_default=True, help="Of the softmax."
)
@click.option(
    "--position", default="-1", show_default=True, metavar="N|all", callback=place,
    help="The token after which is read; -1: the last one; all: every one, beside each other.",
)  # fmt: skip
@click.option("--target", metavar="TEXT", help="Follow this token too (default: the text's own next token).")
@click.option(
    "--lens", type=click.Choice(["logit", "tuned"]), default="logit", show_default=True,
    help="tuned: through translators, fitted on the run's own text when first asked for, and saved.",
)  # fmt: skip
@in_cache
@with_model
@with_html
def logit_lens(**given):
    """Read the stream after every block: likeliest tokens, rank of a target, distance to the final prediction."""
    from tools.interpret import lens_view, looking

    return looking.look_at_texts(given, "interpret.logit-lens", lens_view.DEMO, lens_view.show)
