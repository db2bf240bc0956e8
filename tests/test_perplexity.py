"""Perplexity: windows, token weighting, batching, known values; J1 to J7 of the identities."""

import math

import pytest
import torch
from cases import CONFIGS, TINY, random_params, random_tokens

from gptcore import device, tree
from gptcore.config import architecture
from gptcore.evaluate.perplexity import (
    Likelihood,
    Scores,
    Stopped,
    blocks,
    byte_blocks,
    detail,
    first_tokens,
    gap,
    intervals,
    references,
    score_documents,
    score_tokens,
    verdict,
    windows,
)
from gptcore.model import forward, init_params
from gptcore.stats import Interval

EOT = 60
CONFIG = CONFIGS["gpt2"]
PARAMS = random_params(CONFIG)


def documents(*lengths, seed=3):
    """Documents of so many random tokens, three bytes a token."""
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randint(60, (n,), generator=generator).tolist(), 3 * n) for n in lengths]


def zeroed(config):
    """Weights under which every token is as likely as every other."""
    return tree.map(torch.zeros_like, init_params(config, torch.Generator().manual_seed(0)))


# ----------------------------------------------------------------------------------------------------------- windows


@pytest.mark.parametrize("last", ["full", "short"])
@pytest.mark.parametrize("stride", [1, 3, 8])
def test_every_target_is_scored_once(stride, last):
    """J6 on lists: 1..n-1 in order, never past the context, and with enough to look back on."""
    for n in range(40):
        spans = list(windows(n, 8, stride, last))
        assert [target for _, end, first in spans for target in range(first, end + 1)] == list(range(1, n))
        assert all(0 <= begin < end <= min(begin + 8, n - 1) for begin, end, _ in spans)
        assert all(first - begin >= 8 - stride + 1 for begin, _, first in spans[1:])
        assert len(spans) == (n > 1) + max(0, math.ceil((n - 1 - 8) / stride))


def rolling(n, size, k):
    """The harness's rule, stated on 0..n-1 after a prefix of -1: (inputs, targets) of each window.

    The first window predicts up to `size` tokens from the prefix on; each later one up to size - k + 1 new tokens,
    from the `size` tokens before the last of them.
    """
    tokens, end = [-1, *range(n)], min(size, n)
    found = [(tokens[:end], tokens[1 : end + 1])]
    while end < n:
        start, end = end, min(end + size - k + 1, n)
        found.append((tokens[end - size : end], tokens[start + 1 : end + 1]))
    return found


@pytest.mark.parametrize("k", [1, 4, 9, 16])
def test_windows_follow_the_rolling_rule(k):
    for n in range(1, 101):
        tokens = [-1, *range(n)]
        ours = [(tokens[b:e], tokens[f : e + 1]) for b, e, f in windows(n + 1, 16, 16 - k + 1)]
        assert ours == rolling(n, 16, k)


# ------------------------------------------------------------------------------------------------------------ scores


def brute_force(params, config, tokens, window):
    """Nats of each token, from its own forward over the window - 1 tokens before it and the last of them."""
    text = torch.tensor([EOT, *tokens])
    found = []
    for t in range(1, len(text)):
        logits, _ = forward(params, config, text[None, max(0, t - window) : t])
        found.append(-logits[0, -1].log_softmax(-1)[text[t]].item())
    return found


@pytest.mark.parametrize("name", ["gpt2", "llama", "alibi", "window"])
def test_stride_one_is_token_by_token(name):
    """J1. Seen to fail with windows whose first target is scored again by the next."""
    config, texts = CONFIGS[name], documents(1, 30, 11)
    params = random_params(config)
    measured, n_tokens = score_tokens(params, config, [t for t, _ in texts], eot=EOT, window=9, stride=1)
    wanted = [value for tokens, _ in texts for value in brute_force(params, config, tokens, 9)]
    assert n_tokens.tolist() == [1, 30, 11]
    torch.testing.assert_close(measured.nats, torch.tensor(wanted, dtype=torch.float64), rtol=0, atol=1e-5)


