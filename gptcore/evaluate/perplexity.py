"""Perplexity: how surprised the model is by text it has not seen, one number a token.

What you learn here: a document longer than the context is read through windows, and every token is a target in exactly
one of them; sums of nats are divided once, at the end, by tokens (loss, perplexity) or by bytes of the original text
(bits per byte, the number that compares tokenizers). How the windows are batched changes the speed and nothing else.
Axes: N documents, B windows, T tokens of the longest, n scored targets, C model width, V vocabulary.
Next: calibration.py asks whether the model knows when it is right, choice.py gives it questions.
"""

import lzma
import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from gptcore import stats
from gptcore.model import chunk_rows, residual, unembed
from gptcore.ops import wide
from gptcore.stats import Interval

BATCH_TOKENS = {"cpu": 4096}  # a CPU works fastest out of its caches; elsewhere many more run at once
LIMIT = 65_536
MIN_UNITS = 10  # documents or blocks below which no interval is given: percentiles of so few draws mean nothing
MIN_XZ = 65_536  # bytes below which a general compressor has not yet learned anything


def exp(nats) -> float:
    """e^nats; inf beyond e^709, where there are no floats."""
    return math.inf if nats > 709 else math.exp(nats)


class Stopped(Exception):
    """stop() said so before every target was scored: there is no score of half a text."""


class Scores(NamedTuple):
    """What a model scored on N documents, one entry a document, on the CPU; sums of them are divided here, once."""

    nats: Tensor  # (N,) float64, summed negative log-likelihood
    n_tokens: Tensor  # (N,) int64, targets scored
    n_bytes: Tensor  # (N,) int64, UTF-8 bytes of the original text that they stand for
    n_correct: Tensor  # (N,) int64, targets that were the most likely token

    @property
    def loss(self) -> float:
        """Mean nats per token, every token weighing the same."""
        return self.nats.sum().item() / self.n_tokens.sum().item()

    @property
    def perplexity(self) -> float:
        """exp(loss): as unsure as a choice among so many tokens. Compares models with the same tokenizer only."""
        return exp(self.loss)

    @property
    def bits_per_byte(self) -> float:
        """Bits the model needs for a byte of the original text: the number that compares tokenizers."""
        return self.nats.sum().item() / (math.log(2) * self.n_bytes.sum().item())

    @property
    def accuracy(self) -> float:
        """The share of targets that were the most likely token."""
        return self.n_correct.sum().item() / self.n_tokens.sum().item()


def windows(n, context, stride, last="full") -> Iterator[tuple[int, int, int]]:
    """(begin, end, first): feed document[begin:end], score its targets first..end; each of 1..n-1 is scored once.

    After the first window a target sees at least context - stride + 1 tokens. last "full" slides the last window back
    to full length, which with stride = context is the rolling rule of the Language Model Evaluation Harness.
    """
    begin, first = 0, 1
    while first < n:
        end = min(begin + context, n - 1)
        if end == n - 1 and last == "full":
            begin = max(0, end - context)
        yield begin, end, first
        begin, first = begin + stride, end + 1


def score_documents(
    params, config, documents, *,
    eot, window=None, stride=None, max_tokens=None, token_bytes=None, batch_tokens=None, stop=None,
) -> Scores:  # fmt: skip
    """Nats, tokens, bytes and hits of every document; documents are (token ids, UTF-8 bytes of the text) pairs.

    eot is the id that every document is read after; None leaves first tokens and their bytes unscored. max_tokens
    scores the first so many tokens only. Either needs token_bytes, the bytes of each id (V,), for the denominator.
    The rest as in score_tokens.
    """
    ways = {"eot": eot, "window": window, "stride": stride, "batch_tokens": batch_tokens, "stop": stop}
    if token_bytes is None and (eot is None or max_tokens is not None):
        raise ValueError("token_bytes: expected the bytes of each id, without which parts of documents have no length")
    if max_tokens is not None:
        documents = first_tokens(documents, max_tokens, token_bytes)
    measures, n_tokens = score_tokens(params, config, [tokens for tokens, _ in documents], **ways)
    return summed(measures, n_tokens, documents, token_bytes)


