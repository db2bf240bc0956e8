"""Activation patching: which activation carries the difference between two prompts?

What you learn here: put one activation of the clean run into the corrupt run, run what comes after it, and see how
much of the answer returns. Nothing is estimated. It is fast because little has to run: below the patched layer, and
before the patched position, the run is the corrupt one, whose residual stream and keys and values are at hand. So the
cells of one layer join the batch when the run reaches their layer, and neighbouring positions share a batch.

    sweep(params, config, clean, corrupt, site, metric, by=..., position=-1)  -> Sweep: every layer x position, or head
    patch_cells(params, config, clean, corrupt, site, metric, cells, by=...)  -> the metric for a few of them

Axes: B pairs, T tokens, N cells, L layers, H heads (H_kv), D head width, C model width, V vocabulary.
Meng et al. 2022, arXiv:2202.05262; Wang et al. 2022, arXiv:2211.00593; Heimersheim & Nanda 2024, arXiv:2404.15255.
Next: ablation.py takes activations away, attribution.py estimates all effects from one gradient.
"""

from itertools import groupby, product
from typing import NamedTuple

import torch
from torch import Tensor

from gptcore.interpret.pairs import check_direction, differs, recovery
from gptcore.interpret.taps import chain, record, sites
from gptcore.model import block, check_tokens, residual, unembed

STACK = 8  # neighbouring positions in one batch: the first of them decides where all of them start
BUDGET = 2**26  # numbers that the widest activations of a batch may have: 256 MB in float32

RESIDUAL = ("position",)
AXES = {  # what the value of a site is indexed by, after the pair and the layer
    "resid_pre": RESIDUAL, "resid_mid": RESIDUAL, "resid_post": RESIDUAL, "attn.out": RESIDUAL, "mlp.out": RESIDUAL,
    "block": RESIDUAL,  # attn.out and mlp.out together
    "attn.q": ("position", "head"), "attn.k": ("position", "head"), "attn.v": ("position", "head"),
    "attn.z": ("position", "head"), "attn.pattern": ("head", "query", "key"),
}  # fmt: skip
DEFAULT_BY = {
    RESIDUAL: ("layer", "position"), ("position", "head"): ("layer", "head"),
    ("head", "query", "key"): ("layer", "head", "query"),
}  # fmt: skip


class Sweep(NamedTuple):
    """What every cell's patched run gave: patched (*axes, B), and the metric of both runs, each (B,).

    positions are those of the patched run that the position axis stands for. patched is nan where a position has no
    counterpart. forwards is the work that was done, in runs of all B prompts through the whole model.
    """

    site: str
    axes: tuple[str, ...]
    positions: list[int]
    patched: Tensor
    clean: Tensor
    corrupt: Tensor
    direction: str
    forwards: float

    @property
    def recovery(self) -> Tensor:
        """The share of the difference that comes back (denoise) or goes (noise), (*axes, B); nan where undefined."""
        return recovery(self.patched, self.clean, self.corrupt, self.direction)

    def undefined(self, *cell) -> str:
        """Why a cell (*axes, pair) has no recovery; empty if it has one."""
        clean, corrupt = self.clean[cell[-1]], self.corrupt[cell[-1]]
        if not differs(clean, corrupt):
            return f"clean and corrupt hardly differ ({clean:.6g} and {corrupt:.6g})"
        return "" if self.patched[cell].isfinite() else "the position has no counterpart in the other prompt"


def sweep(
    params, config, clean, corrupt, site, metric, *, by=None, position=-1, positions=None, direction="denoise",
    align=None, width=1, budget=BUDGET,
) -> Sweep:  # fmt: skip
    """Patch every cell of a site in turn: clean, corrupt (B,T) token ids -> Sweep.

    site is a name of AXES; by says which axes are told apart, layer first, while the others are patched together: layer
    x position, layer x head or layer x head x query unless told. metric(logits (...,B,V)) -> (...,B) reads one position
    for all or (B,), or (B,K) or (1,K) for logits (...,B,K,V). positions are the ones to patch, all by default. width
    layers around each are patched at once. direction "noise" puts corrupt values into the clean run. align, pairs
    (clean position, corrupt position), makes prompts of two lengths comparable. Raises ValueError for lengths that
    differ without it, and for a site, an axis or a position that is not there.
    """
    by = axes_of(config, site, by)
    swap, values = swap_of(params, config, clean, corrupt, site, metric, position, direction, align)
    n_rows, n_tokens, _ = swap.base.x[0].shape
    positions = places(positions, n_tokens)
    sizes, cells = cells_of(config, site, by, positions, n_tokens)
    patched, work = run_cells(params, config, swap, site, cells, by, metric, positions, width=width, budget=budget)
    return Sweep(site, by, positions, patched.reshape(*sizes, n_rows), *values, direction, forwards=2 + work)


