"""invoke interpret.patch, .attribute and .steer on runs whose answers are known by construction."""

import csv
import dataclasses
import io
import json

import pytest
import torch
from cases import random_params
from click.testing import CliRunner
from models import hand_built
from typed import typed

from gptcore import GenerateOptions, checkpoint, forward, generate, text_pieces, tokenizer
from gptcore.config import architecture
from gptcore.interpret.report import _layer_table
from gptcore.interpret.steering import mean_difference, steer
from tools.cli import main
from tools.interpret.patch_view import percent

BYTE = tokenizer.named("byte")
PAIR = ("--clean", "abcab", "--corrupted", "abdab", "--target", "c", "--exact-target", "--run", "hand")
STEER = ("--prompt", "a", "--positive", "b", "--negative", "c")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with the hand-built run `hand` and a random one, `small`, of another architecture."""
    place = tmp_path_factory.mktemp("patching")
    small = architecture("llama", n_vocab=257, n_context=64, n_layer=2, d_model=16, n_head=2, logit_softcap=4.0)
    made, config = hand_built(n_vocab=257, n_context=60)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        for name, params, sizes in (("hand", made, config), ("small", random_params(small, torch.float32), small)):
            folder = checkpoint.create_run("runs", name, {"config": dataclasses.asdict(sizes), "plan": None}, BYTE)
            checkpoint.save_step(folder, 5, params=params, optimizer={}, rng={}, state={})
        yield place


@pytest.fixture
def call(home, monkeypatch):
    """Run a command in that folder; ValueErrors, which the bridge turns into one line, come through."""
    monkeypatch.chdir(home)

    def run(*argv, columns=100):
        words = ["interpret", *map(str, argv)]
        result = CliRunner().invoke(main, words, env={"COLUMNS": str(columns)}, color=False)
        if result.exception and not isinstance(result.exception, SystemExit):
            raise result.exception
        assert result.exit_code == 0, result.output
        return result.output

    return run


def document(text):
    """The one document of --json -, which is all there is."""
    (line,) = text.splitlines()
    return json.loads(line)


def test_the_layer_that_copies_is_critical(call):
    """In the hand-built model block 1 is everything and block 0, which knows only previous tokens, nothing."""
    text = call("patch", *PAIR, "--csv", "layers.csv")
    lines = text.splitlines()
    assert lines[0].startswith("clean      c 100.0 %")
    assert lines[1].startswith("corrupted  d 100.0 %")
    assert lines[2] == "target c, foil d"
    rows = [line.split() for line in lines if line.split()[:1] in (["1"], ["2"])]
    assert [row[:4] for row in rows] == [["1", "1", "+100.0", "Critical"], ["2", "0", "+0.0", "Minimal"]]
    with open("layers.csv", encoding="utf-8") as file:
        found = list(csv.DictReader(file))
    assert [row["layer"] for row in found] == ["0", "1"]
    assert float(found[1]["block"]) == pytest.approx(1, abs=1e-5)
    assert float(found[1]["resid_post"]) == pytest.approx(1, abs=1e-5)
    assert float(found[1]["mlp.out"]) == 0
    assert found[1]["low"] == ""  # one pair has no interval
    assert lines[-1].split()[1:4] == ["rows", "of", "forward,"]


def test_the_head_and_the_position_that_carry_it(call):
    heads = document(call("patch", *PAIR, "--by", "head", "--json", "-"))["result"]
    torch.testing.assert_close(torch.tensor(heads["recovery"]), torch.tensor([[0.0, 0], [1, 0]]), rtol=0, atol=1e-5)
    places = document(call("patch", *PAIR, "--by", "position", "--json", "-"))["result"]
    wanted = torch.tensor([0.0, 0, 1, 0, 0]).expand(2, 5)
    torch.testing.assert_close(torch.tensor(places["recovery"]), wanted, rtol=0, atol=1e-5)
    noise = document(call("patch", *PAIR, "--by", "head", "--direction", "noise", "--json", "-"))["result"]
    assert noise["recovery"][1][0] == pytest.approx(1, abs=1e-5)
    table = call("patch", *PAIR, "--by", "position", "--site", "attn.v", "--top-k", "1")
    assert "1         2  +100.0" in table


def test_equal_prompts_are_undefined(call):
    words = ("--clean", "abcab", "--corrupted", "abcab", "--target", "c", "--exact-target", "--run", "hand")
    text = call("patch", *words)
    assert text.count("undefined") == 3  # two layers, and why
    assert "hardly differ (" in text
    assert "··" in text
    found = document(call("patch", *words, "--json", "-"))
    assert found["result"]["recovery"]["block"] == [None, None]
    assert [token["text"] for token in found["tokens"]] == list("abcab")


@pytest.mark.parametrize("ways", [(), ("--method", "attribution"), ("--by", "head")])
def test_sentences_wrap_at_the_terminals_edge(call, ways):
    pair = ("--clean", "The tower is in", "--corrupted", "The river is in", "--target", "Paris", "--run", "small")
    assert max(map(len, call("patch", *pair, *ways, columns=60).splitlines())) <= 60
    assert max(map(len, call("steer", *STEER, "--run", "small", columns=60).splitlines())) <= 60


def test_a_zero_has_one_sign():
    assert [percent(value) for value in (-1e-5, 1e-5, -0.0, -0.01)] == ["+0.0", "+0.0", "+0.0", "-1.0"]
    rows = _layer_table({"block": [-1e-5, -0.02]}, "")["table"]
    assert [row[1] for row in rows[1:]] == ["0 %", "−2 %"]


BANDS = ("assessment", "Critical", "Important", "Moderate", "Minimal")


@pytest.mark.parametrize(
    ("ways", "said"),
    [
        (("--target", "d", "--foil", "c"), "The clean run does not prefer the target"),
        (("--target", "d", "--foil", "c", "--by", "head"), "The clean run does not prefer the target"),
        (("--target", "d", "--metric", "prob"), "The clean run prefers the target no more than the corrupted one"),
        (("--target", "d", "--metric", "nll"), "The clean run prefers the target no more than the corrupted one"),
    ],
)
def test_no_verdict_is_read_into_a_pair_the_wrong_way_round(call, home, ways, said):
    """The clean run goes on with c, so with d as the target there is no answer to bring back."""
    words = ("patch", "--clean", "abcab", "--corrupted", "abdab", "--exact-target", "--run", "hand", *ways)
    text = call(*words, "--html", "wrong.html")
    assert text.count(f"{said}: read no verdict into this.") == 1
    assert not any(word in text for word in BANDS)
    page = (home / "wrong.html").read_text(encoding="utf-8").split('<script type="application/json"')[1]
    assert "The clean run does not prefer the target" in page  # there the metric is always logit-diff
    assert not any(word in page.split("</script>")[0] for word in BANDS)
    assert "no verdict" not in call("patch", *PAIR, "--metric", ways[-1] if "--metric" in ways else "logit-diff")


def test_prompts_of_two_lengths(call, home):
    pair = ("--clean", "The tower is in", "--corrupted", "The building is in", "--target", "Paris", "--run", "small")
    text = call("patch", *pair)
    assert "a space was put before the target: ' Paris'" in text
    assert "the target is 6 tokens (' ', 'P', 'a', 'r', 'i', 's'); the first is what is measured" in text
    assert "15 and 18 tokens: 10 positions are paired from both ends" in text
    done = typed("interpret.patch", *pair, "--by", "position", cwd=home)
    assert done.status == 2
    assert done.stderr.rstrip().endswith("expected equal lengths by position, or --align auto, got 15 and 18 tokens")
    found = document(call("patch", *pair, "--by", "position", "--align", "auto", "--json", "-"))["result"]
    assert [place for place, value in enumerate(found["recovery"][0]) if value is None] == list(range(4, 12))


def test_several_pairs_are_pooled(call):
    lines = [{"clean": f"ab{x}ab", "corrupted": "abqab", "target": x, "foil": "q"} for x in "cdefg"]
    with open("pairs.jsonl", "w", encoding="utf-8") as file:
        file.write("\n".join(map(json.dumps, lines)))
    words = ("--pairs", "pairs.jsonl", "--exact-target", "--run", "hand")
    text = call("patch", *words)
    assert "... and 2 pairs more" in text
    assert "+100.0 to +100.0" in text
    found = document(call("patch", *words, "--by", "head", "--json", "-"))["result"]
    assert len(found["pairs"]) == 5
    assert found["recovery"][1][0] == pytest.approx(1, abs=1e-5)
    with open("broken.jsonl", "w", encoding="utf-8") as file:
        file.write('{"clean": "a"}\n')
    with pytest.raises(ValueError, match=r"pairs: expected \{.*\} in line 1, got"):
        call("patch", "--pairs", "broken.jsonl", "--run", "hand")


@pytest.mark.parametrize("metric", ["logit", "prob", "logprob", "nll", "kl"])
def test_whatever_is_measured_the_induction_head_is_all_of_it(call, metric):
    found = document(call("patch", *PAIR, "--by", "head", "--metric", metric, "--json", "-"))["result"]
    assert found["recovery"][1][0] == pytest.approx(1, abs=1e-3)
    assert found["recovery"][0] == [0, 0]


@pytest.mark.parametrize("run", ["hand", "small"])
def test_the_demo_works_with_every_model(call, run):
    text = call("patch", "--demo", "--run", run)
    assert "passed over: this tokenizer begins both answers with ·" in text
    assert text.count("block = attention and MLP") == 1
    if run == "hand":
        assert "+100.0  Critical" in text


def test_estimates_stand_beside_what_is_measured(call):
    found = document(call("patch", *PAIR, "--method", "attribution", "--by", "head", "--run", "small", "--json", "-"))
    cells, checked = found["result"]["estimate"], found["result"]["checked"]
    assert len(checked["cells"]) == 4
    layer, head = checked["cells"][0]
    assert checked["estimate"][0][0] == pytest.approx(cells[layer][head])
    measured = document(call("patch", *PAIR, "--by", "head", "--run", "small", "--csv", "cells.csv", "--json", "-"))
    with open("cells.csv", encoding="utf-8") as file:
        patched = {(int(row["layer"]), int(row["head"])): float(row["patched"]) for row in csv.DictReader(file)}
    ends = [forward_metric(call, text) for text in ("abcab", "abdab")]
    assert checked["exact"][0][0] == pytest.approx(patched[layer, head] - ends[1], abs=1e-4)
    assert measured["result"]["recovery"][layer][head] == pytest.approx(
        (patched[layer, head] - ends[1]) / (ends[0] - ends[1]), abs=1e-3
    )
    text = call("patch", *PAIR, "--method", "edges", "--steps", "0", "--run", "small")
    assert "the gradient at the corrupted prompt" in text
    assert "logits" in text


def forward_metric(call, text):
    """logit[c] - logit[foil] of the small run, the foil being the corrupted prompt's answer."""
    model = checkpoint.load_model("small")
    logits = lambda text: forward(model.params, model.config, torch.tensor([BYTE.encode(text)]))[0][0, -1]
    other = logits("abdab").clone()
    other[ord("c")] = -torch.inf
    return (logits(text)[ord("c")] - logits(text)[other.argmax()]).item()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["patch", "--clean", "a", "--run", "hand"], "clean: expected --clean, --corrupted and --target, or --demo"),
        (["patch", "--demo", *PAIR], "clean: expected --clean, --corrupted and --target, or --demo"),
        (["patch", *PAIR, "--foil", "c"], "foil: expected another token than the target, got c twice"),
        (["patch", *PAIR, "--method", "edges", "--direction", "noise"], "direction: expected denoise for --method"),
        (["attribute", "--text", "ab", "--position", "2", "--run", "hand"], "position: expected -2 to 1 in this text"),
        (["attribute", "--text", "ab", "--target", "c", "--foil", "c", "--run", "hand"], "foil: expected another"),
        (["steer", *STEER, "--positive", "c", "--negative", "b", "--run", "hand"], "positive: .* got no direction"),
        (["patch", "--demo", "--by", "head", "--site", "mlp.out", "--run", "hand"], "site: .* for --by head, got mlp"),
        (["logit-lens", "--text", "ab", "--target", "", "--run", "hand"], "target: expected a text"),
        (["steer", *STEER, "--layer", "7", "--run", "hand"], "layer: expected 0 to 1, got 7"),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_refused(call, argv, message):
    with pytest.raises(ValueError, match=message):
        call(*argv)


