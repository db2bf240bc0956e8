"""invoke evaluate, compare, harness and sampling-demo on small runs: what they print is what the library measured."""

import dataclasses
import importlib.util
import json
import math
import shutil
import subprocess
import sys
import xml.etree.ElementTree as xml
from pathlib import Path

import pytest
import torch
from cases import random_params
from click.testing import CliRunner
from rich.console import Console

from gptcore import checkpoint, data, tree
from gptcore import tokenizer as tokenizers
from gptcore.config import architecture
from gptcore.evaluate.calibration import Curve
from gptcore.evaluate.choice import last_words, multiple_choice, read_items, read_words
from gptcore.evaluate.perplexity import score_documents
from gptcore.model import init_params
from tools import drawing, scoring
from tools.cli import main
from tools.reliability import BAR, LEFT, SIZE, TOP, reliability_svg

TEXT = "The cat sat. A dog ran by the river, and one of two birds sang in the old tree."
SENTENCES = TEXT.split()


def call(*argv):
    """Run a command; ValueErrors, which the bridge turns into one line, come through."""
    result = CliRunner().invoke(main, [str(word) for word in argv])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


def write_run(name, words, plan, weights):
    """A run folder with a step for each of the weights."""
    config = architecture("llama", n_vocab=words.n_vocab, n_context=32, n_layer=1, d_model=16, n_head=2)
    folder = checkpoint.create_run("runs", name, {"config": dataclasses.asdict(config), "plan": plan}, words)
    for number, scale in enumerate(weights, start=1):
        params = tree.map(lambda leaf, scale=scale: leaf * scale, random_params(config, torch.float32))
        checkpoint.save_step(folder, number, params=params, optimizer={}, rng={}, state={"train_loss": 5.0 / number})
    return folder


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A working folder with a run of three steps on bytes, one of one step on a BPE, texts and questions."""
    place = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        generator = torch.Generator().manual_seed(0)
        with open("texts.jsonl", "w", encoding="utf-8") as file:
            for _ in range(150):
                picked = torch.randint(len(SENTENCES), (25,), generator=generator).tolist()
                file.write(json.dumps({"text": " ".join(SENTENCES[i] for i in picked) + " é"}) + "\n")
        byte, bpe = tokenizers.named("byte"), tokenizers.train_bpe([TEXT], 280)
        for name, words, weights in (("bytes", byte, (0.1, 1.0, 1.5)), ("merged", bpe, (0.1,))):
            sizes = {"n_context": 32, "n_sequences": 4, "seed": 1}
            write_run(name, words, data.prepare("texts.jsonl", words, cache="data", **sizes).plan, weights)
        checkpoint.mark("runs/bytes", "best", 2)
        write_run("planless", byte, None, (0.1,)).rename("planless")
        questions = [{"ctx": "The cat", "endings": ["sat.", "tree", "by the river"], "label": i % 3} for i in range(12)]
        (place / "questions.jsonl").write_text("\n".join(map(json.dumps, questions)))
        (place / "words.jsonl").write_text('{"text": "one of two"}\n{"text": "a cat sat"}\n')
        (place / "odd.jsonl").write_text('{"text": "one of two"}\n{"ctx": 3}\n')
        yield place


@pytest.fixture(autouse=True)
def at_home(home, monkeypatch):
    monkeypatch.chdir(home)


def read(path):
    """The objects of a file of JSON lines."""
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def held_out(model):
    return data.reopen(model.run["plan"], model.tokenizer, cache="data").validation


GIVEN = {"threads": None, "device": "cpu"}


def test_evaluate_prints_what_training_would_log():
    """The best step on the held-out split: the same call as a validation while training, the same numbers."""
    output = call("evaluate", "--run", "bytes", "--json", "scores.json", "--per-token", "tokens.jsonl", "--calibration")
    model = scoring.load("runs/bytes", GIVEN)
    wanted = score_documents(model.params, model.config, held_out(model), eot=model.tokenizer.eot)
    assert "bytes step-0000002" in output
    for number in (wanted.loss, wanted.perplexity, wanted.bits_per_byte, wanted.accuracy):
        assert f"{number:.4f}" in output
    found = read("scores.json")[0]
    assert found["loss"]["value"] == pytest.approx(wanted.loss, rel=1e-6)
    assert [document["nats"] for document in found["documents"]] == pytest.approx(wanted.nats.tolist(), rel=1e-6)
    assert found["bits_per_byte"]["low"] < wanted.bits_per_byte < found["bits_per_byte"]["high"]
    assert found["references"].keys() == {"untrained", "unigram"}  # too little text for xz
    rows = read("tokens.jsonl")
    assert len(rows) == wanted.n_tokens.sum()
    assert sum(row["nll"] for row in rows) == pytest.approx(wanted.nats.sum().item(), rel=1e-4)
    assert {"document", "index", "id", "text", "nll", "rank", "entropy"} == rows[0].keys()
    assert f"Training perplexity {math.exp(2.5):.4g}, here {wanted.perplexity:.4g}" in " ".join(output.split())
    assert "overfitting" in output  # exp(2.5) is far below what random weights reach
    assert "Calibration" in output
    assert "Most surprising" in output


def test_evaluate_reads_files_in_windows_of_any_size():
    """Stride 1, no prefix, the first 100 tokens; against the library."""
    call("evaluate", "--run", "runs/bytes/checkpoints/step-0000003", "--data", "texts.jsonl", "--tokens", 300,
         "--window", 8, "--stride", 1, "--prefix", "none", "--json", "scores.json")  # fmt: skip
    model, found = scoring.load("runs/bytes/checkpoints/step-0000003", GIVEN), read("scores.json")[0]
    texts = [row["text"] for row in read("texts.jsonl")]
    documents = [(model.tokenizer.encode(text), len(text.encode())) for text in texts]
    ways = {"eot": None, "window": 8, "stride": 1, "max_tokens": 300, "token_bytes": model.tokenizer.n_bytes}
    wanted = score_documents(model.params, model.config, documents, **ways)
    assert found["loss"]["value"] == pytest.approx(wanted.loss, rel=1e-6)
    assert found["bits_per_byte"]["value"] == pytest.approx(wanted.bits_per_byte, rel=1e-6)
    assert sum(len(document["token_nats"]) for document in found["documents"]) == wanted.n_tokens.sum()


def test_one_long_text_has_an_interval_over_blocks():
    """Of the context, however small the window: every number has bounds, the calibration's too."""
    output = call("evaluate", "--run", "bytes", "--data", "words.jsonl", "--train-gap", "--json", "scores.json")
    assert "too few, 10 are needed" in output
    assert "other text" in output
    assert "overfitting" not in output
    found = read("scores.json")[0]
    assert found["loss"]["low"] is None
    assert found["train_gap"]["difference"]["low"] is None
    assert "Loss on training text" in output
    Path("long.txt").write_text(" ".join(SENTENCES * 30))
    output = call(
        "evaluate", "--run", "bytes", "--data", "long.txt", "--window", 8, "--calibration", "--json", "scores.json"
    )
    assert "blocks of 32 tokens or more" in output
    assert "1 document," in output
    found = read("scores.json")[0]
    for interval in (found["loss"], found["calibration"]["ece"], found["calibration"]["brier"]):
        assert interval["low"] <= interval["value"] <= interval["high"]


