"""invoke sampling-demo: what temperature, top-k and top-p do, on two small distributions and on a run."""

import click

from tools.options import on_device, with_threads


@click.command("sampling-demo")
@click.option(
    "--run", metavar="RUN", help="Also continue a prompt in five ways: a run or step folder, or a run's name."
)
@click.option("--prompt", default="Return the", show_default=True, metavar="TEXT", help="What --run continues.")
@click.option("--draws", type=click.IntRange(min=1), default=20, show_default=True, help="Draws of each setting.")
@click.option("--seed", type=int, default=42, show_default=True, help="Random seed: the same one draws the same.")
@on_device
@with_threads
def sampling_demo(**given):
    """See what the sampling settings do: exact probabilities beside drawn frequencies."""
    from rich.console import Console

    from tools import drawing

    console = Console(highlight=False)
    model = None
    if given["run"] is not None:  # what is wrong with it is said before anything is shown
        from tools import scoring

        model = scoring.load(given["run"], given)
    drawing.show_distributions(given["draws"], given["seed"], console)
    drawing.show_advice(console)
    if model:
        drawing.show_texts(model, given["prompt"], given["seed"], console)
    return 0