def patch_cells(
    params, config, clean, corrupt, site, metric, cells, *, by=None, position=-1, direction="denoise", align=None
) -> Tensor:
    """The metric of a few cells of a sweep, (N,B): cells are N tuples, numbers in the order of by."""
    by = axes_of(config, site, by)
    swap, _ = swap_of(params, config, clean, corrupt, site, metric, position, direction, align)
    cells, everywhere = torch.tensor(cells, dtype=torch.long).reshape(-1, len(by)), range(swap.base.x[0].shape[1])
    return run_cells(params, config, swap, site, cells, by, metric, everywhere)[0]


def axes_of(config, site, by) -> tuple[str, ...]:
    """The axes of a sweep of the site, checked."""
    if site not in AXES or (site == "resid_mid" and config.block != "sequential"):
        there = [name for name in AXES if name != "resid_mid" or config.block == "sequential"]
        raise ValueError(f"site: expected one of {', '.join(there)}, got {site!r}")
    by = (("layer",) if site == "block" else DEFAULT_BY[AXES[site]]) if by is None else tuple(by)
    if by[:1] != ("layer",) or len(set(by)) < len(by) or set(by[1:]) - set(AXES[site]):
        raise ValueError(f"by: expected layer, then any of {', '.join(AXES[site])} for {site}, got {by}")
    return by


def heads_of(config, site) -> int:
    """How many heads a site has: keys and values are shared."""
    return config.n_kv_head if site in ("attn.k", "attn.v") else config.n_head


def places(positions, n_tokens) -> list[int]:
    """Positions counted from the beginning, negative ones from the end; None is all of them."""
    positions = list(range(n_tokens) if positions is None else positions)
    if not all(-n_tokens <= at < n_tokens for at in positions):
        raise ValueError(f"positions: expected them within {n_tokens} tokens, got {positions}")
    return [at % n_tokens for at in positions]


def cells_of(config, site, by, positions, n_tokens) -> tuple[tuple[int, ...], Tensor]:
    """(the size of each axis, every cell (N,len(by))): positions are those of a position axis or of the queries."""
    sizes = {"layer": config.n_layer, "head": heads_of(config, site), "key": n_tokens}
    ranges = [positions if axis in ("position", "query") else range(sizes[axis]) for axis in by]
    return tuple(map(len, ranges)), torch.tensor(list(product(*ranges)), dtype=torch.long).reshape(-1, len(by))


# ------------------------------------------------------------------------------------------------ what has been run


class Run(NamedTuple):
    """One forward, remembered: x before each block and after the last, L+1 of (B,T,C); k and v as the cache holds them,
    L of (B,H_kv,T,D); seen, every value that was asked for by its site."""

    x: list[Tensor]
    k: list[Tensor]
    v: list[Tensor]
    seen: dict[str, Tensor]


class Reading(NamedTuple):
    """The positions that the metric reads (B,K); single says that there is one a row, and no axis for it."""

    at: Tensor
    single: bool


class Swap(NamedTuple):
    """A run to be patched and what goes into it: source by site, laid out by the base's positions.

    paired (T,) says which positions have something to put there, first (B,) is the first position at which the two
    runs can differ, value (B,) the metric of the base.
    """

    base: Run
    source: dict[str, Tensor]
    paired: Tensor
    first: Tensor
    reading: Reading
    value: Tensor


@torch.no_grad()
def remember(params, config, tokens, names=(), *, tap=None) -> Run:
    """Run tokens (B,T) once, under a tap if there is one; keep what later runs start from, and the named values."""
    layers = range(config.n_layer)
    keys = "k_rot" if config.position == "rope" else "k_normed" if config.qk_norm else "k"  # as the scores read them
    own = [f"blocks.{i}.{name}" for i in layers for name in ("resid_pre", f"attn.{keys}", "attn.v")]
    recorder, seen = record(config, own + sites(config, names))
    x, _ = residual(params, config, tokens, tap=chain(tap, recorder))
    every = lambda name: [seen[f"blocks.{i}.{name}"] for i in layers]
    k, v = ([value.transpose(1, 2) for value in every(f"attn.{name}")] for name in (keys, "v"))
    return Run([*every("resid_pre"), x], k, v, seen)


def reading(position, tokens) -> Reading:
    """Positions to read in tokens (B,T): one number, (B,), or (B,K) or (1,K); negative ones count from the end."""
    at = torch.as_tensor(position, device=tokens.device)
    single, (n_rows, n_tokens) = at.dim() < 2, tokens.shape
    wide = at.reshape(-1, 1) if single else at
    if at.dim() > 2 or len(wide) not in (1, n_rows) or (wide < -n_tokens).any() or (wide >= n_tokens).any():
        raise ValueError(f"position: expected one for all or {n_rows}, within {n_tokens} tokens, got {at.tolist()}")
    return Reading((wide % n_tokens).expand(n_rows, -1), single)


