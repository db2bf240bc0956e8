"""Questions for a model that only continues text: which of these endings, and what is the last word?

What you learn here: a choice's score is the likelihood of its tokens after the context. All choices of a question
share the context, so it is run once and its keys and values are handed to each of them: C + sum E_i tokens instead
of K C + sum E_i.
Axes: G contexts, R choices in a batch, C tokens of a context, E of a choice, N items, K choices of the longest item.
Next: comparison.py says whether one model answers better than another.
"""

import json
import math
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from gptcore.cache import init_cache, select, with_lengths
from gptcore.evaluate.perplexity import BATCH_TOKENS, LIMIT, likelihood, measured, together
from gptcore.model import residual


class Item(NamedTuple):
    """A question: the endings follow the context as they are, whatever stands between them included."""

    context: str
    endings: tuple[str, ...]
    label: int  # the index of the right one
    n_delimiter: int = 1  # characters at the start of each ending that are not counted in its length


class Answers(NamedTuple):
    """What a model makes of N continuations."""

    log_p: Tensor  # (N,) float64, sum of log p(token) over the continuation's tokens
    greedy: Tensor  # (N,) bool: every one of them was the most likely token
    n_fed: int  # tokens that went through the model, padding not counted

    @property
    def accuracy(self) -> float:
        """The share of continuations that greedy decoding writes."""
        return self.greedy.double().mean().item()

    @property
    def perplexity(self) -> float:
        """exp of the mean of -log p, a continuation counting once however many tokens it has."""
        return self.log_p.mean().neg().exp().item()


class ChoiceScores(NamedTuple):
    """What a model makes of N questions with up to K endings; what an item does not have scores -inf."""

    log_p: Tensor  # (N,K) float64, log p(ending | context)
    alone: Tensor  # (N,K) float64, log p(ending | nothing but the end-of-text id)
    n_chars: Tensor  # (N,K) characters of an ending without its delimiter
    n_bytes: Tensor  # (N,K) the same in UTF-8
    label: Tensor  # (N,)

    def correct(self) -> dict[str, Tensor]:
        """Is the item right, (N,) bool, by the rule's name? Ties go to the lowest index.

        acc compares log p, acc_norm log p a character, acc_bytes log p a byte (the one that tokenizers and scripts
        change least), acc_mutual_info how much the context adds: log p(ending | context) - log p(ending).
        """
        none = self.log_p == -math.inf
        rules = {
            "acc": self.log_p,
            "acc_norm": self.log_p / self.n_chars,
            "acc_bytes": self.log_p / self.n_bytes,
            "acc_mutual_info": (self.log_p - self.alone).masked_fill(none, -math.inf),
        }
        return {name: value.argmax(-1) == self.label for name, value in rules.items()}

    def brier(self) -> Tensor:
        """Squared distance of softmax(log p) from the right answer, (N,), 0 to 2."""
        p = self.log_p.softmax(-1)
        right = F.one_hot(self.label, p.shape[-1])
        return (p - right).square().sum(-1)

    def confidence(self) -> Tensor:
        """The likeliest ending's share of softmax(log p), (N,)."""
        return self.log_p.softmax(-1).amax(-1)


# ------------------------------------------------------------------------------------------------------------ forms


def read_items(lines) -> list[Item]:
    """Questions from JSON lines {"ctx", "endings", "label"}; a space joins context and ending.

    Rows with activity_label, ctx_a and ctx_b are HellaSwag's own (Zellers et al. 2019, arXiv:1905.07830) and read as
    the Language Model Evaluation Harness reads them. Raises ValueError naming the line.
    """
    items = []
    for number, row in _rows(lines):
        hellaswag = all(isinstance(row.get(name), str) for name in ("activity_label", "ctx_a", "ctx_b"))
        endings, label = row.get("endings"), row.get("label")
        context = (
            f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}" if hellaswag else row.get("ctx")
        )
        if (
            not isinstance(context, str)
            or not isinstance(endings, list)
            or not all(isinstance(e, str) for e in endings)
        ):
            raise ValueError(f'line {number}: expected {{"ctx": text, "endings": [texts], "label"}}, got {_short(row)}')
        if not str(label).isdecimal() or int(label) >= len(endings):
            raise ValueError(f"line {number}: expected a label in 0..{len(endings) - 1}, got {label!r}")
        tidy = hellaswag_text if hellaswag else str
        items.append(Item(tidy(context), tuple(" " + tidy(ending) for ending in endings), int(label)))
    return items


