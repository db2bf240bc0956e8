"""Induction heads: the hand-built model's exact scores, what a trained one must show, and every formula by its
definition on every architecture.
"""

import math

import pytest
import torch
from cases import CONFIGS, Rows, random_params, random_tokens
from models import hand_built, repeat_loss

from gptcore import forward, generator, init_params, nats
from gptcore.config import architecture
from gptcore.interpret.attention import DETECTORS, SHAPES, find_heads, join, strength
from gptcore.interpret.induction import (
    Repeats,
    composition,
    composition_baseline,
    copying_eigenvalues,
    find_pairs,
    head_weights,
    history,
    n_ablated,
    repeats,
    resampled,
    scan,
    shifted,
    stripe,
    strong,
    summarise,
)
from gptcore.interpret.taps import chain, record

HEADED = {name: config for name, config in CONFIGS.items() if config.n_layer}
every_config = pytest.mark.parametrize("config", HEADED.values(), ids=HEADED.keys())


def close(got, wanted, atol=1e-10):
    torch.testing.assert_close(got, torch.as_tensor(wanted, dtype=got.dtype), rtol=0, atol=atol)


# -------------------------------------------------------------------------------------------------------- the sequences


def test_sequences_are_a_bos_and_the_same_random_tokens_twice():
    config = CONFIGS["gpt2"]
    group = repeats(config, 30, 19, generator=generator(1), bos=60, exclude=[0, 7, 5000])
    tokens, length, n_bos = group
    assert (tokens.shape, length, n_bos) == ((30, 39), 19, 1)
    assert (tokens[:, 0] == 60).all()
    assert torch.equal(tokens[:, 1:20], tokens[:, 20:])
    assert all(len(set(row[1:20].tolist())) == 19 for row in tokens)
    assert not {0, 7, 60} & set(tokens[:, 1:].flatten().tolist())
    assert set(tokens[:, 1:].flatten().tolist()) == set(range(60)) - {0, 7}  # 570 draws of 58: none missed, p < 0.002
    again = repeats(config, 30, 19, generator=generator(1), bos=60, exclude=[0, 7, 5000])
    assert torch.equal(again.tokens, tokens)
    assert repeats(config, 2, 20, generator=generator(1)).tokens.shape == (2, 40)


def test_few_tokens_are_drawn_with_replacement_and_none_is_refused():
    config = architecture("gpt2", n_vocab=2, n_context=40, n_layer=1, d_model=8, n_head=1)
    assert set(repeats(config, 5, 20, generator=generator(1)).tokens.flatten().tolist()) == {0, 1}
    assert (repeats(config, 5, 19, generator=generator(1), bos=1).tokens[:, 1:] == 0).all()
    with pytest.raises(ValueError, match="exclude: expected it to leave an id"):
        repeats(config, 5, 5, generator=generator(1), bos=1, exclude=[0])


@pytest.mark.parametrize(("length", "bos", "most"), [(21, None, 20), (20, 3, 19), (1, None, 20)])
def test_what_does_not_fit_twice_is_refused(length, bos, most):
    with pytest.raises(ValueError, match=f"seq_length: expected 2 to {most}, so that it fits 40 twice, got {length}"):
        repeats(CONFIGS["gpt2"], 5, length, generator=generator(1), bos=bos)


# ------------------------------------------------------------------------------------------------------ the known model


def known(bos, n=1, n_vocab=13):
    params, config = hand_built(n_vocab=n_vocab, n_context=2 * n_vocab - 1)
    return params, config, repeats(config, n, n_vocab - 1, generator=generator(3), bos=n_vocab - 1 if bos else None)


@pytest.mark.parametrize("bos", [False, True])
def test_the_hand_built_model_repeats(bos):
    """Every token of the second copy follows as it did in the first; without a BOS its first row is torn in two."""
    params, config, (tokens, length, _) = known(bos)
    logits, _ = forward(params, config, tokens)
    assert torch.equal(logits[0, length + 1 : -1].argmax(-1), tokens[0, length + 2 :])


@pytest.mark.parametrize(("bos", "exact"), [(False, 23 / 24), (True, 1.0)])
def test_the_hand_built_induction_head_has_the_stripe(bos, exact):
    """4.3: without a BOS row q = T splits over keys 0 and 1. Seen to fail with a stripe at q - T, where the
    duplicate-token head looks.
    """
    params, config, group = known(bos)
    found = summarise(scan(params, config, group))
    for name in ("stripe", "prefix"):
        close(found.scores[name].value, [[0, 0], [exact, 0]], atol=1e-5)
    assert strong(found.scores["stripe"].corrected().value[1, 0]) == "strong"
    assert strength(found.scores, "duplicate")[0, 1] > 0.4
    assert found.shifted == []
    if bos:
        close(found.copying, [[0, 0], [1, 0]], atol=1e-5)
        assert found.second.value < 0.01
        assert found.gain.value == pytest.approx(found.first.value - found.second.value)


