"""Induction: heads that look for what followed last time, and the pairs of heads that make it work.

What you learn here: a sequence of random tokens, twice, has nothing to predict but the repetition, so the loss on the
second copy says whether a model repeats, and attention to the token after the earlier copy says who does it. A head
that does so needs another one below it, which tells every position what came before; their weights fit together more
than chance would have it, and taking either away shows what it is worth.  Olsson et al. 2022, arXiv:2209.11895;
Elhage et al. 2021, https://transformer-circuits.pub/2021/framework
Axes: N sequences, B of them at once, T = length of what is repeated, R repeat rows, L layers, H heads, D head width,
C model width, V vocabulary.
Next: patching.py asks the same question of any text.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from gptcore import model, stats
from gptcore.interpret.attention import (
    DETECTORS,
    Score,
    Sums,
    batches,
    check_heads,
    interval,
    join,
    scores,
    strength,
    watch,
)
from gptcore.interpret.nodes import output_weights
from gptcore.interpret.taps import chain, patch

STRENGTHS = ((0.7, "strong"), (0.5, "moderate"), (0.3, "weak"), (-torch.inf, "minimal"))  # more than


# -------------------------------------------------------------------------------------------------------- the sequences


class Repeats(NamedTuple):
    """Sequences [BOS] r r."""

    tokens: Tensor  # (N, n_bos + 2 length)
    length: int
    n_bos: int  # 1 with a BOS, else 0


def repeats(config, n_sequences, length, *, generator, bos=None, exclude=()) -> Repeats:
    """Random tokens twice, each sequence [bos] r r; bos None: none.

    r is drawn without replacement from all ids but bos and those to exclude, with replacement where they are too few.
    Raises ValueError naming the largest length that fits the context.
    """
    n_bos = int(bos is not None)
    most = (config.n_context - n_bos) // 2
    if not 2 <= length <= most:
        raise ValueError(f"seq_length: expected 2 to {most}, so that it fits {config.n_context} twice, got {length}")
    usable = torch.ones(config.n_vocab, dtype=torch.bool)
    usable[[id for id in {*exclude, *([bos] if n_bos else [])} if id < config.n_vocab]] = False
    ids = usable.nonzero()[:, 0]
    if not len(ids):
        raise ValueError("exclude: expected it to leave an id, got every one")
    draw = (
        torch.randperm if len(ids) >= length else lambda n, generator: torch.randint(n, (length,), generator=generator)
    )
    r = torch.stack([ids[draw(len(ids), generator=generator)[:length]] for _ in range(n_sequences)])
    return Repeats(torch.cat([torch.full((n_sequences, n_bos), bos or 0), r, r], dim=1), length, n_bos)


def stripe(group) -> Tensor:
    """Where induction looks: from the second copy's rows q to what followed the token the first time, k = q - T + 1.

    (S,S) bool. Not q - T: that is the copy itself, where a duplicate-token head looks.
    """
    places = torch.arange(group.tokens.shape[1], device=group.tokens.device)
    q, k = places[:, None], places[None, :]
    return (q >= group.n_bos + group.length) & (k == q - group.length + 1)


# ------------------------------------------------------------------------------------------------------------- the scan


class Scan(NamedTuple):
    """What one forward of every sequence gave; summarise makes numbers of it."""

    sums: Sums  # of DETECTORS, stripe and SHAPES
    nats: Tensor  # (N, 2): mean of the first copy's tokens and of the second's, but for each copy's first token
    copied: Tensor  # (2, L, H): summed shares of the attended token among what a head raises, and how many rows
    profiles: dict[int, Tensor]  # T -> (L, H, 2T): mean attention of repeat rows to key q - T + j, j from 1 - T to T


class Induction(NamedTuple):
    """The heads of a model on repeated sequences."""

    scores: dict[str, Score]
    copying: Tensor  # (L,H): by behaviour, -1 to 1
    first: stats.Interval  # mean nats on the first copy
    second: stats.Interval
    gain: stats.Interval  # first - second: how much repeating helps
    shifted: list[tuple[int, int, int, float]]  # layer, head, j, attention: induction with another offset than 1


def scan(params, config, *groups, tap=None) -> Scan:
    """One row of forward for each sequence of the groups of Repeats, which may differ in length.

    tap edits the forward before it is measured; it is called with batches of two sequences or more.
    """
    check_heads(config)
    if tap and any(len(group.tokens) < 2 for group in groups):
        raise ValueError("n_sequences: expected at least 2 of each length for an edit, got 1")
    sums, nats, copied, profiles = [], [], [], {}
    for group in groups:
        found, detectors = [], {**DETECTORS, "stripe": stripe(group)}
        for rows in batches(config, group.tokens, least=2 if tap else 1):
            part = group._replace(tokens=group.tokens[rows])
            heads, finish = watch(config, part.tokens, detectors, dtype=params["embed"]["w"].dtype)
            offsets, profile = watch_offsets(part)
            copies, shares = watch_copying(params, config, part)
            targets = part.tokens.roll(-1, 1).index_fill(1, torch.tensor([-1], device=rows.device), -100)
            with torch.no_grad():
                watching = chain(tap, heads, offsets, copies)
                losses = model.nats(params, config, part.tokens, targets, tap=watching)
            sums.append(finish())
            nats.append(copy_nats(losses, part))
            copied.append(torch.stack(shares, dim=1))
            found.append(torch.stack(profile) * len(rows) / len(group.tokens))
        profiles[group.length] = sum(found)
    return Scan(join(sums), torch.cat(nats), sum(copied), profiles)


def copy_nats(losses, group) -> Tensor:
    """Losses (N,S) of the next token -> the mean over each copy's tokens but its first, (N,2) float64 on the CPU.

    The first token of a copy follows nothing that it followed before, so it says nothing about repeating.
    """
    b, t = group.n_bos, group.length
    return torch.stack([losses[:, start : start + t - 1].mean(1) for start in (b, b + t)], dim=1).double().cpu()


def watch_offsets(group):
    """(tap, profile): a tap that adds to profile, a layer each, the mean attention (H,2T) of the second copy's rows to
    key q - T + j for j from 1 - T to T. Where there is no such key it is 0.
    """
    t, place, profile = group.length, group.tokens.device, []
    q = torch.arange(group.n_bos + t, group.n_bos + 2 * t, device=place)[:, None]
    k = q - t + torch.arange(1 - t, t + 1, device=place)

    def tap(name, value):
        if name.endswith("attn.pattern"):
            found = value[:, :, q, k.clamp(min=0)].where(k >= 0, 0)
            profile.append(found.mean((0, 2)).double().cpu())
        return value

    return tap, profile


def watch_copying(params, config, group):
    """(tap, shares): a tap that adds to shares, a layer each, (2,H): of what a head's output raises among the tokens of
    the sequence, the share of the token it attends to most, summed over the second copy's rows, and how many rows.

    What is raised is the head's direct path to the logits, z W_O W_U, minus its mean over the vocabulary, where
    positive. Rows in which nothing is raised do not count.  Olsson et al. 2022.
    """
    b, t, tokens = group.n_bos, group.length, group.tokens
    known = tokens[:, : b + t]
    fresh = (known[:, :, None] == known[:, None, :]).tril(-1).any(-1).logical_not()  # a token's first place counts
    unembed = model.head(params)["w"][: config.n_vocab]
    direction = unembed[known] - unembed.mean(0)  # (B,S',C)
    top, shares = [], []

    def tap(name, value):
        if name.endswith("attn.pattern"):
            top.append(value[:, :, b + t :].argmax(-1))  # (B,H,R)
        if name.endswith("attn.z"):
            reads = torch.einsum("bsc,hdc->bhsd", direction, output_weights(params, config, len(shares)))
            raised = torch.einsum("brhd,bhsd->bhrs", value[:, b + t :], reads).relu()
            where = top[-1] - t * (top[-1] >= b + t)  # the second copy's token stands in the first one too
            total = (raised * fresh[:, None, None]).sum(-1)
            share = raised.gather(-1, where[..., None])[..., 0] / total
            counts = total > 0
            shares.append(torch.stack([share.where(counts, 0).sum((0, 2)), counts.sum((0, 2))]).double().cpu())
        return value

    return tap, shares


def summarise(scan, *, generator=None) -> Induction:
    """Scores, losses and copying of a Scan; with a generator each with a bootstrap interval over the sequences."""
    first, second = scan.nats.T
    measured = torch.stack([first, second, first - second], dim=1)
    found = interval(measured, torch.ones(len(measured)), generator=generator)
    losses = (stats.Interval(*each) for each in zip(*(bound.tolist() for bound in found), strict=True))
    total, count = scan.copied
    copying = torch.where(count > 0, 2 * total / count - 1, 0)
    return Induction(scores(scan.sums, generator=generator), copying, *losses, shifted(scan.profiles))


def shifted(profiles, least=0.3) -> list[tuple[int, int, int, float]]:
    """Heads that look, for every length T of {T: (L,H,2T)}, most at the same offset j that is neither 1 (induction) nor
    0 (the copy itself), with more than `least` of their attention: (layer, head, j, the least attention there).

    A rotary model can repeat through such heads while its stripe is 0. One length alone shows nothing: there, j = T - 1
    is the previous token.
    """
    if len(profiles) < 2:
        return []
    best = {t: profile.max(-1) for t, profile in profiles.items()}
    offsets = torch.stack([found.indices - t + 1 for t, found in best.items()])
    weights = torch.stack([found.values for found in best.values()]).amin(0)
    same = (offsets == offsets[0]).all(0) & (weights > least) & (offsets[0] != 1) & (offsets[0] != 0)
    return [(*at, offsets[0][tuple(at)].item(), weights[tuple(at)].item()) for at in same.nonzero().tolist()]


def strong(score) -> str:
    """What an induction score is called: strong above 0.7, moderate above 0.5, weak above 0.3, else minimal."""
    return next((word for least, word in STRENGTHS if score > least), "minimal")


def history(steps, config, *groups, generator) -> Iterator[tuple[int, Induction]]:
    """The moving picture: (step, what the heads of that step do on the same sequences), for each of (step, params).

    Params may be loaded one after the other: steps is read as the picture moves.
    """
    for step, params in steps:
        yield step, summarise(scan(params, config, *groups), generator=generator)


# -------------------------------------------------------------------------------------------------------- the weights


class HeadWeights(NamedTuple):
    """The projections of a layer, a head each; keys and values are repeated for the heads that share them."""

    q: Tensor  # (H, D, C): q = W x
    k: Tensor
    v: Tensor
    o: Tensor  # (H, C, D)


def head_weights(params, config, layer) -> HeadWeights:
    """The weights of each head of a layer, biases left out."""
    p, group = params["blocks"][layer]["attn"], config.n_head // config.n_kv_head
    q, k, v = (p[name]["w"].unflatten(0, (-1, config.d_head)) for name in ("q", "k", "v"))
    o = output_weights(params, config, layer).mT
    return HeadWeights(q, k.repeat_interleave(group, 0), v.repeat_interleave(group, 0), o)


def copying_eigenvalues(params, config, space="tokens") -> Tensor:
    """Re sum(lambda) / sum |lambda| over the eigenvalues of what a head makes of a token, (L,H) in [-1, 1].

    1: every token is raised where it is attended to. space "tokens": W_E W_V W_O W_U; "residual": W_V W_O alone. The
    D x D product has the same eigenvalues but zeros. Norm gains are not folded in; a zero head has 0.  Elhage 2021.
    """
    check_heads(config)
    if space not in ("tokens", "residual"):
        raise ValueError(f"space: expected tokens or residual, got {space!r}")
    n, found = config.n_vocab, []
    middle = model.head(params)["w"][:n].T @ params["embed"]["w"][:n]  # (C,C): W_U W_E
    for layer in range(config.n_layer):
        w = head_weights(params, config, layer)
        through = w.o.mT @ middle if space == "tokens" else w.o.mT  # the row convention: x W_V W_O
        values = torch.linalg.eigvals((through @ w.v.mT).double())
        size = values.abs().sum(-1)
        found.append(torch.where(size > 0, values.sum(-1).real / size, 0))
    return torch.stack(found)


def reader(w, kind) -> Tensor:
    """What a later head reads by its queries, keys or values, (H,D,C): a factor of its M that keeps Frobenius norms.

    M = QK^T for "q", QK for "k", OV for "v", all X^T Y with D x C factors: |X^T Y A| = |R Y A| with X^T = Q R, since Q
    turns and does not stretch.
    """
    x, y = {"q": (w.k.mT, w.q), "k": (w.q.mT, w.k), "v": (w.o, w.v)}[kind]
    return torch.linalg.qr(x, mode="r").R @ y


def writer(w) -> Tensor:
    """What an earlier head writes, (H,C,D): a factor of OV that keeps Frobenius norms, as in reader."""
    return w.o @ torch.linalg.qr(w.v.mT, mode="r").R.mT


def composed(reads, writes) -> Tensor:
    """|M OV| / (|M| |OV|), Frobenius: reads (...,D,C), writes (...,C,D) -> (...); 0 where either is 0."""
    size = reads.norm(dim=(-2, -1)) * writes.norm(dim=(-2, -1))
    return torch.where(size > 0, (reads @ writes).norm(dim=(-2, -1)) / size, 0)


def composition(params, config, kind="k") -> Tensor:
    """How much a later head reads of what an earlier one writes, (L,H,L,H) indexed [earlier..., later...]; nan where
    the first is not in an earlier layer.

    kind "q": M = QK^T, "k": M = QK, "v": M = OV of the later head, in |M OV| / (|M| |OV|). Norm gains, positions and
    QK-norm are left out.  Elhage et al. 2021.
    """
    check_heads(config)
    if kind not in ("q", "k", "v"):
        raise ValueError(f"kind: expected q, k or v, got {kind!r}")
    weights = [head_weights(params, config, layer) for layer in range(config.n_layer)]
    reads, writes = [reader(w, kind) for w in weights], [writer(w) for w in weights]
    n_layer, n_head = config.n_layer, config.n_head
    found = params["embed"]["w"].new_full((n_layer, n_head, n_layer, n_head), torch.nan)
    for later in range(n_layer):
        for earlier in range(later):
            for head in range(n_head):
                found[earlier, :, later, head] = composed(reads[later][head], writes[earlier])
    return found


def composition_baseline(config, *, generator, n_pairs=100) -> tuple[float, float]:
    """(mean, spread) of the composition of random heads of this shape: products of Gaussian matrices."""
    c, d = config.d_model, config.d_head
    draw = lambda *shape: torch.randn(n_pairs, *shape, generator=generator)
    first, second = (HeadWeights(draw(d, c), draw(d, c), draw(d, c), draw(c, d)) for _ in range(2))
    found = composed(reader(second, "k"), writer(first))
    return found.mean().item(), found.std().item()


# -------------------------------------------------------------------------------------------------------- the circuits


class Pair(NamedTuple):
    """An earlier head that may feed a later induction head, and what each is worth."""

    earlier: tuple[int, int]
    later: tuple[int, int]
    composition: float  # K, as it is
    baseline: float  # of random heads
    z: float  # (composition - baseline) / spread
    previous: float  # the earlier head's corrected previous-token score
    copying: float  # the later head's, by eigenvalues
    prefix: float  # the later head's corrected prefix matching
    without_earlier: "Drop"
    without_later: "Drop"


class Drop(NamedTuple):
    """What is lost when a head's output is another sequence's: measured."""

    prefix: float  # of the later head's corrected prefix matching
    gain: float  # of the repeat gain, nats a token


def resampled(config, layer, head):
    """A tap that gives a head the output that it had on another sequence of the batch: the next one, in a circle."""

    def swap(z):
        other = z.clone()
        other[:, :, head] = z[:, :, head].roll(1, 0)
        return other

    return patch(config, {f"blocks.{layer}.attn.z": swap})


def find_pairs(params, config, *groups, found, generator, n_later=None, n_earlier=5, least=0.3) -> list[Pair]:
    """The pairs behind the heads whose corrected prefix matching is above `least`, largest z first.

    found is the Induction of these groups. For each later head (of the best n_later, default all) the n_earlier heads
    of earlier layers with the largest K-composition, each head ablated once: N rows of forward a head, as many as
    n_ablated says.
    """
    prefix, previous = (strength(found.scores, name) for name in ("prefix", "previous"))
    order = prefix.flatten().nan_to_num(nan=-torch.inf).argsort(descending=True).tolist()
    places = [divmod(i, config.n_head) for i in order if prefix.flatten()[i] > least]
    later = [place for place in places if place[0] > 0][:n_later]
    if not later:
        return []
    mean, spread = composition_baseline(config, generator=generator)
    weights, copying = composition(params, config, "k"), copying_eigenvalues(params, config)
    drops, pairs = {}, []

    def drop(place, of):
        if place not in drops:
            drops[place] = summarise(scan(params, config, *groups, tap=resampled(config, *place)))
        without = drops[place]
        left = strength(without.scores, "prefix")[of]
        return Drop((prefix[of] - left).item(), found.gain.value - without.gain.value)

    for place in later:
        fits = weights[(slice(0, place[0]), slice(None), *place)].flatten()
        for i in fits.argsort(descending=True)[:n_earlier].tolist():
            earlier, k = divmod(i, config.n_head), fits[i].item()
            known = (previous[earlier].item(), copying[place].item(), prefix[place].item())
            pair = Pair(earlier, place, k, mean, (k - mean) / spread, *known, drop(earlier, place), drop(place, place))
            pairs.append(pair)
    return sorted(pairs, key=lambda pair: -pair.z)


def n_ablated(pairs) -> int:
    """How many heads find_pairs ablated for these pairs, each at a row of forward for every sequence."""
    return len({place for pair in pairs for place in (pair.earlier, pair.later)})