def test_the_gap_to_training_text_is_measured():
    """Both sides by the library, as many tokens of each."""
    call("evaluate", "--run", "bytes", "--train-gap", "--json", "scores.json")
    model, found = scoring.load("runs/bytes", GIVEN), read("scores.json")[0]
    text = scoring.train_text(model, {"cache": "data"}, found["n_tokens"], Console(quiet=True))
    assert sum(len(document.tokens) for document in text) == found["n_tokens"]
    wanted = score_documents(model.params, model.config, scoring.pairs(text), eot=model.tokenizer.eot).loss
    assert found["train_gap"]["train_loss"]["value"] == pytest.approx(wanted, rel=1e-6)
    more = found["train_gap"]["difference"]
    assert more["value"] == pytest.approx(found["loss"]["value"] - wanted, rel=1e-4)
    assert more["low"] < more["value"] < more["high"]


def test_the_curve_is_drawn():
    """A dot a bin at what was said and what came true, the same numbers as in the JSON."""
    call("evaluate", "--run", "bytes", "--svg", "curve.svg", "--json", "scores.json")
    curve = read("scores.json")[0]["calibration"]["curve"]
    picture = xml.parse("curve.svg").getroot()
    assert picture.find("{*}title").text == "Calibration of bytes step-0000002"
    dots = [(float(dot.get("cx")), float(dot.get("cy"))) for dot in picture.findall("{*}circle")]
    wanted = zip(curve["confidence"], curve["accuracy"], strict=True)
    assert dots == [pytest.approx((LEFT + SIZE * said, TOP + SIZE * (1 - true)), abs=0.06) for said, true in wanted]
    bars = [float(bar.get("height")) for bar in picture.findall("{*}rect")]
    assert max(bars) == BAR
    assert bars == pytest.approx([BAR * n / max(curve["n"]) for n in curve["n"]], abs=0.06)
    assert (
        "<a> & b" in xml.fromstring(reliability_svg("<a> & b", Curve(*torch.full((5, 1), 0.5)))).find("{*}title").text
    )


