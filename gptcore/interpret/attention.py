"""Attention heads: where each one looks, as numbers beside what chance alone would give.

What you learn here: "a previous-token head" is a claim about a number. A detector marks, for each query, the keys that
the claim is about; the score is the attention that falls on them. What a head would score that knows nothing but
positions is its chance, which is high for a steep ALiBi head and is taken off. Sequences, not tokens, are the units of
the interval, and no pattern is ever kept: each one is reduced while the forward passes by.
Axes: N sequences, B of them at once, T tokens (q as queries, k as keys), L layers, H heads, D head width, C model
width, n detectors.
Next: induction.py asks the same of repeated sequences.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from gptcore import model, ops, stats
from gptcore.interpret.taps import record

MIN_SEQUENCES = 5  # for an interval
BATCH_BYTES = 2**25  # of a layer's largest activation, whatever the number of sequences


# ------------------------------------------------------------------------------------------------------- the detectors


def previous(tokens) -> Tensor:
    """k = q - 1.  tokens (B,T) -> (B,T,T), True where the key is looked for."""
    q, k = _grid(tokens)
    return (k == q - 1).expand(len(tokens), -1, -1)


def current(tokens) -> Tensor:
    """k = q, but for the first query, which has no choice."""
    q, k = _grid(tokens)
    return ((k == q) & (q >= 1)).expand(len(tokens), -1, -1)


def start(tokens) -> Tensor:
    """k = 0, but for the first query."""
    q, k = _grid(tokens)
    return ((k == 0) & (q >= 1)).expand(len(tokens), -1, -1)


def duplicate(tokens) -> Tensor:
    """An earlier copy of the query's token."""
    q, k = _grid(tokens)
    return (tokens[:, :, None] == tokens[:, None, :]) & (k < q)


def prefix(tokens) -> Tensor:
    """What followed an earlier copy of the query's token: prefix matching, which is what induction heads do."""
    q, k = _grid(tokens)
    before = torch.cat([torch.full_like(tokens[:, :1], -1), tokens[:, :-1]], dim=1)
    return (tokens[:, :, None] == before[:, None, :]) & (k <= q) & (k >= 1)


DETECTORS = {"previous": previous, "current": current, "start": start, "duplicate": duplicate, "prefix": prefix}
SHAPES = ("uniform", "sparse", "keys")  # what is said of a pattern without any detector


def _grid(tokens):
    places = torch.arange(tokens.shape[1], device=tokens.device)
    return places[:, None], places[None, :]


# ---------------------------------------------------------------------------------------------------------- the scores


class Sums(NamedTuple):
    """What is summed over the queries of each sequence, float64 on the CPU: scores divides, join puts together."""

    names: tuple[str, ...]  # n of them: the detectors, then SHAPES
    hits: Tensor  # (N, n, L, H)
    chance: Tensor  # (N, n, H): the same of a head that knows positions alone
    n_queries: Tensor  # (N, n)


class Score(NamedTuple):
    """One score of every head, each (L,H): the value, its 95 % interval (nan where sequences are too few), and what a
    head scores by chance that knows positions alone.
    """

    value: Tensor
    low: Tensor
    high: Tensor
    chance: Tensor

    def corrected(self) -> stats.Interval:
        """(x - chance) / (1 - chance) of the value and its bounds: 0 is chance, 1 the most; nan where chance is 1."""
        scale = torch.where(self.chance < 1, 1 - self.chance, torch.nan)
        return stats.Interval(*((x - self.chance) / scale for x in (self.value, self.low, self.high)))


def null_pattern(config, n_tokens, *, device="cpu") -> Tensor:
    """The pattern of heads that know positions alone, (H,T,T) float64: softmax of the position bias over visible keys.

    1 / (q + 1) without ALiBi and without a window.
    """
    nothing = lambda *shape: torch.zeros(shape, dtype=torch.float64, device=device)
    slopes = ops.alibi_slopes(config.n_head, device) if config.position == "alibi" else None
    q, k = nothing(1, n_tokens, config.n_head, 1), nothing(1, 1, n_tokens, 1)
    scores = ops.attention_scores(q, k, model.positions_of(q), slopes=slopes, window=config.window)
    return scores.softmax(-1)[0]


class Question(NamedTuple):
    """What is asked of every pattern of some sequences: made once by ask, answered a layer at a time."""

    marks: Tensor  # (B, n, T, T) in the pattern's dtype: 1 where a detector looks
    counted: Tensor  # (B, T): queries that have a choice of keys
    most_nats: Tensor  # (T,): the entropy of an even pattern
    n_queries: Tensor  # (B, n + 3)

    def answer(self, pattern) -> Tensor:
        """pattern (B,H,T,T), or (H,T,T) for all -> the sums over its queries, (B, n + 3, H) float64 on the CPU."""
        hits = self.marks.flatten(2) @ pattern.flatten(-2).mT  # (B, n, T T) (T T, H)
        entropy = torch.special.entr(pattern).sum(-1)
        shapes = torch.stack([entropy / self.most_nats, pattern.amax(-1), entropy.exp()], dim=-3)  # (..., 3, H, T)
        shapes = shapes.where(self.counted[:, None, None], 0).sum(-1)
        return torch.cat([hits, shapes], dim=1).double().cpu()


