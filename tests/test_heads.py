"""Where heads look: exact scores of patterns that are known, chance, intervals, labels, on every architecture."""

import math
from dataclasses import replace

import pytest
import torch
from cases import CONFIGS, random_params, random_tokens
from models import hand_built

from gptcore import generator, init_params, tree
from gptcore.config import architecture
from gptcore.interpret.attention import (
    DETECTORS,
    SHAPES,
    ask,
    compare_heads,
    find_heads,
    head_scores,
    join,
    labels,
    measure,
    null_pattern,
    patterns,
    scores,
    strength,
    value_weights,
)
from gptcore.interpret.taps import record
from gptcore.model import forward

HEADED = {name: config for name, config in CONFIGS.items() if config.n_layer}
every_config = pytest.mark.parametrize("config", HEADED.values(), ids=HEADED.keys())
NAMES = (*DETECTORS, *SHAPES)


def close(got, wanted, atol=1e-10):
    torch.testing.assert_close(got, torch.as_tensor(wanted, dtype=got.dtype), rtol=0, atol=atol)


def repeated(bos):
    r = torch.randperm(12, generator=torch.Generator().manual_seed(3))
    return torch.cat([torch.tensor([12][:bos], dtype=torch.long), r, r])[None]


EXACT = {  # of L0H0, L0H1, L1H0, L1H1 where they are known, and chance; without BOS (24 tokens) and with it (25)
    False: {"previous": (1, 0, None, 1 / 23, 0.120694), "start": (None, None, None, 1, 0.120694),
            "duplicate": (0, 0.5, None, None, 0.056062), "prefix": (0, 0, 23 / 24, 0, 0.056062)},
    True: {"previous": (1, 0, None, None, 0.117332), "start": (None, 0, None, 1, 0.117332),
           "duplicate": (0, 0.5, 0, 0, 0.052985), "prefix": (0, 0, 1, 0, 0.052985)},
}  # fmt: skip


@pytest.mark.parametrize("bos", [False, True])
def test_the_hand_built_heads_have_exact_scores(bos):
    """Seen to fail with prefix looking at the copy itself, and with start counting query 0."""
    params, config = hand_built()
    found = head_scores(params, config, repeated(bos), generator=generator(0))
    assert tuple(found) == NAMES
    for name, (*wanted, chance) in EXACT[bos].items():
        close(found[name].chance, torch.full((2, 2), chance), atol=1e-6)
        for got, value in zip(found[name].value.flatten(), wanted, strict=True):
            if value is not None:
                close(got, value, atol=1e-5)
    own = labels(found)
    assert {"previous_token", "sparse"} == set(own[0][0])
    assert "induction" in own[1][0]
    assert "induction" not in {label for each in (*own[0], own[1][1]) for label in each}
    assert {"start_token", "sparse"} == set(own[1][1])
    assert find_heads(found, "prefix", 1)[0][:2] == (1, 0)


def test_an_even_head_is_at_chance():
    """Hand pattern, S = 8: the mean of 1 / (q + 1) over q from 1 on is (H_8 - 1) / 7."""
    config = architecture("gpt2", n_vocab=20, n_context=8, n_layer=1, d_model=8, n_head=1)
    params = random_params(config)
    params["blocks"][0]["attn"]["q"] = tree.map(torch.zeros_like, params["blocks"][0]["attn"]["q"])
    found = head_scores(params, config, random_tokens(config, length=8), generator=generator(0))
    close(found["previous"].value[0, 0], (sum(1 / n for n in range(1, 9)) - 1) / 7)
    for name in DETECTORS:
        close(found[name].corrected().value[0, 0], 0.0)
    close(found["uniform"].value[0, 0], 1.0)
    assert labels(found) == [[{"uniform": pytest.approx(1)}]]


def test_even_patterns_are_uniform_and_sharp_ones_sparse_at_every_length():
    """From 2 to 512 keys. Seen to fail with query 0 counted, which is trivially sharp."""
    config = architecture("gpt2", n_vocab=20, n_context=512, n_layer=1, d_model=8, n_head=1)
    for n in range(2, 513):
        question = ask(config, torch.zeros(1, n, dtype=torch.long), {}, dtype=torch.float64)
        even = null_pattern(config, n)[None]
        sharp = torch.eye(n, dtype=torch.float64)[None, None]
        uniform, sparse, keys = question.answer(even)[0, :, 0] / question.n_queries[0]
        close(uniform, 1.0)
        close(sparse, (even.amax(-1).sum() - 1) / (n - 1))
        close(keys, sum(range(2, n + 1)) / (n - 1), atol=1e-8)
        close(question.answer(sharp)[0, :, 0] / question.n_queries[0], [0.0, 1.0, 1.0])