def test_questions_and_last_words():
    output = call("evaluate", "--run", "bytes", "--choices", "questions.jsonl", "--last-words", "words.jsonl")
    assert "33.3 %" in output  # the same question with each of three labels: a third is right
    for name in ("acc", "acc_norm", "acc_bytes", "acc_mutual_info", "Brier", "2 last words"):
        assert name in output


def test_answers_are_written_down():
    """Every question and word of the JSON is the library's."""
    call("evaluate", "--run", "bytes", "--choices", "questions.jsonl", "--last-words", "words.jsonl",
         "--json", "answers.json", "--svg", "answers.svg")  # fmt: skip
    model, found = scoring.load("runs/bytes", GIVEN), read("answers.json")[0]
    parts = model.params, model.config, model.tokenizer
    wanted = multiple_choice(*parts, scoring.named("questions.jsonl", read_items))
    assert [row["log_p"] for row in found["choices"]["questions"]] == wanted.log_p.tolist()
    assert found["choices"]["acc"]["value"] == 4 / 12
    words = last_words(*parts, scoring.named("words.jsonl", read_words))
    assert [row["log_p"] for row in found["last_words"]["words"]] == words.log_p.tolist()
    assert found["last_words"]["perplexity"] == words.perplexity
    assert xml.parse("answers.svg").getroot().findall("{*}circle")


def test_a_line_separator_inside_json_ends_no_line():
    Path("separated.jsonl").write_text('{"text": "one\u2028two three"}\n', encoding="utf-8")
    assert "1 last word\n" in call("evaluate", "--run", "bytes", "--last-words", "separated.jsonl")


def test_a_run_has_its_steps_compared():
    """Three rows, two changes; the small weights are best, and each is compared with them."""
    output = call("compare", "--run", "bytes")
    assert [f"step-000000{n}" in output for n in (1, 2, 3)] == [True] * 3
    assert output.count("★") == 1
    assert "Use bytes step-0000001: better than the next by more than chance." in output
    assert "From step to step" in output
    assert output.count("↑") == 2
    assert max(map(len, output.splitlines())) <= 80
    assert "…" not in output


def test_a_model_against_itself_is_no_better():
    output = call(
        "compare", "--run", "runs/bytes/checkpoints/step-0000001", "--run", "runs/bytes/checkpoints/step-0000001"
    )
    assert "★" not in output
    assert "No difference shown" in output
    assert "+0.0000  +0.0000 to +0.0000  1.000" in output
    assert "equivalent" in output


def test_one_long_text_is_compared_by_blocks():
    """One document has no bootstrap, its blocks have; totals stay what evaluate says, for either tokenizer."""
    Path("long.txt").write_text(" é ".join(SENTENCES * 30), encoding="utf-8")
    output = call("compare", "--run", "runs", "--data", "long.txt")
    assert "bytes or more, p adjusted" in " ".join(output.split())
    assert "better than the next by more than chance" in output
    for run in ("bytes", "merged"):
        call("evaluate", "--run", run, "--data", "long.txt", "--json", "scores.json")
        assert f"{read('scores.json')[0]['bits_per_byte']['value']:.4f}" in output
    assert "too few documents (2)" in " ".join(call("compare", "--run", "runs", "--data", "words.jsonl").split())


