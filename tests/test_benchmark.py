"""invoke benchmark: the table says what was measured, and the file keeps it."""

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import random_params, random_tokens
from rich.console import Console
from typed import typed

from gptcore import engine, kernels, tree
from gptcore.config import architecture
from gptcore.model import forward
from tools.benchmark import GROUPS, case_table, check_realtime

HOUSE = Path(__file__).resolve().parent.parent
sys.path.append(str(HOUSE / "benchmarks"))
peers = importlib.import_module("peers")
bench_decode = importlib.import_module("bench_decode")
quality = importlib.import_module("quality")
TINY = architecture("gpt2", n_vocab=97, n_context=32, n_layer=2, d_model=32, n_head=2, mlp="gelu_tanh")


def shown(table):
    console = Console(width=120, file=open(os.devnull, "w"), record=True)  # noqa: SIM115
    console.print(table)
    return console.export_text()


def test_a_share_of_a_read_is_how_much_longer_than_the_read_it_took():
    native = {"us": 2000.0, "ratio": 1.0, "spread": [1.0, 1.0]}
    read = {"us": 1800.0, "ratio": 0.9, "spread": [0.8, 1.0]}
    told = {
        "n_tokens": 8,
        "n_bytes": 10**8,
        "native": native,
        "read": read,
        "why": "because",
        "others": 0.04,
        "rounds": 9,
    }
    text = shown(case_table({"group": "decode 124M", "extra_info": told}))
    assert "decode 124M" in text
    assert "because" in text
    lines = {line.split()[0]: line.split() for line in text.splitlines() if line.split()}
    assert lines["native"][-3:] == ["50.0", "90", "%"]
    assert lines["native"][-4] == "4,000"
    assert "rounds" not in lines
    assert "others" not in text


@pytest.mark.skipif(bool(kernels.why_not("decode_")), reason=kernels.why_not("decode_") or "built")
@pytest.mark.parametrize("tied", [True, False])
def test_a_token_reads_a_whole_head_and_no_table(tied):
    """An embedding counts only where it is the head; of angles and embeddings a row is read. Seen to fail with all."""
    config = architecture("llama", n_vocab=96, n_context=32, n_layer=1, d_model=32, n_head=2, tied=tied)
    params = random_params(config, torch.float32)
    read = sum(leaf.numel() for name, leaf in tree.walk(params) if tied or name != "embed.w")
    found = bench_decode.bytes_a_token(engine.pack(params, config), config, n_keys=5, cache_itemsize=2)
    assert found == 4 * read + 2 * 5 * 32 * 2  # keys and values of five positions


def test_a_busy_machine_is_said():
    told = {"native": {"us": 2000.0, "ratio": 1.0, "spread": [1.0, 1.0]}, "why": "because", "others": 0.42}
    text = shown(case_table({"group": "pack", "extra_info": told}))
    assert "because" in text
    assert "others used 42 % of the CPUs: these numbers are not to be judged" in text


def test_what_rounding_costs_is_shown_beside_the_perplexity():
    rows = {"fp32": {"perplexity": 20.0, "change": 0.0}, "int8": {"perplexity": 20.04, "change": 0.002}}
    text = shown(case_table({"group": "int8, quick-001", "extra_info": rows | {"why": "50,000 held-out tokens"}}))
    lines = {line.split()[0]: line.split() for line in text.splitlines() if line.split()}
    assert lines["int8"] == ["int8", "20.0400", "+0.200", "%"]
    assert "50,000 held-out tokens" in text


def test_every_group_is_a_file():
    assert all((HOUSE / "benchmarks" / name).exists() for name in GROUPS.values())


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("--only sampling --run x", "only: expected decode or int8 beside --run, got sampling"),
        ("--run no-such", "run: expected a run or step folder, got no-such; runs in runs: none; .*"),
    ],
)
def test_what_is_wrong_is_one_line(tmp_path, words, line):
    done = typed("benchmark", *words.split(), cwd=tmp_path)
    assert (done.status, done.stdout) == (2, "")
    assert re.fullmatch(f"invoke benchmark: {line}", done.stderr.strip())


