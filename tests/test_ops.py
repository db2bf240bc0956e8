"""Every equation against its definition, written a second time the slow way, in float64."""

import math

import pytest
import torch
import torch.nn.functional as F

from gptcore import ops

G = torch.Generator().manual_seed(0)


def rand(*shape, dtype=torch.float64):
    return torch.randn(shape, generator=G, dtype=dtype)


def test_layernorm_fast_and_seen_agree():
    x, w, b = rand(2, 3, 8), rand(8), rand(8)
    seen = []
    slow = ops.layernorm(x, w, b, eps=1e-5, look=lambda scale: seen.append(scale) or scale)
    torch.testing.assert_close(ops.layernorm(x, w, b, eps=1e-5), slow, rtol=0, atol=1e-12)
    torch.testing.assert_close(seen[0], (x.var(-1, correction=0, keepdim=True) + 1e-5).sqrt(), rtol=0, atol=1e-12)


def test_rmsnorm_is_its_equation_and_can_be_frozen():
    x, w = rand(2, 3, 8), rand(8)
    wanted = w * x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(ops.rmsnorm(x, w, eps=1e-6), wanted, rtol=0, atol=1e-12)
    torch.testing.assert_close(ops.rmsnorm(x, w, eps=1e-6, look=lambda scale: torch.ones_like(scale)), w * x)


def test_rotary_scores_depend_on_the_distance_only():
    """Seen to fail with sin and cos exchanged for the keys only."""
    q, k = rand(1, 1, 1, 16), rand(1, 1, 1, 16)
    for interleaved in (False, True):
        turn = lambda x, p, how=interleaved: ops.rotary(
            x, *ops.rotary_table(torch.tensor([[p]]), 16, 10_000.0), interleaved=how
        )
        near = (turn(q, 3) * turn(k, 1)).sum()
        torch.testing.assert_close((turn(q, 103) * turn(k, 101)).sum(), near, rtol=0, atol=1e-4)  # float32 angles
        assert not torch.allclose((turn(q, 104) * turn(k, 101)).sum(), near, atol=1e-2)


def test_rotary_tells_257_from_256():
    """Seen to fail with angles in bfloat16, which has no 257."""
    x = torch.ones(1, 1, 1, 8, dtype=torch.bfloat16)
    a, b = (ops.rotary(x, *ops.rotary_table(torch.tensor([[p]]), 8, 10_000.0)) for p in (256, 257))
    assert not torch.equal(a, b)


def test_partial_rotary_passes_the_rest():
    """0.4 of a head of 80 turns 32 and passes 48."""
    x = rand(1, 2, 1, 80)
    turned = ops.rotary(x, *ops.rotary_table(torch.tensor([[5, 6]]), 32, 10_000.0))
    assert torch.equal(turned[..., 32:], x[..., 32:])
    pairs = lambda t: t[..., :16].square() + t[..., 16:32].square()
    torch.testing.assert_close(pairs(turned), pairs(x))  # a rotation keeps every pair's length
    assert not torch.allclose(turned[..., :32], x[..., :32])


def test_a_stretched_rotation_is_slower_by_the_factor():
    """Pairs that turn 100, 10, 1 and 0.1 times in the old context: llama3 leaves the fast, divides the slow, mixes."""
    rate = torch.tensor([100.0, 10.0, 1.0, 0.1]) * 2 * math.pi / 500
    settings = {"factor": 8.0, "low": 1.0, "high": 4.0, "n_trained": 500}
    torch.testing.assert_close(ops.linear_stretch(rate, **settings), rate / 8)
    torch.testing.assert_close(ops.llama3_stretch(rate, **settings), rate / torch.tensor([1.0, 1.0, 8.0, 8.0]))
    middle = torch.tensor([2.5 * 2 * math.pi / 500])  # half-way between low and high
    torch.testing.assert_close(ops.llama3_stretch(middle, **settings), middle * (1 + 1 / 8) / 2)