def test_runs_of_one_name_and_runs_without_a_step():
    """Folders tell two runs of one name apart, and what has no step yet is named and left out."""
    for place in ("left", "right"):
        shutil.copytree("runs/bytes", Path(place, "bytes"))
    shutil.copytree("runs/merged", "left/fresh", ignore=shutil.ignore_patterns("step-*"))
    output = call("compare", "--run", "left", "--run", "right/bytes", "--data", "texts.jsonl")
    assert "left/fresh has no saved step and is left out." in output
    assert "left/bytes step-0000002" in output
    assert "right/bytes step-0000002" in output


def test_other_tokenizers_are_compared_in_bits_per_byte():
    """A folder of runs: the best of each, no perplexity column, one line why."""
    output = call("compare", "--run", "runs")
    assert "Tokenizers differ" in output
    assert "perplexity" not in output.split("Tokenizers differ")[0]
    assert "merged step-0000001" in output
    assert "bytes step-0000002" in output
    assert "perplexity" in call("compare", "--run", "bytes").split("Use")[0]


def test_answers_are_compared_by_mcnemar():
    output = call("compare", "--run", "runs", "--choices", "questions.jsonl")
    assert "McNemar" in output
    assert output.count("33.3 %") == 2
    assert "No difference shown between bytes step-0000002 and merged step-0000001" in " ".join(output.split())


def test_a_model_answers_like_itself():
    step = "runs/bytes/checkpoints/step-0000001"
    output = call("compare", "--run", step, "--run", step, "--choices", "questions.jsonl")
    assert "bytes step-0000001 (2)" in output
    assert "+0.0 (+0.0 to +0.0)  1.000" in output


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["evaluate", "--run", "nobody"], "run: expected a run or step folder, got nobody"),
        (["evaluate", "--run", "bytes", "--window", 33], "window: expected a number in 1..n_context=32, got 33"),
        (
            ["evaluate", "--run", "bytes", "--window", 8, "--stride", 9],
            "stride: expected a number in 1..window=8, got 9",
        ),
        (["evaluate", "--run", "bytes", "--data", "none.txt"], "data: expected"),
        (["evaluate", "--run", "bytes", "--choices", "odd.jsonl"], "odd.jsonl, line 1: expected .*endings"),
        (["evaluate", "--run", "bytes", "--last-words", "odd.jsonl"], "odd.jsonl, line 2: expected .*two words"),
        (
            ["evaluate", "--run", "bytes", "--choices", "questions.jsonl", "--tokens", 5],
            "tokens: expected no questions",
        ),
        (
            ["evaluate", "--run", "bytes", "--last-words", "words.jsonl", "--svg", "x.svg"],
            "svg: expected text or --choices",
        ),
        (["evaluate", "--run", "bytes", "--json", "none/x.json"], "json: expected a file in a folder that is there"),
        (["evaluate", "--run", "bytes", "--choices", "latin.jsonl"], "latin.jsonl: expected UTF-8 text"),
        (["evaluate", "--run", "planless"], "data: expected --data for planless step-0000001"),
        (
            ["evaluate", "--run", "planless", "--data", "words.jsonl", "--train-gap"],
            "data: expected --data for planless",
        ),
        (["compare", "--run", "merged"], "run: expected two models or more to compare, got 1"),
        (["compare", "--run", "bytes", "--run", "nobody"], "run: expected a run or step folder, got nobody"),
        (["sampling-demo", "--run", "nobody"], "run: expected a run or step folder, got nobody"),
    ],
)
def test_what_is_wrong_is_one_line(argv, message):
    Path("latin.jsonl").write_bytes('{"text": "one é"}'.encode("latin-1"))
    with pytest.raises(ValueError, match=message):
        call(*argv)


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is not None, reason="lm-eval is installed")
def test_without_the_harness_the_command_says_what_to_install():
    with pytest.raises(ValueError, match="harness: expected lm-eval"):
        call("harness", "--run", "bytes")