def read_words(lines) -> list[tuple[str, str]]:
    """(context, last word) pairs from JSON lines {"text"}: the word after the last space, and that space with it.

    The form of LAMBADA (Paperno et al. 2016, arXiv:1606.06031). Raises ValueError naming the line.
    """
    pairs = []
    for number, row in _rows(lines):
        text = row.get("text")
        if not isinstance(text, str) or " " not in text:
            raise ValueError(f'line {number}: expected {{"text": two words or more}}, got {_short(row)}')
        context, _, word = text.rpartition(" ")
        pairs.append((context, " " + word))
    return pairs


def hellaswag_text(text) -> str:
    """HellaSwag's text without the marks of its source: [title] ends a sentence, other brackets go."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def _rows(lines) -> Iterator[tuple[int, dict]]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"line {number}: expected JSON, got {_short(line)}: {error}") from error
        if not isinstance(row, dict):
            raise ValueError(f"line {number}: expected a JSON object, got {_short(row)}")
        yield number, row


def _short(value):
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else text[:79] + "…"


def encode_pairs(tokenizer, pairs) -> list[tuple[list[int], list[int]]]:
    """(context, continuation) texts -> their ids, as the Language Model Evaluation Harness cuts them.

    Spaces at the context's end go to the continuation, whose ids are what encode(both) has beyond encode(context); an
    empty context is the end-of-text id, or the continuation's own first id where that is it. Raises ValueError for a
    continuation without ids.
    """
    cut = [(context.rstrip(), context, ending) for context, ending in pairs]
    moved = [(kept, context[len(kept) :] + ending) for kept, context, ending in cut]
    whole = tokenizer.encode_batch([context + ending for context, ending in moved])
    begun = tokenizer.encode_batch([context for context, _ in moved])
    found = []
    for both, context, (_, ending) in zip(whole, begun, moved, strict=True):
        rest = both[len(context) :]
        if not context:
            context, rest = [tokenizer.eot], rest[1:] if rest[:1] == [tokenizer.eot] else rest
        if not rest:
            raise ValueError(f"ending: expected at least one token beyond its context, got none for {_short(ending)!r}")
        found.append((context, rest))
    return found


# ----------------------------------------------------------------------------------------------------------- scoring


def multiple_choice(params, config, tokenizer, items, **ways) -> ChoiceScores:
    """Score every ending of every item (a list of Item); **ways as in continuations.

    Raises ValueError where there is no item.
    """
    if not items:
        raise ValueError("items: expected at least one question, got none")
    pairs = [(item.context, ending) for item in items for ending in item.endings]
    alone = [("", ending) for _, ending in pairs]
    answers = continuations(params, config, encode_pairs(tokenizer, pairs + alone), **ways)
    bare = [ending[item.n_delimiter :] for item in items for ending in item.endings]
    sizes = [len(item.endings) for item in items]
    grid = lambda values, empty: pad_sequence(
        torch.as_tensor(values).split(sizes), batch_first=True, padding_value=empty
    )
    return ChoiceScores(
        grid(answers.log_p[: len(pairs)], -math.inf),
        grid(answers.log_p[len(pairs) :], -math.inf),
        grid([len(ending) for ending in bare], 1),
        grid([len(ending.encode()) for ending in bare], 1),
        torch.tensor([item.label for item in items]),
    )


def last_words(params, config, tokenizer, pairs, **ways) -> Answers:
    """Score the last word of each (context, word) pair; **ways as in continuations."""
    return continuations(params, config, encode_pairs(tokenizer, pairs), **ways)


@torch.no_grad()
def continuations(params, config, requests, *, batch_tokens=None, share=True) -> Answers:
    """log p of each continuation after its context; requests are (context ids, continuation ids), neither empty.

    Of both together the last n_context + 1 ids are kept, and all but the last are fed. Equal contexts run once
    (share); batch_tokens, padding counted, run at once; only the continuations' positions are unembedded. Raises
    ValueError for a request that is empty or longer than the context.
    """
    device = params["embed"]["w"].device
    batch_tokens = BATCH_TOKENS.get(device.type, LIMIT) if batch_tokens is None else batch_tokens
    stems = plan(requests, config.n_context, batch_tokens, share)
    parts, owners = [], []
    for batch in batches(stems, config.n_context, batch_tokens):
        for x, rows in run(params, config, batch):
            scored = [(i, *entry) for i, row in enumerate(rows) for entry in row.scored]
            at, position, targets, owner = torch.tensor(scored).T
            x = x[at.to(device), position.to(device)]  # (n,C)
            parts += measured(params, config, x, targets.to(device), likelihood)
            owners.append(owner)
    log_p, wrong = torch.zeros(len(requests), dtype=torch.float64), torch.zeros(len(requests), dtype=torch.long)
    if parts:
        nats, correct = together(parts)
        log_p.index_add_(0, torch.cat(owners), -nats.double())
        wrong.index_add_(0, torch.cat(owners), (~correct).long())
    n_fed = sum(len(row.ids) for stem, leaves in stems for row in (stem, *leaves))
    return Answers(log_p, wrong == 0, n_fed)


class Row(NamedTuple):
    """Ids to feed, and what to score: (position in them, the id that should come next, the request it belongs to)."""

    ids: list[int]
    scored: list[tuple[int, int, int]]


def plan(requests, n_context, batch_tokens, share=True) -> list[tuple[Row, list[Row]]]:
    """A stem for each context and a leaf for each of its continuations; one continuation alone goes with its stem."""
    groups = {}
    for index, (context, ending) in enumerate(requests):
        if not context or not 1 <= len(ending) <= n_context:
            sizes = f"{len(context)} and {len(ending)}"
            raise ValueError(
                f"request {index}: expected a context and 1..n_context={n_context} ids after it, got {sizes}"
            )
        kept = tuple(context[max(0, len(context) + len(ending) - n_context - 1) :])
        groups.setdefault((kept, None if share else index), []).append((index, list(ending)))
    stems = []
    for (context, _), members in groups.items():
        if len(members) == 1:
            [(index, ending)] = members
            stems.append((Row([*context, *ending[:-1]], list(following(len(context) - 1, ending, index))), []))
            continue
        size = max(1, batch_tokens // max(len(ending) for _, ending in members))
        for some in (members[start : start + size] for start in range(0, len(members), size)):
            first = [(len(context) - 1, ending[0], index) for index, ending in some]
            leaves = [Row(e[:-1], list(following(0, e[1:], index))) for index, e in some if len(e) > 1]
            stems.append((Row(list(context), first), leaves))
    return stems


def following(position, ids, index) -> Iterator[tuple[int, int, int]]:
    """Each of the ids as a target, the first one after `position`."""
    return ((position + i, id, index) for i, id in enumerate(ids))


def batches(stems, n_context, batch_tokens) -> Iterator[list[tuple[Row, list[Row]]]]:
    """Stems that run together, the longest first, those with leaves apart from those without.

    At most batch_tokens padded ids, and no padded row that would leave the context; a single stem always runs.
    """
    batch, n_leaves, widest = [], 0, 0
    for stem, leaves in sorted(stems, key=lambda stem: (not stem[1], -len(stem[0].ids))):
        widest, n_leaves = max([widest, *(len(leaf.ids) for leaf in leaves)]), n_leaves + len(leaves)
        if batch:
            deepest, kind = len(batch[0][0].ids), bool(batch[0][1])
            n_ids = (len(batch) + 1) * deepest + n_leaves * widest
            if n_ids > batch_tokens or deepest + widest > n_context or bool(leaves) != kind:
                yield batch
                batch, n_leaves, widest = [], len(leaves), max([0, *(len(leaf.ids) for leaf in leaves)])
        batch.append((stem, leaves))
    if batch:
        yield batch


def run(params, config, batch) -> Iterator[tuple[Tensor, list[Row]]]:
    """The residual stream (B,T,C) after the last block for the batch's stems, then for all their leaves."""
    w = params["embed"]["w"]
    stems, leaves = [stem for stem, _ in batch], [leaf for _, some in batch for leaf in some]
    tokens = padded([stem.ids for stem in stems]).to(w.device)
    if not leaves:
        yield residual(params, config, tokens)[0], stems
        return
    more = padded([leaf.ids for leaf in leaves]).to(w.device)
    room = replace(config, n_context=tokens.shape[1] + more.shape[1])  # a cache no longer than it need be
    x, cache = residual(params, config, tokens, init_cache(room, len(stems), device=w.device, dtype=w.dtype))
    yield x, stems
    cache = with_lengths(cache, [len(stem.ids) for stem in stems])
    cache = select(cache, [i for i, (_, some) in enumerate(batch) for _ in some])  # a copy of its stem's for each leaf
    yield residual(params, config, more, cache)[0], leaves


def padded(rows) -> Tensor:
    """Lists of ids as (B,T), 0 on the right, where no earlier position sees it."""
    return pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
