"""For developers: tests and style."""

import subprocess
import sys
from pathlib import Path

import click

HOUSE = Path(__file__).resolve().parent.parent


def python(*words) -> int:
    """Run a module of this Python in the checkout; returns its exit status."""
    return subprocess.run([sys.executable, "-m", *words], cwd=HOUSE).returncode


@click.command()
@click.option("-k", metavar="NAME", help="Only tests whose name holds this; pytest's -k expression.")
@click.option("--coverage", is_flag=True, help="Show the lines that no test ran, and write htmlcov/index.html.")
def test(k, coverage):
    """Run the tests."""
    chosen = ["-k", k] if k else []
    covered = ["--cov", "--cov-report=term-missing", "--cov-report=html"] if coverage else []
    return python("pytest", *chosen, *covered)


@click.command()
def lint():
    """Check style and layout; changes nothing."""
    style, layout = python("ruff", "check"), python("ruff", "format", "--check")
    return style or layout
