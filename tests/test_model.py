"""Laws 1, 2 and 3 of the design on every architecture axis; weights and their init; the loss; transforms."""

import math
from functools import partial

import pytest
import torch
from cases import CONFIGS, CUTS, TINY, random_params, random_tokens, recorder

from gptcore import tree
from gptcore.cache import fork, init_cache, with_lengths
from gptcore.config import ARCHITECTURES, architecture
from gptcore.model import (
    activation_spec,
    block,
    check_params,
    count_params,
    embed,
    forward,
    init_params,
    loss,
    nats,
    param_spec,
    positions_of,
    run_blocks,
    unembed,
)

every_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
close = partial(torch.testing.assert_close, rtol=0, atol=1e-10)


# ------------------------------------------------------------------------------------------------- the cache's laws


@every_config
@pytest.mark.parametrize("cuts", CUTS, ids=["whole", "uneven", "singles"])
def test_chunked_equals_one_shot(config, cuts):
    """However the tokens arrive, the logits agree. Seen to fail with SDPA's is_causal, aligned to the first key."""
    params, tokens = random_params(config), random_tokens(config)
    whole, none = forward(params, config, tokens)
    cache, parts = init_cache(config, len(tokens), dtype=torch.float64), []
    for start, end in zip((0, *cuts), cuts, strict=False):
        logits, cache = forward(params, config, tokens[:, start:end], cache)
        parts.append(logits)
    close(torch.cat(parts, dim=1), whole)
    assert none is None
    assert cache.length.tolist() == [40, 40, 40]
    assert cache.bound == 40


@every_config
def test_ragged_rows_are_each_as_if_alone(config):
    """Right-padded prompts of 1, 9 and 20 tokens, then 8 more each, against every row by itself."""
    params, tokens, lengths = random_params(config), random_tokens(config), [1, 9, 20]
    _, cache = forward(params, config, tokens[:, :20], init_cache(config, 3, dtype=torch.float64))
    cache = with_lengths(cache, lengths)
    more = torch.stack([row[n : n + 8] for row, n in zip(tokens, lengths, strict=True)])
    together = []
    for step in range(8):
        logits, cache = forward(params, config, more[:, step : step + 1], cache)
        together.append(logits)
    for row, n in enumerate(lengths):
        alone, _ = forward(params, config, tokens[row : row + 1, : n + 8])
        close(torch.cat(together, dim=1)[row], alone[0, n:])


@every_config
def test_an_old_handle_stays_valid(config):
    """Law 2: go on from an older handle after newer tokens were appended. Seen to fail with a cache that shifts."""
    params, tokens = random_params(config), random_tokens(config)
    _, old = forward(params, config, tokens[:, :10], init_cache(config, 3, dtype=torch.float64))
    forward(params, config, tokens[:, 10:30], old)
    again, _ = forward(params, config, tokens[:, 20:25], old)
    wanted, _ = forward(params, config, torch.cat([tokens[:, :10], tokens[:, 20:25]], dim=1))
    close(again, wanted[:, 10:])


def test_two_continuations_need_a_fork():
    config, params = CONFIGS["gpt2"], random_params(CONFIGS["gpt2"])
    tokens = random_tokens(config)
    _, trunk = forward(params, config, tokens[:, :10], init_cache(config, 3, dtype=torch.float64))
    _, left = forward(params, config, tokens[:, 10:20], fork(trunk))
    _, right = forward(params, config, tokens[:, 20:30], trunk)
    step = tokens[:, :1]
    wanted, _ = forward(params, config, torch.cat([tokens[:, :20], step], dim=1))
    close(forward(params, config, step, left)[0], wanted[:, -1:])
    wanted, _ = forward(params, config, torch.cat([tokens[:, :10], tokens[:, 20:30], step], dim=1))
    close(forward(params, config, step, right)[0], wanted[:, -1:])


def test_what_lies_above_a_length_never_leaks():
    """NaN above the length of a right-padded row changes nothing once it is overwritten or invisible."""
    config = CONFIGS["llama"]
    params, tokens = random_params(config), random_tokens(config)
    _, cache = forward(params, config, tokens[:, :20], init_cache(config, 3, dtype=torch.float64))
    wanted, _ = forward(params, config, tokens[:, 10:14], with_lengths(fork(cache), [10, 10, 10]))
    for buffer in (*cache.k, *cache.v):
        buffer[:, :, 14:] = torch.nan
    close(forward(params, config, tokens[:, 10:14], with_lengths(cache, [10, 10, 10]))[0], wanted)


