"""invoke compare: which run is better on the same text, and whether that can be told from chance."""

import click

from tools.options import Number, in_cache, offline, on_device, with_threads


@click.command()
@click.option(
    "--run",
    multiple=True,
    required=True,
    metavar="RUN",
    help="A run, a step folder or a folder of runs; several times. One run alone: all its steps.",
)
@click.option(
    "--data",
    multiple=True,
    metavar="SOURCE",
    help="python-docs, or a file, folder, glob or - (default: what the first run has held out); several times.",
)
@click.option("--text-field", default="text", show_default=True, help="The field of .jsonl and .parquet with the text.")
@click.option(
    "--tokens", type=click.IntRange(min=1), default=1_000_000, show_default=True,
    help="At most so many tokens of the first run.",
)  # fmt: skip
@click.option(
    "--margin", type=Number(min=0, min_open=True), default=0.005, show_default=True,
    help="Bits per byte that do not matter.",
)  # fmt: skip
@click.option(
    "--choices",
    type=click.Path(exists=True, dir_okay=False),
    metavar="FILE",
    help='Compare answers instead: {"ctx", "endings", "label"} a line.',
)
@in_cache
@offline
@on_device
@with_threads
def compare(**given):
    """Rank runs or steps on the same documents, with paired intervals; say where no difference was shown."""
    from rich.console import Console

    from tools import fetching, ranking

    console = Console(highlight=False)
    fetching.obey(given["offline"])
    if given["choices"]:
        ranking.show_answers(given, console)
    else:
        ranking.show_ranking(given, console)
    return 0
