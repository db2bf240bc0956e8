"""The command line from outside: what is typed arrives, and what is wrong is one line and an exit status."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import click
import invoke
import pytest
import torch

from gptcore import checkpoint
from tools.bridge import mirror
from tools.cli import main
from tools.runs import runs

HOUSE = Path(__file__).resolve().parent.parent

DEMO = '''
import json, os, signal, time
import click
from invoke.main import program
from tools.bridge import mirror, refuse_with_2

@click.command()
@click.option("--mode", type=click.Choice(["quick", "full"]), default="full", help="How long.")
@click.option("--steps", type=click.IntRange(min=1), default=10)
@click.option("--lr", type=float)
@click.option("--data", "sources", multiple=True)
@click.option("--resume", is_flag=False, flag_value="newest")
@click.option("--compile/--no-compile", default=True)
@click.option("--debug", is_flag=True)
@click.option("-k")
@click.option("--prompt")
def train(**given):
    """Trains nothing."""
    print(json.dumps(given))

@click.command("import")
@click.argument("file")
@click.option("--yes", is_flag=True)
def import_(**given):
    print(json.dumps(given))

@click.command()
@click.argument("how")
def fail(how):
    if how == "value":
        raise ValueError("top_p: expected a number in (0, 1],\\n got 1.5")
    if how == "file":
        open("missing.txt")
    if how == "status":
        return 7
    if how == "memory":
        raise MemoryError
    if how == "gpu":
        import torch
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\\n See the documentation.")
    if how == "mps":
        raise RuntimeError("MPS backend out of memory (MPS allocated: 1 GB)")
    if how == "cpu":
        import torch
        torch.empty(2**60)
    if how == "bug":
        raise RuntimeError("ours")
    if how == "ctrl-c":
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(10)

def show(word):
    command = click.Command("show", callback=lambda: print(word))
    return click.Group(word, commands=[command])

refuse_with_2(program)
ns = mirror(click.Group("demo", commands=[train, import_, fail, show("lens"), show("heads")]))
'''


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """A folder whose tasks.py mirrors a tree with every kind of option."""
    folder = tmp_path_factory.mktemp("demo")
    (folder / "tasks.py").write_text(DEMO, encoding="utf-8")
    return folder


def call(*argv, cwd, **environment):
    """What `invoke ARGV` does in a process of its own."""
    environment = os.environ | {"PYTHONPATH": str(HOUSE)} | environment
    argv = [sys.executable, "-m", "invoke", *argv]
    return subprocess.run(argv, cwd=cwd, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL)


DEFAULTS = {
    "mode": "full", "steps": 10, "lr": None, "sources": [], "resume": None, "compile": True, "debug": False, "k": None,
    "prompt": None,
}  # fmt: skip


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ("", {}),
        ("--mode quick --steps 3 --lr 1e-3", {"mode": "quick", "steps": 3, "lr": 1e-3}),
        ("--mode=quick --steps=3", {"mode": "quick", "steps": 3}),
        ("--data a.txt --data b/ --data -", {"sources": ["a.txt", "b/", "-"]}),
        ("--resume", {"resume": "newest"}),
        ("--resume quick-001", {"resume": "quick-001"}),
        ("--resume --steps 3", {"resume": "newest", "steps": 3}),
        ("--no-compile --debug", {"compile": False, "debug": True}),
        ("--compile", {}),
        ("--prompt -x", {"prompt": "-x"}),
        ("--prompt -xyz", {"prompt": "-xyz"}),
        ("--prompt --not-an-option", {"prompt": "--not-an-option"}),
        ("--prompt train", {"prompt": "train"}),
        ("--prompt=a=b", {"prompt": "a=b"}),
        ("-k name", {"k": "name"}),
    ],
)
def test_what_is_typed_arrives(demo, argv, expected):
    done = call("train", *argv.split(), cwd=demo)
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout) == DEFAULTS | expected


def test_an_empty_value_and_a_newline_arrive(demo):
    done = call("train", "--prompt", "", "--data", "two\nlines", cwd=demo)
    assert json.loads(done.stdout) == DEFAULTS | {"prompt": "", "sources": ["two\nlines"]}


def test_tasks_are_chained(demo):
    done = call("train", "--steps", "3", "import", "-", "--yes", cwd=demo)
    first, second = map(json.loads, done.stdout.splitlines())
    assert (first["steps"], second) == (3, {"file": "-", "yes": True})


def test_groups_become_collections(demo):
    """Seen to fail with the command's own name as the task's: Invoke ran the first of the two only."""
    assert call("lens.show", "heads.show", cwd=demo).stdout == "lens\nheads\n"


HINT = "(invoke train --help lists its options)"


@pytest.mark.parametrize(
    ("argv", "status", "line"),
    [
        ("train --mode huge", 2, "invoke train: Invalid value for '--mode': 'huge' is not one of 'quick', 'full'."),
        ("train --steps x", 2, "invoke train: Invalid value for '--steps': 'x' is not a valid integer range."),
        ("train --steps 0", 2, "invoke train: Invalid value for '--steps': 0 is not in the range x>=1."),
        ("train --lr x", 2, "invoke train: Invalid value for '--lr': 'x' is not a valid float."),
        ("fail value", 2, "invoke fail: top_p: expected a number in (0, 1], got 1.5"),
        ("fail file", 2, "invoke fail: missing.txt: No such file or directory"),
        ("fail memory", 2, "invoke fail: out of memory"),
        ("fail gpu", 2, "invoke fail: CUDA out of memory. Tried to allocate 2 GiB. See the documentation."),
        ("fail mps", 2, "invoke fail: MPS backend out of memory (MPS allocated: 1 GB)"),
        ("fail ctrl-c", 130, "invoke fail: stopped"),
        ("train --bad", 2, f"invoke train: No idea what '--bad' is! {HINT}"),
        ("train stray", 2, f"invoke train: No idea what 'stray' is! {HINT}"),
        ("train --prompt", 2, f"invoke train: Flag <Argument: prompt> needed value and was not given one! {HINT}"),
        ("nope", 2, "invoke: No idea what 'nope' is! (invoke --list lists the tasks)"),
    ],
)
def test_what_is_wrong_is_one_line_and_a_status(demo, argv, status, line):
    done = call(*argv.split(), cwd=demo)
    assert (done.returncode, done.stdout, done.stderr.strip()) == (status, "", line)


def test_the_cpus_own_memory_is_one_line_too(demo):
    """torch.empty(2**60): a RuntimeError whose words are the allocator's."""
    done = call("fail", "cpu", cwd=demo)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("invoke fail: ")
    assert "can't allocate memory" in line


