"""invoke docs: the lessons as a site."""

import importlib.util
from pathlib import Path

import click

from tools.develop import HOUSE, python

NEEDED = ("sphinx", "myst_parser", "furo", "latex2mathml")


@click.command()
@click.option(
    "--out", type=click.Path(file_okay=False), default="build/docs", show_default=True, help="Folder of the site."
)
def docs(out):
    """Build the lessons as a site of static pages that load nothing from elsewhere (the extra [docs])."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(
            f'docs: expected {missing[0]}, got none: python -m pip install -e ".[docs]" -c constraints.txt'
        )
    folder = Path(out).resolve()
    status = python("sphinx", "-q", "-W", "--keep-going", "-b", "html", str(HOUSE / "docs"), str(folder))
    if not status:
        click.echo(f"docs: {folder / 'index.html'}")
    return status