def test_the_hand_built_weights_copy_and_compose():
    for n_vocab, wanted in ((13, 0.277350), (12, 0.288675)):
        params, config, _ = known(True, n_vocab=n_vocab)
        close(copying_eigenvalues(params, config), [[0, 0], [1, 0]], atol=1e-5)
        close(composition(params, config)[0, :, 1], [[wanted, 0], [0, 0]], atol=1e-5)


def test_the_true_pair_ranks_first_and_ablation_agrees():
    """Both heads of the pair are worth the whole gain; the others nothing. A baseline pair is below it."""
    params, config, group = known(True, n=12)
    found = summarise(scan(params, config, group), generator=generator(0))
    pairs = find_pairs(params, config, group, found=found, generator=generator(0))
    first, second = pairs
    assert (first.earlier, first.later, second.earlier) == ((0, 0), (1, 0), (0, 1))
    assert first.z > 10
    assert second.composition == 0
    assert (first.previous, first.copying, first.prefix) == pytest.approx((1, 1, 1), abs=1e-5)
    assert first.without_earlier.prefix > 0.9
    assert first.without_earlier.gain > found.gain.value - 1
    assert first.without_later.prefix == pytest.approx(0, abs=1e-9)
    assert first.without_later.gain > found.gain.value - 1
    assert second.without_earlier == pytest.approx((0, 0), abs=1e-6)
    assert n_ablated(pairs) == 3
    assert find_pairs(params, config, group, found=found, generator=generator(0), least=2) == []


def test_another_sequences_output_is_put_in():
    params, config, group = known(True, n=4)
    tap, seen = record(config, "blocks.0.attn.z")
    edited_tap, edited = record(config, ["blocks.0.attn.z", "blocks.1.attn.q"])
    forward(params, config, group.tokens, tap=tap)
    forward(params, config, group.tokens, tap=chain(resampled(config, 0, 0), edited_tap))
    before, after = seen["blocks.0.attn.z"], edited["blocks.0.attn.z"]
    assert torch.equal(after[:, :, 1], before[:, :, 1])
    assert torch.equal(after[1:, :, 0], before[:-1, :, 0])
    assert torch.equal(after[0, :, 0], before[-1, :, 0])
    with pytest.raises(ValueError, match="n_sequences: expected at least 2 of each length for an edit, got 1"):
        scan(params, config, *[group._replace(tokens=group.tokens[:1])], tap=resampled(config, 0, 0))


# ---------------------------------------------------------------------------------------------------- the trained model


def test_the_trained_model_repeats(trained):
    params, config = trained
    assert repeat_loss(params, config) < 0.1
    assert all((p["mlp"][name]["w"] == 0).all() for p in params["blocks"] for name in ("up", "down"))


def test_the_trained_model_has_induction_heads(trained):
    """4.3: found by their scores, their weights, and what is lost without them."""
    params, config = trained
    groups = [repeats(config, 80, 20, generator=generator(5)), repeats(config, 20, 12, generator=generator(6))]
    found = summarise(scan(params, config, *groups), generator=generator(2))
    ((layer, head, best),) = find_heads(found.scores, "stripe", 1)
    assert (layer, best >= 0.75) == (1, True)
    score = found.scores["stripe"]
    assert score.low[layer, head] < score.value[layer, head] < score.high[layer, head]
    ((layer, _, best),) = find_heads(found.scores, "previous", 1)
    assert (layer, best >= 0.4) == (0, True)
    assert copying_eigenvalues(params, config)[1].max() >= 0.9
    assert found.gain.low > 5
    pairs = find_pairs(params, config, *groups, found=found, generator=generator(4), n_later=1)
    assert pairs[0].z >= 5
    assert pairs[0].without_earlier.gain >= 1.0
    assert pairs[0].without_later.gain >= 0.3
    assert pairs[0].without_earlier.prefix > 0.3


# ------------------------------------------------------------------------------------------------------ by definition


@every_config
def test_a_fresh_model_has_no_induction(config):
    """Corrected scores within 0.02 of 0; QK-norm gives fresh heads opinions: 0.1."""
    groups = [
        repeats(config, 40, 19, generator=generator(1), bos=0),
        repeats(config, 10, 9, generator=generator(2), bos=0),
    ]
    found = summarise(scan(init_params(config, generator(1)), config, *groups))
    for name in ("stripe", "prefix", "duplicate"):
        numbers = strength(found.scores, name)
        assert (numbers[numbers.isfinite()].abs() <= (0.1 if config.qk_norm else 0.02)).all(), name
    assert tuple(found.scores) == (*DETECTORS, "stripe", *SHAPES)
    assert abs(found.gain.value) < 0.1