def summed(measures, n_tokens, documents, token_bytes=None) -> Scores:
    """What score_tokens measured, by document, (ids, bytes) pairs; bytes of ids that were not scored are left out."""
    n_bytes = []
    for (tokens, size), n in zip(documents, n_tokens.tolist(), strict=True):
        n_bytes.append(size - sum(int(token_bytes[int(token)]) for token in tokens[: len(tokens) - n]))
    nats, n_correct = per_document(measures.nats, n_tokens), per_document(measures.correct, n_tokens)
    return Scores(nats, n_tokens, torch.tensor(n_bytes), n_correct)


def first_tokens(documents, max_tokens, token_bytes) -> list[tuple]:
    """The documents that hold the first max_tokens tokens, the last one cut there, its bytes counted by token."""
    kept = []
    for tokens, size in documents:
        if max_tokens <= 0:
            break
        if len(tokens) > max_tokens:
            tokens = tokens[:max_tokens]
            size = sum(int(token_bytes[int(token)]) for token in tokens)
        kept.append((tokens, size))
        max_tokens -= len(tokens)
    return kept


def per_document(values, n_tokens) -> Tensor:
    """Sums of a value per target over each document: (n,), lengths (N,) -> (N,), in float64 or int64."""
    values = values.double() if values.is_floating_point() else values.long()
    documents = torch.repeat_interleave(torch.arange(len(n_tokens)), n_tokens)
    return torch.zeros(len(n_tokens), dtype=values.dtype).index_add_(0, documents, values)


# ------------------------------------------------------------------------------------------- what the numbers are worth


def intervals(scores, *, generator, draws=1000) -> dict[str, Interval]:
    """loss, perplexity, bits_per_byte and accuracy, each with its 95 % interval; bounds are nan below 10 units.

    A percentile bootstrap over documents, because the tokens of one go up and down together: draws of whole documents,
    the same ones for all four numbers.
    """
    units = torch.stack([column.double() for column in scores], dim=1)  # (N,4)
    ratios = lambda sums: torch.stack(
        [sums[..., 0] / sums[..., 1], sums[..., 0] / (math.log(2) * sums[..., 2]), sums[..., 3] / sums[..., 1]], dim=-1
    )
    bounds = torch.full((2, 3), torch.nan, dtype=torch.float64)
    if len(units) >= MIN_UNITS:
        bounds = stats.percentiles(ratios(stats.bootstrap_sums(units, draws=draws, generator=generator)))
    loss, bits, accuracy = (Interval(*column) for column in torch.stack([ratios(units.sum(0)), *bounds]).T.tolist())
    perplexity = Interval(*map(exp, loss))
    return {"loss": loss, "perplexity": perplexity, "bits_per_byte": bits, "accuracy": accuracy}


def blocks(measures, n_tokens, documents, token_bytes, size) -> Scores:
    """Scores of blocks of at least `size` tokens (or whole documents), so that one long text has an interval too.

    measures and n_tokens come from score_tokens on documents, sequences of ids; token_bytes (V,) are the bytes of ids.
    """
    pieces = [cuts(n, size) for n in n_tokens.tolist()]
    sizes = torch.tensor([size for cut in pieces for size in cut], dtype=torch.long)
    targets = [torch.as_tensor(tokens).long()[len(tokens) - n :] for tokens, n in zip(documents, n_tokens, strict=True)]
    n_bytes = per_document(torch.as_tensor(token_bytes)[torch.cat(targets)], sizes)
    return Scores(per_document(measures.nats, sizes), sizes, n_bytes, per_document(measures.correct, sizes))


