"""invoke menu: the commands for those who would rather choose than type.

A screen is a row of SCREENS: a command and the options it asks for. What an option may be, its default and its
explanation come from the click command itself; the answers become words of the command line, which is shown and then
run in a process of its own. Ctrl-C goes back a question; in a job it ends the job, and the menu goes on.
"""

import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import click

HOUSE = Path(__file__).resolve().parent.parent
BACK, START, OWN = "Back", "Start", "Own value"


class Screen(NamedTuple):
    """An entry of the menu: the command, the options that it asks for, words that are always there."""

    command: str
    about: str
    asks: tuple[str, ...] = ()
    words: tuple[str, ...] = ()
    needs_run: bool = False


SCREENS = {
    "Train": Screen("train", "a new model on text", ("--mode", "--data")),
    "Continue": Screen("train", "training where a run stopped", ("--resume",), needs_run=True),
    "Generate": Screen("generate", "text, token by token", ("--run", "--preset", "--prompt"), needs_run=True),
    "Evaluate": Screen("evaluate", "a run: loss, perplexity, bits per byte", ("--run",), needs_run=True),
    "Compare": Screen("compare", "all steps of a run, or runs", ("--run",), needs_run=True),
    "Attention": Screen("interpret.attention", "where heads look", ("--run", "--text"), needs_run=True),
    "Logit lens": Screen("interpret.logit-lens", "what each block would say", ("--run", "--text"), needs_run=True),
    "Induction": Screen("interpret.induction-heads", "heads that copy", ("--run",), needs_run=True),
    "Patch": Screen(
        "interpret.patch",
        "which activation carries the answer",
        ("--run", "--clean", "--corrupted", "--target"),
        needs_run=True,
    ),
    "Report": Screen("interpret.report", "everything on one page of HTML", ("--run", "--text"), needs_run=True),
    "Download": Screen("download", "training data, before it is needed", ("--data", "--tokens")),
    "Pretrained": Screen("pretrained", "make a run from a published model", ("NAME",)),
    "Runs": Screen("runs", "list all runs and their steps"),
    "Doctor": Screen("doctor", "what this machine can use"),
}

SUGGESTIONS = {  # where click knows only a text or a number: values worth choosing, with a few words about each
    ("train", "--data"): [
        ("python-docs", "Python's documentation, here already"),
        ("fineweb-edu", "educational web pages"),
        ("wikitext", "articles of Wikipedia"),
    ],
    ("download", "--data"): [("fineweb-edu", "educational web pages"), ("wikitext", "articles of Wikipedia")],
    ("download", "--tokens"): [
        ("10000000", "a first look"),
        ("50000000", "the default"),
        ("100000000", "for a long training"),
    ],
    ("generate", "--preset"): [(name, "") for name in ("greedy", "precise", "balanced", "creative", "very-creative")],
    ("pretrained", "NAME"): [("gpt2", "124M weights"), ("pythia-160m", "160M weights"), ("phi-2", "2.8B weights")],
}


@click.command()
def menu():
    """Choose with the arrow keys what to do, and see the command that does it."""
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        return job(["--list"])
    from tools import asking

    click.echo("gptcore: arrow keys and Enter choose, Ctrl-C goes back")
    while True:
        found = found_runs()
        for name, state in found:
            click.echo(f"  {name}  {state}")
        if not found:
            click.echo("  no runs yet: Train makes one")
        rows = [(name, screen.about) for name, screen in SCREENS.items() if found or not screen.needs_run]
        try:
            chosen = asking.select("What next?", [*rows, ("Exit", "leave the menu")])
        except KeyboardInterrupt:
            return 0
        if chosen == "Exit":
            return 0
        words = fill(SCREENS[chosen], found)
        if words:
            click.echo(f"$ invoke {shlex.join(words)}")
            status = job(words)
            if status:
                click.echo(f"that ended with exit status {status}; the menu goes on")


