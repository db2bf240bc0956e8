"""Comparing models: equal to itself, chance as often as promised, words, ranking, questions."""

import math

import pytest
import torch

from gptcore import device, stats
from gptcore.evaluate.comparison import Model, compare, compare_items, one_tokenizer, rank
from gptcore.evaluate.perplexity import Scores

N = 120
TEXTS = tuple(f"{i:064x}" for i in range(N))
BYTES = torch.full((N,), 1000)


def generator(*words):
    return device.generator("comparison", *words)


def model(name, nats_per_byte, tokenizer="t", texts=TEXTS):
    """A model with so many nats a byte on each document, four bytes a token."""
    n = len(texts)
    scores = Scores(torch.as_tensor(nats_per_byte).double() * BYTES[:n], BYTES[:n] // 4, BYTES[:n], BYTES[:n] // 8)
    return Model(name, scores, texts, tokenizer)


def spread(seed, n=N):
    """How hard each document is: 1 nat a byte, give or take 0.25."""
    return 1 + 0.25 * torch.randn(n, generator=generator("spread", seed)).double()


def noise(seed, size=0.03, n=N):
    return size * torch.randn(n, generator=generator("noise", seed)).double()


def test_a_model_against_itself():
    """Exactly 0, p = 1, no star."""
    a, b = model("a", spread(0)), model("b", spread(0))
    [found] = compare([(a, b)], generator=generator())
    assert found.difference[:3] == (0, 0, 0)
    assert found.p == 1
    assert found.detectable == 0
    assert found.word == "equivalent within ±0.005"
    assert not rank([a, b], generator=generator())[0].star


def test_words():
    """A clear difference each way, one that does not matter, one that drowns in noise, and two that say nothing."""
    base = model("base", spread(1))
    others = {
        "better": model("better", spread(1) - 0.05 + noise(1)),
        "worse": model("worse", spread(1) + 0.05 + noise(2)),
        "equivalent within ±0.005": model("same", spread(1) + noise(3, 0.001)),
        "tied (could have seen 0.1": model("noisy", spread(1) + noise(4, 0.5)),
        "too few documents": None,
        "not comparable: document 3": model("other", spread(1), texts=(*TEXTS[:3], "f" * 64, *TEXTS[4:])),
        "not comparable: base has 120 documents, short 119": model("short", spread(1)[:-1], texts=TEXTS[:-1]),
    }
    few = (model("few", spread(1)[:9], texts=TEXTS[:9]),) * 2
    pairs = [few if other is None else (base, other) for other in others.values()]
    for found, word in zip(compare(pairs, generator=generator()), others, strict=True):
        assert found.word.startswith(word), found
        assert (found.difference is None) == word.startswith(("too few", "not comparable"))


def test_a_difference_is_in_bits_per_byte():
    a, b = model("a", spread(2)), model("b", spread(2) + 0.1)
    [found] = compare([(a, b)], generator=generator())
    assert found.difference.value.item() == pytest.approx(0.1 / math.log(2))
    assert found.difference.value.item() == pytest.approx(b.scores.bits_per_byte - a.scores.bits_per_byte)


def test_many_comparisons_pay_for_each_other():
    """A p of 0.02 alone is a finding; among nine others that are nothing it is not."""
    base = model("base", spread(3))
    candidates = (model(str(i), spread(3) + 0.006 + noise(i)) for i in range(100))
    alone = next(
        (m, c) for m in candidates for c in compare([(base, m)], generator=generator(m.name)) if 0.01 < c.p < 0.03
    )
    nothing = [model(f"n{i}", spread(3) + noise(100 + i)) for i in range(9)]
    family = compare([(base, other) for other in (alone[0], *nothing)], generator=generator(alone[0].name))
    assert alone[1].word == "worse"
    assert family[0].p >= 5 * alone[1].p
    assert family[0].word.startswith("tied")


def test_a_clear_difference_is_found_among_many():
    """Each of 120 models is far worse than the base. Seen to fail with 2,000 draws, of which p is at least 0.0005."""
    pairs = [(model("base", spread(4)), model(str(i), spread(4) + 0.3)) for i in range(120)]
    assert {found.word for found in compare(pairs, generator=generator())} == {"worse"}


def test_false_alarms_and_coverage():
    """400 pairs without and with a difference of 0.01: 5 % false alarms, 95 % coverage, each within chance.

    Of 400 the false alarms are 20 give or take 4.4 (bounds at 12 and 28 take in 95 %; the seed is fixed).
    """
    alarms = covered = 0
    for seed in range(400):
        hard, extra = spread(seed), noise(seed)
        pair = [(model("a", hard), model("b", hard + extra))], [(model("a", hard), model("c", hard + 0.01 + extra))]
        [same], [worse] = (compare(p, generator=generator("sim", seed), draws=500) for p in pair)
        alarms += same.p < 0.05 and not same.difference.low < 0 < same.difference.high
        covered += worse.difference.low.item() <= 0.01 / math.log(2) <= worse.difference.high.item()
    assert 0.03 <= alarms / 400 <= 0.07
    assert covered / 400 >= 0.92


def test_a_ranking():
    """Best first, a star only where the next is worse beyond chance, very good within 5 % of the perplexity."""
    hard = spread(5)
    clear = rank(
        [model("c", hard + 0.3), model("a", hard), model("b", hard + 0.01 + noise(6, 0.002))], generator=generator()
    )
    assert [place.model.name for place in clear] == ["a", "b", "c"]
    assert [place.star for place in clear] == [True, False, False]
    assert [place.very_good for place in clear] == [True, True, False]  # exp(0.04) and exp(1.2) times the best
    assert [place.to_best and place.to_best.word for place in clear] == [None, "worse", "worse"]
    close = rank([model("a", hard), model("b", hard + noise(7))], generator=generator())
    assert not any(place.star for place in close)


def test_tokenizers_are_never_ranked_by_perplexity():
    """Other tokenizer: bits per byte compare, and no model is very good by a perplexity of other tokens."""
    hard = spread(8)
    models = [model("a", hard, "t"), model("b", hard + 0.001, "u")]
    assert not one_tokenizer(models)
    places = rank(models, generator=generator())
    assert [place.model.name for place in places] == ["a", "b"]
    assert not any(place.very_good for place in places)
    assert one_tokenizer(models[:1])


def test_other_documents_are_not_ranked():
    models = [model("a", spread(9)), model("b", spread(9), texts=(*TEXTS[:-1], "e" * 64))]
    with pytest.raises(ValueError, match=r"expected the same for every model, but document 119 is another text for a"):
        rank(models, generator=generator())
    with pytest.raises(ValueError, match="models: expected at least one, got none"):
        rank([], generator=generator())


@pytest.mark.parametrize(("b", "c", "p"), [(18, 6, 0.0227), (6, 0, 0.03125), (5, 5, 1.0), (0, 0, 1.0)])
def test_questions(b, c, p):
    """Right and wrong on the same questions: exact McNemar, and the difference of accuracies with its interval."""
    first = torch.tensor([True] * b + [False] * c + [True] * 20 + [False] * 20)
    second = torch.tensor([False] * b + [True] * c + [True] * 20 + [False] * 20)
    found = compare_items(first, second, generator=generator())
    assert (found.only_first, found.only_second) == (b, c)
    assert found.p == pytest.approx(p, abs=5e-5)
    assert found.p == stats.mcnemar(b, c)
    assert found.difference.value == pytest.approx((c - b) / len(first))
    assert found.difference.low <= found.difference.value <= found.difference.high
    n = len(first)  # the variance of a difference of two indicators, and 2.8016 standard errors of its mean
    assert found.detectable == pytest.approx(2.8016 * math.sqrt(((b + c) / n - ((b - c) / n) ** 2) / n), rel=0.1)


def test_a_few_questions_have_no_interval():
    """Nine questions: the exact p-value stands, bounds do not."""
    found = compare_items([True] * 9, [False] * 9, generator=generator())
    assert found.difference.value == -1
    assert math.isnan(found.difference.low)
    assert math.isnan(found.difference.high)
    assert found.p == 2 / 2**9


def test_other_questions_are_refused():
    with pytest.raises(ValueError, match="items: expected the same questions"):
        compare_items([True], [True, False], generator=generator())
