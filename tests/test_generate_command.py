"""invoke generate, typed: settings, streams, batches, the prompt loop, and what it says about wrong input."""

import os
import re
import select
import shutil
import subprocess
import sys
import time

import pytest
import torch

pytest.importorskip("resource", reason="signals and terminals as they are here are POSIX's")

from test_train_command import argv, write_notes
from typed import HOUSE, SIGINT, Command, snapshot, typed

from gptcore import checkpoint, engine, kernels, tokenizer, tree
from gptcore.generate import GenerateOptions
from gptcore.generate import generate as library
from gptcore.sampling import PRESETS
from tools.speaking import rounded, text_pieces


@pytest.fixture(scope="module")
def house(tmp_path_factory):
    """A folder with a learned-positions run `notes` and a rotary run `turning`."""
    folder = tmp_path_factory.mktemp("house")
    write_notes(folder)
    given = {"steps": 30, "epochs": 1, "save_every": 100, "n_context": 32, "dropout": None}
    for run, arch in (("turning", "llama"), ("notes", "gpt2")):
        done = typed("train", *argv(run=run, arch=arch, lr=0.01, **given), cwd=folder)
        assert (done.status, done.stderr) == (0, "")
    return folder


def spoken(house, *words, **ways):
    """(the setting line, the text, the line of counts) of one prompt."""
    done = typed("generate", *words, cwd=house, **ways)
    assert (done.status, done.stderr) == (0, "")
    head, rest = done.stdout.split("\n", 1)
    text, counts = rest.rstrip("\n").rsplit("\n", 1)
    return head, text, counts


def expected_text(house, prompt, run="notes", params=None, **options):
    """What the library makes of it, with the run's weights or others."""
    folder = house / "runs" / run
    words = tokenizer.load(folder / "tokenizer.json")
    params = params or checkpoint.load_params(checkpoint.find_step(folder))
    given = GenerateOptions(stop=(words.eot,), **options)
    steps = library(params, checkpoint.read_config(folder), [words.encode(prompt)], given)
    return prompt + "".join(text_pieces((step.tokens[0] for step in steps if step.tokens[0] != words.eot), words))


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_is_what_the_library_has(house, preset):
    head, text, counts = spoken(house, "--preset", preset, "--prompt", "The cat", "--max-new-tokens", "40")
    sampling = PRESETS[preset]
    shown = f"temperature {sampling.temperature:g}, top-k {sampling.top_k}, top-p {sampling.top_p:g}, min-p 0, seed 42"
    assert head == f"notes step-0000030, CPU: {preset}, {shown}"
    assert text == expected_text(house, "The cat", sampling=sampling, max_new_tokens=40)
    assert counts.startswith("7 prompt tokens, 40 new, ")


def test_what_is_given_overrides_the_preset(house):
    """G2, and a strategy says which settings count."""
    own = ["--top-k", 5, "--top-p", 0.8, "--temperature", 0.6, "--min-p", 0.01, "--seed", 7]
    head, text, _ = spoken(house, *own, "--prompt", "The", "--max-new-tokens", "12")
    assert head.endswith("balanced, temperature 0.6, top-k 5, top-p 0.8, min-p 0.01, seed 7")
    sampling = PRESETS["balanced"]._replace(temperature=0.6, top_k=5, top_p=0.8, min_p=0.01)
    assert text == expected_text(house, "The", sampling=sampling, max_new_tokens=12, seed=7)
    head, *_ = spoken(house, *own, "--strategy", "top_k", "--prompt", "The", "--max-new-tokens", "2")
    assert "temperature 0.6, top-k 5, top-p 1, min-p 0.01" in head
    head, *_ = spoken(house, *own, "--strategy", "greedy", "--prompt", "The", "--max-new-tokens", "2")
    assert "temperature 0, top-k 0, top-p 1, min-p 0," in head


def test_the_list_of_presets_needs_no_run(tmp_path):
    """G1: the numbers are the library's."""
    done = typed("generate", "--list-presets", cwd=tmp_path)
    rows = {
        line.split()[0]: line.split()[1:] for line in done.stdout.splitlines()[2:] if line.strip() and "─" not in line
    }
    assert done.status == 0
    assert rows.keys() == PRESETS.keys()
    for name, values in rows.items():
        s = PRESETS[name]
        assert values[:4] == (
            [f"{s.top_k}", f"{s.top_p:g}", f"{s.temperature:g}", "-"] if s.temperature else ["-", "-", "0", "(most"]
        )


