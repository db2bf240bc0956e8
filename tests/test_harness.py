"""The adapter to the Language Model Evaluation Harness: its numbers are those of transformers' own adapter, offline.

The comparisons need the extra [harness]; pip install -e ".[harness]" -c constraints.txt makes an environment for them.
"""

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys

import pytest
import torch
from cases import random_params

from gptcore import checkpoint, tree
from gptcore import tokenizer as tokenizers
from gptcore.config import architecture
from gptcore.evaluate.choice import Item, multiple_choice, read_items
from gptcore.evaluate.harness import QUIET, adapter, local_tasks, opened
from gptcore.evaluate.perplexity import windows
from gptcore.model import init_params

TASKS = ["gptcore_choice", "gptcore_last_word", "gptcore_text", "gptcore_repeat"]
installed = importlib.util.find_spec("lm_eval") is not None
needs_harness = pytest.mark.skipif(not installed, reason="lm-eval is not installed: the extra [harness]")


@pytest.fixture(scope="module")
def model():
    """A random model shaped like GPT-2 with a tokenizer of 300 ids: (params, config, tokenizer)."""
    words = tokenizers.train_bpe(["the cat and the dog, one two three four and five. He said that she was here"], 300)
    config = architecture("gpt2", n_vocab=words.n_vocab, n_context=48, n_layer=2, d_model=32, n_head=4)
    return random_params(config, torch.float32), config, words


@pytest.fixture
def run(model, tmp_path):
    """A run folder that holds the model."""
    params, config, words = model
    folder = checkpoint.create_run(tmp_path, "tiny", {"config": dataclasses.asdict(config)}, words)
    checkpoint.save_step(folder, 7, params=params, optimizer={}, rng={}, state={})
    return folder


def test_a_run_is_loaded(model, run):
    params, config, words, batch_size = opened(run, "cpu", batch_size=1)
    assert config == model[1]
    assert words.fingerprint == model[2].fingerprint
    assert batch_size is None
    wanted = dict(tree.walk(model[0]))
    assert wanted.keys() == dict(tree.walk(params)).keys()
    assert all(torch.equal(leaf, wanted[name]) for name, leaf in tree.walk(params))


def test_local_tasks_are_absolute_and_leave_the_environment_alone(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    before = dict(os.environ)
    with local_tasks() as folder:
        assert {path.stem for path in folder.glob("*.yaml")} == set(TASKS)
        for path in folder.glob("*.yaml"):
            assert f'"{folder}/' in path.read_text()
            assert "{folder}" not in path.read_text()
        assert os.environ["HF_HUB_OFFLINE"] == "0"  # what the user has set stays
        assert os.environ["DISABLE_MULTIPROC"] == "1"
        lines = (folder / "questions.jsonl").read_text().splitlines()
        assert len(read_items(lines)) == len(lines) >= 12
    assert dict(os.environ) == before
    assert not folder.exists()


@pytest.mark.skipif(installed, reason="lm-eval is installed")
def test_without_the_harness_one_line_says_what_to_install():
    with pytest.raises(ValueError, match=r'harness: expected lm-eval, got .*; pip install -e "\.\[harness\]"'):
        adapter()


# ----------------------------------------------------------------------------------------------- against the harness


def as_transformers(params, config, words, folder):
    """The same weights as transformers' GPT-2, and the same tokenizer."""
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    sizes = {
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "n_embd": config.d_model,
        "n_positions": config.n_context,
    }
    ends = {"bos_token_id": words.eot, "eos_token_id": words.eot}
    theirs = GPT2LMHeadModel(GPT2Config(vocab_size=config.n_vocab, activation_function="gelu", **sizes, **ends)).eval()
    state = {"wte.weight": params["embed"]["w"], "wpe.weight": params["positions"]["w"]}
    norms = {"ln_f": params["norm_f"]}
    for i, p in enumerate(params["blocks"]):
        norms |= {f"h.{i}.ln_1": p["norm_1"], f"h.{i}.ln_2": p["norm_2"]}
        joint = {leaf: torch.cat([p["attn"][name][leaf] for name in "qkv"]) for leaf in ("w", "b")}
        linears = {
            "attn.c_attn": joint,
            "attn.c_proj": p["attn"]["o"],
            "mlp.c_fc": p["mlp"]["up"],
            "mlp.c_proj": p["mlp"]["down"],
        }
        for name, leaves in linears.items():
            state |= {f"h.{i}.{name}.weight": leaves["w"].T, f"h.{i}.{name}.bias": leaves["b"]}
    state |= {f"{name}.{kind}": p[leaf] for name, p in norms.items() for kind, leaf in (("weight", "w"), ("bias", "b"))}
    theirs.transformer.load_state_dict(state)
    words.save(folder / "tokenizer.json")
    return theirs, PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), eos_token=tokenizers.EOT)


def evaluated(lm):
    """All four tasks through the harness: its results and its samples by task."""
    with local_tasks() as folder:
        import lm_eval
        from lm_eval.tasks import TaskManager

        manager = TaskManager(include_path=str(folder), include_defaults=False)
        found = lm_eval.simple_evaluate(lm, tasks=TASKS, task_manager=manager, log_samples=True, bootstrap_iters=0)
    return found["results"], found["samples"]