def ask(config, tokens, detectors, *, lengths=None, dtype=torch.float32) -> Question:
    """The question that the detectors, functions of tokens (B,T) or masks (B,T,T) or (T,T), put to these sequences.

    Queries from a row's length on are padding and never count; no query sees the keys there.
    """
    n_tokens, place = tokens.shape[1], tokens.device
    lengths = tokens.new_full((len(tokens),), n_tokens) if lengths is None else torch.as_tensor(lengths, device=place)
    real = torch.arange(n_tokens, device=place) < lengths[:, None]  # (B,T)
    marks = [mark(tokens) if callable(mark) else mark.expand(len(tokens), -1, -1) for mark in detectors.values()]
    marks = (
        torch.stack(marks, dim=1) & real[:, None, :, None]
        if marks
        else real.new_zeros(len(tokens), 0, n_tokens, n_tokens)
    )
    n_visible = ops.visible(model.positions_of(tokens), n_tokens, config.window)[0, 0].sum(-1)
    counted = real & (n_visible > 1)
    n_queries = [marks.any(-1).sum(-1), counted.sum(-1, keepdim=True).expand(-1, len(SHAPES))]
    return Question(marks.to(dtype), counted, n_visible.to(dtype).log(), torch.cat(n_queries, dim=1).double().cpu())


def measure(params, config, tokens, *, detectors=DETECTORS, lengths=None) -> Sums:
    """Ask every head of the model about tokens (N,T), as many rows of forward as there are sequences.

    detectors: {name: mask or function of tokens} as in ask; lengths (N,) of rows that are padded on the right. Raises
    ValueError for a model without blocks, which has no heads.
    """
    check_heads(config)
    parts = []
    for rows in batches(config, tokens):
        lengths_here = None if lengths is None else torch.as_tensor(lengths)[rows.cpu()]
        tap, finish = watch(config, tokens[rows], detectors, lengths=lengths_here, dtype=params["embed"]["w"].dtype)
        with torch.no_grad():
            model.residual(params, config, tokens[rows], tap=tap)
        parts.append(finish())
    return join(parts)


def watch(config, tokens, detectors, *, lengths=None, dtype=torch.float32):
    """(tap, finish): a tap that reduces every pattern of a forward of these tokens, and what then gives the Sums."""
    question, answers = ask(config, tokens, detectors, lengths=lengths, dtype=dtype), []

    def tap(name, value):
        if name.endswith("attn.pattern"):
            answers.append(question.answer(value))
        return value

    def finish():
        exact = question._replace(marks=question.marks.double())
        chance = exact.answer(null_pattern(config, tokens.shape[1], device=tokens.device))
        return Sums((*detectors, *SHAPES), torch.stack(answers, dim=2), chance, question.n_queries)

    return tap, finish


def check_heads(config) -> None:
    """Raise ValueError for a model without blocks."""
    if not config.n_layer:
        raise ValueError("n_layer: expected a model with heads, got 0 blocks")