def test_the_cache_refuses_what_it_cannot_hold():
    config, params = CONFIGS["gpt2"], random_params(CONFIGS["gpt2"])
    tokens, cache = random_tokens(config), init_cache(CONFIGS["gpt2"], 3, dtype=torch.float64)
    _, cache = forward(params, config, tokens, cache)
    with pytest.raises(ValueError, match="tokens: expected at most n_context=40 positions a row, got 41"):
        forward(params, config, tokens[:, :1], cache)
    with pytest.raises(ValueError, match=r"lengths: expected 3 numbers in 0..40, got \[1, 2, 41\]"):
        with_lengths(cache, [1, 2, 41])
    with pytest.raises(ValueError, match="tokens: expected 3 rows as the cache has, got 2"):
        forward(params, config, tokens[:2, :1], init_cache(config, 3, dtype=torch.float64))


@pytest.mark.parametrize("leaf", ["embed.w", "blocks.1.attn.v.w"])
def test_gradients_through_a_cache_are_refused(leaf):
    """Seen to fail for a weight inside a block while only the embedding was asked."""
    config, params = CONFIGS["gpt2"], random_params(CONFIGS["gpt2"])
    flat = {name: t.clone().requires_grad_(name == leaf) for name, t in tree.walk(params)}
    with pytest.raises(ValueError, match="cache: expected no gradients through it"):
        forward(tree.nest(flat), config, random_tokens(config), init_cache(config, 3, dtype=torch.float64))


@pytest.mark.parametrize(
    "tokens",
    [torch.zeros(3).long(), torch.zeros(2, 3), torch.zeros(2, 3).bool(), torch.zeros(2, 0).long(), [1, 2]],
    ids=["1-d", "floats", "bools", "none", "a list"],
)
def test_tokens_of_another_kind_are_refused(tokens):
    with pytest.raises(ValueError, match=r"tokens: expected an integer tensor \(B,T\), T at least 1, got"):
        forward(random_params(CONFIGS["gpt2"]), CONFIGS["gpt2"], tokens)


@pytest.mark.parametrize("score", [loss, nats], ids=["loss", "nats"])
def test_targets_of_another_kind_are_refused(score):
    """Only -100 is left out: -1, which others leave out, is no id. Seen to fail with targets clamped to 0."""
    config, params = CONFIGS["gpt2"], random_params(CONFIGS["gpt2"])
    tokens = random_tokens(config)
    with pytest.raises(ValueError, match=r"targets: expected \(3, 40\) as the tokens, got \(40, 3\)"):
        score(params, config, tokens, tokens.T)
    with pytest.raises((RuntimeError, IndexError), match="out of bounds"):
        score(params, config, tokens, torch.where(tokens == tokens[0, 0], -1, tokens))