def test_a_steep_alibi_head_looks_back_by_chance():
    """4.1: previous-token chance for slopes from 1/2 to 1/256 at 64 tokens; without ALiBi 0.0594."""
    config = architecture("alibi", n_vocab=61, n_context=64, n_layer=1, d_model=16, n_head=8)
    wanted = [0.2434, 0.1848, 0.1267, 0.0913, 0.0741, 0.0663, 0.0628, 0.0611]
    for each, chance in ((config, wanted), (replace(config, position="sinusoidal"), [0.0594] * 8)):
        params = init_params(each, generator(0))
        found = head_scores(params, each, random_tokens(each, length=64), generator=generator(0))
        close(found["previous"].chance[0], chance, atol=5e-5)
    shares = null_pattern(replace(config, n_context=4096), 2000)[0, 1999]
    assert shares[1998].item() == pytest.approx(math.exp(-0.5) * (1 - math.exp(-0.5)), abs=1e-4)


@every_config
def test_a_fresh_model_is_at_chance(config):
    """4.3: every corrected score of an untrained model is within 0.02 of 0, whatever its positions and window.

    QK-norm makes queries and keys long from the start, so that fresh heads have opinions: 0.1.
    """
    params = init_params(config, generator(1))
    tokens = random_tokens(config, rows=60, length=20).repeat(1, 2)
    found = head_scores(params, config, tokens, generator=generator(0))
    for name in DETECTORS:
        numbers = found[name].corrected().value
        assert (numbers[numbers.isfinite()].abs() <= (0.1 if config.qk_norm else 0.02)).all(), name
    if config.window != 1:
        assert found["prefix"].corrected().value.isfinite().all()


@every_config
def test_scores_are_those_of_the_recorded_patterns(config):
    """Against a loop over sequences, queries and keys, on ragged rows; padding counts nowhere."""
    params, lengths = random_params(config), [2, 9, 12]
    tokens = random_tokens(config, length=12) % 5  # few ids, so that every detector finds something
    found = head_scores(params, config, tokens, generator=generator(0), lengths=lengths)
    tap, seen = record(config, "blocks.*.attn.pattern")
    forward(params, config, tokens, tap=tap)
    rules = {
        "previous": lambda row, q, k: k == q - 1, "current": lambda row, q, k: k == q >= 1,
        "start": lambda row, q, k: k == 0 and q >= 1, "duplicate": lambda row, q, k: row[k] == row[q] and k < q,
        "prefix": lambda row, q, k: k >= 1 and row[k - 1] == row[q],
    }  # fmt: skip
    null = null_pattern(config, 12)
    for name, rule in rules.items():
        marked = [
            (b, q, [k for k in range(q + 1) if rule(row, q, k)])
            for b, row in enumerate(tokens.tolist()) for q in range(lengths[b])
        ]  # fmt: skip
        marked = [each for each in marked if each[2]]
        chance = sum(null[:, q, k].sum(-1) for _, q, k in marked) / len(marked)
        for layer in range(config.n_layer):
            pattern = seen[f"blocks.{layer}.attn.pattern"]
            close(found[name].value[layer], sum(pattern[b, :, q, k].sum(-1) for b, q, k in marked) / len(marked))
            close(found[name].chance[layer], chance)
    n_keys = lambda q: min(q + 1, config.window or 99)
    rows = [(b, q) for b in range(3) for q in range(lengths[b]) if n_keys(q) > 1]
    for layer in range(config.n_layer if rows else 0):  # a window of 1 leaves no choice
        pattern = seen[f"blocks.{layer}.attn.pattern"]
        entropy = {(b, q): torch.special.entr(pattern[b, :, q]).sum(-1) for b, q in rows}
        mean = lambda values: sum(values) / len(rows)
        close(found["uniform"].value[layer], mean(entropy[b, q] / math.log(n_keys(q)) for b, q in rows))
        close(found["sparse"].value[layer], mean(pattern[b, :, q].amax(-1) for b, q in rows))
        close(found["keys"].value[layer], mean(entropy[each].exp() for each in rows))


@every_config
def test_a6_ragged_rows_score_as_they_do_one_by_one(config):
    params, tokens = random_params(config), random_tokens(config, rows=4, length=12)
    lengths = [3, 12, 1, 7]
    together = measure(params, config, tokens, lengths=lengths)
    alone = [measure(params, config, row[None, :n]) for row, n in zip(tokens, lengths, strict=True)]
    for got, wanted in zip(together[1:], join(alone)[1:], strict=True):
        close(got, wanted)


def test_renaming_the_tokens_changes_no_score():
    """Embedding rows, head rows and tokens permuted together."""
    config = CONFIGS["phi"]
    params, tokens = random_params(config), random_tokens(config)
    order = torch.randperm(config.n_vocab, generator=torch.Generator().manual_seed(5))
    renamed = params | {"embed": {"w": params["embed"]["w"][order.argsort()]}}
    before, after = (
        head_scores(p, config, t, generator=generator(0)) for p, t in ((params, tokens), (renamed, order[tokens]))
    )
    for name in NAMES:
        close(after[name].value, before[name].value)