def test_batches_change_nothing():
    """J3: alone, in eights, all at once. In float64 to 1e-9; in float32 within its rounding."""
    texts = documents(100, 1, 40, 41, 7, 80, 0, 39)
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 1e-6)):
        params = random_params(CONFIG, dtype)
        ways = [score_documents(params, CONFIG, texts, eot=EOT, batch_tokens=b) for b in (1, 8 * 40, 10_000)]
        ways += [score_documents(params, CONFIG, texts[:3], eot=EOT)]
        for other in ways[1:]:
            torch.testing.assert_close(other.nats, ways[0].nats[: len(other.nats)], rtol=tolerance, atol=0)
            assert torch.equal(other.n_correct, ways[0].n_correct[: len(other.nats)])


def test_a_uniform_model_is_as_unsure_as_the_vocabulary_is_large():
    """J4: perplexity V, bits per byte log2 V times tokens over bytes, and the first id is the guess."""
    scores = score_documents(zeroed(CONFIG), CONFIG, [([5, 0, 7, 0], 10), ([0], 2), ([], 0)], eot=EOT)
    assert scores.perplexity == pytest.approx(61, rel=1e-6)
    assert scores.bits_per_byte == pytest.approx(math.log2(61) * 5 / 12, rel=1e-6)
    assert scores.accuracy == 3 / 5
    assert scores.n_tokens.tolist() == [4, 1, 0]
    assert scores.n_bytes.tolist() == [10, 2, 0]


def test_a_long_document_weighs_by_its_tokens():
    """J5: documents of 200 and 5 tokens. Seen to fail with a mean of the documents' means."""
    texts = documents(200, 5)
    both = score_documents(PARAMS, CONFIG, texts, eot=EOT)
    long, short = (score_documents(PARAMS, CONFIG, [text], eot=EOT) for text in texts)
    assert both.loss == pytest.approx((200 * long.loss + 5 * short.loss) / 205, rel=1e-12)
    assert abs(both.loss - (long.loss + short.loss) / 2) > 0.1


@pytest.mark.parametrize("n", [1, 40, 41, 80])
def test_tails_are_scored(n):
    """J6: documents of 1, window, window + 1 and 2 windows."""
    scores = score_documents(PARAMS, CONFIG, documents(n), eot=EOT)
    assert scores.n_tokens.tolist() == [n]
    assert scores.nats.item() > 0


def test_bits_per_byte_do_not_depend_on_the_tokenizer():
    """A relabelled model permutes the rows of its embedding: text and ids change together, bits do not."""
    order = torch.randperm(61, generator=torch.Generator().manual_seed(0))
    relabelled = PARAMS | {"embed": {"w": PARAMS["embed"]["w"][order.argsort()]}}
    texts = documents(50, 90)
    moved = [(order[torch.tensor(tokens)].tolist(), size) for tokens, size in texts]
    ours = score_documents(PARAMS, CONFIG, texts, eot=EOT)
    theirs = score_documents(relabelled, CONFIG, moved, eot=order[EOT].item())
    assert theirs.bits_per_byte == pytest.approx(ours.bits_per_byte, rel=1e-9)


def test_a_coarser_tokenizer_with_the_same_distribution_has_the_same_bits():
    """16 equally likely nibbles, or 256 equally likely bytes: other perplexities, equal bits per byte."""
    nibbles, whole = (architecture("gpt2", **TINY | {"n_vocab": n}) for n in (16, 256))
    fine = score_documents(zeroed(nibbles), nibbles, [([3] * 40, 20)], eot=0)
    coarse = score_documents(zeroed(whole), whole, [([51] * 20, 20)], eot=0)
    assert fine.bits_per_byte == pytest.approx(8, rel=1e-6)
    assert coarse.bits_per_byte == pytest.approx(8, rel=1e-6)
    assert fine.perplexity == pytest.approx(16, rel=1e-5)
    assert coarse.perplexity == pytest.approx(256, rel=1e-5)