@needs_harness
@pytest.mark.oracle
def test_four_tasks_equal_transformers_adapter(model, tmp_path):
    """Multiple choice, last words, whole texts and generation on the same weights, each sample to 1e-4."""
    from lm_eval.models.huggingface import HFLM

    params, config, words = model
    theirs, their_words = as_transformers(*model, tmp_path)
    results, samples = evaluated(adapter()(params, config, words))
    hf = HFLM(pretrained=theirs, tokenizer=their_words, batch_size=4, device="cpu", max_length=config.n_context)
    their_results, their_samples = evaluated(hf)
    for task in TASKS:
        assert len(samples[task]) == len(their_samples[task]) >= 12
        for ours, wanted in zip(samples[task], their_samples[task], strict=True):
            assert ours["doc_hash"] == wanted["doc_hash"]
            flat = lambda sample: [part for [answer] in sample["resps"] for part in _parts(answer)]
            assert flat(ours) == pytest.approx(flat(wanted), abs=1e-4), task
        for name, value in their_results[task].items():
            if isinstance(value, float):
                assert results[task][name] == pytest.approx(value, rel=1e-5), name
    questions = [sample["doc"] for sample in samples["gptcore_choice"]]
    items = [Item(row["ctx"], tuple(" " + ending for ending in row["endings"]), row["label"]) for row in questions]
    ours = multiple_choice(params, config, words, items).correct()
    for name in ("acc", "acc_norm", "acc_bytes"):
        assert results["gptcore_choice"][f"{name},none"] == pytest.approx(ours[name].double().mean().item())


def _parts(answer):
    """An answer as a list of numbers or texts: (log p, greedy), log p, or a text."""
    if isinstance(answer, str):
        return [ord(c) for c in answer]
    return [float(value) for value in (answer if isinstance(answer, (tuple, list)) else [answer])]


@needs_harness
@pytest.mark.oracle
@pytest.mark.parametrize("k", [1, 4, 9, 16])
def test_windows_equal_the_harness_as_lists(k):
    """J2: every n from 1 to 100, window 16."""
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    for n in range(1, 101):
        text = list(range(n))
        theirs = [make_disjoint_window(pair) for pair in get_rolling_token_windows(text, -1, 16, k)]
        whole = [-1, *text]
        ours = [(begin, end, first) for begin, end, first in windows(n + 1, 16, 16 - k + 1)]
        # The harness feeds context + targets without the last: the same tokens as document[begin:end].
        assert [(context + targets)[:-1] for context, targets in theirs] == [whole[b:e] for b, e, _ in ours]
        assert [targets for _, targets in theirs] == [whole[f : e + 1] for _, e, f in ours]


@needs_harness
@pytest.mark.oracle
def test_the_harness_finds_us_by_name(model, run, tmp_path):
    """Its own command line, our model from a run folder, the four tasks, no network; the same numbers in its file."""
    out = tmp_path / "results"
    command = [sys.executable, "-m", "gptcore.evaluate.harness", "run", "--model", "gptcore"]
    command += ["--model_args", f"run={run}", "--tasks", *TASKS, "--output_path", str(out), "--device", "cpu"]
    subprocess.run(command, check=True, capture_output=True, env=os.environ | QUIET, timeout=280)
    [path] = out.rglob("results_*.json")
    found = json.loads(path.read_text())["results"]
    results, _ = evaluated(adapter()(*model))
    for task in TASKS:
        for name, value in results[task].items():
            if isinstance(value, float):
                assert found[task][name] == pytest.approx(value, rel=1e-6), name


@needs_harness
@pytest.mark.oracle
def test_odd_requests(model):
    """Nothing but spaces before a choice, an empty text, sampling, a stop string at once, and a cache of answers."""
    from lm_eval.api.instance import Instance

    params, config, words = model
    lm, kept = adapter()(params, config, words, batch_size=2), []
    lm.set_cache_hook(type("Hook", (), {"add_partial": lambda self, *entry: kept.append(entry)})())
    ask = lambda kind, *args: Instance(request_type=kind, doc={}, arguments=args, idx=0)
    spaces = lm.loglikelihood([ask("loglikelihood", "  ", "cat"), ask("loglikelihood", "", "  cat")], disable_tqdm=True)
    assert spaces[0] == pytest.approx(spaces[1])
    assert lm.loglikelihood_rolling([ask("loglikelihood_rolling", "")]) == [0.0]
    greedy = {"until": [], "max_gen_toks": 4}
    wishes = [greedy, greedy | {"until": [""]}, {"do_sample": True, "temperature": 1.0, "max_gen_toks": 4, "until": []}]
    texts = lm.generate_until(
        [ask("generate_until", context, w) for w in wishes for context in ("the cat", "", "x" * 200)]
    )
    assert texts[:3] == texts[3:6]
    assert texts[6:] != texts[:3]
    first = lm.generate_until([ask("generate_until", "the cat", greedy | {"until": [texts[0][:1]]})])
    assert first == [""]
    assert len(kept) == 2 + 1 + 9 + 1
    zero = init_params(config, torch.Generator().manual_seed(0))
    assert lm.tok_encode("the cat") == words.encode("the cat")
    assert adapter()(zero, config, words).tokenizer_name == words.fingerprint