def test_interleaved_is_halves_after_a_permutation():
    x, table = rand(1, 3, 2, 8), ops.rotary_table(torch.arange(3)[None], 8, 100.0)
    order = [0, 2, 4, 6, 1, 3, 5, 7]
    torch.testing.assert_close(ops.rotary(x, *table, interleaved=True)[..., order], ops.rotary(x[..., order], *table))


def test_alibi_slopes_are_the_published_ones():
    assert ops.alibi_slopes(4).tolist() == [1 / 4, 1 / 16, 1 / 64, 1 / 256]
    assert ops.alibi_slopes(6).tolist() == [1 / 4, 1 / 16, 1 / 64, 1 / 256, 1 / 2, 1 / 8]


def test_sinusoidal_has_unit_pairs_and_base_10000():
    table = ops.sinusoidal(torch.tensor([[0, 1, 7]]), 6)[0].double()
    assert table[0].tolist() == [0, 1, 0, 1, 0, 1]
    torch.testing.assert_close(table[2, 2], torch.tensor(math.sin(7 / 10_000 ** (2 / 6))).double(), atol=1e-6, rtol=0)


def test_visible_is_one_rule():
    see = ops.visible(torch.tensor([[2, 3]]), 5)[0, 0].int().tolist()
    assert see == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 0]]
    assert ops.visible(torch.tensor([[3]]), 5, window=2)[0, 0].int().tolist() == [[0, 0, 1, 1, 0]]


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1)], ids=str)
@pytest.mark.parametrize("slopes", [None, ops.alibi_slopes(4).double()], ids=["plain", "alibi"])
@pytest.mark.parametrize("window", [0, 3])
@pytest.mark.parametrize("shape", [(7, 7), (1, 7), (3, 7), (1, 1)], ids=str)
def test_explicit_attention_is_fused_attention_is_a_loop(heads, slopes, window, shape):
    """Three ways to the same z; the loop uses nothing but softmax. Seen to fail with SDPA's is_causal for T < S."""
    (n_head, n_kv_head), (n_new, n_keys) = heads, shape
    q, k, v = rand(2, n_new, n_head, 6), rand(2, n_kv_head, n_keys, 6), rand(2, n_kv_head, n_keys, 6)
    positions = torch.arange(n_keys - n_new, n_keys)[None]
    scores = ops.attention_scores(q, k, positions, slopes=slopes, window=window)
    pattern = scores.softmax(-1)
    explicit = ops.attention_mix(pattern, v)
    fused = ops.attention_fused(q, k, v, positions, slopes=slopes, window=window, causal=n_new == n_keys)
    torch.testing.assert_close(explicit, fused, rtol=0, atol=1e-10)
    for b in range(2):
        for i, p in enumerate(positions[0].tolist()):
            for h in range(n_head):
                keys = range(max(0, p - window + 1) if window else 0, p + 1)
                group = h // (n_head // n_kv_head)
                bias = lambda j, h=h, p=p: 0 if slopes is None else -slopes[h] * (p - j)
                s = torch.stack([q[b, i, h] @ k[b, group, j] / math.sqrt(6) + bias(j) for j in keys])
                z = (s.softmax(0)[:, None] * torch.stack([v[b, group, j] for j in keys])).sum(0)
                torch.testing.assert_close(explicit[b, i, h], z, rtol=0, atol=1e-10)
    assert pattern.sum(-1).sub(1).abs().max() < 1e-12


def test_softcapped_scores_stay_below_the_cap():
    q, k = 100 * rand(1, 4, 2, 6), 100 * rand(1, 2, 4, 6)
    scores = ops.attention_scores(q, k, torch.arange(4)[None], softcap=5.0)
    assert scores[scores > -torch.inf].abs().max() <= 5


def test_dropout_drops_its_share_and_keeps_the_mean():
    """200,000 elements at rate 0.3: the share's standard error is 0.00102; five of them: false alarm below 1e-6."""
    x = torch.ones(200_000)
    y = ops.dropout(x, 0.3, torch.tensor(7))
    assert abs((y == 0).double().mean() - 0.3) < 0.0052
    assert y.unique().tolist() == [0, pytest.approx(1 / 0.7)]
    assert torch.equal(y, ops.dropout(x, 0.3, torch.tensor(7)))
    assert not torch.equal(y, ops.dropout(x, 0.3, torch.tensor(8)))