@pytest.mark.oracle
@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed: the extra [harness]")
def test_the_harness_runs_on_a_run(tmp_path):
    call("harness", "--run", "bytes", "--tasks", "gptcore_text", "--limit", 2, "--device", "cpu",
         "--output-path", tmp_path)  # fmt: skip
    [path] = tmp_path.rglob("results_*.json")
    assert json.loads(path.read_text())["results"]["gptcore_text"]["bits_per_byte,none"] > 0


@pytest.mark.oracle
@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed: the extra [harness]")
def test_a_task_that_is_not_there_is_one_line():
    command = [sys.executable, "-m", "gptcore.evaluate.harness", "run", "--model", "gptcore", "--tasks", "nosuch"]
    found = subprocess.run([*command, "--model_args", "run=runs/bytes"], check=False, capture_output=True, text=True)
    assert found.returncode == 2
    assert found.stderr.splitlines()[-1] == "harness: Tasks not found: nosuch"
    assert "Traceback" not in found.stderr


# ----------------------------------------------------------------------------------------------------- sampling-demo


def test_the_demo_shows_exact_probabilities():
    """What the settings must do: 99.26 %; one token under top-p 0.95 or all eight; 86.5, 63.6 and 42.9 %."""
    first = lambda logits, settings: 100 * drawing.exact(logits, settings)[0].item()
    cuts = drawing.CUTS
    assert first(drawing.CONFIDENT, cuts["all"]) == pytest.approx(99.26, abs=0.01)
    assert (drawing.exact(drawing.CONFIDENT, cuts["top-p 0.95"]) > 0).sum() == 1
    assert (drawing.exact(drawing.UNCERTAIN, cuts["top-p 0.95"]) > 0).sum() == 8
    _, temperatures = drawing.DISTRIBUTIONS["Temperature"]
    found = [first(drawing.FALLING, settings) for settings in temperatures.values()]
    assert found == pytest.approx([86.5, 63.6, 42.9], abs=0.05)


@pytest.mark.parametrize("name", ["Confident", "Uncertain", "Temperature"])
def test_the_demo_draws_what_it_says(name):
    """4,000 draws of each setting: every share within five sigma, and nothing that has probability 0."""
    logits, ways = drawing.DISTRIBUTIONS[name]
    for settings in ways.values():
        p, n = drawing.exact(logits, settings), drawing.drawn(logits, settings, 4000, seed=1)
        assert ((n / 4000 - p).abs() <= 5 * (p * (1 - p) / 4000).sqrt() + 1e-9).all()


def test_the_demo_fits_a_terminal_and_is_repeatable():
    output = call("sampling-demo")
    assert max(map(len, output.splitlines())) <= 80
    assert "…" not in output
    assert output == call("sampling-demo")
    assert output != call("sampling-demo", "--seed", 7)
    assert sum(output.count(f"\n  {use} ") for use in drawing.ADVICE) == len(drawing.ADVICE) == 6


def test_the_demo_continues_a_prompt_in_five_ways():
    output = call("sampling-demo", "--run", "bytes", "--prompt", "[cat]")
    assert output.count("[cat]") == 6  # once said, five times continued
    for way in drawing.WAYS:
        assert way in output


def test_weights_of_an_untrained_run_are_measured_too(home):
    """A model that knows nothing is called so."""
    words = tokenizers.named("byte")
    plan = checkpoint.read_run("runs/bytes")["plan"]
    config = architecture("gpt2", n_vocab=words.n_vocab, n_context=32, n_layer=1, d_model=16, n_head=2)
    folder = checkpoint.create_run("fresh", "one", {"config": dataclasses.asdict(config), "plan": plan}, words)
    params = tree.map(torch.zeros_like, init_params(config, torch.Generator()))
    checkpoint.save_step(folder, 1, params=params, optimizer={}, rng={}, state={})
    output = " ".join(call("evaluate", "--run", folder).split())
    assert "The model is no better than guessing." in output
    assert "As unsure as a choice among 257.0 tokens; untrained, among 257." in output
