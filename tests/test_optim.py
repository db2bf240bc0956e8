"""The update: against float64 by hand, torch's own Muon, and the documented numbers."""

import math
from itertools import chain, pairwise
from typing import NamedTuple

import pytest
import torch

from gptcore import optim, tree
from gptcore.device import generator


class Leaf(NamedTuple):
    shape: tuple
    decay: bool


SPEC = {
    "embed.w": Leaf((11, 6), True),
    "blocks.0.norm_1.w": Leaf((6,), False),
    "blocks.0.attn.q.w": Leaf((6, 6), True),
    "blocks.0.mlp.up.w": Leaf((24, 6), True),
    "blocks.0.mlp.up.b": Leaf((24,), False),
    "blocks.0.mlp.down.w": Leaf((6, 24), True),
    "norm_f.w": Leaf((6,), False),
}


def random_tree(*words, dtype=torch.float64):
    draws = generator(*words)
    flat = {name: torch.randn(leaf.shape, generator=draws, dtype=torch.float64) for name, leaf in SPEC.items()}
    return tree.nest({name: value.to(dtype) for name, value in flat.items()})


def set_gradients_(params, *words):
    for leaf, grad in zip(tree.leaves(params), tree.leaves(random_tree(*words)), strict=True):
        leaf.grad = grad.to(leaf.dtype)


def test_groups_hold_every_leaf_once():
    """The head is tied, so embed.w is one leaf; the counts sum to the parameter count."""
    found = optim.groups(SPEC)
    assert found["no decay"] == ["blocks.0.norm_1.w", "blocks.0.mlp.up.b", "norm_f.w"]
    assert found["muon"] == []
    found = optim.groups(SPEC, "muon")
    assert found["muon"] == ["blocks.0.attn.q.w", "blocks.0.mlp.up.w", "blocks.0.mlp.down.w"]
    assert found["decay"] == ["embed.w"]
    assert sorted(chain(*found.values())) == sorted(SPEC)
    with pytest.raises(ValueError, match=r"^optimizer: expected one of adamw, muon, got 'sgd'$"):
        optim.groups(SPEC, "sgd")


@pytest.mark.parametrize("kind", optim.KINDS)
def test_the_optimizer_holds_every_number_once(kind):
    optimizer = optim.make(random_tree("w"), SPEC, optim.Options(kind=kind))
    leaves = [leaf for part in optimizer.parts for group in part.param_groups for leaf in group["params"]]
    assert sum(leaf.numel() for leaf in leaves) == sum(math.prod(leaf.shape) for leaf in SPEC.values())
    assert len({id(leaf) for leaf in leaves}) == len(SPEC)


def test_a_tree_that_is_not_the_spec_is_refused():
    params = random_tree("w")
    params["head"] = params.pop("norm_f")
    with pytest.raises(ValueError, match=r"^weights: missing \['norm_f.w'\], not expected \['head.w'\]$"):
        optim.make(params, SPEC, optim.Options())


def adamw_by_hand(w, m, v, grad, step, *, lr, decay, betas=(0.9, 0.999), eps=1e-8):
    w = w - lr * decay * w
    m, v = betas[0] * m + (1 - betas[0]) * grad, betas[1] * v + (1 - betas[1]) * grad**2
    return w - lr * (m / (1 - betas[0] ** step)) / ((v / (1 - betas[1] ** step)).sqrt() + eps), m, v