@every_config
def test_a_scan_is_what_its_parts_say(config):
    """Stripe, offsets, losses and copying of a repeat with few tokens, by loops over the recorded forward."""
    params = random_params(config)
    tokens = random_tokens(config, length=6) % 4
    group = Repeats(torch.cat([torch.full((3, 1), 9), tokens, tokens], dim=1), 6, 1)
    tap, seen = record(config, ["blocks.*.attn.pattern", "blocks.*.attn.z"])
    forward(params, config, group.tokens, tap=tap)
    found = scan(params, config, group)
    unembed = params.get("head", {}).get("w", params["embed"]["w"])[: config.n_vocab]
    result = summarise(found)
    for layer in range(config.n_layer):
        pattern, z = (seen[f"blocks.{layer}.attn.{site}"] for site in ("pattern", "z"))
        rows = range(7, 13)
        close(result.scores["stripe"].value[layer], sum(pattern[:, :, q, q - 5].mean(0) for q in rows) / 6)
        assert found.profiles[6].shape == (config.n_layer, config.n_head, 12)
        for j in range(-5, 7):
            keys = [(q, q - 6 + j) for q in rows if q - 6 + j >= 0]
            wanted = sum(pattern[:, :, q, k].mean(0) for q, k in keys) / 6
            close(found.profiles[6][layer, :, j + 5], wanted)
        o = head_weights(params, config, layer).o
        for head in range(config.n_head):
            shares = []
            for b in range(3):
                for q in rows:
                    logits = z[b, q, head] @ o[head].T @ unembed.T
                    raised = (logits - logits.mean()).clamp(min=0)
                    total = raised[list(set(group.tokens[b].tolist()))].sum()
                    if total > 0:
                        shares.append((raised[group.tokens[b, pattern[b, head, q].argmax()]] / total).item())
            close(result.copying[layer, head], 2 * sum(shares) / len(shares) - 1)
    losses = nats(params, config, group.tokens[:, :-1], group.tokens[:, 1:])
    close(found.nats, torch.stack([losses[:, 1:6].mean(1), losses[:, 7:12].mean(1)], dim=1))


@every_config
def test_eigenvalues_are_those_of_the_whole_matrix(config):
    """W_E W_V W_O W_U is V x V, its rows what a token makes of the logits; W_V W_O is C x C."""
    params = random_params(config)
    embed = params["embed"]["w"][: config.n_vocab]
    unembed = params.get("head", {}).get("w", params["embed"]["w"])[: config.n_vocab]
    for space, before, after in (("tokens", embed, unembed.T), ("residual", None, None)):
        got = copying_eigenvalues(params, config, space)
        assert got.shape == (config.n_layer, config.n_head)
        for layer in range(config.n_layer):
            w = head_weights(params, config, layer)
            for head in range(config.n_head):
                whole = w.v[head].T @ w.o[head].T
                whole = whole if before is None else before @ whole @ after
                values = torch.linalg.eigvals(whole)
                close(got[layer, head], values.sum().real / values.abs().sum(), atol=1e-6)


@every_config
def test_composition_is_that_of_the_whole_matrices(config):
    params = random_params(config)
    weights = [head_weights(params, config, layer) for layer in range(config.n_layer)]
    for kind in "qkv":
        got = composition(params, config, kind)
        for first in range(config.n_layer):
            assert got[first, :, : first + 1].isnan().all()
            for second in range(first + 1, config.n_layer):
                for one in range(config.n_head):
                    for two in range(config.n_head):
                        ov = weights[first].o[one] @ weights[first].v[one]
                        w = weights[second]
                        qk = w.q[two].T @ w.k[two]
                        m = {"q": qk.T, "k": qk, "v": w.o[two] @ w.v[two]}[kind]
                        close(got[first, one, second, two], (m @ ov).norm() / m.norm() / ov.norm())
    silent = random_params(config)
    silent["blocks"][0]["attn"]["v"]["w"].zero_()
    assert (composition(silent, config)[0, :, 1:] == 0).all()
    assert (copying_eigenvalues(silent, config)[0] == 0).all()


