"""invoke generate: a run speaks, once for each prompt or in a loop."""

import click

from tools.native import build_first
from tools.options import from_run, on_device, with_threads


@click.command()
@from_run
@click.option(
    "--prompt",
    multiple=True,
    metavar="TEXT",
    help="Text to continue; may be given several times. Without it: a prompt loop.",
)
@click.option(
    "--prompts",
    type=click.Path(exists=True, dir_okay=False),
    metavar="FILE",
    help="A prompt a line, continued together.",
)
@click.option(
    "--preset",
    default="balanced",
    show_default=True,
    metavar="NAME",
    help="greedy, precise, balanced, creative or very-creative.",
)
@click.option(
    "--strategy", metavar="NAME", help="Which settings count: greedy, multinomial, top_k, top_p or top_k_top_p."
)
@click.option("--temperature", type=float, help="Overrides the preset: below 1 bolder, above 1 more varied, 0 greedy.")
@click.option("--top-k", type=int, help="Overrides the preset: the k most likely tokens; 0: all.")
@click.option("--top-p", type=float, help="Overrides the preset: the most likely tokens up to this share, in (0, 1].")
@click.option(
    "--min-p", type=float, help="Overrides the preset: tokens from this share of the best one's on, in [0, 1]."
)
@click.option(
    "--max-new-tokens", type=click.IntRange(min=0), default=100, show_default=True, help="The prompt not counted."
)
@click.option("--stop", multiple=True, metavar="TEXT", help="End before this text; may be given several times.")
@click.option("--seed", type=int, default=42, show_default=True, help="Random seed: the same one gives the same text.")
@click.option("--no-cache", is_flag=True, help="Read everything again for each token, to see what the cache saves.")
@click.option(
    "--n-context", type=click.IntRange(min=1), help="A longer context than the run's; not for learned positions."
)
@on_device
@click.option(
    "--engine",
    type=click.Choice(["auto", "eager", "native", "graph"]),
    default="auto",
    show_default=True,
    help="Who decodes: torch operators, native kernels, a CUDA graph of a whole step, or the best that can.",
)
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "int8"]),
    help="What the weights are rounded to (default: as the run has them); int8 is the native engine's.",
)
@with_threads
@click.option("--list-presets", is_flag=True, help="Show the presets and stop; needs no run.")
def generate(**given):
    """Continue a prompt, token by token."""
    from rich.console import Console

    console = Console(highlight=False)
    if not given["list_presets"]:
        build_first(lambda line: click.echo(line, err=True))  # before gptcore is imported

    from gptcore.sampling import PRESETS
    from tools import speaking

    if given["list_presets"]:
        console.print(speaking.preset_table(PRESETS))
        return 0
    if "" in given["stop"]:  # it is found in every text at once
        raise ValueError("stop: expected a text to end before, got an empty one")
    settings = speaking.choose_settings(given)
    prompts = [*given["prompt"], *(speaking.read_prompts(given["prompts"]) if given["prompts"] else ())]
    model = speaking.load(given)
    console.print(speaking.setting_line(model, given, settings), style="#666666", soft_wrap=True)
    options = speaking.make_options(given, settings, model)
    if not prompts:
        return speaking.loop(model, options, given, console)
    if len(prompts) == 1:
        speaking.speak(model, prompts[0], options, given["stop"], console)
    else:
        speaking.speak_together(model, prompts, options, given["stop"], console)
    return 0