@pytest.mark.parametrize("name", ["gpt2", "llama", "alibi", "window"])
def test_a_block_alone_is_causal_wherever_its_positions_begin(name):
    """Without a cache the keys are the new tokens. Seen to fail with absolute positions compared to their indices."""
    config, params = CONFIGS[name], random_params(CONFIGS[name])
    x = torch.randn(2, 6, config.d_model, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    run = lambda way: block(x, params["blocks"][0], config, torch.arange(5, 11)[None], attention=way)
    close(run("explicit"), run("fused"))


# --------------------------------------------------------------------------------------------------- looking inside


@every_config
def test_a_tap_that_changes_nothing_changes_nothing(config):
    """Law 3: explicit = fused, every site of activation_spec is seen once, in order, in its shape."""
    params, tokens = random_params(config), random_tokens(config)
    tap, seen = recorder()
    looked, _ = forward(params, config, tokens, tap=tap)
    close(looked, forward(params, config, tokens)[0])
    silent, _ = forward(params, config, tokens, tap=lambda name, value: value)
    assert torch.equal(looked, silent)
    sizes = {"B": 3, "T": 40, "S": 40}
    spec = {name: tuple(sizes.get(n, n) for n in shape) for name, shape in activation_spec(config).items()}
    assert {name: tuple(value.shape) for name, value in seen.items()} == spec
    assert list(seen) == list(spec)


@every_config
def test_a_cached_tap_sees_the_new_tokens_of_the_same_values(config):
    params, tokens = random_params(config), random_tokens(config)
    tap, whole = recorder()
    forward(params, config, tokens, tap=tap)
    _, cache = forward(params, config, tokens[:, :30], init_cache(config, 3, dtype=torch.float64))
    tap, tail = recorder()
    forward(params, config, tokens[:, 30:], cache, tap=tap)
    for name, value in tail.items():
        rows = whole[name][:, :, 30:] if name.endswith(("scores", "pattern")) else whole[name][:, 30:]
        close(value, rows)


def test_an_edit_at_a_site_reaches_everything_after_it():
    config, params = CONFIGS["gpt2"], random_params(CONFIGS["gpt2"])
    tokens = random_tokens(config)
    tap, clean = recorder({"blocks.1.resid_post"})
    wanted, _ = forward(params, config, tokens, tap=tap)
    patched, _ = forward(params, config, tokens.flip(1), tap=lambda name, value: clean.get(name, value))
    close(patched, wanted)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda value: None, "tap at blocks.0.attn.z: expected .*, got NoneType"),
        (lambda value: value[:1], r"tap at blocks.0.attn.z: expected \(\(3, 40, 4, 10\)"),
        (lambda value: value.float(), "tap at blocks.0.attn.z: expected .*float64"),
    ],
    ids=["None", "another shape", "another dtype"],
)
def test_a_tap_that_returns_something_else_is_named(answer, message):
    tap = lambda name, value: answer(value) if name == "blocks.0.attn.z" else value
    with pytest.raises(ValueError, match=message):
        forward(random_params(CONFIGS["gpt2"]), CONFIGS["gpt2"], random_tokens(CONFIGS["gpt2"]), tap=tap)


@pytest.mark.parametrize("part", ["embed", "blocks.0.attn.z", "norm_f"])
def test_the_parts_check_a_tap_as_the_whole_does(part):
    config, params = CONFIGS["gpt2"], random_params(CONFIGS["gpt2"])
    tap = lambda name, value: None if name == part else value
    x = embed(params, config, random_tokens(config))
    calls = {
        "embed": lambda: embed(params, config, random_tokens(config), tap=tap),
        "blocks.0.attn.z": lambda: run_blocks(params, config, x, tap=tap),
        "norm_f": lambda: unembed(params, config, x, tap=tap),
    }
    with pytest.raises(ValueError, match=f"tap at {part}: expected .*, got NoneType"):
        calls[part]()


def test_positions_are_for_reading():
    tap = lambda name, value: value + 1 if name == "positions" else value
    with pytest.raises(ValueError, match="tap at positions: expected the tensor it was given"):
        forward(random_params(CONFIGS["gpt2"]), CONFIGS["gpt2"], random_tokens(CONFIGS["gpt2"]), tap=tap)


@every_config
def test_starting_in_the_middle_is_bit_identical(config):
    params, tokens = random_params(config), random_tokens(config)
    whole, _ = forward(params, config, tokens)
    x = embed(params, config, tokens)
    for first in range(config.n_layer + 1):
        top, _ = run_blocks(params, config, x, first=first)
        assert torch.equal(unembed(params, config, top), whole)
        if first < config.n_layer:
            x = block(x, params["blocks"][first], config, positions_of(tokens))


@every_config
def test_no_token_sees_a_later_one(config):
    params, tokens = random_params(config), random_tokens(config)
    changed = tokens.clone()
    changed[:, 25] = (changed[:, 25] + 1) % config.n_vocab
    before, after = forward(params, config, tokens)[0], forward(params, config, changed)[0]
    assert torch.equal(before[:, :25], after[:, :25])
    assert not torch.allclose(before[:, 25], after[:, 25])