def test_dropout_masks_of_neighbouring_seeds_and_sites_are_independent():
    """Two masks at rate 1/2 agree on a binomial(100,000, 1/2) share; 15 pairs at five sigma: false alarm below 1e-5."""
    x, seed = torch.ones(100_000), torch.tensor(2**40 + 3)
    masks = [ops.dropout(x, 0.5, ops.fold(s, n)) == 0 for s in (seed, seed + 1) for n in range(3)]
    for i, a in enumerate(masks):
        for b in masks[:i]:
            assert abs((a == b).double().mean() - 0.5) < 0.0080


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("cap", [0.0, 2.0])
@pytest.mark.parametrize("rows", [1, 4, 100])
def test_chunked_cross_entropy_is_the_plain_one(with_bias, cap, rows):
    """Loss and all gradients against autograd in float64, padding rows and ignored targets included."""
    x, w, b = rand(13, 5), rand(16, 5), rand(16) if with_bias else None
    targets = torch.randint(11, (13,), generator=G)
    targets[3] = targets[9] = -100

    def run(f):
        leaves = [t.clone().requires_grad_() for t in (x, w, b) if t is not None]
        value = f(*leaves, *([] if with_bias else [None]))
        return value, torch.autograd.grad(value * 3, leaves)

    def plain(x, w, b):
        logits = F.linear(x, w, b)[:, :11]
        return F.cross_entropy(cap * torch.tanh(logits / cap) if cap else logits, targets)

    wanted, got = run(plain), run(lambda x, w, b: ops.LinearCrossEntropy.apply(x, w, b, targets, 11, cap, rows)[0])
    torch.testing.assert_close(got[0], wanted[0], rtol=0, atol=1e-12)
    for g, t in zip(got[1], wanted[1], strict=True):
        torch.testing.assert_close(g, t, rtol=0, atol=1e-12)


def test_chunked_cross_entropy_never_holds_all_logits():
    """Largest allocation at N=2048, V=20,000: far below the logits' 164 MB; the plain loss makes them."""
    x, w = rand(2048, 8, dtype=torch.float32).requires_grad_(), rand(20_000, 8, dtype=torch.float32).requires_grad_()
    targets = torch.randint(20_000, (2048,), generator=G)

    def largest(f):
        with torch.profiler.profile(profile_memory=True) as profile:
            f().backward()
        return max(event.self_cpu_memory_usage for event in profile.events())

    assert largest(lambda: F.cross_entropy(x @ w.T, targets)) > 160e6
    assert largest(lambda: ops.LinearCrossEntropy.apply(x, w, None, targets, 20_000, 0.0, 128)[0]) < 30e6


def test_a_float16_loss_sums_over_a_large_vocabulary():
    """70,000 equal logits: a row's sum is more than float16 holds. Seen to fail (infinite gradients) before it was
    computed in float32."""
    x, w = torch.ones(2, 4, dtype=torch.float16).requires_grad_(), torch.zeros(70_000, 4, dtype=torch.float16)
    w = w.requires_grad_()
    value = ops.LinearCrossEntropy.apply(x, w, None, torch.tensor([1, 2]), 70_000, 0.0, 2)[0]
    value.backward()
    assert value.item() == pytest.approx(math.log(70_000), rel=1e-4)
    assert w.grad[1].tolist() == pytest.approx([-0.5] * 4, rel=1e-3)
    assert not x.grad.any()


def test_mean_over_no_target_is_zero_not_nan():
    x, w = rand(4, 3).requires_grad_(), rand(5, 3)
    value = ops.LinearCrossEntropy.apply(x, w, None, torch.full((4,), -100), 5, 0.0, 2)[0]
    value.backward()
    assert value == 0
    assert x.grad.abs().max() == 0
