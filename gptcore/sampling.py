"""From logits to a token: temperature, top-k, top-p, min-p, and a draw that gives the same token everywhere.

What you learn here: how the usual settings cut a distribution, and why whole numbers make a draw repeatable. A sum of
floats depends on its order, a sum of integers does not; so each token gets an integer weight, and 64 random bits that
depend only on (seed, position) choose among them. The same row gives the same token alone or in a batch, on a CPU or a
GPU. This file is the specification: a native twin must return the same tokens, bit for bit.
Axes: B rows, V vocabulary, N the candidates of a row (V, or the few that top-k leaves).
Next: generate.py calls sample once for every new token.
"""

import math
from typing import NamedTuple

import torch

ONE = 2**40  # the weight of a most likely token: 27.7 nats below it a token weighs 0 and is never drawn
LOW = 2**32 - 1  # masks the low word of 64 bits


class Sampling(NamedTuple):
    """The settings of a draw: sample(logits, seed=7, position=3, **settings._asdict())."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0


PRESETS = {
    "greedy": Sampling(temperature=0.0),  # debugging, repeatable text
    "precise": Sampling(temperature=0.7, top_k=40, top_p=0.85),  # facts, code
    "balanced": Sampling(temperature=1.0, top_k=50, top_p=0.9),  # everything
    "creative": Sampling(temperature=1.2, top_k=100, top_p=0.95),  # stories
    "very-creative": Sampling(temperature=1.5, top_k=200, top_p=0.98),  # experiments
}

STRATEGIES = {  # which settings count; min_p belongs to none of them and counts wherever something is drawn
    "greedy": (),
    "multinomial": ("temperature", "min_p"),
    "top_k": ("temperature", "top_k", "min_p"),
    "top_p": ("temperature", "top_p", "min_p"),
    "top_k_top_p": ("temperature", "top_k", "top_p", "min_p"),
}


def with_strategy(strategy, settings) -> Sampling:
    """The settings that count under a strategy; the others become neutral. Raises ValueError for an unknown name."""
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy: expected one of {', '.join(STRATEGIES)}, got {strategy!r}")
    if strategy == "greedy":
        return PRESETS["greedy"]
    return Sampling(**{name: getattr(settings, name) for name in STRATEGIES[strategy]})


def check_settings(*, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0) -> None:
    """Raise ValueError for a setting outside its range, naming it."""
    if not (temperature == 0 or 1e-30 <= temperature <= 1e30):  # 1 / temperature must be a float32, and not 0
        raise ValueError(f"temperature: expected 0 or a number in [1e-30, 1e30], got {temperature}")
    if isinstance(top_k, bool) or not isinstance(top_k, int) or top_k < 0:
        raise ValueError(f"top_k: expected a whole number of at least 0, got {top_k}")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p: expected a number in (0, 1], got {top_p}")
    if not 0 <= min_p <= 1:
        raise ValueError(f"min_p: expected a number in [0, 1], got {min_p}")


@torch.no_grad()
def sample(logits, *, seed, position, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0) -> torch.Tensor:
    """Draw one token a row: logits (V,) or (B,V) -> int64 () or (B,).

    seed (any 64 bits) and position (the token's index in its row) are ints or int64 (B,); the token depends on nothing
    else of the row's surroundings. Temperature 0 takes the most likely token, the lowest index among equals. Raises
    ValueError for settings out of range and for a row with NaN, +inf, or nothing above -inf.
    """
    check_settings(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    rows = _rows(logits)
    words = [_words(name, value, rows) for name, value in (("seed", seed), ("position", position))]
    if temperature == 0:
        tokens = rows.argmax(-1)  # torch promises the first of equals
    else:
        ids, weight = _candidates(rows, temperature, top_k, top_p, min_p)
        x0, x1, *_ = philox(*words)
        tokens = choose(weight, x0, x1)
        tokens = tokens if ids is None else ids.gather(-1, tokens)
    return tokens.to(logits.device).view(logits.shape[:-1])


@torch.no_grad()
def kept_weights(logits, *, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0) -> torch.Tensor:
    """The integers that sample draws by, 0 for what is cut: logits (V,) or (B,V) -> int64 of the same shape.

    A token's exact probability is its weight over the row's sum. Raises ValueError as sample does.
    """
    check_settings(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    rows = _rows(logits)
    zeros = torch.zeros_like(rows, dtype=torch.int64)
    if temperature == 0:
        weight = zeros.scatter_(-1, rows.argmax(-1, keepdim=True), ONE)
    else:
        ids, weight = _candidates(rows, temperature, top_k, top_p, min_p)
        weight = weight if ids is None else zeros.scatter_(-1, ids, weight)
    return weight.to(logits.device).view(logits.shape)


def exp_weight(x):
    """floor(e^x 2^40) for float32 x <= 0, as int64, to 8.1e-8 relative: our own, because no two libraries agree.

    Multiplications and additions apart, each rounded to float32: a fused multiply-add changes hundreds of weights.
    Cephes' expf: x = n ln 2 + r, a polynomial in r, and n goes into the exponent.
    """
    x = x.clamp(min=-100.0)  # keeps n an int32; the weight is 0 from x = -27.8 on
    t = x * 1.44269504 + 12582912.0
    n = t - 12582912.0  # adding and taking away 1.5 * 2^23 rounds to the nearest whole number
    r = (x - n * 0.693359375) + n * 2.12194440e-4  # ln 2 in two parts
    p = torch.full_like(x, 1.9875691500e-4)
    for c in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1):
        p = p * r + c
    p = (p * (r * r) + r) + 1.0
    p = (p.view(torch.int32) + n.to(torch.int32) * (1 << 23)).view(torch.float32)  # times 2^n
    return (torch.where(x > -80, p, 0.0) * float(ONE)).to(torch.int64)


def philox(seed, position):
    """Philox4x32-10: four random 32-bit words for a 64-bit seed and position, ints or int64 tensors alike.

    Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3". Products of a tensor wrap at 64 bits; the masks
    make that and a negative int64 harmless.
    """
    k0, k1 = seed & LOW, (seed >> 32) & LOW
    x0, x1, x2, x3 = position & LOW, (position >> 32) & LOW, 0, 0
    for _ in range(10):
        a, b = x0 * 0xD2511F53, x2 * 0xCD9E8D57
        x0, x1, x2, x3 = (b >> 32) & LOW ^ x1 ^ k0, b & LOW, (a >> 32) & LOW ^ x3 ^ k1, a & LOW
        k0, k1 = (k0 + 0x9E3779B9) & LOW, (k1 + 0xBB67AE85) & LOW
    return x0, x1, x2, x3


def choose(weight, x0, x1):
    """The first index whose running sum exceeds floor(u W / 2^64): weight int64 (B,N) with sums W < 2^63 -> (B,1).

    u = x0 + 2^32 x1 are 64 random bits, x0 and x1 ints or int64 (B,1).
    """
    mass = weight.cumsum(-1)
    return torch.searchsorted(mass, _high_product(mass[:, -1:], x0, x1), right=True)


def _high_product(total, x0, x1):
    """floor(total (x0 + 2^32 x1) / 2^64) without a 128-bit product: by halves, as on paper."""
    t0, t1 = total & LOW, total >> 32
    cross = x1 * t0
    middle = ((x0 * t0 >> 32) & LOW) + (cross & LOW) + (x0 * t1 & LOW)
    return x1 * t1 + ((cross >> 32) & LOW) + (x0 * t1 >> 32) + (middle >> 32)


def _rows(logits):
    """The door: logits as float32 (B,V), or ValueError."""
    if not logits.is_floating_point() or logits.ndim not in (1, 2) or not logits.numel():
        raise ValueError(f"logits: expected floats (V,) or (B, V), got {logits.dtype} {tuple(logits.shape)}")
    rows = logits.reshape(-1, logits.shape[-1]).float()
    rows = rows.cpu() if rows.device.type == "mps" else rows  # top-p's share is taken in float64, which MPS lacks
    best = rows.amax(-1)  # NaN wins every maximum
    bad = ~best.isfinite()
    if bad.any():
        row = int(bad.nonzero()[0])
        raise ValueError(f"logits: expected a finite largest logit in row {row}, got {best[row].item()}")
    return rows


def _words(name, value, rows):
    """A seed or position as an int, or as int64 (B,1) on the rows' device."""
    if isinstance(value, int):
        if not -(2**63) <= value < 2**64:
            raise ValueError(f"{name}: expected 64 bits, got {value}")
        return value
    if not isinstance(value, torch.Tensor) or value.dtype != torch.int64 or value.shape not in ((), (len(rows),)):
        got = f"{value.dtype} {tuple(value.shape)}" if isinstance(value, torch.Tensor) else repr(value)
        raise ValueError(f"{name}: expected an int or int64 ({len(rows)},), got {got}")
    if value.numel() == 1:
        return value.item()  # Python's integers are quicker than a hundred tiny operations
    return value.to(rows.device)[:, None]


def _candidates(rows, temperature, top_k, top_p, min_p):
    """Tokens that may be drawn, in index order: ids (B,N), or None for all of V, and their int64 weights (B,N)."""
    z, ids, best = rows, None, rows.amax(-1, keepdim=True)
    if 0 < top_k < z.shape[-1]:
        edge = z.topk(top_k).values[:, -1:]
        n_kept = int((z >= edge).sum(-1).max())  # ties at the edge are all kept: there may be more than k
        ids = z.topk(n_kept).indices.sort(-1).values
        z = z.gather(-1, ids)
        z = z.where(z >= edge, -math.inf)
    weight = exp_weight((z - best) * (1 / temperature))
    if top_p < 1:
        weight = weight * (z >= _nucleus_edge(z, weight, top_p))
    if min_p > 0:
        weight = weight * (weight >= math.ceil(min_p * ONE))
    return ids, weight


def _nucleus_edge(z, weight, top_p):
    """The largest logit (B,1) such that the tokens from it on up reach the share top_p of the mass.

    Holtzman et al. 2020, arXiv:1904.09751. A long tail is seldom needed, so it is sorted only if the best do not do.
    """
    want = (weight.sum(-1, keepdim=True).double() * top_p).floor().clamp(min=1).long()
    n, n_all = 512, z.shape[-1]
    while True:
        n = min(n, n_all)
        top, ids = z.topk(n)
        mass = weight.gather(-1, ids).cumsum(-1)
        if n == n_all or bool((mass[:, -1:] >= want).all()):
            break
        n *= 8
    # want may exceed the sum by the rounding of float64: then all stay
    return top.gather(-1, torch.searchsorted(mass, want).clamp(max=n - 1))