def test_a_window_hides_what_is_far_and_only_that():
    """One layer with a window of 7: token 20 reaches queries 20..26 and no other."""
    config = architecture("alibi", **TINY | {"n_layer": 1, "window": 7})
    params, tokens = random_params(config), random_tokens(config)
    changed = tokens.clone()
    changed[:, 20] = (changed[:, 20] + 1) % config.n_vocab
    moved = (forward(params, config, tokens)[0] - forward(params, config, changed)[0]).abs().amax((0, 2)) > 0
    assert moved.nonzero().flatten().tolist() == list(range(20, 27))


# ------------------------------------------------------------------------------------------------- weights and init


@every_config
def test_init_follows_the_spec(config):
    """Means and standard deviations within five standard errors for each of some 30 leaves: false alarm below 1e-4."""
    params = init_params(config, torch.Generator().manual_seed(3))
    check_params(params, config)
    for name, leaf in tree.walk(params):
        spec, n = param_spec(config)[name], leaf.numel()
        if spec.std == 0:
            assert torch.equal(leaf, torch.full_like(leaf, spec.mean))
        else:
            assert abs(leaf.mean() - spec.mean) < 5 * spec.std / math.sqrt(n)
            assert abs(leaf.std() / spec.std - 1) < 5 / math.sqrt(2 * n)