def batches(config, tokens, *, least=1):
    """The numbers of the rows to put through the model together: within BATCH_BYTES a layer, or `least` rows if not."""
    n, n_tokens = tokens.shape
    n_bytes = 4 * n_tokens * max(config.n_head * n_tokens, config.d_ff)
    n_batches = min(-(-n * n_bytes // BATCH_BYTES), n // least)
    return torch.arange(n, device=tokens.device).tensor_split(n_batches)


def join(parts) -> Sums:
    """The sums of several sets of sequences about the same names as those of one."""
    return Sums(parts[0].names, *(torch.cat(each) for each in list(zip(*parts, strict=True))[1:]))


def scores(sums, *, generator=None) -> dict[str, Score]:
    """{name: Score}: hits over queries, all sequences together; with a generator also the intervals."""
    chance = sums.chance.sum(0) / sums.n_queries.sum(0)[:, None]  # (n,H)
    found = interval(sums.hits, sums.n_queries, generator=generator)
    columns = zip(*found, chance[:, None].expand_as(found.value), strict=True)
    return {name: Score(*column) for name, column in zip(sums.names, columns, strict=True)}


def interval(top, bottom, *, generator) -> stats.Interval:
    """Sum of top (N,...) over sum of bottom (N,) or (N,n), with a bootstrap over the N sequences.

    Without a generator, or with fewer than MIN_SEQUENCES that have a query to count, the bounds are nan.
    """
    least = math.inf if generator is None else MIN_SEQUENCES
    return stats.ratio_interval(top, bottom, generator=generator, least=least)


def head_scores(params, config, tokens, *, generator=None, detectors=DETECTORS, lengths=None) -> dict[str, Score]:
    """{name: Score} of every detector and of SHAPES, over sequences tokens (N,T)."""
    return scores(measure(params, config, tokens, detectors=detectors, lengths=lengths), generator=generator)


# --------------------------------------------------------------------------------------------- what heads are called

LABELS = {  # label: (score, more than)
    "previous_token": ("previous", 0.5),
    "start_token": ("start", 0.5),
    "duplicate_token": ("duplicate", 0.5),
    "induction": ("prefix", 0.5),
    "sparse": ("sparse", 0.7),
    "uniform": ("uniform", 0.9),
}


def strength(scores, name) -> Tensor:
    """The number that a score is ranked and labelled by, (L,H): corrected for chance; a pattern's shape as it is."""
    return scores[name].value if name in SHAPES else scores[name].corrected().value


def labels(scores) -> list[list[dict[str, float]]]:
    """[layer][head] -> {label: its number} of every label that holds; a head without any is mixed."""
    known = {label: (strength(scores, name), least) for label, (name, least) in LABELS.items() if name in scores}
    n_layer, n_head = next(iter(scores.values())).value.shape
    at = lambda layer, head: {
        label: numbers[layer, head].item() for label, (numbers, least) in known.items() if numbers[layer, head] > least
    }
    return [[at(layer, head) for head in range(n_head)] for layer in range(n_layer)]


def find_heads(scores, name, k=5) -> list[tuple[int, int, float]]:
    """The k heads of the largest strength: (layer, head, strength), best first; where it is undefined, none."""
    if name not in scores:
        raise ValueError(f"score: expected one of {', '.join(scores)}, got {name!r}")
    numbers = strength(scores, name)
    order = numbers.flatten().nan_to_num(nan=-torch.inf).argsort(descending=True, stable=True)[:k].tolist()
    found = [(*divmod(i, numbers.shape[1]), numbers.flatten()[i].item()) for i in order]
    return [each for each in found if not math.isnan(each[2])]


# ---------------------------------------------------------------------------------------------------------- patterns


def patterns(params, config, tokens, *, layers=None, value_weighted=False) -> Tensor:
    """The patterns of some layers (default: all), (layers, B, H, T, T). Layers above the last one do not run.

    value_weighted: the weights times the length of what they bring, see value_weights.
    """
    check_heads(config)
    layers = list(range(config.n_layer)) if layers is None else list(layers)
    if not layers or min(layers) < 0 or max(layers) >= config.n_layer:
        raise ValueError(f"layers: expected numbers from 0 to {config.n_layer - 1}, got {layers}")
    tap, seen = record(config, [f"blocks.{layer}.attn.{site}" for layer in layers for site in ("pattern", "v")])
    with torch.no_grad():
        model.check_tokens(tokens, config)
        model.run_blocks(params, config, model.embed(params, config, tokens), last=max(layers) + 1, tap=tap)
    found = []
    for layer in layers:
        pattern, v = (seen[f"blocks.{layer}.attn.{site}"] for site in ("pattern", "v"))
        found.append(
            value_weights(pattern, v, params["blocks"][layer]["attn"]["o"]["w"]) if value_weighted else pattern
        )
    return torch.stack(found)


def value_lengths(v, o) -> Tensor:
    """|v_k W_O[h]|, how much each key brings through each head: v (B,S,H_kv,D), o (C, H D) -> (B,H,S)."""
    o = o.unflatten(1, (-1, v.shape[-1]))  # (C,H,D)
    v = v.repeat_interleave(o.shape[1] // v.shape[2], dim=2)
    return torch.einsum("bshd,chd->bshc", v, o).norm(dim=-1).transpose(1, 2)


def value_weights(pattern, v, o) -> Tensor:
    """A[q,k] |v_k W_O|, each query's again summing to 1: attention to a key that brings nothing carries nothing.

    pattern (B,H,T,S), v (B,S,H_kv,D), o the output projection's w (C, H D) -> (B,H,T,S).  Kobayashi et al. 2020,
    arXiv:2004.10102. A query to which no key brings anything has 0 everywhere.
    """
    weights = pattern * value_lengths(v, o)[:, :, None]
    total = weights.sum(-1, keepdim=True)
    return torch.where(total > 0, weights / total, 0)


def compare_heads(patterns) -> Tensor:
    """How far heads look at the same keys: patterns (n,B,T,T) -> (n,n), 1 for equal ones, 0 where no key is shared.

    The mean over queries q >= 1 of sum_k min(A, A'): one minus the total variation distance.
    """
    return torch.stack([torch.minimum(one, patterns).sum(-1)[..., 1:].mean((-1, -2)) for one in patterns])