def byte_blocks(measures, n_tokens, documents, token_bytes, size) -> Scores:
    """Scores of blocks of at least `size` bytes: the same parts of a text whatever the tokenizer, for comparisons.

    A token counts where it begins. documents are (ids, bytes) pairs of which score_tokens read every token.
    """
    places, sizes = [], []
    for (tokens, n_bytes), n in zip(documents, n_tokens.tolist(), strict=True):
        width = torch.as_tensor(token_bytes)[torch.as_tensor(tokens).long()[len(tokens) - n :]].long()
        cut = cuts(n_bytes, size)
        places.append(len(sizes) + ((width.cumsum(0) - width) // size).clamp(max=max(0, len(cut) - 1)))
        sizes += cut
    places, n_bytes = torch.cat(places), torch.tensor(sizes)
    sums = lambda values: torch.zeros(len(sizes), dtype=values.dtype).index_add_(0, places, values)
    return Scores(sums(measures.nats.double()), sums(torch.ones_like(places)), n_bytes, sums(measures.correct.long()))


def cuts(n, size) -> list[int]:
    """The sizes of the blocks of at least `size` that n are cut into: one block if n is less, none if it is 0."""
    whole = max(1, n // size) if n else 0
    return [size] * (whole - 1) + [n - size * (whole - 1)] * (whole > 0)


def gap(held_out, trained, *, generator, draws=1000) -> Interval:
    """Loss on held-out text less loss on training text, two Scores, in nats per token; they are resampled apart."""
    low = high = math.nan
    if min(len(held_out.nats), len(trained.nats)) >= MIN_UNITS:
        drawn = [
            stats.bootstrap_sums(torch.stack([s.nats, s.n_tokens.double()], dim=1), draws=draws, generator=generator)
            for s in (held_out, trained)
        ]
        here, there = (sums[:, 0] / sums[:, 1] for sums in drawn)
        low, high = map(float, stats.percentiles(here - there))
    return Interval(held_out.loss - trained.loss, low, high)


def references(documents, n_vocab, *, counts=None, texts=None) -> dict[str, float]:
    """What the same text costs without a model, in bits per byte; documents are (ids, bytes of the text) pairs.

    untrained: every id as likely. unigram: by how often each id came in training, counts (V,) and one more. xz: Lempel,
    Ziv and Markov's compressor at its best on the texts, from 64 KiB on. What cannot be said is left out.
    """
    n_bytes = sum(size for _, size in documents)
    ids = torch.cat([torch.as_tensor(tokens).long() for tokens, _ in documents])
    found = {"untrained": math.log2(n_vocab) * len(ids) / n_bytes}
    if counts is not None:
        share = (torch.as_tensor(counts).double() + 1) / (torch.as_tensor(counts).sum() + n_vocab)
        found["unigram"] = -share.log2()[ids].sum().item() / n_bytes
    if texts is not None and n_bytes >= MIN_XZ:
        found["xz"] = 8 * len(lzma.compress("".join(texts).encode("utf-8", "replace"), preset=9)) / n_bytes
    return found


def verdict(bits_per_byte, references) -> str:
    """What a model has learned, in words, by the upper bound of its interval; "" without an interval."""
    if math.isnan(bits_per_byte.high):
        return ""
    ladder = {
        "untrained": "knows token frequencies",
        "unigram": "uses context",
        "xz": "beats a general compressor",
    }
    top = bits_per_byte.high * (1 + 1e-6)  # a model that knows nothing must not win by rounding
    reached = [words for name, words in ladder.items() if top < references.get(name, -math.inf)]
    return reached[-1] if reached else "no better than guessing"


# ------------------------------------------------------------------------------------------------- what is measured


class Likelihood(NamedTuple):
    """What perplexity needs of a target."""

    nats: Tensor  # (n,) float32, -log p(target)
    correct: Tensor  # (n,) bool: the target is the most likely token


class Detail(NamedTuple):
    """What can be shown of a target."""

    nats: Tensor
    correct: Tensor
    rank: Tensor  # (n,) int64: how many tokens were strictly more likely
    entropy: Tensor  # (n,) float32, nats: how unsure the model was before it saw the target


def likelihood(logits, targets) -> Likelihood:
    """logits (n,V) in float32, targets (n,) -> Likelihood."""
    return Likelihood(F.cross_entropy(logits, targets, reduction="none"), logits.argmax(-1) == targets)


def detail(logits, targets) -> Detail:
    """logits (n,V) in float32, targets (n,) -> Detail."""
    log_p = logits.log_softmax(-1)
    rank = (logits > logits.gather(-1, targets[:, None])).sum(-1)
    return Detail(*likelihood(logits, targets), rank, -(log_p.exp() * log_p.clamp(min=-1e4)).sum(-1))


# ------------------------------------------------------------------------------------------------ how it is computed


@torch.no_grad()
def score_tokens(
    params, config, documents, *,
    eot, window=None, stride=None, batch_tokens=None, measure=likelihood, stop=None,
) -> tuple[NamedTuple, Tensor]:  # fmt: skip
    """measure of every target of every document (a list of sequences of ids) -> (measures, n_tokens).

    measures is what measure returns, each entry (n,) in the order of the text and on the CPU; n_tokens (N,) cuts it
    into documents. measure gets logits (n,V), at least float32 whatever the weights are, and targets (n,); only scored
    positions are unembedded. Documents are read in windows of `window` (n_context) tokens, `stride` (window) apart,
    batch_tokens of them at once. Raises ValueError for sizes that do not fit, Stopped once stop() is true.
    """
    window = config.n_context if window is None else window
    stride = window if stride is None else stride
    if not 1 <= window <= config.n_context:
        raise ValueError(f"window: expected a number in 1..n_context={config.n_context}, got {window}")
    if not 1 <= stride <= window:
        raise ValueError(f"stride: expected a number in 1..window={window}, got {stride}")
    if eot is not None and not 0 <= eot < config.n_vocab:
        raise ValueError(f"eot: expected an id below n_vocab={config.n_vocab}, got {eot}")
    device = params["embed"]["w"].device
    batch_tokens = BATCH_TOKENS.get(device.type, LIMIT) if batch_tokens is None else batch_tokens
    flat, lengths = joined(documents, [] if eot is None else [eot])
    n_tokens = (lengths - 1).clamp(min=0)
    if not n_tokens.any():
        raise ValueError("documents: expected at least one token to score, got none")
    bad = flat[(flat < 0) | (flat >= config.n_vocab)].tolist()
    if bad:
        raise ValueError(f"documents: expected ids below n_vocab={config.n_vocab}, got {bad[0]}")

    order, parts = [], []
    for index, targets, rows, tokens in batches(flat, lengths, window, stride, batch_tokens):
        if stop is not None and stop():
            raise Stopped
        x, _ = residual(params, config, tokens.to(device))
        parts += measured(params, config, x.flatten(0, 1)[rows.to(device)], targets.to(device), measure)
        order.append(index)
    back = torch.cat(order).argsort()  # windows were sorted by length: put the text in order again
    return type(parts[0])(*(column[back] for column in together(parts))), n_tokens


def measured(params, config, x, targets, measure) -> list[NamedTuple]:
    """measure of the residual stream's rows x (n,C) and their targets (n,), by chunks: (n,V) logits never exist."""
    size = chunk_rows(config.n_vocab_padded, config.d_model, x.device.type)
    chunks = zip(x.split(size), targets.split(size), strict=True)
    return [measure(wide(unembed(params, config, some)), wanted) for some, wanted in chunks]


def together(parts):
    """The measures of all parts as one, on the CPU."""
    return type(parts[0])(*(torch.cat(column).cpu() for column in zip(*parts, strict=True)))


def joined(documents, prefix) -> tuple[Tensor, Tensor]:
    """Documents end to end, each after the prefix: (their ids, int64, and the length of each with its prefix (N,))."""
    prefix = torch.tensor(prefix, dtype=torch.long)
    parts = [part for tokens in documents for part in (prefix, torch.as_tensor(tokens).long())]
    lengths = [len(prefix) + len(tokens) for tokens in documents]
    return torch.cat([prefix[:0], *parts]), torch.tensor(lengths, dtype=torch.long)


def batches(flat, lengths, window, stride, batch_tokens) -> Iterator[tuple[Tensor, ...]]:
    """Windows on documents that lie end to end in flat, the longest first, as (index, targets, rows, tokens).

    tokens (B,T) is padded on the right, which no earlier position sees; rows (n,) are the scored positions of
    tokens.flatten(), targets (n,) what they should have predicted, index (n,) where in flat that stands.
    """
    starts = (lengths.cumsum(0) - lengths).tolist()
    spans = [
        (begin, end, first, start)
        for start, n in zip(starts, lengths.tolist(), strict=True)
        for begin, end, first in windows(n, window, stride)
    ]
    spans = sorted(spans, key=lambda span: span[0] - span[1])  # stable: equal lengths stay in the order of the text
    done = 0
    while done < len(spans):
        width = spans[done][1] - spans[done][0]
        chosen = spans[done : done + max(1, batch_tokens // width)]
        begin, end, first, start = torch.tensor(chosen).T[:, :, None]  # each (B,1)
        read = begin + torch.arange(width)  # (B,T), positions in the document
        scored = (read + 1 >= first) & (read < end)
        index = (start + read + 1)[scored]
        tokens = torch.where(read < end, flat[(start + read).clamp(max=len(flat) - 1)], 0)
        yield index, flat[index], scored.flatten().nonzero()[:, 0], tokens
        done += len(chosen)