@pytest.mark.parametrize("how", [[], ["--realtime"]], ids=["", "realtime"])
def test_a_run_is_measured_shown_and_kept(tmp_path, how):
    if how:
        try:
            check_realtime()
        except ValueError as error:
            pytest.skip(str(error))
    file = tmp_path / "found.json"
    words = ["benchmark", "--only", "kv-cache", "-k", "small-25", "--threads", "1", *how, "--json", str(file)]
    command = [sys.executable, "-m", "invoke", "-r", str(HOUSE), *words]
    # no part of parallel tests, or pytest-benchmark would measure nothing
    around = os.environ | {"GPTCORE_BUILD": "none", "PYTEST_XDIST_WORKER": ""}
    done = subprocess.run(command, cwd=tmp_path, env=around, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "positions computed: 24 with a cache, 290 without" in done.stdout
    found = json.loads(file.read_text())
    assert found["command"] == " ".join(["invoke benchmark --only kv-cache -k small-25 --threads 1", *how])
    (case,) = found["benchmarks"]
    assert case["extra_info"]["threads"] == 1
    assert {"with cache", "without cache"} <= case["extra_info"].keys()


@pytest.mark.parametrize("name", peers.PACKAGES)
def test_a_peer_computes_our_model(name):
    """Where it is installed. llama.cpp looks GELU up in a table of float16. Seen to fail with q and k exchanged."""
    if reason := peers.why_not(name, TINY):
        pytest.skip(reason)
    params, tokens = random_params(TINY, torch.float32), random_tokens(TINY, 1, 24)
    ours, _ = forward(params, TINY, tokens)
    makes = {"transformers": peers.Transformers, "llama.cpp": lambda *ours: peers.LlamaCpp(*ours, torch.float32, 1)}
    peer = makes[name](params, TINY)
    error = (peer.logits(tokens[0]) - ours[0]).square().mean().sqrt() / ours.std()
    assert error < {"transformers": 1e-5, "llama.cpp": 0.005}[name]
    text = peer.text(tokens[0], 8)
    for n, token in enumerate(text):  # greedy: each is the likeliest after those before it
        logits, _ = forward(params, TINY, torch.cat([tokens[0], torch.tensor(text[:n], dtype=torch.long)])[None])
        assert logits[0, -1].max() - logits[0, -1, token] <= 0.005 * ours.std()


def test_a_peer_says_what_it_cannot_hold():
    assert peers.why_not("transformers", architecture("llama", n_vocab=97)) == "the model is no GPT-2"
    odd = architecture("gpt2", n_vocab=97, d_model=40, n_head=2)
    assert peers.why_not("llama.cpp", odd) == "rows of its Q8_0 are multiples of 32"


def test_the_peers_weights_go_both_ways():
    params = random_params(TINY)
    model = peers.ModuleGPT(TINY)
    model.load(params)
    for (name, ours), (other, theirs) in zip(tree.walk(params), tree.walk(model.params()), strict=True):
        assert name == other
        assert torch.equal(ours, theirs), name


def test_a_table_of_variants_has_the_mean_and_its_interval():
    """1.5, 1.6, 1.7: mean 1.6, and Student's t for two degrees of freedom, 4.303, times 0.1 / sqrt(3)."""
    facts = {"tokens_per_second": 1000.0, "updates": 7, "train_loss": 1.0, "validation_loss": 2.0}
    rows = [facts | {"variant": "a", "bits_per_byte": bits} for bits in (1.5, 1.6, 1.7)]
    lines = list(quality.table([*rows, facts | {"variant": "b", "bits_per_byte": 2.0}]))
    assert lines[0].startswith("a ")
    assert "1.6000 +- 0.2484 (3 seeds)" in lines[0]
    assert "2.0000 +- nan (1 seeds)" in lines[1]
