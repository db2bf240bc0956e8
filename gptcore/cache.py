"""The KV cache: keys and values that are computed once and never again.

What you learn here: generating token n+1 needs the keys and values of all n before it; keeping them turns n(n+1)/2
computed positions into n. The cache is append-only: what lies below a row's length is never rewritten, so an older
handle stays valid and going back is free. Rows may have different lengths.
Axes: B rows, T new tokens, H_kv key heads, D head width. Next: model.py reads and grows it.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class KVCache(NamedTuple):
    """A handle on shared buffers: k and v per layer (B,H_kv,n_context,D), length (B,), and bound, on the host.

    bound is at least every length: it is known without waiting for the device, refuses an overflow in time, and says
    how much of the buffers attention has to read. Two continuations of one handle share a tail: fork() one of them.
    """

    k: tuple[Tensor, ...]
    v: tuple[Tensor, ...]
    length: Tensor
    bound: int


def init_cache(config, batch, *, device="cpu", dtype=torch.float32) -> KVCache:
    """An empty cache for `batch` rows of up to config.n_context positions."""
    # Zeros, not empty: attention multiplies what lies above a length by 0, and 0 * NaN is NaN.
    shape = (batch, config.n_kv_head, config.n_context, config.d_head)
    zeros = lambda: tuple(torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.n_layer))
    length = torch.zeros(batch, dtype=torch.long, device=device)
    return KVCache(zeros(), zeros(), length, bound=0)


def append_(store, new, positions) -> Tensor:
    """Write new (B,T,H_kv,D) into store (B,H_kv,n_context,D) at positions (B,T); returns the store."""
    rows = torch.arange(len(store), device=store.device)[:, None]
    store[rows, :, positions] = new.to(store.dtype)  # index tensors move to the front: (B,T,H_kv,D)
    return store


def with_lengths(cache, lengths) -> KVCache:
    """The same buffers seen as holding lengths (a list of B whole numbers) positions: ragged prompts, and going back.

    Right-padded prompts are prefilled together and then cut to their own lengths; what lies above is overwritten
    before it is seen. Raises ValueError for a length beyond what the handle holds.
    """
    if len(lengths) != len(cache.length) or not all(0 <= length <= cache.bound for length in lengths):
        raise ValueError(f"lengths: expected {len(cache.length)} numbers in 0..{cache.bound}, got {list(lengths)}")
    return cache._replace(length=torch.tensor(lengths, device=cache.length.device), bound=max(lengths, default=0))


def fork(cache) -> KVCache:
    """A copy with buffers of its own, so that two continuations do not write the same tail."""
    return cache._replace(k=tuple(k.clone() for k in cache.k), v=tuple(v.clone() for v in cache.v))


def select(cache, rows) -> KVCache:
    """The given rows (a list of indices) in buffers of their own."""
    index = torch.tensor(rows, device=cache.length.device)
    pick = lambda buffers: tuple(buffer[index] for buffer in buffers)
    return KVCache(pick(cache.k), pick(cache.v), cache.length[index], cache.bound)


def replace_(cache, row, other) -> None:
    """Overwrite one row's keys and values by the one row of another cache; older handles on that row are spent."""
    for mine, theirs in zip((*cache.k, *cache.v), (*other.k, *other.v), strict=True):
        mine[row] = theirs[0]