def test_the_same_generator_gives_the_same_weights():
    config = CONFIGS["phi"]
    a, b, c = (init_params(config, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert all(torch.equal(x, y) for x, y in zip(tree.leaves(a), tree.leaves(b), strict=True))
    assert not torch.equal(a["embed"]["w"], c["embed"]["w"])


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("n_vocab", [4096, 100_277])
def test_an_untrained_model_is_as_unsure_as_its_vocabulary_is_large(name, n_vocab):
    config = architecture(name, n_vocab=n_vocab, n_layer=2)
    params, tokens = init_params(config, torch.Generator().manual_seed(0)), random_tokens(config, 2, 33)
    assert abs(nats(params, config, tokens[:, :-1], tokens[:, 1:]).mean() - math.log(n_vocab)) < 0.2


GPT2_124M = {"n_vocab": 50_257, "n_context": 1024, "n_layer": 12, "d_model": 768, "n_head": 12}
PYTHIA_70M = {"n_vocab": 50_304, "n_layer": 6, "d_model": 512, "n_head": 8}
PHI_2 = {"n_vocab": 51_200, "n_layer": 32, "d_model": 2560, "n_head": 32}
SMOLLM2_135M = {"n_vocab": 49_152, "n_layer": 30, "d_model": 576, "n_head": 9, "n_kv_head": 3, "d_ff": 1536}
QWEN2_05B = {
    "n_vocab": 151_936,
    "n_layer": 24,
    "d_model": 896,
    "n_head": 14,
    "n_kv_head": 2,
    "d_ff": 4864,
    "bias": "qkv",
}
QWEN3_06B = {
    "n_vocab": 151_936,
    "n_layer": 28,
    "d_model": 1024,
    "n_head": 16,
    "n_kv_head": 8,
    "d_head": 128,
    "d_ff": 3072,
}


@pytest.mark.parametrize(
    ("arch", "sizes", "count"),
    [
        ("gpt2", {"n_vocab": 4096}, 1_350_400),
        ("gpt2", {"n_vocab": 100_277, "d_model": 256}, 28_896_000),
        ("gpt2", {"n_vocab": 100_277, "d_model": 256, "n_layer": 6, "n_vocab_padded": 100_352}, 30_475_520),
        ("seed", {"n_vocab": 100_277}, 13_628_800),
        ("seed", {"n_vocab": 100_277, "d_model": 256}, 28_830_464),
        ("gpt2", GPT2_124M, 124_439_808),
        ("neox", PYTHIA_70M, 70_426_624),
        ("phi", PHI_2, 2_779_683_840),
        ("llama", SMOLLM2_135M, 134_515_008),
        ("llama", QWEN2_05B, 494_032_768),
        ("qwen3", QWEN3_06B, 596_049_920),
    ],
    ids=[
        "quick",
        "medium",
        "full",
        "seed-quick",
        "seed-medium",
        "GPT-2",
        "Pythia",
        "Phi-2",
        "SmolLM2",
        "Qwen2",
        "Qwen3",
    ],
)
def test_parameter_counts_are_the_published_ones(arch, sizes, count):
    assert count_params(architecture(arch, **sizes)) == count


def test_a_wrong_tree_is_named():
    config = CONFIGS["gpt2"]
    params = init_params(config, torch.Generator())
    params["blocks"][1]["attn"]["q"]["w"] = torch.zeros(3, 4)
    with pytest.raises(ValueError, match=r"blocks.1.attn.q.w: expected \(40, 40\), got \(3, 4\)"):
        check_params(params, config)
    del params["blocks"][1]["attn"]["q"]["w"]
    params["norm_g"] = {"w": torch.ones(1)}
    with pytest.raises(ValueError, match=r"weights: missing \['blocks.1.attn.q.w'\], not expected \['norm_g.w'\]"):
        check_params(params, config)


def test_a_tied_head_is_one_leaf_and_a_padded_vocabulary_changes_nothing():
    assert not [name for name in param_spec(CONFIGS["gpt2"]) if name.startswith("head")]
    padded, plain = CONFIGS["padded"], architecture("phi", **TINY)
    params, tokens = random_params(padded), random_tokens(padded)
    cut = tree.map(lambda t: t[: plain.n_vocab] if t.shape[0] == padded.n_vocab_padded else t, params)
    close(forward(params, padded, tokens)[0], forward(cut, plain, tokens)[0])
    targets = tokens.roll(-1, 1)
    close(loss(params, padded, tokens, targets), loss(cut, plain, tokens, targets))


# ---------------------------------------------------------------------------------------------- loss and transforms


@every_config
def test_loss_is_the_mean_of_nats_and_so_are_its_gradients(config):
    """The chunked loss with its own backward against plain autograd in float64, ignored targets included."""
    params, tokens = random_params(config), random_tokens(config)
    targets = tokens.roll(-1, 1)
    targets[0, :5] = -100

    def gradients(f):
        leaves = tree.map(lambda t: t.clone().requires_grad_(), params)
        value = f(leaves)
        return [value.detach(), *torch.autograd.grad(value, tree.leaves(leaves))]

    plain = lambda p: nats(p, config, tokens, targets).sum() / (targets != -100).sum()
    for got, wanted in zip(gradients(lambda p: loss(p, config, tokens, targets)), gradients(plain), strict=True):
        close(got, wanted)
    assert (nats(params, config, tokens, targets)[0, :5] == 0).all()


@pytest.mark.parametrize("name", ["gpt2", "llama", "phi", "seed", "softcaps"])
def test_explicit_attention_gives_the_same_loss(name):
    config, params = CONFIGS[name], random_params(CONFIGS[name])
    tokens = random_tokens(config)
    ways = [loss(params, config, tokens, tokens, attention=way) for way in ("fused", "explicit")]
    close(*ways)


def test_dropout_happens_iff_it_is_asked_for():
    config, params = CONFIGS["seed"], random_params(CONFIGS["seed"])
    tokens = random_tokens(config)
    run = lambda seed: forward(params, config, tokens, dropout=seed)[0]
    assert torch.equal(run(None), run(None))
    assert torch.equal(run(torch.Generator().manual_seed(5)), run(torch.Generator().manual_seed(5)))
    assert not torch.allclose(run(torch.Generator().manual_seed(5)), run(torch.Generator().manual_seed(6)))
    assert not torch.allclose(run(torch.tensor(1)), run(None))
    seeds = torch.tensor([7, 8, 9])  # one a row: a row's mask does not depend on who shares the batch
    close(run(seeds)[1:2], forward(params, config, tokens[1:2], dropout=seeds[1:2])[0])
    still = architecture("seed", **TINY, dropout=0.0)
    assert torch.equal(forward(params, still, tokens)[0], forward(params, still, tokens, dropout=torch.tensor(1))[0])


@pytest.mark.parametrize("name", ["gpt2", "llama", "alibi", "phi", "seed"])
def test_forward_is_one_graph_with_and_without_a_tap(name):
    """fullgraph=True raises at the first break; the tap records one site and edits another."""
    config, params = CONFIGS[name], random_params(CONFIGS[name])
    tokens = random_tokens(config)

    def looked(params, tokens):
        seen = {}

        def tap(name, value):
            if name == "blocks.0.attn.pattern":
                seen[name] = value
            return value * 0.5 if name == "blocks.1.attn.z" else value

        return forward(params, config, tokens, tap=tap)[0], seen

    plain = lambda params, tokens, seed: forward(params, config, tokens, dropout=seed)[0]
    compiled = torch.compile(plain, fullgraph=True, backend="eager")
    assert torch.equal(compiled(params, tokens, torch.tensor(9)), plain(params, tokens, torch.tensor(9)))
    got, wanted = torch.compile(looked, fullgraph=True, backend="eager")(params, tokens), looked(params, tokens)
    assert torch.equal(got[0], wanted[0])
    assert torch.equal(got[1]["blocks.0.attn.pattern"], wanted[1]["blocks.0.attn.pattern"])


def test_a_cached_step_is_one_graph():
    config, params = CONFIGS["llama"], random_params(CONFIGS["llama"])
    tokens, compiled = random_tokens(config), torch.compile(forward, fullgraph=True, backend="eager")
    cache, parts = init_cache(config, 3, dtype=torch.float64), []
    for step in range(6):
        logits, cache = compiled(params, config, tokens[:, step : step + 1], cache)
        parts.append(logits)
    close(torch.cat(parts, dim=1), forward(params, config, tokens[:, :6])[0])


@pytest.mark.parametrize("name", ["gpt2", "llama", "alibi", "phi"])
def test_functional_transforms(name):
    """torch.func.grad of nats = autograd of loss; vmap over rows, and over an ensemble of weights = a loop."""
    config, params = CONFIGS[name], random_params(CONFIGS[name])
    tokens = random_tokens(config)
    mean = lambda p, t: nats(p, config, t[:, :-1], t[:, 1:]).mean()
    got = torch.func.grad(mean)(params, tokens)
    leaves = tree.map(lambda t: t.clone().requires_grad_(), params)
    wanted = torch.autograd.grad(loss(leaves, config, tokens[:, :-1], tokens[:, 1:]), tree.leaves(leaves))
    for g, w in zip(tree.leaves(got), wanted, strict=True):
        close(g, w)
    close(
        torch.func.grad(lambda p: loss(p, config, tokens[:, :-1], tokens[:, 1:]))(params)["embed"]["w"],
        got["embed"]["w"],
    )
    rows = torch.func.vmap(lambda row: forward(params, config, row[None])[0][0])(tokens)
    close(rows, forward(params, config, tokens)[0])
    other = random_params(config, seed=5)
    both = torch.func.vmap(lambda p: forward(p, config, tokens)[0])(
        tree.map(lambda a, b: torch.stack([a, b]), params, other)
    )
    close(both[1], forward(other, config, tokens)[0])
    per_row = torch.func.vmap(torch.func.grad(mean), in_dims=(None, 0))(params, tokens[:, None])
    close(per_row["embed"]["w"].mean(0), got["embed"]["w"])


@pytest.mark.parametrize("name", ["gpt2", "qwen3"])
def test_bfloat16_is_off_by_rounding_only(name):
    """The mean error stays below 4 units of bfloat16's last place (2^-8) at the logits' scale."""
    config, params = CONFIGS[name], random_params(CONFIGS[name], torch.float32)
    tokens = random_tokens(config)
    wanted, _ = forward(params, config, tokens)
    got, _ = forward(tree.map(lambda t: t.bfloat16(), params), config, tokens)
    assert got.dtype == torch.bfloat16
    assert (got.float() - wanted).abs().mean() < 4 * 2**-8 * wanted.std()


@every_config
def test_nats_go_through_a_tap(config):
    """Every site but the logits is seen, in order, and an edit of the final norm arrives."""
    params, tokens = random_params(config), random_tokens(config)
    targets = tokens.roll(-1, 1)
    tap, seen = recorder()
    plain = nats(params, config, tokens, targets)
    close(nats(params, config, tokens, targets, tap=tap), plain)
    assert list(seen) == list(activation_spec(config))[:-1]
    silent = nats(params, config, tokens, targets, tap=lambda name, value: value * 0 if name == "norm_f" else value)
    bias = params.get("head", {}).get("b", torch.zeros(config.n_vocab_padded, dtype=torch.float64))[: config.n_vocab]
    if config.logit_softcap:
        bias = config.logit_softcap * torch.tanh(bias / config.logit_softcap)
    close(silent, -bias.log_softmax(-1)[targets])
