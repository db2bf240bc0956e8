"""Law 9: what the lessons show exists, and runs as written."""

import ast
import importlib
import io
import re
import shlex
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from tools.cli import main

HOUSE = Path(__file__).resolve().parent.parent
DOCS = HOUSE / "docs"
PAGES = {path.stem: path.read_text(encoding="utf-8") for path in sorted(DOCS.glob("*.md"))}
LESSONS = [name for name in PAGES if name[:2].isdigit()]
FENCE = re.compile(r"^```([^\n]*)\n(.*?)^```$", re.S | re.M)
NO_RUN = ("train", "benchmark", "compare --run rope", "doctor")  # minutes, or what a lesson's minutes of training leave


def commands(text):
    """The `invoke ...` lines of a page's blocks, and those that stand in its sentences."""
    lines = [line for kind, body in FENCE.findall(text) if not kind for line in body.splitlines()]
    told = re.findall(r"`(invoke [^`]+)`", FENCE.sub("", text))
    return list(dict.fromkeys(line.strip() for line in [*lines, *told] if line.startswith("invoke ")))


def parsed(command):
    """click's context of a command: every option known, every value of its type. Raises click's UsageError."""
    name, *words = shlex.split(command)[1:]
    here = main
    for part in name.split("."):
        assert part in here.commands, f"{command}: no {part}"
        here = here.commands[part]
    return here.make_context(name, words)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A working folder with a text and a tiny run of two blocks in it."""
    path = tmp_path_factory.mktemp("lessons")
    lines = (f"A note of the {n}th day: the cat sat on the mat, and it was the best of times.\n\n" for n in range(200))
    (path / "notes.txt").write_text("".join(lines), encoding="utf-8")
    sizes = "--n-layer 2 --d-model 32 --n-head 2 --n-context 64 --accumulation-steps 1 --tokenizer byte"
    words = f"train --mode quick --data notes.txt --steps 4 --epochs 1 --compile off --threads 1 {sizes}"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path)
        done = CliRunner().invoke(main, words.split())
        assert done.exit_code == 0, done.output
    return path


def test_the_learning_path_names_every_lesson_once():
    assert re.findall(r"\]\((\d\d-[a-z-]+)\.md\)", PAGES["index"]) == LESSONS
    assert len(LESSONS) >= 1


@pytest.mark.parametrize("name", PAGES)
def test_every_link_leads_somewhere(name):
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", FENCE.sub("", PAGES[name])):
        assert target.startswith("https://") or (DOCS / target).exists(), target


@pytest.mark.parametrize("name", LESSONS)
def test_the_code_of_a_lesson_is_in_the_source(name):
    """Seen to fail with a function that had been renamed."""
    included = [(kind, body) for kind, body in FENCE.findall(PAGES[name]) if kind.startswith("{literalinclude}")]
    assert included
    for kind, body in included:
        path, wanted = DOCS / kind.split()[1], re.search(r"^:pyobject: (\S+)$", body, re.M)[1]
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for part in wanted.split("."):
            tree = next((node for node in tree.body if getattr(node, "name", None) == part), None)
            assert tree, f"{path}: no {wanted}"


@pytest.mark.parametrize("name", LESSONS)
def test_a_lesson_runs_and_prints_what_it_shows(name, monkeypatch, folder):
    """A page is one program; a block of text right after one of Python is what that one prints."""
    monkeypatch.chdir(folder)
    told, printed, there = FENCE.findall(PAGES[name]), "", {}
    for kind, body in told:
        if kind == "python":
            with redirect_stdout(io.StringIO()) as out, torch.random.fork_rng(devices=[]):
                exec(compile(body, f"docs/{name}.md", "exec"), there)
            printed = out.getvalue()
        elif kind == "text":
            assert printed == body
    assert "python" in {kind for kind, _ in told}


@pytest.mark.parametrize("name", LESSONS)
def test_the_commands_of_a_lesson_run(name, monkeypatch, folder):
    """Those that take minutes are parsed: their options exist and take these values."""
    monkeypatch.chdir(folder)
    for command in commands(PAGES[name]):
        parsed(command)
        words = shlex.split(command)[1:]
        if command.removeprefix("invoke ").startswith(NO_RUN):
            continue
        done = CliRunner().invoke(main, [*words[0].split("."), *words[1:]])
        assert done.exit_code == 0, f"{command}: {done.output}"
        assert done.output.strip(), command


def test_the_site_loads_nothing_from_elsewhere(tmp_path):
    """Every page is there, equations are MathML, and no script, style or picture comes from another host."""
    for name in ("sphinx", "myst_parser", "furo", "latex2mathml"):
        pytest.importorskip(name, reason="the extra [docs] builds the site")
    done = CliRunner().invoke(main, ["docs", "--out", str(tmp_path / "site")])
    assert done.exit_code == 0, done.output
    for name in PAGES:
        page = (tmp_path / "site" / f"{name}.html").read_text(encoding="utf-8")
        assert not re.findall(r"<(?:script|link|img)[^>]*(?:src|href)=\"(?:https?:)?//[^\"]*", page)
        assert ("<math " in page) == (name in LESSONS)
    assert "attention_scores" in (tmp_path / "site" / "03-attention.html").read_text(encoding="utf-8")


def test_without_the_extra_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    done = CliRunner().invoke(main, ["docs"])
    assert isinstance(done.exception, ValueError)  # of which bridge.py makes one line and exit status 2
    assert str(done.exception).endswith('python -m pip install -e ".[docs]" -c constraints.txt')
    assert "\n" not in str(done.exception)


def test_a_picture_is_what_its_script_draws(monkeypatch):
    """The one that no rounding can change. Seen to fail with another top_k."""
    monkeypatch.syspath_prepend(str(DOCS))
    drawn = importlib.import_module("figures").sampling()
    assert (DOCS / "sampling.svg").read_text(encoding="utf-8") == drawn