def test_half_precision_weights_are_read_in_float32():
    """J7: nats within 1e-2 of float32 on average, and a softmax that sums to one in float32."""
    texts, wide = documents(40, 90), random_params(CONFIG, torch.float32)
    narrow = tree.map(lambda leaf: leaf.bfloat16(), wide)
    rounded = tree.map(lambda leaf: leaf.float(), narrow)
    measured, _ = score_tokens(narrow, CONFIG, [t for t, _ in texts], eot=EOT)
    assert measured.nats.dtype == torch.float32
    ours = score_documents(narrow, CONFIG, texts, eot=EOT).loss
    assert ours == pytest.approx(score_documents(rounded, CONFIG, texts, eot=EOT).loss, rel=1e-2)


def test_without_a_prefix_first_tokens_and_their_bytes_are_left_out():
    size = torch.arange(61)
    texts = [([5, 9, 2], 16), ([7], 7), ([], 0)]
    scores = score_documents(PARAMS, CONFIG, texts, eot=None, token_bytes=size)
    assert scores.n_tokens.tolist() == [2, 0, 0]
    assert scores.n_bytes.tolist() == [11, 0, 0]
    logits, _ = forward(PARAMS, CONFIG, torch.tensor([[5, 9]]))
    wanted = -logits.log_softmax(-1)[0, [0, 1], [9, 2]].sum().item()
    assert scores.nats[0].item() == pytest.approx(wanted, rel=1e-12)


def test_max_tokens_scores_the_first_ones():
    size, texts = torch.full((61,), 3), documents(30, 100, 50)
    scores = score_documents(PARAMS, CONFIG, texts, eot=EOT, max_tokens=42, token_bytes=size)
    wanted = score_documents(PARAMS, CONFIG, [texts[0], (texts[1][0][:12], 36)], eot=EOT)
    assert torch.equal(scores.nats, wanted.nats)
    assert scores.n_bytes.tolist() == [90, 36]
    assert first_tokens(texts, 180, size) == texts


def test_detail_counts_rank_and_entropy():
    """p = 1/2, 1/4, 1/4: entropy 1.5 bits; the target's rank is the number of strictly likelier tokens."""
    logits = torch.tensor([[0.5, 0.25, 0.25]]).log().repeat(3, 1)
    found = detail(logits, torch.tensor([0, 1, 2]))
    assert found.rank.tolist() == [0, 1, 1]
    torch.testing.assert_close(found.entropy, torch.full((3,), 1.5 * math.log(2)))
    assert detail(torch.tensor([[0.0, -torch.inf]]), torch.tensor([0])).entropy.item() == 0


def test_ids_of_any_kind_and_the_random_state():
    """Lists, arrays, small integer tensors; evaluation draws nothing and asks for no gradient."""
    before, tokens = torch.get_rng_state(), random_tokens(CONFIG, rows=1)[0] % 60
    found = [score_documents(PARAMS, CONFIG, [(t, 120)], eot=EOT).nats for t in (tokens.tolist(), tokens.numpy())]
    found += [score_documents(PARAMS, CONFIG, [(tokens.to(torch.uint16), 120)], eot=EOT).nats]
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
    assert torch.equal(before, torch.get_rng_state())
    assert not found[0].requires_grad


def test_stop_leaves_no_half_score():
    calls = iter([False, False, True])
    with pytest.raises(Stopped):
        score_documents(PARAMS, CONFIG, documents(200), eot=EOT, batch_tokens=40, stop=lambda: next(calls))


@pytest.mark.parametrize(
    ("ways", "message"),
    [
        ({"window": 41}, "window: expected a number in 1..n_context=40, got 41"),
        ({"window": 8, "stride": 9}, "stride: expected a number in 1..window=8, got 9"),
        ({"eot": 61}, "eot: expected an id below n_vocab=61, got 61"),
        ({"eot": None}, "token_bytes: expected the bytes of each id"),
        ({"max_tokens": 5}, "token_bytes: expected the bytes of each id"),
    ],
)
def test_refusals(ways, message):
    with pytest.raises(ValueError, match=message):
        score_documents(PARAMS, CONFIG, documents(5), **{"eot": EOT} | ways)


