"""invoke interpret.patch: which activation carries the difference between two prompts."""

import click

from tools.interpret.options import with_html, with_model

METRICS = ("logit-diff", "logit", "prob", "logprob", "nll", "kl")
SITES = (
    "block", "resid_pre", "resid_mid", "resid_post", "attn.out", "mlp.out", "attn.z", "attn.q", "attn.k", "attn.v",
    "attn.pattern",
)  # fmt: skip


@click.command()
@click.option("--clean", metavar="TEXT", help="The prompt whose answer is right.")
@click.option("--corrupted", metavar="TEXT", help="The same, changed so that the answer is another.")
@click.option("--target", metavar="TEXT", help="What the clean prompt should go on with.")
@click.option("--foil", metavar="TEXT", help="What it is measured against (default: the corrupted prompt's answer).")
@click.option("--demo", is_flag=True, help="Look at pairs of our own.")
@click.option(
    "--pairs", type=click.Path(exists=True, dir_okay=False), metavar="FILE",
    help='Several pairs, pooled: {"clean", "corrupted", "target"} and perhaps "foil" a line.',
)  # fmt: skip
@click.option("--top-k", type=click.IntRange(min=1), default=5, show_default=True, help="Rows of a ranking.")
@click.option("--metric", type=click.Choice(METRICS), default="logit-diff", show_default=True, help="What is read.")
@click.option(
    "--by", type=click.Choice(["layer", "position", "head"]), default="layer", show_default=True,
    help="What is told apart, beside layers.",
)  # fmt: skip
@click.option(
    "--site", type=click.Choice(SITES),
    help="What is patched (default: by layer attn.out and mlp.out, by position resid_pre, by head attn.z).",
)  # fmt: skip
@click.option(
    "--direction", type=click.Choice(["denoise", "noise"]), default="denoise", show_default=True,
    help="denoise: clean values into the corrupted run; noise: the reverse.",
)  # fmt: skip
@click.option(
    "--align", type=click.Choice(["strict", "auto"]), default="strict", show_default=True,
    help="auto: positions of prompts of two lengths are paired from both ends.",
)  # fmt: skip
@click.option("--exact-target", is_flag=True, help="Put no space before the target.")
@click.option("--order", type=click.Choice(["rank", "layer"]), default="rank", show_default=True, help="Of the table.")
@click.option(
    "--method", type=click.Choice(["measured", "attribution", "edges"]), default="measured", show_default=True,
    help="attribution, edges: estimates from gradients, the largest beside what is measured.",
)  # fmt: skip
@click.option(
    "--steps", type=click.IntRange(min=0), default=5, show_default=True,
    help="Of integrated gradients; 0: the gradient at the corrupted prompt alone.",
)  # fmt: skip
@with_model
@with_html
def patch(**given):
    """Put activations of one prompt into the run of another and measure how much of the answer comes back."""
    from tools.interpret import patch_view

    return patch_view.show(given)