def test_adamw_equals_its_equations():
    """Four updates at changing rates, decay on matrices only. Seen to fail with decay on every leaf."""
    params = random_tree("w")
    want = {name: (leaf.clone(), 0, 0) for name, leaf in tree.walk(params)}
    optimizer = optim.make(params, SPEC, optim.Options(lr=0.01, weight_decay=0.1))
    for step in range(1, 5):
        set_gradients_(params, "grad", step)
        grads = {name: leaf.grad.clone() for name, leaf in tree.walk(params)}
        optimizer.step_(step / 4)
        for name, leaf in SPEC.items():
            rates = {"lr": 0.01 * step / 4, "decay": 0.1 if leaf.decay else 0.0}
            want[name] = adamw_by_hand(*want[name], grads[name], step, **rates)
    for name, leaf in tree.walk(params):
        torch.testing.assert_close(leaf, want[name][0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape", [(12, 12), (8, 20), (20, 8)], ids=str)
def test_orthogonalize_moves_singular_values_only(shape):
    """U p(p(...p(S))) V^T with the polynomial on plain numbers, and all values but the smallest end near 1."""
    x = torch.randn(shape, generator=generator("x"), dtype=torch.float64)
    u, s, vt = torch.linalg.svd(x / x.norm(), full_matrices=False)
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    got = optim.orthogonalize((x / x.norm())[None])[0]
    torch.testing.assert_close(got, u @ s.diag() @ vt, rtol=0, atol=1e-10)
    assert s[:-1].min() > 0.65
    assert s.max() < 1.25


def muon_by_hand(w, buffer, grad, *, lr, decay, momentum=0.95):
    """One update in float64; the classic momentum, which differs from a running mean by a factor that cancels."""
    buffer = momentum * buffer + grad
    ahead = grad + momentum * buffer
    moved = optim.orthogonalize((ahead / ahead.norm())[None])[0]
    return w - lr * decay * w - lr * math.sqrt(max(1, w.shape[0] / w.shape[1])) * moved, buffer


def test_muon_equals_its_equations_and_torch():
    """Three updates of a square, a tall and a wide matrix; the error against float64 is at most twice torch's own.
    Seen to fail without Nesterov's look ahead, and with the ratio of columns to rows."""
    names = optim.groups(SPEC, "muon")["muon"]
    params = random_tree("w", dtype=torch.float32)
    flat = dict(tree.walk(params))
    want = {name: (flat[name].double(), 0) for name in names}
    peer = {name: flat[name].clone() for name in names}
    theirs = torch.optim.Muon(list(peer.values()), lr=0.1, weight_decay=0.2, momentum=0.95)
    optimizer = optim.make(params, SPEC, optim.Options(kind="muon", muon_lr=0.1, weight_decay=0.2))
    for step in range(3):
        set_gradients_(params, "grad", step)
        for name in names:
            peer[name].grad = flat[name].grad.clone()
            want[name] = muon_by_hand(*want[name], flat[name].grad.double(), lr=0.1, decay=0.2)
        optimizer.step_()
        theirs.step()
    for name in names:
        error = (flat[name] - want[name][0]).norm()
        assert error <= 2 * (peer[name] - want[name][0]).norm(), name
        torch.testing.assert_close(
            optim.state(optimizer)[f"{name}/momentum_buffer"], theirs.state[peer[name]]["momentum_buffer"]
        )


def test_muon_leaves_the_rest_to_adamw():
    params, other = random_tree("w"), random_tree("w")
    for leaves, kind in ((params, "muon"), (other, "adamw")):
        set_gradients_(leaves, "grad")
        optim.make(leaves, SPEC, optim.Options(kind=kind, lr=0.01)).step_(0.5)
    same = {name for (name, a), (_, b) in zip(tree.walk(params), tree.walk(other), strict=True) if a.equal(b)}
    assert same == SPEC.keys() - set(optim.groups(SPEC, "muon")["muon"])


def test_zero_grad_drops_the_gradients():
    params = random_tree("w")
    set_gradients_(params, "grad")
    optim.make(params, SPEC, optim.Options(kind="muon")).zero_grad_()
    assert all(leaf.grad is None for leaf in tree.leaves(params))


def advance_(params, optimizer, steps):
    for step in steps:
        set_gradients_(params, "grad", step)
        optimizer.step_(1 / (step + 1))


@pytest.mark.parametrize("kind", optim.KINDS)
def test_state_goes_out_and_in_bit_for_bit(kind):
    """3 updates, a new optimizer from the saved state, 4 more = 7 updates. Seen to fail with the count left out."""
    options = optim.Options(kind=kind, lr=0.01)
    whole = random_tree("w", dtype=torch.float32)
    advance_(whole, optim.make(whole, SPEC, options), range(7))

    first = random_tree("w", dtype=torch.float32)
    optimizer = optim.make(first, SPEC, options)
    assert optim.state(optimizer) == {}
    advance_(first, optimizer, range(3))
    saved = {name: value.clone() for name, value in optim.state(optimizer).items()}
    second = tree.map(torch.clone, first)
    resumed = optim.make(second, SPEC, options)
    optim.load_state_(resumed, saved)
    advance_(second, resumed, range(3, 7))

    assert all(a.equal(b) for a, b in zip(tree.leaves(second), tree.leaves(whole), strict=True))
    assert all(value.equal(optim.state(optimizer)[name]) for name, value in saved.items())  # copied, not shared
    optim.load_state_(resumed, {})
    assert optim.state(resumed) == {}


def test_state_goes_by_the_leaves_names():
    params = random_tree("w")
    optimizer = optim.make(params, SPEC, optim.Options(kind="muon"))
    advance_(params, optimizer, range(2))
    saved = optim.state(optimizer)
    matrices = optim.groups(SPEC, "muon")["muon"]
    others = SPEC.keys() - set(matrices)
    keys = ("step", "exp_avg", "exp_avg_sq")
    assert saved.keys() == {f"{n}/momentum_buffer" for n in matrices} | {f"{n}/{key}" for n in others for key in keys}
    assert saved["embed.w/step"] == 2


def test_a_state_that_does_not_fit_is_refused_and_changes_nothing():
    params = random_tree("w")
    optimizer = optim.make(params, SPEC, optim.Options())
    advance_(params, optimizer, range(1))
    saved = optim.state(optimizer)
    short = {name: value for name, value in saved.items() if name != "norm_f.w/exp_avg"}
    message = r"^optimizer state: missing \['norm_f.w/exp_avg'\], not expected \['head.w/step'\]$"
    with pytest.raises(ValueError, match=message):
        optim.load_state_(optimizer, short | {"head.w/step": torch.tensor(1.0)})
    with pytest.raises(ValueError, match=r"^embed.w/exp_avg: expected \(11, 6\), got \(6, 11\)$"):
        optim.load_state_(optimizer, saved | {"embed.w/exp_avg": torch.zeros(6, 11)})
    assert all(value.equal(optim.state(optimizer)[name]) for name, value in saved.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_clip_after_a_planted_huge_gradient(dtype):
    grads = [grad.to(dtype) for grad in tree.leaves(random_tree("grad"))]
    grads[2][1, 1] = 1e6
    before = math.sqrt(sum(grad.double().square().sum().item() for grad in grads))
    norm = optim.clip_(grads, 1.0)
    after = math.sqrt(sum(grad.double().square().sum().item() for grad in grads))
    assert norm.dtype == torch.promote_types(dtype, torch.float32)
    assert norm.item() == pytest.approx(before, rel=1e-6)
    assert after == pytest.approx(1.0, rel=1e-6 if dtype != torch.bfloat16 else 2**-8)


def test_clip_leaves_a_small_gradient_alone():
    for scale in (1e-3, 0.0):
        grads = [scale * grad for grad in tree.leaves(random_tree("grad"))]
        copies = [grad.clone() for grad in grads]
        optim.clip_(grads, 1.0)
        assert all(a.equal(b) for a, b in zip(grads, copies, strict=True))


def test_a_norm_that_is_not_finite_shows():
    assert optim.clip_([torch.ones(3), torch.tensor([math.nan])]).isnan()
    assert optim.clip_([torch.ones(3), torch.tensor([math.inf])]).isinf()


@pytest.mark.parametrize("name", optim.SCHEDULES)
def test_rates_of_the_quick_run(name):
    """6,103 updates at a peak of 3e-4: up to the peak at 304, 3e-5 at 6,102, and no update at rate 0.
    Seen to fail with step / n_warmup and with the cosine ending one step later."""
    rates = [3e-4 * optim.SCHEDULES[name](step, n_steps=6103) for step in range(6103)]
    assert rates[0] == pytest.approx(3e-4 / 305)
    assert rates[304] == pytest.approx(3e-4, rel=1e-12)
    assert rates[6102] == pytest.approx(3e-5, rel=1e-12)
    assert max(rates) == pytest.approx(3e-4, rel=1e-12)
    assert all(a < b for a, b in pairwise(rates[:305]))
    assert all(a >= b for a, b in pairwise(rates[305:]))
    assert optim.SCHEDULES[name](10**6, n_steps=6103) == pytest.approx(0.1, rel=1e-12)


def test_the_middle_of_each_schedule():
    assert optim.warmup_cosine(305 + (6102 - 305) / 2, n_steps=6103) == pytest.approx(0.55)
    assert optim.wsd(50, n_steps=101, decay=0.6, floor=0.0) == pytest.approx(1 - (50 - 40.4) / (100 - 40.4))
    assert optim.wsd(40, n_steps=101, decay=0.6, floor=0.0) == 1.0
    assert optim.wsd(5, n_steps=20, decay=1.0, warmup=0.5) == pytest.approx(0.6)


@pytest.mark.parametrize("name", optim.SCHEDULES)
@pytest.mark.parametrize("n_steps", [1, 2, 3, 19, 20, 21])
def test_short_schedules(name, n_steps):
    """Below 20 updates nothing warms up; the first is at the peak and, of two or more, the last at the floor."""
    rates = [optim.SCHEDULES[name](step, n_steps=n_steps) for step in range(n_steps)]
    assert rates[0] == 1.0
    assert n_steps == 1 or rates[-1] == pytest.approx(0.1)