def test_the_seed_and_the_cache(house):
    """G7: the same seed gives the same text, without the cache and past the end of the context too."""
    say = lambda *words: spoken(house, "--prompt", "The", "--max-new-tokens", "60", *words)[1]
    first = say()
    assert say() == first
    assert say("--no-cache") == first
    assert say("--threads", "2") == first
    assert say("--seed", "43") != first


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_the_weights_are_rounded_as_asked(house, dtype):
    """One model reads the prompt and makes the text, whichever engine: in int8 the one of the widened weights."""
    if dtype == "int8" and (reason := kernels.why_not("decode_")):
        pytest.skip(reason)
    folder = house / "runs" / "notes"
    params, config = checkpoint.load_params(checkpoint.find_step(folder)), checkpoint.read_config(folder)
    if dtype == "int8":
        wanted = engine.unpack(engine.pack(params, config, torch.int8), config)
    else:
        wanted = tree.map(lambda leaf: leaf.to(getattr(torch, dtype)), params)
    given = ["--prompt", "The cat", "--max-new-tokens", 60, "--dtype", dtype]  # the context is read again on the way
    head, text, _ = spoken(house, *given)
    assert head.startswith(f"notes step-0000030, CPU, {dtype}: balanced, ")
    assert text == expected_text(house, "The cat", params=wanted, max_new_tokens=60)
    eager = expected_text(house, "The cat", params=wanted, max_new_tokens=60, engine="eager")
    if dtype == "int8":
        assert text == eager
    else:
        assert spoken(house, *given, "--engine", "eager")[1] == eager


@pytest.mark.skipif(bool(kernels.why_not("decode_")), reason=kernels.why_not("decode_"))
def test_int8_reads_the_prompt_with_the_decoders_own_numbers(house):
    """To the bit. Seen to fail with the weights as they were, a model whose texts are the same for a while."""
    folder = house / "runs" / "notes"
    params, config = checkpoint.load_params(checkpoint.find_step(folder)), checkpoint.read_config(folder)
    found, packed = rounded(params, config, {"dtype": "int8", "engine": "auto", "no_cache": False})
    assert torch.int8 in {leaf.dtype for leaf in packed.weights}
    for name, leaf in tree.walk(engine.unpack(packed, config)):
        assert torch.equal(dict(tree.walk(found))[name], leaf), name
    assert not torch.equal(found["embed"]["w"], params["embed"]["w"])


@pytest.mark.parametrize("n", [0, 1, 100])
def test_exactly_so_many_tokens(house, n):
    """G4 and M11: 100 tokens with a context of 32 are read again on the way, which is said once."""
    _, text, counts = spoken(house, "--prompt", "The", "--max-new-tokens", n, "--preset", "greedy")
    assert counts.startswith(f"3 prompt tokens, {n} new, ")
    assert counts.endswith(", the context was full and its last half read again") is (n == 100)
    assert text == expected_text(house, "The", sampling=PRESETS["greedy"], max_new_tokens=n)


def test_a_stop_text_is_cut_off(house):
    whole = expected_text(house, "The", sampling=PRESETS["greedy"], max_new_tokens=40)
    stop = whole[9:12]
    _, text, _ = spoken(
        house, "--preset", "greedy", "--prompt", "The", "--max-new-tokens", 40, "--stop", stop, "--stop", "\x00"
    )
    assert text == whole[: whole.index(stop, 3)]


def test_several_prompts_are_each_as_if_alone(house):
    """G8, from options and from a file together. 45 tokens with a context of 32 are read again, which is said."""
    prompts = ["The", "A cat and a dog", "x"]
    alone = [spoken(house, "--prompt", prompt, "--max-new-tokens", 45)[1] for prompt in prompts]
    (house / "prompts.txt").write_text("\n".join(["", *prompts[1:], ""]), encoding="utf-8")
    for words in (
        [word for prompt in prompts for word in ("--prompt", prompt)],
        ["--prompt", "The", "--prompts", "prompts.txt"],
    ):
        done = typed("generate", *words, "--max-new-tokens", 45, cwd=house)
        assert done.status == 0
        *texts, counts = done.stdout.split("\n", 1)[1].split(f"\n{'-' * 20}\n")
        assert texts == alone
        assert counts.startswith("3 texts, 135 new tokens, ")
        assert counts.endswith(" a second, the context was full and its last half read again\n")


def test_text_is_shown_as_it_is(house):
    """T6 and no markup: special strings, brackets, a character of four bytes, the longest line unbroken."""
    prompt = "<|endoftext|> [bold]no[/bold] [/] 🦊 :smile: " + "long " * 30
    _, text, _ = spoken(house, "--prompt", prompt, "--max-new-tokens", 5)
    assert text.startswith(prompt)
    done = typed("generate", "--prompt", prompt, "--prompt", "[red]", "--max-new-tokens", 2, cwd=house)
    assert done.status == 0
    assert prompt in done.stdout
    assert "\n[red]" in done.stdout