def test_the_environment_is_ready_before_torch():
    """What the user has set stays."""
    show = "import os, tasks; print(os.environ['CUBLAS_WORKSPACE_CONFIG'], os.environ['GOMP_SPINCOUNT'])"
    left = {name: value for name, value in os.environ.items() if name not in ("CUBLAS_WORKSPACE_CONFIG",)}
    for given, expected in (({}, ":4096:8 3000\n"), ({"CUBLAS_WORKSPACE_CONFIG": ":16:8"}, ":16:8 3000\n")):
        environment = left | {"GOMP_SPINCOUNT": "3000"} | given
        done = subprocess.run([sys.executable, "-c", show], cwd=HOUSE, env=environment, capture_output=True, text=True)
        assert done.stdout == expected


def test_a_missing_argument_is_named(demo):
    done = call("import", cwd=demo)
    assert done.returncode == 2
    assert "'import' did not receive required positional arguments: 'file'" in done.stderr


def test_a_command_returns_its_status(demo):
    assert call("fail", "status", cwd=demo).returncode == 7


def test_our_own_mistakes_are_not_hidden(demo):
    done = call("fail", "bug", cwd=demo)
    assert done.returncode == 1
    assert "RuntimeError: ours" in done.stderr


def test_help_shows_choices_range_and_default(demo):
    text = " ".join(call("train", "--help", cwd=demo).stdout.split())
    assert "[quick|full] How long. [default: full]" in text
    assert "[default: 10; x>=1]" in text


