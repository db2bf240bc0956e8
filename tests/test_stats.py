"""Intervals and tests: known answers, exact enumeration, and how often they are wrong."""

import itertools
import math

import pytest
import torch

from gptcore import stats
from gptcore.device import generator


def test_bootstrap_sums_are_the_sums_of_all_resamples():
    """Three units have 27 equally likely resamples; 27,000 draws, five sigma a cell, false alarm below 2e-5.
    Seen to fail with draws without replacement."""
    units = torch.tensor([1.0, 10.0, 100.0])
    exact = torch.tensor([sum(units[i] for i in picks) for picks in itertools.product(range(3), repeat=3)])
    drawn = stats.bootstrap_sums(units, draws=27_000, generator=generator("three"))
    assert drawn.shape == (27_000,)
    assert set(drawn.tolist()) == set(exact.tolist())
    for value in exact.unique():
        p = float((exact == value).double().mean())
        assert abs(int((drawn == value).sum()) - 27_000 * p) < 5 * math.sqrt(27_000 * p * (1 - p))


def test_columns_share_their_draws():
    """Many quantities at once give what each gives alone."""
    units = torch.rand(30, 2, 4, generator=generator("units"), dtype=torch.float64)
    every = stats.bootstrap_sums(units, draws=50, generator=generator("draws"))
    alone = stats.bootstrap_sums(units[:, 1, 2], draws=50, generator=generator("draws"))
    torch.testing.assert_close(every[:, 1, 2], alone, rtol=1e-14, atol=0)
    assert every.shape == (50, 2, 4)


def test_chunks_do_not_show():
    """A million units and six draws do not fit into one chunk of picks."""
    n = 2**20
    units = torch.rand(n, generator=generator("units"), dtype=torch.float64)
    picked = torch.randint(n, (6, n), generator=generator("draws"))
    drawn = stats.bootstrap_sums(units, draws=6, generator=generator("draws"))
    assert 6 * n > stats.CHUNK
    torch.testing.assert_close(drawn, units[picked].sum(1), rtol=1e-10, atol=0)


def test_the_ratio_is_weighted_by_the_units_lengths():
    """Documents of 1,000 and 10 tokens at 2 and 5 nats: the mean of the means would say 3.5."""
    interval = stats.ratio_interval([2000.0, 50.0], [1000, 10], generator=generator("r"))
    assert interval.value == pytest.approx(2050 / 1010)
    assert interval.low == pytest.approx(2.0)
    assert interval.high == pytest.approx(5.0)


def test_equal_units_have_no_width():
    interval = stats.ratio_interval(torch.full((20, 3), 6.0), torch.full((20,), 3.0), generator=generator("r"))
    assert [part.tolist() for part in interval] == [[2.0] * 3] * 3


def test_units_that_count_nothing_leave_no_gap():
    """A draw of empty documents only has no ratio, and is left out."""
    interval = stats.ratio_interval([0.0, 4.0], [0, 2], generator=generator("r"))
    assert tuple(interval) == (2.0, 2.0, 2.0)
    assert stats.paired_difference([0.0, 0.0], [0, 0], generator=generator("r")).p == 1.0


def test_an_interval_needs_units_that_count():
    """Three columns of six units, of which 6, 5 and 4 count. Seen to fail with every unit counted."""
    ones = torch.ones(6, 3)
    ones[5, 1:], ones[4, 2] = 0, 0
    found = stats.ratio_interval(torch.arange(18.0).view(6, 3), ones, generator=generator("r"), least=5)
    assert found.value.isfinite().all()
    assert found.low.isnan().tolist() == found.high.isnan().tolist() == [False, False, True]
    few = stats.ratio_interval([1.0, 2.0], [1, 1], generator=None, least=3)  # nothing is drawn
    assert (few.value, few.low.isnan()) == (1.5, True)


def simulate(n_simulations, *words, effect=0.0):
    """Models on 120 documents of 200 to 2,000 bytes: nats a byte differ by the effect, with noise a document."""
    draws = generator("simulate", *words)
    n_bytes = torch.randint(200, 2000, (120, n_simulations), generator=draws).double()
    noise = 0.03 * torch.randn(120, n_simulations, generator=draws, dtype=torch.float64)
    return (effect + noise) * n_bytes, n_bytes


def test_intervals_cover_and_false_alarms_are_as_rare_as_promised():
    """4,000 experiments without any difference. Promised: 95 % and 5 %; with 120 units a percentile bootstrap is a
    little short (about 94 % and 6 %). The bounds are five sigma (0.0037) from that: false alarm below 1e-6.
    Seen to fail with a one-sided p, and with draws of half the units."""
    difference = stats.paired_difference(*simulate(4000), generator=generator("draws"), draws=1000)
    covered = ((difference.low <= 0) & (difference.high >= 0)).double().mean()
    alarms = (difference.p < 0.05).double().mean()
    assert 0.92 <= covered <= 0.96
    assert 0.03 <= alarms <= 0.08


