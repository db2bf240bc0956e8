"""invoke evaluate: how well a run predicts text that it has not seen, and how sure one can be of that."""

import click

from tools.options import from_run, in_cache, offline, on_device, with_threads


@click.command()
@from_run
@click.option(
    "--data",
    multiple=True,
    metavar="SOURCE",
    help="python-docs, or a file, folder, glob or - (default: the run's held-out text); may be given several times.",
)
@click.option("--text-field", default="text", show_default=True, help="The field of .jsonl and .parquet with the text.")
@click.option(
    "--tokens",
    type=click.IntRange(min=1),
    help="Score at most so many tokens (default: as many as the run's own validation; of other text 10,000,000).",
)
@click.option("--window", type=click.IntRange(min=1), help="Tokens of a window (default: the model's context).")
@click.option("--stride", type=click.IntRange(min=1), help="Tokens from window to window (default: a whole window).")
@click.option(
    "--prefix",
    type=click.Choice(["eot", "none"]),
    default="eot",
    show_default=True,
    help="What a document is read after; with none its first token is not scored.",
)
@click.option("--calibration", is_flag=True, help="Also: is it right as often as it says?")
@click.option("--train-gap", is_flag=True, help="Also measure as much training text in the same way.")
@click.option(
    "--choices",
    type=click.Path(exists=True, dir_okay=False),
    metavar="FILE",
    help='Score multiple choice instead: {"ctx", "endings", "label"} a line.',
)
@click.option(
    "--last-words",
    type=click.Path(exists=True, dir_okay=False),
    metavar="FILE",
    help='Score last words instead: {"text"} a line.',
)
@click.option(
    "--per-token",
    type=click.Path(dir_okay=False),
    metavar="FILE",
    help="Write a JSON line for each token; show the worst.",
)
@click.option(
    "--json",
    type=click.Path(dir_okay=False),
    metavar="FILE",
    help="Write every number, down to each document and token, or each question.",
)
@click.option(
    "--svg",
    type=click.Path(dir_okay=False),
    metavar="FILE",
    help="Draw the reliability curve: what was said against what came true.",
)
@in_cache
@offline
@on_device
@with_threads
def evaluate(**given):
    """Measure a run: loss, perplexity, bits per byte and accuracy with intervals, or answers to questions."""
    from rich.console import Console

    from tools import fetching, scoring

    console = Console(highlight=False)
    scoring.check_options(given)
    fetching.obey(given["offline"])
    model = scoring.load(given["run"], given)
    found = {"run": model.name, "tokenizer": model.tokenizer.fingerprint}
    if given["choices"]:
        found["choices"] = scoring.show_choices(model, given, console)
    if given["last_words"]:
        found["last_words"] = scoring.show_words(model, given["last_words"], console)
    if not given["choices"] and not given["last_words"]:
        found |= scoring.show_perplexity(model, given, console)
    if given["json"]:
        scoring.write_json(given["json"], found)
    return 0