# The real tree


def commands(group, path=()):
    """Every command of a click tree by its name in Invoke."""
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from commands(command, (*path, name))
        else:
            yield ".".join((*path, name)), command


def options_of(command):
    """The names of a command's options."""
    return {name for parameter in command.params for name in parameter.opts}


def options(text):
    """The options that a help text shows, in the order of the alphabet; --[no-]x and --x / --no-x are two each."""
    shown = re.findall(r"^ +(-.*?)(?:  |$)", text, flags=re.MULTILINE)
    names = [name for line in shown for name in re.findall(r"(?<![\w-])--?(?:\[no-\])?[a-z][\w-]*", line)]
    both = [[name.replace("[no-]", ""), name.replace("[no-]", "no-")] for name in names]
    return sorted({name for pair in both for name in pair} - {"--help"})


@pytest.mark.parametrize(
    ("name", "command"), [*commands(main)], ids=lambda value: value if isinstance(value, str) else ""
)
def test_click_and_invoke_show_the_same_options(name, command, capsys):
    invoke.Program(namespace=mirror(main)).run(["invoke", name, "--help"], exit=False)
    mirrored = capsys.readouterr().out
    assert options(mirrored) == options(command.get_help(click.Context(command)))
    assert command.help.split(".")[0].split(":")[0] in " ".join(mirrored.split())


def test_the_comparison_of_options_sees_a_difference():
    assert options("  --data=STRING  Text.\n  --[no-]x\n  -k STRING  Y --z.\n") == ["--data", "--no-x", "--x", "-k"]
    assert options("Options:\n  --x / --no-x    A\n  -k NAME\n  --help  Show.\n") == ["--no-x", "--x", "-k"]


def test_the_list_names_every_command():
    listed = call("--list", cwd=HOUSE).stdout
    assert all(re.search(rf"^  {re.escape(name)} ", listed, flags=re.MULTILINE) for name, _ in commands(main))


