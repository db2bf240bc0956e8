"""Which model is better, and can one tell?

What you learn here: two models are compared text by text, because a text that is hard for one is hard for the other,
and the difference is far less noisy than either score. Bits per byte of the original text, so that tokenizers may
differ. Asking several questions at once makes a lucky answer likely, so the p-values pay for it (Holm 1979); and where
no difference was shown, the smallest that would have been is named.
Axes: N documents or items.
"""

import math
from typing import NamedTuple

import torch

from gptcore import stats
from gptcore.evaluate.perplexity import MIN_UNITS, Scores
from gptcore.stats import Interval, Paired

MARGIN = 0.005  # bits per byte that do not matter
CLOSE = 1.05  # times the best perplexity: very good, if not the best


class Model(NamedTuple):
    """A model's scores on some documents."""

    name: str
    scores: Scores
    texts: tuple[str, ...]  # the sha256 of each document's text
    tokenizer: str  # its fingerprint: perplexities compare only where it is the same


class Comparison(NamedTuple):
    """Model `second` against `first` on the same documents, in bits per byte: below 0, the second is better."""

    first: str
    second: str
    word: str  # better, worse, equivalent within ..., tied ..., too few documents, not comparable
    difference: Paired | None  # p is not adjusted; None where nothing can be said
    p: float  # adjusted for the other comparisons of the family
    detectable: float  # bits per byte, the smallest true difference found four times in five


class Place(NamedTuple):
    """A place in a ranking, best first."""

    model: Model
    star: bool  # the best, and better than the next by more than chance
    very_good: bool  # perplexity within 5 % of the best, the best included; False where tokenizers differ
    to_best: Comparison | None  # None for the best


class Answered(NamedTuple):
    """Two models on the same N questions."""

    only_first: int  # questions that only this one got right
    only_second: int
    difference: Interval  # accuracy of the second less that of the first; no bounds below 10 questions
    p: float  # McNemar's, exact
    detectable: float  # the smallest true difference found four times in five; 0 where no answer differs


def mismatch(first, second) -> str:
    """What differs between the documents of two models, the first thing; "" where they are the same texts."""
    if len(first.texts) != len(second.texts):
        return f"{first.name} has {len(first.texts)} documents, {second.name} {len(second.texts)}"
    for index, (a, b) in enumerate(zip(first.texts, second.texts, strict=True)):
        if a != b:
            return f"document {index} is another text for {first.name} ({a[:8]}) than for {second.name} ({b[:8]})"
    return ""


def compare(pairs, *, generator, margin=MARGIN, draws=2000) -> list[Comparison]:
    """Compare each (first, second) pair of Models; the pairs are one family, so their p-values pay for each other.

    The difference is sum(nats of second - first) / (ln 2 sum bytes) with a paired bootstrap over documents. The word
    is the first that holds of: not comparable, too few documents (below 10), better or worse (the interval excludes 0
    and p < 0.05), equivalent within the margin (the interval is inside), tied. There are at least 40 draws a pair.
    """
    draws = max(draws, 40 * len(pairs))  # p is no less than 1 / draws, and of many pairs none could be below 0.05
    found = [_difference(first.scores, second.scores, generator, draws) if not _why(first, second) else None
             for first, second in pairs]  # fmt: skip
    adjusted = iter(stats.holm([difference.p.item() for difference in found if difference]))
    compared = []
    for (first, second), difference in zip(pairs, found, strict=True):
        if difference is None:
            compared.append(Comparison(first.name, second.name, _why(first, second), None, math.nan, math.nan))
            continue
        p, seen = next(adjusted), float(stats.detectable(difference.error))
        word = _word(difference, p, margin, seen)
        compared.append(Comparison(first.name, second.name, word, difference, p, seen))
    return compared


def rank(models, *, generator, margin=MARGIN) -> list[Place]:
    """Models on the same documents by bits per byte, best first, each compared with the best.

    Raises ValueError for no model, and naming the first document that is not the same for all.
    """
    if not models:
        raise ValueError("models: expected at least one, got none")
    for other in models[1:]:
        if mismatch(models[0], other):
            raise ValueError(f"documents: expected the same for every model, but {mismatch(models[0], other)}")
    best, *rest = sorted(models, key=lambda model: model.scores.bits_per_byte)
    compared = compare([(best, other) for other in rest], generator=generator, margin=margin)
    same = one_tokenizer(models)
    good = [same and model.scores.perplexity <= CLOSE * best.scores.perplexity for model in (best, *rest)]
    first = Place(best, bool(compared) and compared[0].word == "worse", good[0], None)
    return [first, *(Place(m, False, g, c) for m, g, c in zip(rest, good[1:], compared, strict=True))]


def one_tokenizer(models) -> bool:
    """May their perplexities stand in one column?"""
    return len({model.tokenizer for model in models}) <= 1


def compare_items(first, second, *, generator, draws=2000) -> Answered:
    """Two models on the same questions: first and second (N,) bool, right or wrong. McNemar 1947, exact."""
    first, second = (torch.as_tensor(column, dtype=torch.bool) for column in (first, second))
    if first.shape != second.shape or not len(first):
        raise ValueError(f"items: expected the same questions, got {tuple(first.shape)} and {tuple(second.shape)}")
    only = [int((first & ~second).sum()), int((second & ~first).sum())]
    gain = second.double() - first.double()
    found = stats.paired_difference(gain, torch.ones_like(gain), generator=generator, draws=draws)
    low, high = (float(bound) if len(gain) >= MIN_UNITS else math.nan for bound in (found.low, found.high))
    seen = float(stats.detectable(found.error))
    return Answered(*only, Interval(float(found.value), low, high), stats.mcnemar(*only), seen)


def _why(first, second) -> str:
    """Why nothing can be said of a pair, "" where something can."""
    other = mismatch(first, second)
    if other:
        return f"not comparable: {other}"
    return f"too few documents ({len(first.texts)})" if len(first.texts) < MIN_UNITS else ""


def _difference(first, second, generator, draws) -> Paired:
    n_bytes = math.log(2) * first.n_bytes
    return stats.paired_difference(second.nats - first.nats, n_bytes, generator=generator, draws=draws)


def _word(difference, p, margin, seen) -> str:
    low, high = difference.low.item(), difference.high.item()
    if p < 0.05 and (low > 0 or high < 0):
        return "worse" if low > 0 else "better"
    if -margin < low and high < margin:
        return f"equivalent within ±{margin:g}"
    return f"tied (could have seen {seen:.2g})"