# ---------------------------------------------------------------------------------------------- attribution, steering


@pytest.mark.parametrize("by", ["component", "head", "neuron"])
def test_the_parts_sum_to_the_logit(call, by):
    found = document(call("attribute", "--text", "a cat sat", "--run", "small", "--by", by, "--json", "-"))["result"]
    model = checkpoint.load_model("small")
    logits = forward(model.params, model.config, torch.tensor([BYTE.encode("a cat sat")]))[0][0, -1]
    assert found["target"] == logits.argmax()
    assert sum(found["parts"].values()) == pytest.approx(found["logit"], abs=1e-4)
    assert 4 * torch.tanh(torch.tensor(found["logit"] / 4)) == pytest.approx(logits.max().item(), abs=1e-4)
    assert len(found["parts"]) == {"component": 6, "head": 8, "neuron": 2 * 64 + 2 + 6}[by]


def test_the_induction_head_writes_the_answer(call):
    text = call("attribute", "--text", "abcab", "--run", "hand", "--by", "head", "--top-k", "1")
    lines = [line.split() for line in text.splitlines()]
    (head,) = [line for line in lines if line[:1] == ["L1H0"]]
    (total,) = [line for line in lines if line[:3] == ["sum", "=", "logit"]]
    assert head[-1] == total[-1]
    assert text.splitlines()[0] == "logit of c after b (position 4)"
    csv_text = call("attribute", "--text", "abcab", "--run", "hand", "--by", "head", "--csv", "-")
    rows = {row["part"]: float(row["value"]) for row in csv.DictReader(io.StringIO(csv_text))}
    assert rows["L1H0"] > 1
    assert rows["L1H1"] == 0
    capped = call("attribute", "--text", "abcab", "--run", "small")
    assert "Direct effects, before the cap of 4:" in capped


