"""invoke interpret.attention: where heads look."""

import click

from tools.interpret.options import with_html, with_model, with_text
from tools.options import Number


@click.command()
@with_text
@click.option("--layer", type=int, help="This layer's heads with their labels (default: the strongest heads a score).")
@click.option("--head", type=int, help="With --layer: this head's pattern.")
@click.option("--threshold", type=Number(0, 1), default=0.1, show_default=True, help="Weights below it are a dot.")
@click.option("--value-weighted", is_flag=True, help="Weigh each key by the length of what it brings.")
@with_model
@with_html
def attention(**given):
    """Show where heads look: the strongest a score, a layer's heads with labels, or one head's pattern."""
    from tools.interpret import attention_view, looking

    attention_view.check(given)
    return looking.look_at_texts(given, "interpret.attention", attention_view.DEMO, attention_view.show)