def test_an_interval_is_over_sequences_and_needs_five():
    config = CONFIGS["gpt2"]
    params, tokens = random_params(config), random_tokens(config, rows=40)
    sums = measure(params, config, tokens)
    few = scores(join([measure(params, config, tokens[:4])]), generator=generator(0))["previous"]
    assert few.low.isnan().all()
    assert few.value.isfinite().all()
    found = scores(sums, generator=generator(0))
    again = scores(sums, generator=generator(0))
    assert torch.equal(found["start"].low, again["start"].low)
    for score in found.values():
        assert (score.low <= score.value).all()
        assert (score.value <= score.high).all()
        assert (score.low < score.high).all()
    each = sums.hits[:, 0] / sums.n_queries[:, 0, None, None]  # every sequence has 39 queries: 1.96 standard errors
    half = 1.96 * each.std(0) / math.sqrt(40)
    close(found["previous"].high - found["previous"].low, 2 * half, atol=0.3 * half.max().item())


@pytest.mark.parametrize("n", [5, 200])
def test_a_label_does_not_depend_on_the_length(n):
    """I7: a previous-token head is one at 5 and at 200 tokens."""
    params, config = hand_built(n_vocab=8, n_context=200)
    found = head_scores(params, config, random_tokens(config, rows=1, length=n), generator=generator(0))
    assert labels(found)[0][0] == {"previous_token": pytest.approx(1), "sparse": pytest.approx(1)}
    assert "start_token" in labels(found)[1][1]


def test_heads_are_found_by_name():
    config = CONFIGS["window_rope"]  # every query sees itself alone: no score but keys has a choice
    found = head_scores(random_params(config), config, random_tokens(config), generator=generator(0))
    assert strength(found, "previous").isfinite().all()
    assert find_heads(found, "current") == []
    assert find_heads(found, "uniform") == []
    with pytest.raises(ValueError, match=r"score: expected one of previous, current, .*, got 'elephant'"):
        find_heads(found, "elephant")
    config = CONFIGS["gpt2"]
    found = head_scores(random_params(config), config, random_tokens(config), generator=generator(0))
    best = find_heads(found, "start", 3)
    assert [number for *_, number in best] == sorted(strength(found, "start").flatten().tolist())[: -1 - 3 : -1]


@every_config
def test_patterns_are_the_recorded_ones_and_upper_layers_do_not_run(config):
    params, tokens = random_params(config), random_tokens(config, length=9)
    tap, seen = record(config, "blocks.*.attn.pattern")
    forward(params, config, tokens, tap=tap)
    got = patterns(params, config, tokens)
    close(got, torch.stack(list(seen.values())))
    close(got.sum(-1), torch.ones(got.shape[:-1]))
    broken = params | {"blocks": [params["blocks"][0], *[None] * (config.n_layer - 1)]}
    close(patterns(broken, config, tokens, layers=[0]), got[:1])
    with pytest.raises(ValueError, match=r"layers: expected numbers from 0 to \d, got \[99\]"):
        patterns(params, config, tokens, layers=[99])


@every_config
def test_value_weights_are_what_arrives(config):
    """A[q,k] |v_k W_O[h]| by a loop over heads; a key that brings nothing weighs nothing."""
    params, tokens = random_params(config), random_tokens(config, length=9)
    tap, seen = record(config, ["blocks.*.attn.pattern", "blocks.*.attn.v"])
    forward(params, config, tokens, tap=tap)
    for layer in range(config.n_layer):
        o = params["blocks"][layer]["attn"]["o"]["w"]
        pattern, v = (seen[f"blocks.{layer}.attn.{site}"].clone() for site in ("pattern", "v"))
        v[:, 2] = 0
        got = value_weights(pattern, v, o)
        close(got.sum(-1)[..., 0], torch.ones(3, config.n_head))
        assert (got[..., 2] == 0).all()
        for h in range(config.n_head):
            length = (
                v[:, :, h * config.n_kv_head // config.n_head] @ o[:, h * config.d_head :][:, : config.d_head].T
            ).norm(dim=-1)
            brought = pattern[:, h] * length[:, None]
            total = brought.sum(-1, keepdim=True)
            close(got[:, h], torch.where(total > 0, brought / total, 0))
    if config.window != 1:
        plain, weighted = (patterns(params, config, tokens, value_weighted=way) for way in (False, True))
        assert (plain - weighted).abs().max() > 1e-3


def test_heads_that_look_alike_are_alike():
    eye, first = torch.eye(5, dtype=torch.float64), torch.zeros(5, 5, dtype=torch.float64)
    first[:, 0] = 1
    even = null_pattern(architecture("gpt2", n_vocab=9, n_context=5, n_layer=1, d_model=4, n_head=1), 5)[0]
    got = compare_heads(torch.stack([eye, first, even])[:, None])
    mean = (1 / 2 + 1 / 3 + 1 / 4 + 1 / 5) / 4
    close(got, [[1, 0, mean], [0, 1, mean], [mean, mean, 1]])


def test_a_model_without_blocks_has_no_heads():
    config = CONFIGS["no_layer"]
    for ask_for in (measure, patterns):
        with pytest.raises(ValueError, match="n_layer: expected a model with heads, got 0 blocks"):
            ask_for(random_params(config), config, random_tokens(config))