def test_pairing_finds_what_an_unpaired_test_cannot():
    """+0.01 nat a byte, paired noise 0.03, documents that differ by 0.25: found in most of 400 experiments."""
    differences, n_bytes = simulate(400, "power", effect=0.01)
    difference = stats.paired_difference(differences, n_bytes, generator=generator("draws"))
    level = 1 + 0.25 * torch.randn(120, 400, generator=generator("documents"), dtype=torch.float64)
    a, b = level, level + differences / n_bytes
    z = (b.mean(0) - a.mean(0)) / (a.var(0) / 120 + b.var(0) / 120).sqrt()
    assert (difference.p < 0.05).double().mean() > 0.55
    assert (z.abs() > 1.96).double().mean() < 0.05


def test_the_detectable_effect_is_found_four_times_in_five():
    """2,000 experiments at 2.8016 true standard errors: power 0.8, sigma 0.009, and the bootstrap a little eager."""
    assert stats.detectable(1.0) == pytest.approx(2.8016, abs=5e-5)
    error = stats.paired_difference(*simulate(2000), generator=generator("draws"), draws=500).error.mean().item()
    shifted = simulate(2000, effect=stats.detectable(error))
    found = stats.paired_difference(*shifted, generator=generator("draws"), draws=1000)
    assert 0.76 < (found.low > 0).double().mean() < 0.86


def test_a_model_against_itself_is_exactly_equal():
    difference = stats.paired_difference(torch.zeros(50), torch.arange(1, 51), generator=generator("same"))
    assert tuple(difference) == (0.0, 0.0, 0.0, 1.0, 0.0)


def test_a_clear_difference_has_the_smallest_p_there_is():
    difference = stats.paired_difference(torch.rand(50) + 1, torch.ones(50), generator=generator("p"), draws=2000)
    assert difference.p.item() == 1 / 2000
    assert difference.low > 1


@pytest.mark.parametrize(("b", "c", "p"), [(18, 6, 0.0227), (6, 0, 0.03125), (5, 5, 1.0), (0, 0, 1.0), (0, 6, 0.03125)])
def test_mcnemar(b, c, p):
    assert stats.mcnemar(b, c) == pytest.approx(p, abs=5e-5)


def test_mcnemar_by_enumeration():
    """A fair coin n times: the outcomes at least as uneven as the one seen."""
    for b, c in itertools.product(range(9), repeat=2):
        n = b + c
        uneven = sum(math.comb(n, i) for i in range(n + 1) if abs(2 * i - n) >= abs(b - c))
        assert stats.mcnemar(b, c) == pytest.approx(uneven / 2**n, rel=1e-12)


@pytest.mark.oracle
def test_mcnemar_equals_scipy():
    """The exact binomial test of a fair coin, for every pair of counts below 40."""
    scipy = pytest.importorskip("scipy.stats", reason="scipy is not installed; it comes with the extra [harness]")
    for b, c in itertools.product(range(40), repeat=2):
        wanted = scipy.binomtest(b, b + c).pvalue if b + c else 1.0
        assert stats.mcnemar(b, c) == pytest.approx(wanted, rel=1e-12)


def test_mcnemar_of_many_items():
    """Ten thousand items, where 2^n is far beyond a float: near the normal tail with continuity correction."""
    z = (400 - 1) / math.sqrt(10_000)
    assert stats.mcnemar(5200, 4800) == pytest.approx(math.erfc(z / math.sqrt(2)), rel=5e-3)


def test_holm():
    assert stats.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert stats.holm([0.6, 0.9]) == [1.0, 1.0]
    assert stats.holm([]) == []


def test_wilson():
    """5 of 10 as printed in Brown, Cai & DasGupta 2001: (0.237, 0.763); at 0 and n the bounds are not the estimate."""
    assert tuple(stats.wilson(5, 10)) == pytest.approx((0.5, 0.2366, 0.7634), abs=5e-5)
    assert tuple(stats.wilson(0, 10)) == pytest.approx((0.0, 0.0, 0.2775), abs=5e-5)
    assert tuple(stats.wilson(10, 10)) == pytest.approx((1.0, 0.7225, 1.0), abs=5e-5)


def test_wilson_covers():
    """Exact coverage at 40 items, averaged over shares: within a hundredth of what it promises."""
    shares, n = [i / 50 for i in range(5, 46)], 40
    bounds = [stats.wilson(k, n) for k in range(n + 1)]
    chance = lambda k, p: math.comb(n, k) * p**k * (1 - p) ** (n - k)
    covered = [sum(chance(k, p) for k in range(n + 1) if bounds[k].low <= p <= bounds[k].high) for p in shares]
    assert sum(covered) / len(covered) == pytest.approx(0.95, abs=0.01)


def test_bad_inputs_are_named():
    with pytest.raises(ValueError, match=r"^units: expected at least one unit, got shape \(0,\)$"):
        stats.bootstrap_sums([], draws=10, generator=generator("x"))
    with pytest.raises(ValueError, match=r"^denominators: expected one for each of 3 units, got 2$"):
        stats.ratio_interval([1.0, 2.0, 3.0], [1.0, 2.0], generator=generator("x"))
    with pytest.raises(ValueError, match=r"^successes: expected from 0 to n of at least 1, got 3 of 2$"):
        stats.wilson(3, 2)