def at_positions(x, at) -> Tensor:
    """x (...,B,T,C) at positions at (B,K) -> (...,B,K,C)."""
    return x.gather(-2, at[..., None].expand(*x.shape[:-2], -1, x.shape[-1]))


def measure(params, config, x, reading, metric, *, tap=None) -> Tensor:
    """The metric of the last residual stream at the positions read, (...,B,K,C) -> (...,B)."""
    logits = unembed(params, config, x, tap=tap)
    return metric(logits[..., 0, :] if reading.single else logits)


@torch.no_grad()
def swap_of(params, config, clean, corrupt, site, metric, position, direction, align):
    """Run both prompts once -> (Swap, (clean metric, corrupt metric))."""
    check_direction(direction)
    links = linked(config, clean, corrupt, align)
    if clean.shape != corrupt.shape and (torch.as_tensor(position) >= 0).any():
        raise ValueError(f"position: expected one counted from the end (below 0) of two lengths, got {position}")
    wanted = [f"blocks.{i}.{name}" for i in range(config.n_layer) for name in names_of(site)]
    prompts, values = (clean, corrupt), []
    runs, readings = [remember(params, config, t, wanted) for t in prompts], [reading(position, t) for t in prompts]
    for run, read in zip(runs, readings, strict=True):
        values.append(measure(params, config, at_positions(run.x[-1], read.at), read, metric))
    into = 1 if direction == "denoise" else 0  # which of the two is patched
    goes, comes, base, other = links[:, into], links[:, 1 - into], prompts[into], prompts[1 - into]
    source = {name: lay(name, runs[1 - into].seen[name], comes, goes, base.shape[1]) for name in wanted}
    paired = torch.zeros(base.shape[1], dtype=torch.bool, device=base.device).index_fill(0, goes, True)
    same = torch.zeros_like(base, dtype=torch.bool)
    same[:, goes] = (goes == comes) & (base[:, goes] == other[:, comes])
    first = same.long().cumprod(1).sum(1)
    return Swap(runs[into], source, paired, first, readings[into], values[into]), values


def names_of(site) -> tuple[str, ...]:
    """The names within a block that a site of AXES stands for."""
    return ("attn.out", "mlp.out") if site == "block" else (site,)


def linked(config, clean, corrupt, align) -> Tensor:
    """Positions that stand for each other, (clean, corrupt) a row; both prompts checked."""
    for tokens in (clean, corrupt):
        check_tokens(tokens, config)
    lengths = clean.shape[1], corrupt.shape[1]
    if len(clean) != len(corrupt) or (align is None and lengths[0] != lengths[1]):
        got = f"{tuple(clean.shape)} and {tuple(corrupt.shape)}"
        raise ValueError(f"clean and corrupt: expected equal shapes, or align for two lengths, got {got}")
    links = torch.tensor([(i, i) for i in range(lengths[0])] if align is None else align, device=clean.device)
    links = links.reshape(-1, 2)
    twice = any(len(column.unique()) < len(column) for column in links.unbind(1))
    if twice or (links < 0).any() or (links >= links.new_tensor(lengths)).any():
        wanted = f"positions below {lengths[0]} and {lengths[1]}, each once"
        raise ValueError(f"align: expected {wanted}, got {align}")
    return links


def lay(name, value, comes, goes, n_tokens) -> Tensor:
    """A recorded value with its positions comes moved to goes, of n_tokens; the rest is 0, and never used."""
    for axis in (2, 3) if name.endswith("pattern") else (1,):
        shape = [*value.shape[:axis], n_tokens, *value.shape[axis + 1 :]]
        value = value.new_zeros(shape).index_copy(axis, goes, value.index_select(axis, comes))
    return value


# ---------------------------------------------------------------------------------------------------- the patched runs