def test_a_longer_context(house):
    """M11: rotary models can be opened with one, learned positions only with a shorter one."""
    *_, counts = spoken(house, "--run", "turning", "--n-context", 256, "--prompt", "The", "--max-new-tokens", 60)
    assert "read again" not in counts
    *_, counts = spoken(house, "--run", "turning", "--prompt", "The", "--max-new-tokens", 60)
    assert "read again" in counts
    *_, counts = spoken(house, "--n-context", 8, "--prompt", "The", "--max-new-tokens", 20)
    assert "read again" in counts
    done = typed("generate", "--n-context", 33, "--prompt", "The", cwd=house)
    line = "invoke generate: n_context: expected at most 32, got 33; positions beyond it were never learned"
    assert (done.status, done.stderr.splitlines()) == (2, [line])


def test_a_step_can_be_named(house):
    step = "runs/notes/checkpoints/step-0000030"
    for run in (step, "runs/notes", "notes", "notes/checkpoints/step-0000030"):
        head, *_ = spoken(house, "--run", run, "--prompt", "a", "--max-new-tokens", 1)
        assert head.startswith("notes step-0000030, CPU: ")


# --------------------------------------------------------------------------------------------------- the prompt loop


def test_the_loop_reads_stdin(house):
    """G6: an empty line does nothing, help helps, quit ends."""
    done = typed("generate", "--max-new-tokens", 10, cwd=house, stdin="\nhelp\nThe\n  quit \nnever read\n")
    alone = expected_text(house, "The", max_new_tokens=10)
    assert (done.status, done.stderr) == (0, "")
    assert f">>> {alone}\n3 prompt tokens, 10 new, " in done.stdout
    assert done.stdout.count(">>> ") == 4
    assert "quit, exit or q ends" in done.stdout
    assert done.stdout.count("notes step-0000030, CPU: balanced, temperature 1") == 2  # at the start and in help
    assert "never read" not in done.stdout


@pytest.mark.parametrize("end", ["exit\n", "q\n", ""])
def test_the_loop_ends(house, end):
    done = typed("generate", "--max-new-tokens", 1, cwd=house, stdin=f"The\n{end}")
    assert (done.status, done.stderr, done.stdout.count(" new, ")) == (0, "", 1)


def test_ctrl_c_stops_a_text_and_ctrl_c_at_the_prompt_ends(house):
    """G6 under a pseudo-terminal, with the keys themselves. G5: the first letters are there before the last is made."""
    master, slave = os.openpty()
    words = ("generate", "--max-new-tokens", 100_000, "--no-cache")
    command = Command(*words, cwd=house, terminal=os.ttyname(slave), TERM="xterm-256color")
    said = b""

    def read_until(text, seconds=60):
        nonlocal said
        end = time.monotonic() + seconds
        while text not in said:
            assert select.select([master], [], [], max(0, end - time.monotonic()))[0], said[-500:]
            said += os.read(master, 4096)
        said = said.split(text, 1)[1]

    read_until(b">>> ")
    os.close(slave)  # not earlier: a terminal that nobody has open is gone
    os.write(master, b"The cat\r")
    read_until(b"The cat\r\n")
    read_until(b"The cat")  # and the text goes on from here, for a hundred thousand tokens
    assert os.read(master, 10)
    os.write(master, b"\x03")
    read_until(b"stopped")
    read_until(b">>> ")
    end = time.monotonic() + 60
    while command.process.is_alive() and time.monotonic() < end:
        os.write(master, b"\x03")  # again: one that comes while Python sets up its prompt is not heard
        command.process.join(2)
    rest = b""
    try:
        while select.select([master], [], [], 10)[0] and (part := os.read(master, 4096)):
            rest += part
    except OSError:  # nobody has it open any more
        pass
    os.close(master)
    assert command.status == 130
    assert b"Traceback" not in rest
    assert rest.decode().strip().endswith("invoke generate: stopped")


def test_ctrl_c_during_a_text_that_was_asked_for(house):
    command = Command("generate", "--prompt", "The", "--max-new-tokens", 100_000, "--no-cache", cwd=house)
    command.wait_for(lambda: len(command.stdout) > 100).signal(SIGINT).end()
    assert command.status == 130
    assert command.stderr.strip() == "invoke generate: stopped"


def test_a_reader_that_has_enough(house):
    """`invoke generate | head -c 1` has no traceback. In the shell, because the pipe's end is the matter."""
    line = f"{sys.executable} -m invoke -r {HOUSE} generate --prompt The --max-new-tokens 400 | head -c 1"
    done = subprocess.run(line, shell=True, cwd=house, env=os.environ | {"PYTHONPATH": str(HOUSE)}, capture_output=True)
    assert (len(done.stdout), done.stderr) == (1, b"")


