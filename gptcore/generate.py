"""Generation: read the prompt once, then draw one token after another.

What you learn here: prefill reads many tokens at once and fills the cache, decode reads one token a row from it. A draw
depends on the logits, the row's seed and the token's index in its row, and on nothing else, so a row's text does not
depend on who shares its batch; and a generator that yields token by token is all that streaming needs.
Axes: B rows, T tokens of the longest row, C model width, V vocabulary.
Next: train.py makes the weights.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from gptcore import engine, graph, kernels
from gptcore.cache import init_cache, replace_, select, with_lengths
from gptcore.device import key
from gptcore.model import forward, residual, unembed
from gptcore.sampling import PRESETS, Sampling, check_settings

ENGINES = ("auto", "eager", "native", "graph")


@dataclass(frozen=True, kw_only=True)
class GenerateOptions:
    """How to go on from a prompt. Raises ValueError with expected and got."""

    sampling: Sampling = PRESETS["balanced"]
    max_new_tokens: int = 100  # the prompt not counted
    seed: int | Sequence[int] = 42  # one for all rows, or one a row
    stop: tuple[int, ...] = ()  # a row ends after it has drawn one of these tokens: the end of text, usually
    cached: bool = True  # False: read everything again for every token, to see what the cache saves
    engine: str = "auto"  # "eager" (forward, token by token), "native" (engine.py), "graph" (graph.py), or the best

    def __post_init__(self):
        check_settings(**self.sampling._asdict())
        if self.engine not in ENGINES:
            raise ValueError(f"engine: expected one of {', '.join(ENGINES)}, got {self.engine!r}")
        if self.max_new_tokens < 0:
            raise ValueError(f"max_new_tokens: expected at least 0, got {self.max_new_tokens}")


class Step(NamedTuple):
    """One new token a row, -1 for a row that has ended; reread: a full context was cut to its last half before it."""

    tokens: list[int]
    reread: bool


@dataclass
class Row:
    """A row while it grows: its tokens, its seed, and where the part begins that the model still sees."""

    ids: list[int]
    seed: int
    start: int = 0

    @property
    def context(self) -> list[int]:
        """The tokens that the model sees."""
        return self.ids[self.start :]

    def make_room_(self, n_context) -> bool:
        """Keep the last half where the context has become too long, and say whether it had."""
        full = len(self.ids) - self.start > n_context
        if full:
            self.start = len(self.ids) - max(1, n_context // 2)
        return full


def generate(params, config, prompts, options=GenerateOptions(), *, tap=None, packed=None) -> Iterator[Step]:
    """Continue prompts, lists of token ids of any lengths: a Step for each new token, until every row has ended.

    A row draws what it would draw alone, as far as the logits are those: in low precision, matrix products round
    differently in a batch. When its context is full, its last half is read again as a new beginning.
    tap sees and edits every prefill and decode step, with the values of the new tokens only. packed is engine.pack's
    result, where it is at hand already or rounds the weights. Raises ValueError for an empty prompt, an id outside the
    vocabulary, and logits that are not numbers.
    """
    rows = start_rows(prompts, options, config)
    ahead = decoder(who_decodes(params, config, options, tap), params, config, options, tap, packed)
    live, cache, n_new = list(range(len(rows))), None, 0
    full = [place for place in live if rows[place].make_room_(config.n_context)]  # prompts longer than the context
    while rows and n_new < options.max_new_tokens:
        growing, reread = [rows[index] for index in live], bool(full)
        if n_new == 0 or not options.cached:
            logits, cache = prefill(params, config, [row.context for row in growing], cached=options.cached, tap=tap)
            steps = [draw(logits, growing, options.sampling)]
        else:
            cache = read_again(params, config, growing, cache, full, tap=tap)
            room = config.n_context + 1 - max(len(row.context) for row in growing)
            steps, cache = ahead(growing, cache, min(room, options.max_new_tokens - n_new))
        for drawn in steps:
            tokens = [-1] * len(rows)
            for index, token in zip(live, drawn, strict=True):
                tokens[index] = token
                rows[index].ids += [token] if token >= 0 else []
            yield Step(tokens, reread)
            n_new, reread = n_new + 1, False
        stays = [place for place, row in enumerate(growing) if row.ids[-1] not in options.stop]
        if not stays:
            return
        if len(stays) < len(live):
            lengths = [len(growing[place].context) - 1 for place in stays]  # the longest row may be gone
            live, cache = [live[place] for place in stays], cache and with_lengths(select(cache, stays), lengths)
        full = [place for place, index in enumerate(live) if rows[index].make_room_(config.n_context)]


def who_decodes(params, config, options, tap) -> str:
    """The engine that will decode, "auto" decided. Raises ValueError where one is asked for that cannot serve."""
    if options.engine == "eager":
        return "eager"
    reason = "a tap is given" if tap else "" if options.cached else "nothing is cached"
    with torch.no_grad():
        why_not = {"native": reason or engine.why_not(params, config), "graph": reason or graph.why_not(params)}
    if options.engine == "auto":
        return next((who for who, why in why_not.items() if not why), "eager")
    if options.engine == "graph":
        why_not["graph"] = reason  # where none can be captured, its step runs as it is
    if why_not[options.engine]:
        names = {"native": "the native decoder", "graph": "a graph"}
        raise ValueError(f"engine: expected what {names[options.engine]} serves, but {why_not[options.engine]}")
    return options.engine


def start_rows(prompts, options, config) -> list[Row]:
    """A Row for each prompt, or ValueError: no token, an id outside the vocabulary, another number of seeds."""
    seeds = [options.seed] * len(prompts) if isinstance(options.seed, int) else options.seed
    if len(seeds) != len(prompts):
        raise ValueError(f"seed: expected one for all or {len(prompts)}, got {len(seeds)}")
    for ids in prompts:
        if len(ids) == 0 or min(ids) < 0 or max(ids) >= config.n_vocab:
            got = f"{min(ids)}..{max(ids)}" if len(ids) else "none"
            raise ValueError(f"prompts: expected token ids in 0..{config.n_vocab - 1}, at least one a row, got {got}")
    return [Row(list(ids), key(seed)) for ids, seed in zip(prompts, seeds, strict=True)]


@torch.no_grad()
def prefill(params, config, contexts, *, cached=True, tap=None):
    """Read contexts, B lists of ids -> (logits after each row's last token (B,V), a cache of the rows, or None)."""
    w = params["embed"]["w"]
    lengths = [len(ids) for ids in contexts]
    padded = [ids + [0] * (max(lengths) - len(ids)) for ids in contexts]  # on the right, where nobody looks back at it
    cache = init_cache(config, len(contexts), device=w.device, dtype=w.dtype) if cached else None
    x, cache = residual(params, config, torch.tensor(padded, device=w.device), cache, tap=tap)  # (B,T,C)
    last = torch.tensor(lengths, device=w.device)[:, None, None] - 1
    x = x.gather(1, last.expand(-1, 1, x.shape[2]))  # only here is a prediction wanted: (B,1,C)
    return unembed(params, config, x, tap=tap)[:, 0], cache and with_lengths(cache, lengths)


@torch.no_grad()
def read_again(params, config, rows, cache, full, *, tap=None):
    """The cache once the rows at the places `full` were read again from where they begin now, up to their newest."""
    for place in full:
        *older, _ = rows[place].context
        if older:
            replace_(cache, place, prefill(params, config, [older], tap=tap)[1])
    return with_lengths(cache, [len(row.context) - 1 for row in rows]) if full else cache


def decoder(who, params, config, options, tap, packed):
    """The engine's decode(rows, cache, n_steps) -> (a list of B tokens for each of up to n_steps, a longer cache)."""
    pace, steps = engine.Pace(), None

    @torch.no_grad()
    def eager(rows, cache, n_steps):
        tokens = torch.tensor([row.ids[-1:] for row in rows], device=cache.length.device)  # (B,1)
        logits, cache = forward(params, config, tokens, cache, tap=tap)
        return [draw(logits[:, 0], rows, options.sampling)], cache

    def native(rows, cache, n_steps):
        nonlocal packed
        packed = packed or engine.pack(params, config)
        settings = {"sampling": options.sampling, "stop": options.stop, "pace": pace}
        return engine.decode_(packed, cache, **newest(rows), n_steps=n_steps, **settings)

    def captured(rows, cache, n_steps):
        nonlocal steps
        if not (steps and steps.serves(cache)):  # the first time, and when rows have ended: others lie elsewhere
            steps = graph.prepare(params, config, cache, options.sampling)
        return graph.decode_(steps, cache, **newest(rows), n_steps=n_steps, stop=options.stop)

    return {"eager": eager, "native": native, "graph": captured}[who]


def newest(rows) -> dict:
    """What a step reads of each row, (B,): its newest token, and the words of its draw."""
    return {"tokens": torch.tensor([row.ids[-1] for row in rows]), **words(rows)}


def words(rows) -> dict:
    """What a row's draw depends on beside its logits, each (B,): its seed, and the index its next token will have."""
    seed = torch.tensor([row.seed - (row.seed >> 63 << 64) for row in rows])  # the same 64 bits, read as int64
    return {"seed": seed, "position": torch.tensor([len(row.ids) for row in rows])}


def draw(logits, rows, sampling) -> list[int]:
    """A token for each row, by its own seed and the index that the token will have in it."""
    return kernels.sample(logits, **words(rows), **sampling._asdict()).tolist()


def text_pieces(tokens: Iterable[int], tokenizer, stop=()) -> Iterator[str]:
    """Text as it becomes certain: whole characters, cut before the first of the stop strings.

    What may still become a stop string, or half a character, is held back until the next token or the end decides.
    """
    decoder, held = tokenizer.stream(), ""
    longest = max((len(text) for text in stop), default=0)

    def settled(text, ending):
        ends = [text.find(end) for end in stop if end in text]
        if ends:
            return text[: min(ends)], None
        starts = () if ending else range(max(0, len(text) - longest + 1), len(text))
        keep = next((at for at in starts if any(end.startswith(text[at:]) for end in stop)), len(text))
        return text[:keep], text[keep:]

    for token in tokens:
        piece, held = settled(held + decoder.feed(token), ending=False)
        if piece:
            yield piece
        if held is None:
            return
    piece, _ = settled(held + decoder.end(), ending=True)
    if piece:
        yield piece
