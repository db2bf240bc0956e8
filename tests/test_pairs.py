"""Metrics, recovery and the texts that are compared: by hand, and with a tokenizer that joins letters."""

import math

import pytest
import torch

from gptcore import generator, tokenizer
from gptcore.interpret.pairs import (
    align_ends,
    band,
    continuation,
    differs,
    foil_of,
    kl,
    logit,
    logit_diff,
    logprob,
    logprob_of,
    nll,
    pooled,
    prob,
    recovery,
)

LOGITS = torch.tensor([[0.0, math.log(2.0), math.log(5.0)], [0.0, 0.0, math.log(2.0)]], dtype=torch.float64)
WORDS = "Nora met Felix in Paris. Paris is in France. Felix is in Paris, and Nora is in Paris. Felix waved to Nora. "


@pytest.fixture(scope="module")
def bpe():
    return tokenizer.train_bpe([WORDS * 20 + "Montparnasse"], 290)


def close(got, wanted, atol=1e-12):
    torch.testing.assert_close(got, torch.as_tensor(wanted, dtype=got.dtype), rtol=0, atol=atol, equal_nan=True)


def test_metrics_are_their_formulas():
    """Probabilities 1/8 2/8 5/8 and 1/4 1/4 2/4."""
    target = torch.tensor([2, 1])
    close(logit(target)(LOGITS), [math.log(5), 0])
    close(logit_diff(target, 0)(LOGITS), [math.log(5), 0])
    close(prob(target)(LOGITS), [5 / 8, 1 / 4])
    close(logprob(target)(LOGITS), [math.log(5 / 8), math.log(1 / 4)])
    close(nll(2)(LOGITS), [-math.log(5 / 8), -math.log(1 / 2)])
    close(kl(LOGITS)(LOGITS), [0, 0])
    close(kl(LOGITS)(LOGITS.flip(0))[1], 1 / 4 * math.log(2) + 1 / 2 * math.log(4 / 5))
    close(logprob_of(torch.tensor([[2, 1]]))(LOGITS[None]), [math.log(5 / 8 / 4)])
    stacked = torch.stack([LOGITS, LOGITS.flip(1)])
    for metric in (logit_diff(target, 0), prob(target), kl(LOGITS)):
        close(metric(stacked)[1], metric(stacked[1]))
    many = torch.stack([LOGITS, LOGITS.flip(1)])[:, None]
    assert logprob_of(torch.tensor([[2, 1]]))(many).shape == (2, 1)


def test_recovery_is_the_share_of_the_way_and_never_clipped():
    clean, corrupt = torch.tensor([3.0, 3.0, 1.0]), torch.tensor([1.0, -1.0, 1.0])
    patched = torch.tensor([[1.0, -1.0, 1.0], [3.0, 4.0, 2.0], [0.0, 3.0, 1.0]])
    close(recovery(patched, clean, corrupt), [[0, 0, math.nan], [1, 1.25, math.nan], [-0.5, 1, math.nan]])
    close(recovery(patched, clean, corrupt, "noise")[1], [0, -0.25, math.nan])
    with pytest.raises(ValueError, match="direction: expected one of denoise, noise"):
        recovery(patched, clean, corrupt, "back")


@pytest.mark.parametrize(("clean", "defined"), [(1.0, False), (1.0019, False), (1.0021, True), (-1.0, True)])
def test_a_difference_of_a_thousandth_is_none(clean, defined):
    assert differs(torch.tensor(clean), torch.tensor(1.0)) == defined


