"""invoke pretrained: a model of others becomes a run."""

import click

from tools.options import from_run


@click.command()
@click.argument("name")
@click.option("--revision", metavar="WORD", help="A branch, tag or commit of the hub (default: main, as it is today).")
@click.option(
    "--dtype",
    type=click.Choice(["auto", "float32", "bfloat16"]),
    default="auto",
    show_default=True,
    help="What the weights are kept in; auto: as published, float16 as bfloat16.",
)
@click.option("--run", metavar="NAME", help="Name of the new run (default: the model's).")
@click.option("--yes", is_flag=True, help="Do not ask before a download.")
def pretrained(name, revision, dtype, run, yes):
    """Make a run from a published model: phi-2, gpt2, pythia-160m, a hub id owner/model, or a local folder."""
    from pathlib import Path

    from rich.console import Console

    from tools import importing

    console = Console()
    if Path(name).is_dir():
        return importing.from_folder(name, dtype, run, console)
    return importing.from_hub(name, revision, dtype, run, yes, console)


@click.command("import")
@click.argument("file")
@click.option(
    "--dtype",
    type=click.Choice(["auto", "float32", "bfloat16"]),
    default="auto",
    show_default=True,
    help="What the weights are kept in; auto: as stored, float16 as bfloat16.",
)
@click.option("--run", metavar="NAME", help="Name of the new run (default: the file's).")
@click.option("--tokenizer", metavar="NAME", help="Of a .pt file, which holds none (default: cl100k_base).")
def import_(file, dtype, run, tokenizer):
    """Make a run from a transformers folder, or from a .pt checkpoint of the attention-to-detail project."""
    from pathlib import Path

    from rich.console import Console

    from tools import importing

    console, path = Console(), Path(file)
    if path.is_file() and path.suffix == ".safetensors":
        path = path.parent
    if path.is_dir():
        return importing.from_folder(path, dtype, run, console)
    return importing.from_checkpoint(path, tokenizer, dtype, run, console)


@click.command()
@from_run
@click.option(
    "--format",
    "format_",
    type=click.Choice(["hf", "gguf"]),
    default="hf",
    show_default=True,
    help="hf: a folder for transformers; gguf: a file for llama.cpp (needs the extra .[gguf]).",
)
@click.option("--out", metavar="PATH", help="What to write (default: exports/NAME, or exports/NAME.gguf).")
def export(run, format_, out):
    """Write a run's model for other programs, load it there, and compare the logits."""
    from rich.console import Console

    from tools import importing

    return importing.export_run(run, format_, out, Console())