def test_grouped_heads_share_their_keys_and_values():
    config = CONFIGS["gqa"]
    params = random_params(config)
    w = head_weights(params, config, 1)
    assert torch.equal(w.k[0], w.k[1])
    assert not torch.equal(w.k[1], w.k[2])
    tap, seen = record(
        config, ["blocks.1.norm_1", "blocks.1.attn.q", "blocks.1.attn.v", "blocks.1.attn.z", "blocks.1.attn.out"]
    )
    forward(params, config, random_tokens(config), tap=tap)
    close(torch.einsum("btc,hdc->bthd", seen["blocks.1.norm_1"], w.q), seen["blocks.1.attn.q"])
    close(torch.einsum("bthd,hcd->btc", seen["blocks.1.attn.z"], w.o), seen["blocks.1.attn.out"])


def test_random_heads_compose_a_little():
    """0.126 +- 0.007 at width 64, heads of 16; the standard error of the mean of 100 is 0.0007: five of them."""
    config = architecture("gpt2", n_vocab=9, n_context=8, n_layer=2, d_model=64, n_head=4)
    mean, spread = composition_baseline(config, generator=generator(3))
    assert mean == pytest.approx(0.126, abs=0.0035)
    assert spread == pytest.approx(0.007, abs=0.0025)


def test_a_scan_takes_one_row_of_forward_a_sequence():
    """Seen to fail with a second forward for the losses."""
    config = CONFIGS["llama"]
    params = random_params(config)
    groups = [repeats(config, 8, 20, generator=generator(1)), repeats(config, 2, 10, generator=generator(2))]
    with Rows() as rows:
        scan(params, config, *groups)
    assert rows.n == 10


def test_scans_of_parts_make_the_whole():
    config = CONFIGS["gpt2"]
    params, group = random_params(config), repeats(CONFIGS["gpt2"], 6, 20, generator=generator(1))
    whole = scan(params, config, group)
    parts = [scan(params, config, group._replace(tokens=group.tokens[rows])) for rows in (slice(4), slice(4, 6))]
    for got, wanted in zip(join([part.sums for part in parts])[1:], whole.sums[1:], strict=True):
        close(got, wanted)
    close(torch.cat([part.nats for part in parts]), whole.nats)
    close(sum(part.copied for part in parts), whole.copied)
    close((4 * parts[0].profiles[20] + 2 * parts[1].profiles[20]) / 6, whole.profiles[20])


def test_a_shifted_head_has_one_offset_at_two_lengths():
    """j = 11 at both lengths is found; j = 1, 0, the previous token (j = T - 1) and a weak one are not."""
    profiles = {t: torch.zeros(1, 5, 2 * t, dtype=torch.float64) for t in (20, 30)}
    for t, profile in profiles.items():
        for head, (j, weight) in enumerate([(11, 0.6), (1, 0.9), (0, 0.9), (t - 1, 0.9), (5, 0.2)]):
            profile[0, head, j + t - 1] = weight
    profiles[30] *= 0.9
    assert shifted(profiles) == [(0, 0, 11, pytest.approx(0.54))]
    assert shifted({20: profiles[20]}) == []


def test_the_stripe_is_one_key_a_row_of_the_second_copy():
    group = Repeats(torch.zeros(2, 9, dtype=torch.long), 4, 1)
    assert stripe(group).nonzero().tolist() == [[5, 2], [6, 3], [7, 4], [8, 5]]


def test_the_moving_picture_is_every_step_by_itself():
    """And one step at a time: the next params are asked for when the last ones were measured."""
    config, loaded = CONFIGS["gpt2"], []
    group = repeats(config, 6, 20, generator=generator(1))

    def steps():
        for step in (10, 20):
            loaded.append(step)
            yield step, random_params(config, seed=step)

    picture = history(steps(), config, group, generator=generator(7))
    step, first = next(picture)
    assert (step, loaded) == (10, [10])
    alone = summarise(scan(random_params(config, seed=10), config, group), generator=generator(7))
    close(first.scores["stripe"].value, alone.scores["stripe"].value)
    close(first.scores["stripe"].low, alone.scores["stripe"].low)
    assert [step for step, _ in picture] == [20]


@pytest.mark.parametrize(
    ("score", "word"), [(0.71, "strong"), (0.7, "moderate"), (0.5, "weak"), (0.3, "minimal"), (math.nan, "minimal")]
)
def test_a_word_for_a_score(score, word):
    assert strong(score) == word


def test_what_is_unknown_is_refused():
    config = CONFIGS["gpt2"]
    params = random_params(config)
    with pytest.raises(ValueError, match="space: expected tokens or residual, got 'x'"):
        copying_eigenvalues(params, config, "x")
    with pytest.raises(ValueError, match="kind: expected q, k or v, got 'x'"):
        composition(params, config, "x")
    with pytest.raises(ValueError, match="n_layer: expected a model with heads"):
        scan(random_params(CONFIGS["no_layer"]), CONFIGS["no_layer"], repeats(config, 2, 5, generator=generator(0)))
