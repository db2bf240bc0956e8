"""The runs there are, and how one of them went, without loading any weights."""

import click


@click.command()
@click.option("--run", metavar="RUN", help="Show this run step by step: a run folder, or its name in runs/.")
def runs(run):
    """List all runs and their saved steps, or follow one run."""
    from rich.console import Console

    from gptcore import checkpoint

    console = Console()
    if run is None:
        infos = sorted(checkpoint.list_runs(), key=lambda info: info.run.get("mode") != "imported")  # those first
        console.print(listing(infos) if infos else "No runs in runs/ yet: invoke train --mode quick makes one.")
    else:
        infos = [checkpoint.read_info(checkpoint.find_run(run))]
        console.print(progress(infos[0]))
    for line in [line for info in infos for line in info.damaged]:
        console.print(line, style="yellow", markup=False, highlight=False, soft_wrap=True)


def listing(infos):
    """A row for each saved step of each run; a run that has none still has its row."""
    from rich.markup import escape

    table = _table("run", "step", "size", "train loss", "val. loss", "bits/byte", "")
    for info in infos:
        name = escape(info.path.name)
        for step in info.steps:
            losses = [_number(step.state.get(key)) for key in ("train_loss", "validation_loss", "bits_per_byte")]
            table.add_row(name, str(step.step), f"{step.n_bytes / 1e6:.1f} MB", *losses, _marks(info, step.step))
            name = ""
        if not info.steps:
            table.add_row(name, "-", "-", "-", "-", "-", "nothing saved yet")
    return table


def progress(info):
    """A row for each saved step of one run, with the change of its loss against the row before.

    The loss is the validation loss where the step has one, else the training loss; only equal kinds are compared.
    """
    from rich.markup import escape

    from tools.view import perplexity

    table = _table("step", "epoch", "loss", "perplexity", "of", "rate", "change", "", title=escape(info.path.name))
    before = {}
    for step in info.steps:
        kind = "validation" if step.state.get("validation_loss") is not None else "train"
        loss, epoch, rate = (step.state.get(key) for key in (f"{kind}_loss", "epoch", "lr"))
        change = f"{100 * (loss / before[kind] - 1):+.1f} %" if loss is not None and kind in before else "-"
        table.add_row(
            str(step.step),
            "-" if epoch is None else str(epoch),
            _number(loss),
            "-" if loss is None else perplexity(loss),
            kind,
            "-" if rate is None else f"{rate:.2e}",
            change,
            _marks(info, step.step),
        )
        if loss is not None:
            before[kind] = loss
    return table


def _table(*columns, title=None):
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left")
    for column in columns:
        table.add_column(column, justify="left" if column in ("run", "of", "") else "right", no_wrap=True)
    return table


def _number(value):
    return "-" if value is None else f"{value:.4g}"


def _marks(info, step):
    return ", ".join(word for word in ("latest", "best") if getattr(info, word) == step)
