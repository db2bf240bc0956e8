"""Multiple choice and last words: cutting into ids, sharing contexts, the four ways of being right."""

import json
import math

import pytest
import torch
from cases import CONFIGS, TINY, random_params
from hypothesis import given, settings
from hypothesis import strategies as st

from gptcore import tokenizer as tokenizers
from gptcore import tree
from gptcore.config import architecture
from gptcore.evaluate.choice import (
    ChoiceScores,
    Item,
    continuations,
    encode_pairs,
    hellaswag_text,
    last_words,
    multiple_choice,
    read_items,
    read_words,
)
from gptcore.model import forward

BYTE = tokenizers.named("byte")
CONFIG = architecture("llama", **TINY | {"n_vocab": BYTE.n_vocab})
PARAMS = random_params(CONFIG)


def ids(*lengths, seed=0):
    """Lists of so many random ids."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(61, (n,), generator=generator).tolist() for n in lengths]


def brute_force(params, config, context, ending):
    """log p of the ending from one plain forward over all but the last id, and whether greedy decoding writes it."""
    kept = torch.tensor([*context, *ending])[-config.n_context - 1 :]
    logits, _ = forward(params, config, kept[None, :-1])
    log_p = logits[0, -len(ending) :].log_softmax(-1)
    target = kept[-len(ending) :]
    return log_p.gather(1, target[:, None]).sum().item(), torch.equal(log_p.argmax(-1), target)


def requests():
    """Contexts of 1 to 50 ids where 40 fit, shared and not, with 1 to 40 ids after them, some of them equal."""
    contexts, endings = ids(1, 5, 17, 30, 38, 50), ids(1, 1, 2, 3, 9, 12, 40, seed=1)
    pairs = [(context, ending) for context in contexts for ending in endings]
    return [*pairs, (contexts[2], endings[4]), (contexts[1] + [7], endings[0])]


@pytest.mark.parametrize("name", ["gpt2", "alibi", "gqa", "padded", "window"])
@pytest.mark.parametrize("share", [True, False])
def test_continuations_are_what_a_plain_forward_says(name, share):
    """Whatever is grouped, padded and cut. Seen to fail without cutting the padded contexts to their lengths."""
    config, params = CONFIGS[name], random_params(CONFIGS[name])
    for batch_tokens in (1, 150, 10_000):
        answers = continuations(params, config, requests(), batch_tokens=batch_tokens, share=share)
        wanted = [brute_force(params, config, *pair) for pair in requests()]
        log_p = torch.tensor([value for value, _ in wanted], dtype=torch.float64)
        torch.testing.assert_close(answers.log_p, log_p, rtol=0, atol=1e-9)
        assert answers.greedy.tolist() == [greedy for _, greedy in wanted]


def test_greedy_endings_are_found():
    """The ending that greedy decoding writes is greedy, and no longer so once its last id is another."""
    context, ending = ids(6)[0], []
    for _ in range(4):
        logits, _ = forward(PARAMS, CONFIG, torch.tensor([context + ending]))
        ending.append(logits[0, -1].argmax().item())
    other = [*ending[:-1], (ending[-1] + 1) % 60]
    assert continuations(PARAMS, CONFIG, [(context, ending), (context, other)]).greedy.tolist() == [True, False]


def test_a_shared_context_is_fed_once():
    """C + sum (E_i - 1) ids instead of K C + sum (E_i - 1): the last id of a continuation is never fed."""
    context, endings = ids(20)[0], ids(3, 5, 1, 9)
    pairs = [(context, ending) for ending in endings]
    assert continuations(PARAMS, CONFIG, pairs).n_fed == 20 + 2 + 4 + 0 + 8
    assert continuations(PARAMS, CONFIG, pairs, share=False).n_fed == 4 * 20 + 2 + 4 + 0 + 8


def test_shared_equals_unshared_in_float32():
    params = random_params(CONFIG, torch.float32)
    ways = [continuations(params, CONFIG, requests(), share=share).log_p for share in (True, False)]
    torch.testing.assert_close(*ways, rtol=1e-5, atol=1e-5)


def test_no_requests_no_answers():
    answers = continuations(PARAMS, CONFIG, [])
    assert answers.log_p.shape == answers.greedy.shape == (0,)


@pytest.mark.parametrize(("context", "ending"), [([], [1]), ([1], []), ([1], [1] * 41)])
def test_requests_that_do_not_fit_are_refused(context, ending):
    with pytest.raises(ValueError, match=r"request 1: expected a context and 1..n_context=40 ids after it, got \d+"):
        continuations(PARAMS, CONFIG, [([1], [2]), (context, ending)])


def test_no_questions_are_refused():
    with pytest.raises(ValueError, match="items: expected at least one question, got none"):
        multiple_choice(PARAMS, CONFIG, BYTE, [])


# ------------------------------------------------------------------------------------------------------ text and ids


def test_spaces_move_to_the_ending_and_nothing_is_read_after_the_end_of_text():
    pairs = [("ab", "cd"), ("ab \n", "cd"), ("", "cd"), ("  ", "cd")]
    end = BYTE.eot
    wanted = [([*b"ab"], [*b"cd"]), ([*b"ab"], [*b" \ncd"]), ([end], [*b"cd"]), ([end], [*b"  cd"])]
    assert encode_pairs(BYTE, pairs) == wanted


@settings(max_examples=50, deadline=None)
@given(st.text(max_size=20), st.text(min_size=1, max_size=20))
def test_context_and_ending_are_the_whole_text(context, ending):
    """With a token a byte nothing merges across the border, so the two parts spell the text."""
    [(before, after)] = encode_pairs(BYTE, [(context, ending)])
    assert BYTE.decode([*before, *after]) == BYTE.decode(BYTE.encode(context + ending))


def test_an_ending_without_tokens_is_refused():
    with pytest.raises(ValueError, match="ending: expected at least one token beyond its context, got none for ''"):
        encode_pairs(BYTE, [("ab", "")])


def test_reading_items():
    lines = [
        json.dumps({"ctx": "Two and two", "endings": ["is four", "is five"], "label": 0}),
        "",
        json.dumps(
            {
                "activity_label": "Cooking", "ctx_a": "He stirs. [header] Now", "ctx_b": "the man",
                "ctx": "unused", "endings": ["eats [substeps] it.", "runs  off [title] Fast"], "label": "1",
            }
        ),
    ]  # fmt: skip
    plain, hellaswag = read_items(lines)
    assert plain == Item("Two and two", (" is four", " is five"), 0)
    assert hellaswag == Item("Cooking: He stirs. Now The man", (" eats it.", " runs off. Fast"), 1)
    assert hellaswag_text(" a [title] b [x]c  d ") == "a. b c d"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: expected JSON, got {"),
        ("[1]", "line 2: expected a JSON object"),
        ('{"ctx": "a", "endings": ["b", 3], "label": 0}', "line 2: expected .*endings"),
        ('{"endings": ["b"], "label": 0}', "line 2: expected .*ctx"),
        ('{"activity_label": "a", "ctx_a": "b", "ctx_b": 3, "endings": ["c"], "label": 0}', "line 2: expected .*ctx"),
        ('{"ctx": "a", "endings": ["b"], "label": 1}', "line 2: expected a label in 0..0, got 1"),
        ('{"ctx": "a", "endings": ["b"], "label": -1}', "line 2: expected a label in 0..0, got -1"),
        ('{"ctx": "a", "endings": ["b"]}', "line 2: expected a label in 0..0, got None"),
    ],
)
def test_items_that_are_none(line, message):
    good = '{"ctx": "a", "endings": ["b"], "label": 0}'
    with pytest.raises(ValueError, match=message):
        read_items([good, line])


def test_reading_words():
    assert read_words(['{"text": "she said hello"}']) == [("she said", " hello")]
    with pytest.raises(ValueError, match=r'line 1: expected {"text": two words or more}, got {"text": "one"}'):
        read_words(['{"text": "one"}'])


def test_last_words():
    """Where every token is as likely, greedy decoding writes id 0, and a word of two tokens is one in V squared."""
    flat = tree.map(torch.zeros_like, PARAMS)
    answers = last_words(flat, CONFIG, BYTE, [("one", "\0\0"), ("one", " x"), ("one two", "\0y"), ("", "ab")])
    assert answers.greedy.tolist() == [True, False, False, False]
    assert answers.accuracy == 1 / 4
    assert answers.perplexity == pytest.approx(BYTE.n_vocab**2, rel=1e-6)


# ------------------------------------------------------------------------------------------------------------- right


def test_four_ways_of_being_right():
    """Two items by hand, worked out below; the second has one ending fewer and a tie, which goes to the first."""
    scores = ChoiceScores(
        log_p=torch.tensor([[-4.0, -6.0, -5.0], [-2.0, -2.0, -math.inf]]),
        alone=torch.tensor([[-5.0, -12.0, -6.0], [-1.0, -3.0, -math.inf]]),
        n_chars=torch.tensor([[2, 4, 2], [1, 2, 1]]),
        n_bytes=torch.tensor([[2, 4, 4], [2, 2, 1]]),
        label=torch.tensor([1, 0]),
    )
    # a character: -2, -1.5, -2.5 and -2, -1; a byte: -2, -1.5, -1.25 and -1, -1; gained: 1, 6, 1 and -1, 1
    found = {name: correct.tolist() for name, correct in scores.correct().items()}
    assert found == {
        "acc": [False, True],
        "acc_norm": [True, False],
        "acc_bytes": [False, True],
        "acc_mutual_info": [True, False],
    }


def test_choice_brier():
    """p = (0.7, 0.2, 0.1) and the first is right: 0.09 + 0.04 + 0.01; an ending that is not there costs nothing."""
    log_p = torch.tensor([[0.7, 0.2, 0.1, 0.0]]).log()
    ones = torch.ones(1, 4)
    scores = ChoiceScores(log_p, log_p, ones, ones, torch.tensor([0]))
    assert scores.brier().item() == pytest.approx(0.14)
    assert scores.confidence().item() == pytest.approx(0.7)


def test_multiple_choice_from_text():
    items = [Item("ab", (" cd", " é", " f"), 1), Item("", (" cd", " f"), 0)]
    scores = multiple_choice(PARAMS, CONFIG, BYTE, items)
    assert scores.n_chars.tolist() == [[2, 1, 1], [2, 1, 1]]
    assert scores.n_bytes.tolist() == [[2, 2, 1], [2, 1, 1]]
    wanted, _ = brute_force(PARAMS, CONFIG, [*b"ab"], [*" é".encode()])
    alone, _ = brute_force(PARAMS, CONFIG, [BYTE.eot], [*" é".encode()])
    assert scores.log_p[0, 1].item() == pytest.approx(wanted, rel=1e-9)
    assert scores.alone[0, 1].item() == pytest.approx(alone, rel=1e-9)
    assert torch.equal(scores.log_p[1, :2], scores.alone[1, :2])
    assert scores.log_p[1, 2] == -math.inf