@pytest.mark.parametrize(("texts", "message"), [([], "got none"), ([([], 0)], "got none"), ([([61], 1)], "got 61")])
def test_nothing_to_score_and_foreign_ids_are_refused(texts, message):
    with pytest.raises(ValueError, match=f"documents: expected .*{message}"):
        score_documents(PARAMS, CONFIG, texts, eot=EOT)


# ------------------------------------------------------------------------------------------- what the numbers are worth


def test_intervals_are_over_documents():
    """Wider than chance would make them if tokens were independent, and none for nine documents."""
    scores = score_documents(PARAMS, CONFIG, documents(*range(5, 65, 3)), eot=EOT)
    found = intervals(scores, generator=device.generator("intervals"))
    for name, interval in found.items():
        assert interval.value == pytest.approx(getattr(scores, name), rel=1e-12)
        assert interval.low < interval.value < interval.high
    assert math.log(found["perplexity"].low) == pytest.approx(found["loss"].low)
    few = intervals(Scores(*(column[:9] for column in scores)), generator=device.generator("intervals"))
    assert math.isnan(few["loss"].low)
    assert few["loss"].value == pytest.approx(Scores(*(column[:9] for column in scores)).loss)


def test_a_hopeless_model_has_an_interval():
    """1,000 nats a token: e^1000 is no float, and the perplexity is infinite instead of an error."""
    ones = torch.ones(20, dtype=torch.long)
    found = intervals(Scores(1000.0 * ones, ones, ones, ones), generator=device.generator("intervals"))
    assert found["loss"] == pytest.approx((1000, 1000, 1000))
    assert found["perplexity"] == (math.inf,) * 3


def test_one_long_text_is_cut_into_blocks():
    """Every token in one block of at least 40, its bytes with it; a short document is a block, an empty one is none."""
    texts = [tokens for tokens, _ in documents(200, 15, 0, 79, 80)]
    size = torch.arange(61)
    measures, n_tokens = score_tokens(PARAMS, CONFIG, texts, eot=EOT)
    cut = blocks(measures, n_tokens, texts, size, 40)
    assert cut.n_tokens.tolist() == [40] * 5 + [15] + [79] + [40, 40]
    assert cut.n_bytes.tolist()[:2] == [sum(texts[0][:40]), sum(texts[0][40:80])]
    assert cut.n_bytes.sum() == sum(map(sum, texts))
    whole = score_documents(PARAMS, CONFIG, [(text, sum(text)) for text in texts], eot=EOT)
    assert cut.nats.sum().item() == pytest.approx(whole.nats.sum().item(), rel=1e-12)
    assert cut.n_correct.sum() == whole.n_correct.sum()


