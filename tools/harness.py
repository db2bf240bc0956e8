"""invoke harness: the Language Model Evaluation Harness on a run."""

import click

from tools.options import from_run, on_device


@click.command()
@from_run
@click.option(
    "--tasks",
    default="gptcore_choice,gptcore_last_word,gptcore_text,gptcore_repeat",
    show_default=True,
    metavar="NAMES",
    help="The harness's task names, with commas; the default ones are small and local. HF_HUB_OFFLINE=0 "
    "and HF_DATASETS_OFFLINE=0 in the environment let others fetch their data.",
)
@click.option(
    "--include-path",
    type=click.Path(exists=True, file_okay=False),
    help="A folder with tasks of your own, read instead of ours.",
)
@click.option("--limit", type=click.IntRange(min=1), help="Only the first so many samples of a task.")
@click.option("--output-path", type=click.Path(), help="Write the harness's own results and samples here.")
@on_device
def harness(**given):
    """Run tasks of lm-evaluation-harness (the extra [harness]) on a run."""
    import subprocess
    import sys

    from gptcore import checkpoint
    from gptcore.evaluate.harness import adapter

    adapter()  # one line now where it is not installed
    step = checkpoint.find_step(given["run"])
    # In a process of its own: it sets loggers, environment and exit hooks as if nobody else were there.
    command = [sys.executable, "-m", "gptcore.evaluate.harness", "run", "--model", "gptcore"]
    command += ["--model_args", f"run={step}", "--tasks", given["tasks"], "--device", given["device"]]
    for name in ("include_path", "limit", "output_path"):
        command += [f"--{name}", str(given[name])] if given[name] else []
    command += ["--log_samples"] if given["output_path"] else []
    return subprocess.run(command, check=False).returncode