@pytest.mark.parametrize(
    ("text", "position", "said"),
    [
        ("a cat", "1", "logit of s after · (position 1)"),
        ("a cat ", "-1", "logit of · after t (position 4)"),
        ("a cat", "2", "logit of · after c (position 2)"),
    ],
)
def test_a_target_follows_the_token_that_is_read(call, text, position, said):
    """After a space of its own nothing stands between them; at the text's end the space goes to the target.

    Seen to fail with the space after which was read counted as the target's.
    """
    shown = call("attribute", "--text", text, "--position", position, "--target", "s", "--run", "small")
    assert said in shown


@pytest.mark.parametrize("positions", ["all", "generated", "3:"])
def test_a_steered_text_is_the_librarys_beside_the_plain_one(call, positions):
    words = ("--prompt", "a cat", "--positive", "good", "--positive", "fine", "--negative", "bad", "--layer", "0")
    argv = (*words, "--scale", "30", "--positions", positions, "--max-new-tokens", "12", "--run", "small")
    found = document(call("steer", *argv, "--json", "-"))["result"]
    model = checkpoint.load_model("small")
    sets = [[BYTE.encode(text) for text in texts] for texts in (("good", "fine"), ("bad",))]
    vector = mean_difference(model.params, model.config, *sets, 0)
    where = slice(3, None) if positions == "3:" else positions
    for name, tap in (("plain", None), ("steered", steer(model.config, vector, 0, 30.0, where, n_prompt=5))):
        options = GenerateOptions(max_new_tokens=12, stop=(BYTE.eot,))
        steps = generate(model.params, model.config, [BYTE.encode("a cat")], options, tap=tap)
        tokens = [step.tokens[0] for step in steps if step.tokens[0] != BYTE.eot]
        assert found[name]["tokens"] == tokens
        assert found[name]["text"] == "".join(text_pieces(tokens, BYTE))
    assert found["plain"] != found["steered"]
    shown = call("steer", *argv)
    assert shown.splitlines()[1].startswith("plain    a cat")
    assert shown.splitlines()[2].startswith("steered  a cat")


def test_wrong_words_leave_with_status_2(home):
    done = typed("interpret.steer", *STEER, "--positions", "x", cwd=home)
    assert done.status == 2
    assert "expected all, prompt, generated or a slice such as 4:, got 'x'" in done.stderr


def test_patching_writes_a_page(call, home):
    call("patch", *PAIR, "--html", "patch.html")
    page = (home / "patch.html").read_text(encoding="utf-8")
    data = json.loads(page.split('<script type="application/json"')[1].split(">", 1)[1].split("</script>")[0])
    (panel,) = [panel for panel in data["panels"] if panel["kind"] == "patching"]
    assert (panel["data"]["target"], panel["data"]["foil"]) == ("c", "d")
    assert [(row[0], row[1], row[-1]) for row in panel["data"]["table"][1:]] == [
        ("0", "0 %", "Minimal"),
        ("1", "100 %", "Critical"),
    ]