def test_blocks_of_bytes_are_the_same_for_every_tokenizer():
    """A text as bytes and as ids of 1 to 7 bytes: equal cuts, and each token where it begins."""
    widths, generator = torch.arange(1, 8), device.generator("bytes")
    tokens = torch.randint(7, (40,), generator=generator)
    n = int(widths[tokens].sum())
    nats = torch.rand(n + 5, generator=generator)
    fine = byte_blocks(
        Likelihood(nats, nats < 0.5), torch.tensor([n, 0, 5]), [([0] * n, n), ([], 0), ([0] * 5, 5)], [1], 20
    )
    assert fine.n_bytes.tolist() == fine.n_tokens.tolist() == [20] * (n // 20 - 1) + [20 + n % 20, 5]
    torch.testing.assert_close(fine.nats[1], nats[20:40].double().sum())
    nats = torch.rand(40, generator=generator)
    coarse = byte_blocks(Likelihood(nats, nats < 0.5), torch.tensor([40]), [(tokens.tolist(), n)], widths, 20)
    assert torch.equal(coarse.n_bytes, fine.n_bytes[:-1])
    starts = widths[tokens].cumsum(0) - widths[tokens]
    inside = (starts >= 20) & (starts < 40)
    torch.testing.assert_close(coarse.nats[1], nats[inside].double().sum())
    assert coarse.n_tokens[1] == inside.sum()
    assert coarse.n_correct.sum() == (nats < 0.5).sum()


def test_the_gap_is_found_where_there_is_one():
    """Documents of 2 and 2.5 nats a token, give or take 0.1: the interval holds 0.5; the text itself has no gap."""
    generator, ones = device.generator("gap"), torch.full((50,), 100)
    trained, held_out = (
        Scores(100 * (level + 0.1 * torch.randn(50, generator=generator).double()), ones, ones, ones)
        for level in (2, 2.5)
    )
    found = gap(held_out, trained, generator=generator)
    assert found.value == pytest.approx(held_out.loss - trained.loss)
    assert found.low < 0.5 < found.high
    assert found.high - found.low == pytest.approx(2 * 1.96 * 0.1 * math.sqrt(2 / 50), rel=0.3)
    same = gap(trained, trained, generator=generator)
    assert same.low < same.value == 0 < same.high
    assert math.isnan(gap(Scores(*(column[:9] for column in held_out)), trained, generator=generator).low)


def chain(log_p):
    """A model without layers that says log_p (V,V) of the next token: its embedding is one-hot and its head a table."""
    n = len(log_p)
    config = architecture("llama", n_vocab=n, n_context=512, n_layer=0, d_model=n, n_head=1, tied=False)
    ones = {"w": torch.ones(n, dtype=torch.float64)}
    table = {"w": (log_p.T / n**0.5).contiguous()}  # the norm makes a one-hot row sqrt(V) long
    return {"embed": {"w": torch.eye(n).double()}, "blocks": [], "norm_f": ones, "head": table}, config


def test_verdicts():
    """Four constructed models on 100 KB of a chain of 15 letters that goes one of two ways, 9 to 1.

    Knowing nothing, the letters' frequencies, half of the chain, and the chain itself, which xz cannot see that well.
    """
    generator, n = device.generator("chain"), 16
    steps = torch.stack([torch.randperm(15, generator=generator) for _ in range(2)], dim=1)
    ids = [0]
    for rare in (torch.rand(99_999, generator=generator) < 0.1).tolist():
        ids.append(steps[ids[-1], int(rare)].item())
    texts = [ids[start : start + 1000] for start in range(0, len(ids), 1000)]
    documents = [(text, len(text)) for text in texts]
    strings = ["".join(chr(97 + id) for id in text) for text in texts]
    counts = torch.bincount(torch.tensor(ids), minlength=n)
    ladder = references(documents, n, counts=counts, texts=strings)
    assert ladder["untrained"] == 4
    assert ladder["xz"] < ladder["unigram"] < 4

    truth = torch.full((n, n), 1e-4, dtype=torch.float64)
    truth[torch.arange(15), steps[:, 1]] += 0.1
    truth[torch.arange(15), steps[:, 0]] += 0.9
    truth = truth / truth.sum(-1, keepdim=True)
    share = (counts + 1).double() / (counts + 1).sum()
    flatter = share.clamp(max=share.mean() * 1.05)  # better than nothing, no better than the frequencies
    half = truth**0.25 / (truth**0.25).sum(-1, keepdim=True)
    models = {
        "no better than guessing": torch.full((n, n), 1 / n).double(),
        "knows token frequencies": (flatter / flatter.sum()).expand(n, n),
        "uses context": half,
        "beats a general compressor": truth,
    }
    for words, p in models.items():
        scores = score_documents(*chain(p.log()), documents, eot=15)
        bits = intervals(scores, generator=device.generator("verdict"))["bits_per_byte"]
        assert verdict(bits, ladder) == words, (bits, ladder)
    assert verdict(Interval(1.0, math.nan, math.nan), ladder) == ""
    assert "xz" not in references(documents[:60], n, texts=strings[:60])
