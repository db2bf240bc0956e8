"""Calibration: of the times a model says 70 %, is it right in 70 %?

What you learn here: a forecast can be sharp and wrong. Forecasts of equal confidence are put into bins, and what was
said is held against what came true; the mean gap is the expected calibration error (Guo et al. 2017,
arXiv:1706.04599). The Brier score (Brier 1950) asks for both at once, being sharp and being honest.
Axes: n forecasts, N documents that they come from, M bins, V vocabulary.
Next: comparison.py puts two models side by side.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from gptcore import stats
from gptcore.evaluate.perplexity import MIN_UNITS, likelihood
from gptcore.stats import Interval

BINS = 15


class Certainty(NamedTuple):
    """What calibration needs of a target: a measure for score_tokens."""

    nats: Tensor  # (n,)
    correct: Tensor  # (n,) bool: the target is the most likely token
    confidence: Tensor  # (n,) the probability of the most likely token
    brier: Tensor  # (n,) squared distance of all probabilities from what came, 0 to 2


class Curve(NamedTuple):
    """A reliability curve, one entry a bin that is not empty: what was said, what came true and its Wilson interval."""

    n: Tensor  # (M,) forecasts
    confidence: Tensor  # (M,) their mean
    accuracy: Tensor  # (M,)
    low: Tensor
    high: Tensor


class Calibration(NamedTuple):
    """How honest the confidences are. Bounds are nan where there are too few documents to say."""

    ece: Interval  # bins of equal width
    ece_equal_count: Interval  # bins of equal count: steadier where most confidences are alike
    brier: Interval
    curve: Curve


def certainty(logits, targets) -> Certainty:
    """logits (n,V) in float32, targets (n,) -> Certainty."""
    p = logits.softmax(-1)
    at_target = p.gather(-1, targets[:, None])[:, 0]
    return Certainty(*likelihood(logits, targets), p.amax(-1), 1 - 2 * at_target + p.square().sum(-1))


def calibration(confidence, correct, brier, sizes, *, generator, draws=1000) -> Calibration:
    """Calibration of n forecasts (each (n,)) that come in N documents of `sizes` (N,) forecasts, in order.

    Intervals are percentile bootstraps over documents, because the forecasts within one go together. Resampling adds
    noise to every bin, and the error counts noise of either sign: its interval leans upwards, and more so for few
    forecasts. Multiple choice: sizes of 1.
    """
    documents = torch.repeat_interleave(torch.arange(len(sizes)), torch.as_tensor(sizes))
    gaps = confidence.double() - correct.double()
    tables = []
    for bins in (equal_width(confidence), equal_count(confidence)):
        table = torch.zeros(len(sizes), BINS, dtype=torch.float64)
        tables.append(table.index_put_((documents, bins), gaps, accumulate=True))
    score = torch.zeros(len(sizes), 1, dtype=torch.float64).index_add_(0, documents, brier.double()[:, None])
    units = torch.cat([*tables, score, torch.as_tensor(sizes)[:, None]], dim=1)  # (N, 2M + 2)
    errors = lambda sums: (
        torch.stack([sums[..., :BINS].abs().sum(-1), sums[..., BINS : 2 * BINS].abs().sum(-1), sums[..., -2]], dim=-1)
        / sums[..., -1:]
    )
    value, low, high = errors(units.sum(0)), *torch.full((2, 3), torch.nan).double()
    if len(units) >= MIN_UNITS:
        low, high = stats.percentiles(errors(stats.bootstrap_sums(units, draws=draws, generator=generator)))
    return Calibration(*map(Interval, value.tolist(), low.tolist(), high.tolist()), reliability(confidence, correct))


def equal_width(confidence) -> Tensor:
    """The bin of each confidence, (n,) -> (n,): min(floor(15 c), 14)."""
    return (confidence * BINS).long().clamp(max=BINS - 1)


def equal_count(confidence) -> Tensor:
    """The bin of each confidence when each of 15 bins gets as many, equal ones staying together: (n,) -> (n,)."""
    ranked = confidence.sort().values
    edges = ranked[(torch.arange(1, BINS) * len(ranked)) // BINS]
    return torch.searchsorted(edges, confidence, right=True)


def reliability(confidence, correct) -> Curve:
    """The curve over bins of equal width; confidence (n,) and correct (n,) -> Curve."""
    bins = equal_width(confidence)
    sums = lambda values: torch.zeros(BINS, dtype=torch.float64).index_add_(0, bins, values.double())
    n, said, true = sums(torch.ones_like(confidence)), sums(confidence), sums(correct)
    n, said, true = (column[n > 0] for column in (n, said, true))
    bounds = [stats.wilson(int(k), int(size)) for k, size in zip(true.tolist(), n.tolist(), strict=True)]
    low, high = torch.tensor([[bound.low, bound.high] for bound in bounds], dtype=torch.float64).reshape(-1, 2).T
    return Curve(n.long(), said / n, true / n, low, high)