def test_doctor_is_content_with_a_bare_machine(tmp_path):
    """No compiler, no network, no terminal: each line says what works without it, and the status is 0."""
    bare = {"CXX": "/bin/false", "HF_HUB_OFFLINE": "1", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    done = call("-r", str(HOUSE), "doctor", cwd=tmp_path, **bare)
    assert (done.returncode, done.stderr) == (0, "")
    lines = {line[4:18].strip(): (line[:2], line[18:]) for line in done.stdout.splitlines()}
    assert lines["torch"][0] == "ok"
    assert lines["torch"][1].startswith(f"{torch.__version__}, built for ")
    assert lines["torch.compile"][0] == "--"
    assert lines["torch.compile"][1].startswith("does not work, training is eager and slower: ")
    assert lines["hub"] == ("--", "HF_HUB_OFFLINE=1: --data python-docs and your own files work without it")
    assert lines["terminal"] == ("--", "none: plain lines, no questions")
    assert list(lines)[:5] == ["Python", "torch", "device", "memory", "bfloat16"]


def test_a_test_is_run_by_name_from_anywhere(tmp_path):
    done = call("-r", str(HOUSE), "test", "-k", "test_code_lines_counts", cwd=tmp_path)
    assert done.returncode == 0
    assert "1 passed" in done.stdout
    assert call("-r", str(HOUSE), "test", "-k", "no_such_test", cwd=tmp_path).returncode == 5  # pytest: nothing ran


class Words:
    def save(self, path):
        path.write_text("{}", encoding="utf-8")


@pytest.fixture
def house(tmp_path, monkeypatch):
    """A folder with two runs, one of three steps, one without any."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    run = checkpoint.create_run("runs", "quick-001", {}, Words())
    for step, loss in ((100, 4.0), (200, 3.0), (300, None)):
        state = {"epoch": 0, "train_loss": 3.5, "validation_loss": loss, "bits_per_byte": 1.9, "lr": 3e-4}
        checkpoint.save_step(run, step, params={"w": torch.zeros(250_000)}, optimizer={}, rng={}, state=state)
    checkpoint.mark(run, "best", 200)
    checkpoint.create_run("runs", "full-[bold]", {}, Words())
    return tmp_path


def cells(capsys):
    """The rows of the table that was printed, as lists of words."""
    return [line.split() for line in capsys.readouterr().out.splitlines() if line.strip()]


def test_runs_lists_every_step(house, capsys):
    runs.main([], standalone_mode=False)
    rows = cells(capsys)
    assert rows[0] == ["run", "step", "size", "train", "loss", "val.", "loss", "bits/byte"]
    assert ["quick-001", "100", "1.0", "MB", "3.5", "4", "1.9"] in rows
    assert ["200", "1.0", "MB", "3.5", "3", "1.9", "best"] in rows
    assert ["300", "1.0", "MB", "3.5", "-", "1.9", "latest"] in rows
    assert ["full-[bold]", "-", "-", "-", "-", "-", "nothing", "saved", "yet"] in rows


def test_runs_follows_one_run(house, capsys):
    runs.main(["--run", "quick-001"], standalone_mode=False)
    rows = cells(capsys)
    assert ["100", "0", "4", "54.6", "validation", "3.00e-04", "-"] in rows
    assert ["200", "0", "3", "20.09", "validation", "3.00e-04", "-25.0", "%", "best"] in rows
    assert ["300", "0", "3.5", "33.12", "train", "3.00e-04", "-", "latest"] in rows


def test_runs_shows_a_loss_beyond_floats(house, capsys):
    """Seen to fail with math.exp, which overflows."""
    state = {"epoch": 0, "train_loss": 1e4, "lr": 3e-4}
    checkpoint.save_step("runs/quick-001", 400, params={}, optimizer={}, rng={}, state=state)
    runs.main(["--run", "quick-001"], standalone_mode=False)
    row = next(row for row in cells(capsys) if row[0] == "400")
    assert row[2:4] == ["1e+04", "inf"]


@pytest.mark.parametrize("name", [name for name, command in commands(main) if "--threads" in options_of(command)])
def test_threads_have_a_bound(name, capsys):
    with pytest.raises(click.BadParameter, match=r"999999 is not in the range 1<=x<=1024"):
        dict(commands(main))[name].main(["--threads", "999999"], standalone_mode=False)


FLOATS = [  # generate's are checked with the words of sampling.py, since its prompt sets them too
    (name, parameter.opts[0])
    for name, command in commands(main)
    for parameter in command.params
    if isinstance(parameter.type, click.types.FloatParamType) and name != "generate"
]


@pytest.mark.parametrize("number", ["nan", "inf", "-inf"])
@pytest.mark.parametrize(("name", "option"), FLOATS)
def test_a_number_is_finite(name, option, number):
    with pytest.raises(
        click.BadParameter, match=r"^(expected a finite number, got|-?inf is not in the range) .*$"
    ) as it:
        dict(commands(main))[name].main([option, number], standalone_mode=False)
    assert it.value.param.opts == [option]


def test_runs_tells_of_a_damaged_step(house, capsys):
    (house / "runs/quick-001/checkpoints/step-0000100/state.json").write_text("{", encoding="utf-8")
    runs.main([], standalone_mode=False)
    assert "step-0000100/state.json: damaged, not JSON" in capsys.readouterr().out


def test_runs_in_an_empty_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    runs.main([], standalone_mode=False)
    assert capsys.readouterr().out == "No runs in runs/ yet: invoke train --mode quick makes one.\n"
    with pytest.raises(ValueError, match="got x; runs in runs: none; invoke train --mode quick makes one"):
        runs.main(["--run", "x"], standalone_mode=False)