def test_pairs_are_pooled_by_their_sums():
    """(1 + 3) / (2 + 10); the third pair has nothing to recover, the last no counterpart in the second cell."""
    clean, corrupt = torch.tensor([2.0, 10.0, 1.0, 5.0]), torch.tensor([0.0, 0.0, 1.0, 4.0])
    patched = torch.tensor([[1.0, 3.0, 1.0, 4.0], [2.0, 5.0, 1.0, math.nan]])
    found = pooled(patched, clean, corrupt, generator=generator(0))
    close(found.value, [4 / 13, 7 / 12])
    assert found.low.isnan().all()  # below 5 pairs there is no interval
    many = pooled(patched.repeat(1, 3), clean.repeat(3), corrupt.repeat(3), generator=generator(0))
    close(many.value, found.value)
    assert (many.low < many.value).all()
    assert (many.value < many.high).all()
    eight = pooled(patched.repeat(1, 2), clean.repeat(2), corrupt.repeat(2), generator=generator(0))
    assert eight.low.isnan().tolist() == [False, True]  # six of the eight have a difference, in the second cell four
    none = pooled(clean[None], clean, clean, generator=generator(0))
    assert none.value.isnan().all()


@pytest.mark.parametrize(
    ("words", "value", "ends"),
    [
        ("Critical", 0.71, ()), ("Important", 0.7, ()), ("Important", 0.41, ()), ("Moderate", 0.4, ()),
        ("Moderate", 0.21, ()), ("Minimal", 0.2, ()), ("Minimal", -3.0, ()), ("Critical", 1.3, ()),
        ("", math.nan, ()), ("Moderate to Critical", 0.5, (0.3, 0.8)), ("Important", 0.5, (0.45, 0.6)),
        ("Important", 0.5, (math.nan, math.nan)),
    ],
)  # fmt: skip
def test_bands_have_strict_bounds_and_an_interval_names_both(words, value, ends):
    assert band(value, *ends) == words


def test_a_target_gets_the_space_it_needs(bpe):
    """With and without the space the same id; a line says which space was put."""
    (first,), notes = continuation(bpe, "Nora is in", "Paris")[1:]
    assert bpe.decode([first]) == " Paris"
    assert notes == ("a space was put before the target: ' Paris'",)
    again = continuation(bpe, "Nora is in", " Paris")
    assert (again.ids, again.notes) == ([first], ())
    moved = continuation(bpe, "Nora is in ", "Paris")
    assert (moved.prompt, moved.ids, moved.notes) == ("Nora is in", [first], ())
    exact = continuation(bpe, "Nora is in", "x", exact=True)
    assert bpe.decode(exact.ids) == "x"


def test_of_several_tokens_the_first_is_measured_and_named(bpe):
    found = continuation(bpe, "Nora is in", " zzz")
    assert len(found.ids) > 1
    assert found.notes[-1].startswith(f"the target is {len(found.ids)} tokens (' ")
    assert found.notes[-1].endswith("; the first is what is measured")


def test_a_target_that_grows_into_the_prompt_is_refused(bpe):
    with pytest.raises(ValueError, match=r"target: expected the prompt's tokens \[.*\] to go on, got \[.*' Paris'\]"):
        continuation(bpe, "Nora is in Par", "is", exact=True)
    with pytest.raises(ValueError, match="target: expected a text that continues the prompt, got ' '"):
        continuation(bpe, "Nora", " ")


def test_the_foil_is_the_likeliest_other_token():
    assert foil_of(torch.tensor([1.0, 5.0, 3.0]), 1) == 2
    assert foil_of(torch.tensor([1.0, 5.0, 3.0]), 2) == 1


@pytest.mark.parametrize(
    ("clean", "corrupt", "pairs"),
    [
        ("abcd", "abxd", [(0, 0), (1, 1), (2, 2), (3, 3)]),
        ("abcde", "abxxde", [(0, 0), (1, 1), (3, 4), (4, 5)]),
        ("abc", "abx12", [(0, 0), (1, 1), (2, 4)]),
        ("ab", "abab", [(0, 0), (1, 3)]),
        ("a", "ba", [(0, 1)]),
        ("aaa", "aa", [(0, 0), (2, 1)]),
    ],
)
def test_ends_stand_for_each_other(clean, corrupt, pairs):
    assert align_ends(clean, corrupt) == pairs
    assert align_ends(corrupt, clean) == [(b, a) for a, b in pairs]
