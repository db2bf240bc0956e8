"""How sure are we? Bootstrap intervals of ratios, paired differences, exact tests, and how little we could have seen.

What you learn here: the units of an experiment are documents or sequences, never tokens, because the tokens of one text
go up and down together; two models on the same texts are compared text by text, which removes most of the noise.
Axes: N units, M quantities measured on each, D draws.
Next: evaluate/ and interpret/ put these intervals beside every number.
"""

import math
from statistics import NormalDist
from typing import NamedTuple

import torch
from torch import Tensor

CHUNK = 2**22  # picks at once: 32 MB


class Interval(NamedTuple):
    """An estimate and the bounds of its confidence interval: tensors (...), or floats."""

    value: Tensor | float
    low: Tensor | float
    high: Tensor | float


class Paired(NamedTuple):
    """A difference, its interval, the p-value of no difference, and its standard error, each float64 (...)."""

    value: Tensor
    low: Tensor
    high: Tensor
    p: Tensor
    error: Tensor


def bootstrap_sums(units, *, draws, generator) -> Tensor:
    """Sums over N units drawn with replacement: units (N, ...) -> (D, ...) float64, on the CPU.

    Any statistic of sums follows, each with its interval. Columns of one call share their draws, so that they may be
    compared. From how many units on an interval means something is the caller's to say.  Efron 1979.
    """
    units = torch.as_tensor(units, dtype=torch.float64, device="cpu")
    if units.ndim == 0 or not len(units):
        raise ValueError(f"units: expected at least one unit, got shape {tuple(units.shape)}")
    n, rows, sums = len(units), max(1, CHUNK // len(units)), []
    one = torch.ones((), dtype=torch.float64)
    for start in range(0, draws, rows):
        picked = torch.randint(n, (min(rows, draws - start), n), generator=generator)
        counts = torch.zeros(picked.shape, dtype=torch.float64).scatter_add_(1, picked, one.expand(picked.shape))
        sums.append(counts @ units.reshape(n, -1))
    return torch.cat(sums).reshape(draws, *units.shape[1:])


def percentiles(drawn, level=0.95) -> tuple[Tensor, Tensor]:
    """The bounds between which the middle share of the draws (D, ...) lies; draws without a value do not count."""
    tails = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=drawn.dtype)
    low, high = drawn.nanquantile(tails, dim=0)
    return low, high


def ratio_interval(numerators, denominators, *, generator, draws=1000, level=0.95, least=1) -> Interval:
    """Sum of numerators over sum of denominators, each (N, ...), with a percentile bootstrap over the N units.

    Nats over tokens, nats over bytes, hits over rows: long units weigh more, as they should. The bounds are nan where
    fewer than `least` units have a denominator: the others say nothing, however many they are.
    """
    top, bottom = _pair(numerators, denominators)
    value, few = top.sum(0) / bottom.sum(0), (bottom != 0).sum(0) < least
    if few.all():
        return Interval(value, torch.full_like(value, torch.nan), torch.full_like(value, torch.nan))
    drawn = bootstrap_sums(torch.stack([top, bottom], dim=1), draws=draws, generator=generator)
    low, high = percentiles(drawn[:, 0] / drawn[:, 1], level)
    return Interval(value, low.masked_fill(few, torch.nan), high.masked_fill(few, torch.nan))


def paired_difference(differences, denominators, *, generator, draws=2000, level=0.95) -> Paired:
    """Sum of differences (N, ...) over sum of denominators, between two models on the same units.

    p is twice the share of draws on the smaller side of 0, and never 0: draws can show no less than 1 / draws. Without
    any difference it is 1.
    """
    top, bottom = _pair(differences, denominators)
    drawn = bootstrap_sums(torch.stack([top, bottom], dim=1), draws=draws, generator=generator)
    drawn = drawn[:, 0] / drawn[:, 1]
    side = torch.minimum((~(drawn > 0)).sum(0), (~(drawn < 0)).sum(0))  # a draw without a value speaks for neither
    p = ((2 * side.double() + 1) / draws).clamp(max=1.0)
    return Paired(top.sum(0) / bottom.sum(0), *percentiles(drawn, level), p, drawn.std(0))


def detectable(error, *, level=0.95, power=0.8):
    """The smallest true difference that would be found with this power: 2.8016 standard errors at the defaults."""
    return (NormalDist().inv_cdf((1 + level) / 2) + NormalDist().inv_cdf(power)) * error


def mcnemar(only_first, only_second) -> float:
    """Two-sided exact p-value from the numbers of items that only one of two models got right.  McNemar 1947."""
    n, ways, total = only_first + only_second, 1, 0
    for i in range(min(only_first, only_second) + 1):
        total += ways
        ways = ways * (n - i) // (i + 1)  # from n over i to n over i + 1
    return min(1.0, 2 * total / 2**n)


def holm(p_values) -> list[float]:
    """The p-values of one family, adjusted for being several, in the given order.  Holm 1979."""
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def wilson(successes, n, *, level=0.95) -> Interval:
    """A share and its score interval, which stays inside [0, 1] and is honest at 0 and n.  Wilson 1927."""
    if not 0 <= successes <= n or n == 0:
        raise ValueError(f"successes: expected from 0 to n of at least 1, got {successes} of {n}")
    z, share = NormalDist().inv_cdf((1 + level) / 2), successes / n
    middle, scale = share + z * z / (2 * n), 1 + z * z / n
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return Interval(share, max(0.0, (middle - half) / scale), min(1.0, (middle + half) / scale))


def _pair(top, bottom):
    top = torch.as_tensor(top, dtype=torch.float64, device="cpu")
    bottom = torch.as_tensor(bottom, dtype=torch.float64, device="cpu")
    if len(top) != len(bottom):
        raise ValueError(f"denominators: expected one for each of {len(top)} units, got {len(bottom)}")
    bottom = bottom.reshape(bottom.shape + (1,) * (top.ndim - bottom.ndim))
    return top, bottom.expand_as(top)
