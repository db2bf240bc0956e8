"""For developers: tests, style, and the native code's memory."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import click

HOUSE = Path(__file__).resolve().parent.parent


def python(*words, folder=HOUSE, **more) -> int:
    """Run a module of this Python in the checkout, with more variables in its environment; returns its exit status."""
    return subprocess.run([sys.executable, "-m", *words], cwd=folder, env=os.environ | more).returncode


@click.command()
@click.option("-k", metavar="NAME", help="Only tests whose name holds this; pytest's -k expression.")
@click.option("--coverage", is_flag=True, help="Show the lines that no test ran, and write htmlcov/index.html.")
def test(k, coverage):
    """Run the tests."""
    n = min(8, (os.cpu_count() or 1) + 1)  # one more than CPUs: many tests wait for a process of their own
    chosen = ["-n", "0" if k else str(n)]  # workers each collect the whole suite: too much for a few names
    chosen += ["--dist=loadfile", "--durations=15"]  # fixtures are made once a file
    chosen += ["-k", k] if k else []
    covered = ["--cov", "--cov-report=term-missing", "--cov-report=html"] if coverage else []
    return python("pytest", *chosen, *covered)


@click.command()
def lint():
    """Check style and layout; changes nothing."""
    style, layout = python("ruff", "check"), python("ruff", "format", "--check")
    return style or layout


@click.command()
def sanitize():
    """Run the native kernels' tests under AddressSanitizer and UBSan, in a copy; the first finding ends them."""
    from tools import native

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        native.copy(folder)
        environment = native.sanitizing()
        built = native.build(folder, GPTCORE_BUILD_FLAGS=native.SANITIZERS)
        if not built.ok:
            click.echo(built.text, err=True)
            return 1
        environment["PYTHONPATH"] = name  # before an editable install's checkout
        # A library that does not load is no reason to skip here; the report of a finding goes to file 2, past pytest.
        rules = ("-W", "error:native kernels:RuntimeWarning", "--capture=sys", "-q", "-p", "no:cacheprovider")
        return python("pytest", *rules, "-m", "sanitize", *native.TESTS, folder=folder, **environment)
