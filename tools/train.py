"""invoke train: from a mode and a text to a run folder, and on from where it stopped.

The order of things: read the text, draw the weights, measure this machine, freeze the plan in run.json, then update
after update. What a run is made of stands in run.json before its first update and never changes, so that a resumed run
is the same run.
"""

import click

from tools.modes import ACCUMULATION, MICRO_BATCH, MODES, N_CONTEXT
from tools.options import Number, in_cache, on_device, with_threads

ARCHITECTURES = ("gpt2", "alibi", "llama", "qwen3", "phi", "neox", "seed")
POSITIONS = ("learned", "sinusoidal", "rope", "alibi")
POSITIVE = click.IntRange(min=1)


@click.command()
@click.option("--mode", type=click.Choice(list(MODES)), default="medium", show_default=True, help="Sizes and length.")
@click.option(
    "--data",
    multiple=True,
    metavar="SOURCE",
    help="fineweb-edu, wikitext, hf:REPOSITORY[@REVISION][#CONFIG], python-docs, or a file, folder, glob or -; may be "
    "given several times (default auto: FineWeb-Edu where it is cached or the hub can be reached, else python-docs).",
)
@click.option(
    "--mix", metavar="WEIGHTS", help="A weight for each --data, with commas, as in 0.7,0.3: its share of the sequences."
)
@click.option(
    "--text-field", default="text", show_default=True, help="The field of .jsonl and .parquet that holds the text."
)
@click.option(
    "--tokenizer",
    default="auto",
    show_default=True,
    help="auto, bpe:N, cl100k_base, gpt2, byte, a tokenizer.json or hf:NAME.",
)
@click.option(
    "--packing",
    type=click.Choice(["concat", "bestfit"]),
    default="concat",
    show_default=True,
    help="How documents fill sequences.",
)
@in_cache
@click.option(
    "--cache-gb",
    type=Number(min=0, min_open=True),
    help="What the cache may hold; shards of streams used longest ago go first (quick: 1, medium: 5, full: 10).",
)
@click.option("--offline", is_flag=True, help="Use what is here; never the network. HF_HUB_OFFLINE=1 says the same.")
@click.option("--arch", type=click.Choice(ARCHITECTURES), help="Architecture (quick: qwen3, medium and full: gpt2).")
@click.option("--position-encoding", type=click.Choice(POSITIONS), help="Overrides the architecture's positions.")
@click.option("--n-layer", type=POSITIVE, help="Blocks.")
@click.option("--d-model", type=POSITIVE, help="Width of the residual stream.")
@click.option("--n-head", type=POSITIVE, help="Attention heads.")
@click.option("--n-kv-head", type=POSITIVE, help="Heads of keys and values; fewer than --n-head are shared.")
@click.option("--d-ff", type=POSITIVE, help="Width of the MLP.")
@click.option("--n-context", type=POSITIVE, default=N_CONTEXT, show_default=True, help="Tokens a sequence.")
@click.option("--dropout", type=Number(0, 1, max_open=True), help="Overrides the architecture's dropout.")
@click.option("--minutes", type=Number(min=0, min_open=True), help="Train for about so long (quick: 5).")
@click.option("--steps", type=POSITIVE, help="Train for exactly so many updates.")
@click.option("--epochs", type=POSITIVE, help="Parts of the run, each with a validation at its end.")
@click.option(
    "--tokens-per-epoch", type=click.IntRange(min=512), help="Distinct training tokens, if there are so many."
)
@click.option(
    "--accumulation-steps", type=POSITIVE, help=f"Updates of so many times {MICRO_BATCH:,} tokens ({ACCUMULATION})."
)
@click.option("--optimizer", type=click.Choice(["adamw", "muon"]), help="What moves the weights.")
@click.option("--lr", type=Number(min=0, min_open=True), help="AdamW's peak rate.")
@click.option("--muon-lr", type=Number(min=0, min_open=True), help="Muon's peak rate.")
@click.option(
    "--weight-decay", type=Number(min=0), help="On matrices, not on biases and norms (quick: 0.2, else 0.01)."
)
@click.option("--schedule", type=click.Choice(["cosine", "wsd"]), help="How the rate falls.")
@click.option(
    "--clip",
    type=Number(min=0, min_open=True),
    default=1.0,
    show_default=True,
    help="Largest norm of an update's gradient.",
)
@click.option("--seed", type=int, default=42, show_default=True, help="Random seed of weights, order and dropout.")
@on_device
@click.option(
    "--dtype",
    type=click.Choice(["auto", "float32", "bfloat16"]),
    default="auto",
    show_default=True,
    help="What the passes compute in.",
)
@click.option(
    "--compile",
    "compile_",
    type=click.Choice(["auto", "on", "off"]),
    default="auto",
    show_default=True,
    help="torch.compile: auto pays it for runs of 2 minutes or more.",
)
@click.option("--no-compile", is_flag=True, help="The same as --compile off.")
@with_threads
@click.option("--save-every", type=POSITIVE, help="Updates between saves (default: about a minute).")
@click.option("--run", metavar="NAME", help="Name of the new run (default: quick-001 and so on).")
@click.option("--resume", is_flag=False, flag_value="", metavar="[RUN]", help="Go on with a run: the newest, or RUN.")
@click.option("--init", metavar="RUN", help="Fine-tune a run's weights, with its tokenizer and architecture.")
@click.option("--lora", type=POSITIVE, metavar="RANK", help="With --init: train a second tree of this rank alone.")
@click.option("--recompute", is_flag=True, help="Keep one activation a block: less memory, a third more work.")
@click.option("--debug", is_flag=True, help="Show every site's smallest, largest and mean value in the first update.")
def train(**given):
    """Train a model on text: FineWeb-Edu, WikiText, Python's documentation, or your own files."""
    from rich.console import Console

    from gptcore import checkpoint
    from gptcore.files import only_writer
    from tools import planning, training

    console = Console()
    context = click.get_current_context()
    chosen = {name for name in given if context.get_parameter_source(name).name == "COMMANDLINE"}
    if given["no_compile"]:
        given["compile_"] = "off"
    if given["resume"] is None:
        job = planning.begin(given, console, chosen)
        with only_writer(job.path, "run", patience=0):
            return training.work(job, console)
    run_dir = checkpoint.find_run(given["resume"] or None)
    with only_writer(run_dir, "run", patience=0):  # before a step is chosen: the other process may be saving one
        job = planning.reopen(given | {"resume": given["resume"] or run_dir}, chosen, console)
        return training.work(job, console)