@torch.no_grad()
def run_cells(params, config, swap, site, cells, by, metric, positions, *, width=1, budget=BUDGET):
    """The metric of every patched run, cells (N,len(by)) -> ((N,B), the work in forwards of the B rows).

    A cell before the first difference, or after what is read, changes nothing: it costs nothing and is exactly the
    metric of the base. A cell at a position that is not paired is nan.
    """
    n_rows, n_tokens, _ = swap.base.x[0].shape
    first, reads, paired = swap.first.cpu(), swap.reading.at.cpu().amax(1), swap.paired.cpu()
    low, high = (cells[:, 0] - width // 2).clamp(min=0), (cells[:, 0] + (width + 1) // 2).clamp(max=config.n_layer)
    places = [i for i, axis in enumerate(by) if axis in ("position", "query")]
    everywhere = torch.tensor([min(positions, default=0), max(positions, default=0)]).expand(len(cells), 2)
    begin, end = (cells[:, places].expand(-1, 2) if places else everywhere).unbind(1)
    pointed = [i for i, axis in enumerate(by) if axis in ("position", "query", "key")]
    without = ~paired[cells[:, pointed]].all(1)
    free = (end[:, None] < first) | (begin[:, None] > reads)  # (N,B)
    patched = swap.value.expand(len(cells), n_rows).clone()
    patched[without] = torch.nan
    begin, stop = begin.clamp(min=int(first.min())), int(reads.max()) + 1
    allowed = paired & torch.zeros_like(paired).index_fill(0, torch.tensor(positions, dtype=torch.long), True)
    begins, lows, work = begin.tolist(), low.tolist(), 0.0
    todo = (~without & ~free.all(1)).nonzero()[:, 0].tolist()
    todo.sort(key=lambda n: (begins[n] // STACK, lows[n]))
    for _, group in groupby(todo, key=lambda n: begins[n] // STACK):
        group = torch.tensor(list(group))
        start = int(begin[group].min())
        widest = (stop - start) * max(4 * config.d_ff, 8 * config.d_model, 3 * config.n_head * stop)
        for chunk in group.split(max(1, budget // (n_rows * widest))):
            masks = masks_of(config, site, cells[chunk], by, allowed, paired, slice(start, stop)).to(patched.device)
            x, n_blocks = run_chunk(params, config, swap, site, masks, low[chunk], high[chunk], slice(start, stop))
            value = measure(params, config, x, swap.reading, metric)
            patched[chunk] = torch.where(free[chunk].to(value.device), patched[chunk], value)
            work += n_blocks * (stop - start) / (config.n_layer * n_tokens)
    return patched, work


def masks_of(config, site, cells, by, allowed, paired, span) -> Tensor:
    """Where each cell puts the source's values: bool, (n,...) as the site's value for one pair on the span."""
    every = torch.ones(heads_of(config, site), dtype=torch.bool)
    whole = {"position": allowed, "query": allowed, "key": paired, "head": every}
    cut = {"position": span, "query": span, "key": slice(0, span.stop), "head": slice(None)}
    masks, axes = torch.ones(len(cells), *[1] * len(AXES[site]), dtype=torch.bool), AXES[site]
    for i, axis in enumerate(axes):
        line = whole[axis].expand(len(cells), -1)
        if axis in by:
            line = line & (torch.arange(line.shape[1]) == cells[:, by.index(axis), None])
        masks = masks & line[:, cut[axis]].reshape(len(cells), *(-1 if j == i else 1 for j in range(len(axes))))
    return masks if site == "attn.pattern" else masks[..., None]


def run_chunk(params, config, swap, site, masks, low, high, span) -> tuple[Tensor, int]:
    """Run n cells that patch layers low..high-1 of the base: (x where it is read (n,B,K,C), blocks run, a row each).

    low ascends: cells join when the run reaches their layer, since until then they are the base. Before the span every
    one of them is the base as well, so its keys and values are all that is needed of it.
    """
    base, positions, joined, n_blocks = swap.base, torch.arange(span.start, span.stop), 0, 0
    n_rows = len(base.x[0])
    positions, x = positions.to(masks.device)[None], base.x[0][:0, span]
    for i in range(int(low[0]), config.n_layer):
        n = int((low <= i).sum())
        x, joined = torch.cat([x, base.x[i][:, span].repeat(n - joined, 1, 1)]), n
        now = masks[:n] & ((low[:n] <= i) & (i < high[:n])).to(masks.device).view(-1, *[1] * (masks.dim() - 1))
        tap = putting(swap.source, i, site, now, span)
        if tap and site == "resid_pre":  # the block need not be watched for it
            x, tap = tap(site, x), None
        kv = None
        if span.start:
            k, v = (store[i][:, :, : span.stop].repeat(n, 1, 1, 1) for store in (base.k, base.v))
            kv = (k, v, span.stop)
        x = block(x, params["blocks"][i], config, positions.expand(len(x), -1), kv, tap=tap)
        n_blocks += n
    x, at = x.unflatten(0, (-1, n_rows)), swap.reading.at
    inside = at_positions(x, (at - span.start).clamp(min=0).expand(len(x), -1, -1))
    return torch.where((at < span.start)[..., None], at_positions(base.x[-1], at), inside), n_blocks


def putting(source, layer, site, masks, span):
    """The tap of a block that puts the source's values where the masks (n,...) of n cells say."""
    if not masks.any():
        return None

    def tap(name, value):
        if name not in names_of(site):
            return value
        new = source[f"blocks.{layer}.{name}"]
        new = new[:, :, span, : span.stop] if site == "attn.pattern" else new[:, span]
        return torch.where(masks[:, None], new, value.unflatten(0, (len(masks), -1))).flatten(0, 1)

    return tap