# ------------------------------------------------------------------------------------------------- what is typed wrong


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("--preset nope", "preset: expected one of greedy, precise, balanced, creative, very-creative, got nope"),
        ("--strategy nope", "strategy: expected one of greedy, multinomial, top_k, top_p, top_k_top_p, got 'nope'"),
        ("--temperature -1", "temperature: expected 0 or a number in [1e-30, 1e30], got -1.0"),
        ("--temperature nan", "temperature: expected 0 or a number in [1e-30, 1e30], got nan"),
        ("--top-k -1", "top_k: expected a whole number of at least 0, got -1"),
        ("--top-p 0", "top_p: expected a number in (0, 1], got 0.0"),
        ("--top-p 1.5", "top_p: expected a number in (0, 1], got 1.5"),
        ("--min-p 2", "min_p: expected a number in [0, 1], got 2.0"),
        ("--max-new-tokens -1", "Invalid value for '--max-new-tokens': -1 is not in the range x>=0."),
        ("--stop=", "stop: expected a text to end before, got an empty one"),
        ("--threads 999999", "Invalid value for '--threads': 999999 is not in the range 1<=x<=1024."),
        ("--top-k x", "Invalid value for '--top-k': 'x' is not a valid integer."),
        ("--prompts none.txt", "Invalid value for '--prompts': File 'none.txt' does not exist."),
        ("--prompts empty.txt", "prompts: expected a prompt a line, got none in empty.txt"),
        ("--prompts binary.txt", "prompts: expected UTF-8 text, got a binary file or another encoding in binary.txt"),
        (
            "--dtype int8 --engine eager",
            "dtype: expected float32 or bfloat16 without the native engine, got int8, but --engine eager is given",
        ),
        (
            "--dtype int8 --no-cache",
            "dtype: expected float32 or bfloat16 without the native engine, got int8, but --no-cache is given",
        ),
        (
            "--dtype half",
            "Invalid value for '--dtype': 'half' is not one of 'float32', 'bfloat16', 'int8'.",
        ),
        ("--device mps", "device: expected auto or one of cpu, got mps"),
        (
            "--run no-such",
            "run: expected a run or step folder, got no-such; runs in runs: notes, turning; "
            "invoke train --mode quick makes one",
        ),
        ("--no-such", "No idea what '--no-such' is! (invoke generate --help lists its options)"),
    ],
)
def test_what_is_wrong_is_one_line(house, words, line):
    if "mps" in words and sys.platform != "linux":
        pytest.skip("this system may have MPS")
    (house / "empty.txt").write_bytes(b"\n \n")
    (house / "binary.txt").write_bytes(bytes(range(256)))
    before = snapshot(house)
    done = typed("generate", *words.split(), *([] if "--prompts" in words else ["--prompt", "The"]), cwd=house)
    assert (done.status, done.stdout, done.stderr.strip().splitlines()) == (2, "", [f"invoke generate: {line}"])
    assert snapshot(house) == before


def test_nothing_to_speak_from(tmp_path):
    """C7."""
    done = typed("generate", "--prompt", "The", cwd=tmp_path)
    got = "got nothing; runs in runs: none; invoke train --mode quick makes one"
    assert (done.status, done.stderr.strip()) == (2, f"invoke generate: run: expected a run or step folder, {got}")


@pytest.mark.parametrize("damage", ["weights", "state", "half", "config", "tokenizer"])
def test_a_damaged_run(house, tmp_path, damage):
    """One line with the file to blame."""
    shutil.copytree(house / "runs/notes", tmp_path / "runs/notes")
    run = tmp_path / "runs/notes"
    step = run / "checkpoints/step-0000030"
    if damage == "weights":
        content = bytearray((step / "model.safetensors").read_bytes())
        content[-1] ^= 1
        (step / "model.safetensors").write_bytes(content)
        line = r"runs/notes/checkpoints/step-0000030/model.safetensors: damaged, expected sha256 \w{8}, got \w{8}"
    elif damage == "state":
        (step / "state.json").write_text((step / "state.json").read_text().replace('"epoch": 1', '"epoch": 2'))
        line = (
            r"run: expected runs/notes's best step step-0000030, but "
            r"runs/notes/checkpoints/step-0000030/state.json: damaged, its sha256 does not hold; --run can name another"
        )
    elif damage == "half":
        (step / "state.json").unlink()
        line = r"run: expected runs/notes's best step step-0000030, but .*state.json: expected a file, got none; .*"
    elif damage == "config":
        (run / "run.json").write_text("{}")
        line = r"runs/notes/run.json: expected the config of a model, got 'config'"
    else:
        (run / "tokenizer.json").unlink()
        line = r"tokenizer: expected a tokenizer.json, got runs/notes/tokenizer.json: .*"
    done = typed("generate", "--run", "notes", "--prompt", "The", cwd=tmp_path)
    (said,) = done.stderr.strip().splitlines()
    assert done.status == 2
    assert re.fullmatch(f"invoke generate: {line}", said)
