"""Calibration: bins, errors and Brier scores with known values; calibrated and overconfident forecasts told apart."""

import math

import pytest
import torch
from cases import CONFIGS, random_params, random_tokens

from gptcore import device, stats
from gptcore.evaluate.calibration import calibration, certainty, equal_count, equal_width, reliability
from gptcore.evaluate.perplexity import score_tokens


def measured(confidence, correct, sizes=None, seed=0, draws=200):
    """The calibration of forecasts that each are a document, or come in documents of the given sizes."""
    confidence, correct = torch.as_tensor(confidence), torch.as_tensor(correct)
    sizes = torch.ones(len(confidence), dtype=torch.long) if sizes is None else torch.tensor(sizes)
    generator = device.generator("calibration", seed)
    return calibration(
        confidence, correct, (confidence - correct.float()) ** 2, sizes, generator=generator, draws=draws
    )


def synthetic(n=20_000):
    """Confidences uniform in [0, 1], each forecast true with just that probability."""
    generator = device.generator("synthetic")
    confidence = torch.rand(n, generator=generator)
    return confidence, torch.rand(n, generator=generator) < confidence


def test_expected_calibration_error_by_hand():
    """0.95 said four times and true three times, 0.55 twice and true once: 4/6 x 0.20 + 2/6 x 0.05."""
    found = measured([0.95] * 4 + [0.55] * 2, [True, True, True, False, True, False])
    assert found.ece.value == pytest.approx(0.15, abs=1e-6)
    assert found.ece_equal_count.value == pytest.approx(0.15, abs=1e-6)
    assert math.isnan(found.ece.low)  # six documents are too few for an interval


def test_brier_by_hand():
    """p = (0.7, 0.2, 0.1): 0.14 if the first comes, 1.14 if the second, and a certain hit costs nothing."""
    logits = torch.tensor([[0.7, 0.2, 0.1], [0.7, 0.2, 0.1], [1.0, 0.0, 0.0]]).log()
    found = certainty(logits, torch.tensor([0, 1, 0]))
    torch.testing.assert_close(found.brier, torch.tensor([0.14, 1.14, 0.0]), rtol=0, atol=1e-6)
    torch.testing.assert_close(found.confidence, torch.tensor([0.7, 0.7, 1.0]))
    assert found.correct.tolist() == [True, False, True]


def test_honest_forecasts_and_boasts():
    """20,000 honest ones: below 0.02. Their square roots, which say more than they know: 2/3 - 1/2 on average.

    Honest errors are 15 binomial gaps of at most 0.014 each one sigma, 0.009 on average: 0.02 is beyond five sigma.
    """
    confidence, correct = synthetic()
    honest, boast = measured(confidence, correct), measured(confidence.sqrt(), correct)
    assert honest.ece.value < 0.02
    assert honest.ece_equal_count.value < 0.02
    assert boast.ece.value == pytest.approx(1 / 6, abs=0.02)
    assert boast.ece_equal_count.value == pytest.approx(1 / 6, abs=0.02)
    assert boast.ece.low < 1 / 6 < boast.ece.high
    assert boast.brier.value > honest.brier.value


def test_bins():
    assert equal_width(torch.tensor([0.0, 0.066, 0.067, 0.5, 0.999, 1.0])).tolist() == [0, 0, 1, 7, 14, 14]
    counted = equal_count(torch.arange(30) / 30)
    assert torch.bincount(counted).tolist() == [2] * 15
    assert equal_count(torch.full((20,), 0.5)).unique().numel() == 1  # equal ones stay together
    confidence, _ = synthetic(1000)
    shuffled = torch.randperm(1000, generator=device.generator("shuffle"))
    assert torch.equal(equal_count(confidence)[shuffled], equal_count(confidence[shuffled]))


def test_the_curve_is_what_was_said_against_what_came_true():
    curve = reliability(torch.tensor([0.95, 0.95, 0.95, 0.95, 0.55, 0.55]), torch.tensor([1, 1, 1, 0, 1, 0]).bool())
    assert curve.n.tolist() == [2, 4]
    torch.testing.assert_close(curve.confidence, torch.tensor([0.55, 0.95]).double())
    assert curve.accuracy.tolist() == [0.5, 0.75]
    bound = stats.wilson(3, 4)
    assert (curve.low[1].item(), curve.high[1].item()) == (bound.low, bound.high)


def test_intervals_are_over_documents():
    """Forecasts that agree within a document are worth no more than one: the interval is as wide as for one each."""
    confidence, correct = torch.full((100,), 0.8), torch.arange(100) % 4 > 0
    single = measured(confidence, correct).ece
    copied = measured(confidence.repeat_interleave(10), correct.repeat_interleave(10), [10] * 100).ece
    loose = measured(confidence.repeat_interleave(10), correct.repeat_interleave(10)).ece
    assert copied.high - copied.low == pytest.approx(single.high - single.low)
    assert loose.high - loose.low < 0.5 * (copied.high - copied.low)


def test_a_model_is_measured_on_its_own_text():
    """certainty as a measure: the same nats as perplexity, a confidence for every target, tokens as forecasts."""
    config, params = CONFIGS["gpt2"], random_params(CONFIGS["gpt2"])
    documents = list(random_tokens(config, rows=12, length=50))
    plain, n_tokens = score_tokens(params, config, documents, eot=60)
    found, _ = score_tokens(params, config, documents, eot=60, measure=certainty)
    torch.testing.assert_close(found.nats, plain.nats)
    assert (found.confidence >= (-found.nats).exp() - 1e-12).all()
    generator = device.generator("calibration")
    result = calibration(found.confidence, found.correct, found.brier, n_tokens, generator=generator)
    assert result.curve.n.sum() == 600
    assert 0 < result.ece.low <= result.ece.high < 1
    assert result.brier.low < result.brier.value < result.brier.high