def found_runs():
    """(name, its state in a few words) of every run, the newest first."""
    from gptcore import checkpoint

    infos = sorted(checkpoint.list_runs(), key=lambda info: info.path.stat().st_mtime, reverse=True)
    return [(info.path.name, state(info)) for info in infos]


def state(info):
    """How far a run is: its kind, its newest step, and the best validation loss among its steps."""
    losses = [step.state["validation_loss"] for step in info.steps if step.state.get("validation_loss") is not None]
    words = [str(info.run.get("mode", "run")), f"step {info.latest}" if info.steps else "nothing saved yet"]
    return ", ".join(words + ([f"validation loss {min(losses):.3f}"] if losses else []))


def command_of(path):
    """The click command of a path in dots."""
    from tools.cli import main

    command = main
    for name in path.split("."):
        command = command.commands[name]
    return command


def fill(screen, found):
    """The words of the command, asked for one by one; None when the user goes back past the first question."""
    command = command_of(screen.command)
    params = {(p.opts[0] if isinstance(p, click.Option) else p.name.upper()): p for p in command.params}
    answers, at = {}, 0
    asks = [*screen.asks, START]
    while at < len(asks):
        try:
            if asks[at] == START:
                if not confirm(params, answers, screen, found):
                    return None
            else:
                answers[asks[at]] = ask(screen, asks[at], params[asks[at]], found)
            at += 1
        except KeyboardInterrupt:
            if at == 0:
                return None
            at -= 1
    return line(screen, answers)


def line(screen, answers):
    """The words of the command line that the answers make."""
    given = [(name, value) for name, value in answers.items() if value is not None]
    options = [name if value is True else f"{name}={value}" for name, value in given if name.startswith("-")]
    return [screen.command, *screen.words, *(value for name, value in given if not name.startswith("-")), *options]


def confirm(params, answers, screen, found):
    """Show the command; start it, or change another of its options first. False: back to the menu."""
    from tools import asking

    others = [(name, p.help or "") for name, p in params.items() if isinstance(p, click.Option)]
    while True:
        click.echo(f"  invoke {shlex.join(line(screen, answers))}")
        rows = [(START, "run this command"), ("Options", "set another of its options"), (BACK, "to the menu")]
        chosen = asking.select("Ready?", rows if others else [rows[0], rows[2]])
        if chosen != "Options":
            return chosen == START
        try:
            name = asking.select("Which option?", others)
            answers[name] = ask(screen, name, params[name], found)
        except KeyboardInterrupt:
            continue


def ask(screen, name, param, found):
    """An answer for one option; None leaves it out, which is its default."""
    from tools import asking

    about = getattr(param, "help", None) or name
    if isinstance(param, click.Option) and param.is_flag:
        return True if asking.select(f"{name}: {about}", [("no", "leave it out"), ("yes", "set it")]) == "yes" else None
    if name in ("--run", "--resume"):
        return asking.select(f"{name}: {about}", found)
    rows = [(value, "") for value in getattr(param.type, "choices", ())]
    rows = rows or [*SUGGESTIONS.get((screen.command, name), ())]
    default = getattr(param, "default", None)
    if rows:
        chosen = asking.select(f"{name}: {about}", [*rows, (OWN, "type it")], str(default))
        if chosen != OWN:
            return chosen
    typed = asking.text(f"{name}: {about}\n>", check=lambda text: checked(param, text))
    return typed or None


def checked(param, text):
    """True, or click's own words about a value that this option does not take."""
    try:
        if text:
            param.type.convert(text, param, None)
    except click.UsageError as error:
        return error.format_message().splitlines()[0]
    return True if text or not param.required else "expected a value"


def job(words):
    """Run `invoke WORDS` in a process of its own; Ctrl-C is the job's alone. Returns its exit status."""
    before = signal.signal(signal.SIGINT, lambda *_: None)  # a handler, unlike SIG_IGN, is not handed down
    try:
        return subprocess.run([sys.executable, "-m", "invoke", "-r", str(HOUSE), *words]).returncode
    finally:
        signal.signal(signal.SIGINT, before)
