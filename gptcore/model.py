"""The model: a few functions over a nested dict of weights.

What you learn here: a GPT is embed, a stack of blocks that read the residual stream and add to it, and unembed. The
weights are an argument, the cache is an argument, and looking inside is an argument (tap), so there is no mode, no hook
and no hidden state. param_spec names every weight, activation_spec every value that can be looked at.
Axes: B rows, T new tokens, S keys, C = d_model, F = d_ff, H heads (H_kv), D = d_head, V vocabulary.
Next: sampling.py draws from the logits, generate.py goes on drawing.
"""

import math
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from gptcore import kernels, ops, tree
from gptcore.cache import append_
from gptcore.ops import linear

# ----------------------------------------------------------------------------------------------------- what there is


class Leaf(NamedTuple):
    """One weight: its shape, its initial distribution N(mean, std), and whether weight decay applies."""

    shape: tuple[int, ...]
    std: float = 0.0
    mean: float = 0.0
    decay: bool = False


def param_spec(config) -> dict[str, Leaf]:
    """Every weight by its dotted name, in the order in which init draws them."""
    c, attn_bias, bias = config, config.bias != "none", config.bias == "all"

    def matrix(n_out, n_in, with_bias):
        leaves = {"w": Leaf((n_out, n_in), std=0.02, decay=True)}
        return leaves | {"b": Leaf((n_out,))} if with_bias else leaves

    def norm(width):
        gain = {"w": Leaf((width,), mean=1.0)}
        return gain | {"b": Leaf((width,))} if c.norm == "layernorm" and bias else gain

    def block():
        attn = {
            "q": matrix(c.n_head * c.d_head, c.d_model, attn_bias),
            "k": matrix(c.n_kv_head * c.d_head, c.d_model, attn_bias),
            "v": matrix(c.n_kv_head * c.d_head, c.d_model, attn_bias),
            "o": matrix(c.d_model, c.n_head * c.d_head, bias),
        }
        if c.qk_norm:
            attn |= {"q_norm": {"w": Leaf((c.d_head,), mean=1.0)}, "k_norm": {"w": Leaf((c.d_head,), mean=1.0)}}
        mlp = {"up": matrix(c.d_ff, c.d_model, bias), "down": matrix(c.d_model, c.d_ff, bias)}
        if c.mlp == "swiglu":
            mlp = {"gate": matrix(c.d_ff, c.d_model, bias)} | mlp
        norm_2 = {} if c.block == "parallel_shared_norm" else {"norm_2": norm(c.d_model)}
        return {"norm_1": norm(c.d_model), "attn": attn, **norm_2, "mlp": mlp}

    spec = {"embed": matrix(c.n_vocab_padded, c.d_model, False)}
    if c.position == "learned":
        spec["positions"] = matrix(c.n_context, c.d_model, False)
    spec |= {"blocks": [block() for _ in range(c.n_layer)], "norm_f": norm(c.d_model), "head": {}}
    if not c.tied:
        spec["head"] |= matrix(c.n_vocab_padded, c.d_model, False)
    if c.head_bias:
        spec["head"] |= {"b": Leaf((c.n_vocab_padded,))}
    return dict(tree.walk(spec))


def activation_spec(config) -> dict[str, tuple]:
    """Every site that a tap sees, in order, with its shape: numbers where known, "B", "T" and "S" where not."""
    c, x = config, ("B", "T", config.d_model)
    q, kv, f = ("B", "T", c.n_head, c.d_head), ("B", "T", c.n_kv_head, c.d_head), ("B", "T", c.d_ff)
    scale, scores = ("B", "T", 1), ("B", c.n_head, "T", "S")
    spec = {"positions": ("B", "T"), "embed": x}
    if c.position in ("learned", "sinusoidal"):
        spec["pos"] = x
    attn = {"q": q, "k": kv, "v": kv}
    if c.qk_norm:
        attn |= {"q_normed": q, "k_normed": kv}
    if c.position == "rope":
        attn |= {"q_rot": q, "k_rot": kv}
    attn |= {"scores": scores, "pattern": scores, "z": q, "out": x}
    mlp = {"pre": f} | ({"up": f} if c.mlp == "swiglu" else {}) | {"post": f, "out": x}
    block = {"resid_pre": x, "norm_1.scale": scale, "norm_1": x} | {f"attn.{name}": s for name, s in attn.items()}
    if c.block == "sequential":
        block["resid_mid"] = x
    if c.block != "parallel_shared_norm":
        block |= {"norm_2.scale": scale, "norm_2": x}
    block |= {f"mlp.{name}": s for name, s in mlp.items()} | {"resid_post": x}
    spec |= {f"blocks.{i}.{name}": s for i in range(c.n_layer) for name, s in block.items()}
    return spec | {"norm_f.scale": scale, "norm_f": x, "logits": ("B", "T", c.n_vocab)}


def init_params(config, generator) -> dict:
    """Fresh float32 weights, drawn on the CPU in the order of param_spec from one torch.Generator."""
    draw = lambda leaf: torch.randn(leaf.shape, generator=generator) * leaf.std + leaf.mean
    constant = lambda leaf: torch.full(leaf.shape, leaf.mean)
    spec = param_spec(config)
    return tree.nest({name: draw(leaf) if leaf.std else constant(leaf) for name, leaf in spec.items()})


def count_params(config) -> int:
    """How many weights a model of this shape has, padding rows not counted."""
    padding = (config.n_vocab_padded - config.n_vocab) * (
        config.d_model * (1 if config.tied else 2) + (1 if config.head_bias else 0)
    )
    return sum(math.prod(leaf.shape) for leaf in param_spec(config).values()) - padding


def check_params(params, config) -> None:
    """Raise ValueError unless params has exactly the leaves that param_spec names, each with its shape."""
    spec, got = param_spec(config), dict(tree.walk(params))
    missing, extra = sorted(spec.keys() - got.keys()), sorted(got.keys() - spec.keys())
    if missing or extra:
        raise ValueError(f"weights: missing {missing}, not expected {extra}")
    for name, leaf in got.items():
        if tuple(leaf.shape) != spec[name].shape:
            raise ValueError(f"{name}: expected {spec[name].shape}, got {tuple(leaf.shape)}")


# ------------------------------------------------------------------------------------------------------- the forward


def untouched(name, value):
    """The tap that nobody passed."""
    return value


def at(tap, prefix):
    """The same tap, one level deeper; None stays None, so that without a tap no name is ever made."""
    return tap and (lambda name, value: tap(f"{prefix}.{name}", value))


def checked(tap):
    """The tap, refused with its site's name when it returns something that the model cannot go on with."""

    def call(name, value):
        new = tap(name, value)
        kind = lambda t: (tuple(t.shape), t.dtype, t.device) if isinstance(t, Tensor) else type(t).__name__
        if new is not value and (name == "positions" or kind(new) != kind(value)):
            expected = "the tensor it was given" if name == "positions" else kind(value)
            raise ValueError(f"tap at {name}: expected {expected}, got {kind(new)}")
        return new

    return tap and call


def normed(x, p, config, name, tap) -> Tensor:
    """The config's norm, its divisor and its result seen as `name`.scale and `name`."""
    norm = partial(ops.NORMS[config.norm], x, **p, eps=config.norm_eps)
    return tap(name, norm(look=lambda scale: tap(f"{name}.scale", scale))) if tap else norm()


def rotary_table(positions, config) -> tuple[Tensor, Tensor]:
    """The config's cos and sin at positions (B,T), each (B,T,1,d_rot/2) in float32."""
    stretch, c = ops.STRETCHES[config.rope_scaling], config
    settings = {"factor": c.rope_factor, "low": c.rope_low, "high": c.rope_high, "n_trained": c.rope_trained}
    return ops.rotary_table(positions, c.d_rot, c.rope_base, stretch and partial(stretch, **settings))


def attend(x, p, config, positions, kv=None, *, tap=None, attention="fused") -> Tensor:
    """T new tokens look back at themselves and at this layer's cache, which grows by T.  (B,T,C) -> (B,T,C).

    kv is this layer's (k, v, n_keys): the buffers, and how many of their positions to read.
    """
    keep = tap or untouched
    q, k, v = (keep(n, linear(x, **p[n]).unflatten(-1, (-1, config.d_head))) for n in ("q", "k", "v"))  # (B,T,H,D)
    if "q_norm" in p:
        q = keep("q_normed", ops.rmsnorm(q, **p["q_norm"], eps=config.norm_eps))
        k = keep("k_normed", ops.rmsnorm(k, **p["k_norm"], eps=config.norm_eps))
    if kv is not None and torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        raise ValueError("cache: expected no gradients through it; use torch.no_grad(), or leave the cache out")
    slopes = ops.alibi_slopes(config.n_head, x.device) if config.position == "alibi" else None
    turning = {}
    if config.position == "rope":
        cos, sin = rotary_table(positions, config)
        turning = {"cos": cos, "sin": sin, "interleaved": config.rope_interleaved}
    window, softcap = config.window, config.score_softcap
    explicit = tap or attention == "explicit" or (softcap and kv is None)  # looking is slower, not different
    if kv is not None and not explicit:
        k_store, v_store, n_keys = kv
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # (B,H,T,D)
        rules = {"alibi_slopes": slopes, "window": window, "softcap": softcap, **turning}
        z = kernels.kv_attention_(q, k, v, k_store, v_store, positions[:, 0], n_keys=n_keys, **rules)
        return linear(z.transpose(1, 2).flatten(2), **p["o"])
    if turning:
        q, k = keep("q_rot", ops.rotary(q, **turning)), keep("k_rot", ops.rotary(k, **turning))
    if kv is None:
        k, v, positions = k.transpose(1, 2), v.transpose(1, 2), positions_of(x)  # the keys are the T new ones
    else:
        k_store, v_store, n_keys = kv
        k = append_(k_store, k, positions)[:, :, :n_keys].to(q.dtype)
        v = append_(v_store, v, positions)[:, :, :n_keys].to(q.dtype)
    if explicit:
        scores = ops.attention_scores(q, k, positions, slopes=slopes, window=window, softcap=softcap)
        z = ops.attention_mix(keep("pattern", keep("scores", scores).softmax(-1)), v)
    else:
        z = ops.attention_fused(q, k, v, positions, slopes=slopes, window=window, causal=True)
    return linear(keep("z", z).flatten(2), **p["o"])


def mlp(x, p, config, *, tap=None, drop=untouched) -> Tensor:
    """down(act(up(x))), or with a gate down(act(gate(x)) * up(x)).  (B,T,C) -> (B,T,C)."""
    keep = tap or untouched
    post = ops.ACTIVATIONS[config.mlp](keep("pre", linear(x, **p["gate" if "gate" in p else "up"])))
    if "gate" in p:
        post = post * keep("up", linear(x, **p["up"]))
    return linear(drop(0, keep("post", post)), **p["down"])


def block(x, p, config, positions, kv=None, *, tap=None, dropout=None, attention="fused") -> Tensor:
    """One layer: the residual stream x (B,T,C) is read and added to, twice in turn or, in a parallel block, at once.

    positions (B,T) or (1,T), kv as in attend, dropout an int64 seed tensor, 0-dim or (B,), or None -> (B,T,C).
    """
    keep, drop = tap or untouched, untouched
    if dropout is not None and config.dropout:
        drop = lambda site, t: ops.dropout(t, config.dropout, ops.fold(dropout, site))
    x = keep("resid_pre", x)
    seen = normed(x, p["norm_1"], config, "norm_1", tap)
    attn = keep("attn.out", attend(seen, p["attn"], config, positions, kv, tap=at(tap, "attn"), attention=attention))
    after = x + drop(1, attn)
    if config.block == "sequential":
        x = after = keep("resid_mid", after)
    if "norm_2" in p:
        seen = normed(x, p["norm_2"], config, "norm_2", tap)
    out = keep("mlp.out", mlp(seen, p["mlp"], config, tap=at(tap, "mlp"), drop=drop))
    return keep("resid_post", after + drop(3, drop(2, out)))


def positions_of(x, cache=None) -> Tensor:
    """Absolute positions of the tokens in x (B,T,...): (1,T) from 0 on, or (B,T) continuing a cache."""
    new = torch.arange(x.shape[1], device=x.device)[None]
    return new if cache is None else cache.length[:, None] + new


def bound_after(x, config, cache=None) -> int:
    """How many positions the longest row may hold once x (B,T,...) is appended; ValueError where it does not fit."""
    if cache and len(x) != len(cache.length):
        raise ValueError(f"tokens: expected {len(cache.length)} rows as the cache has, got {len(x)}")
    bound = x.shape[1] + (cache.bound if cache else 0)
    if bound > config.n_context:
        raise ValueError(f"tokens: expected at most n_context={config.n_context} positions a row, got {bound}")
    return bound


def embed(params, config, tokens, positions=None, *, tap=None, lookup=F.embedding) -> Tensor:
    """tokens (B,T) -> the residual stream (B,T,C): token embedding plus learned or sinusoidal positions, if any.

    lookup(tokens, w) may be another way to read the rows, such as one with a sparse gradient.
    """
    keep = checked(tap) or untouched
    positions = positions_of(tokens) if positions is None else positions
    x = lookup(tokens, params["embed"]["w"])
    x = keep("embed", x * math.sqrt(config.d_model) if config.scale_embedding else x)
    if config.position == "learned":
        return x + keep("pos", params["positions"]["w"][positions].expand_as(x))
    if config.position == "sinusoidal":
        return x + keep("pos", ops.sinusoidal(positions, config.d_model).to(x.dtype).expand_as(x))
    return x


def run_blocks(
    params, config, x, cache=None, *, first=0, last=None, tap=None, dropout=None, attention="fused", block=block
):
    """Blocks first..last-1 on a residual stream x (B,T,C) -> (x, cache): the lower blocks really do not run.

    block may be another way to run one, such as train.recomputed's.
    With a cache its buffers are written from each row's length on, and the returned handle is T longer. Raises
    ValueError where the rows would not fit, and for gradients through a cache, which keeps no graph.
    """
    bound, last = bound_after(x, config, cache), config.n_layer if last is None else last
    positions, tap = positions_of(x, cache), checked(tap)
    for i in range(first, last):
        kv = cache and (cache.k[i], cache.v[i], bound)  # its own, like its weights
        seed = None if dropout is None else ops.fold(dropout, 4 + i)
        x = block(
            x, params["blocks"][i], config, positions, kv,
            tap=at(tap, f"blocks.{i}"), dropout=seed, attention=attention,
        )  # fmt: skip
    return x, cache and cache._replace(length=cache.length + x.shape[1], bound=bound)


def unembed(params, config, x, *, tap=None) -> Tensor:
    """The residual stream (B,T,C) -> logits (B,T,V): final norm, head, soft-cap; padding rows are cut off."""
    tap = checked(tap)
    x = normed(x, params["norm_f"], config, "norm_f", tap)
    logits = linear(x, **head(params))[..., : config.n_vocab]
    logits = ops.softcap(logits, config.logit_softcap) if config.logit_softcap else logits
    return tap("logits", logits) if tap else logits


def head(params) -> dict:
    """The head's w, and b if it has one; a tied head is the embedding."""
    return {"w": params["embed"]["w"]} | params.get("head", {})


def forward(params, config, tokens, cache=None, *, tap=None, dropout=None, attention="fused"):
    """tokens (B,T) -> (logits (B,T,V), the cache T tokens longer, or None if there was none).

    tap(name, value) -> value sees, and may replace, every site of activation_spec. dropout is a torch.Generator or an
    int64 seed tensor, 0-dim or one a row: dropout happens iff it is given. attention "explicit" takes a tap's path.
    Raises ValueError for tokens that are not (B,T) whole numbers or do not fit the context.
    """
    x, cache = residual(params, config, tokens, cache, tap=tap, dropout=dropout, attention=attention)
    return unembed(params, config, x, tap=tap), cache


def residual(params, config, tokens, cache=None, *, tap=None, dropout=None, attention="fused", block=block):
    """forward without its last step: tokens (B,T) -> (the residual stream after the last block (B,T,C), cache)."""
    check_tokens(tokens, config, cache)
    positions = positions_of(tokens, cache)
    if tap:
        checked(tap)("positions", positions.expand_as(tokens))
    x = embed(params, config, tokens, positions, tap=tap)
    ways = {"tap": tap, "dropout": as_seed(dropout), "attention": attention, "block": block}
    return run_blocks(params, config, x, cache, **ways)


def check_tokens(tokens, config, cache=None) -> None:
    """Raise ValueError unless tokens is int64 or int32 (B,T), T at least 1, and still fits the context."""
    kind = isinstance(tokens, Tensor) and tokens.dtype in (torch.int64, torch.int32)
    if not kind or tokens.dim() != 2 or tokens.shape[1] == 0:
        got = f"{tuple(tokens.shape)} {tokens.dtype}" if isinstance(tokens, Tensor) else type(tokens).__name__
        raise ValueError(f"tokens: expected an integer tensor (B,T), T at least 1, got {got}")
    bound_after(tokens, config, cache)


def as_seed(dropout):
    """The seed that a generator draws; a seed tensor or None as it is (a generator cannot enter a compiled graph)."""
    if isinstance(dropout, torch.Generator):
        return torch.randint(2**62, (), generator=dropout, device=dropout.device)
    return dropout


# ---------------------------------------------------------------------------------------------------------- the loss

PLAIN_LOSS_BYTES = 256_000_000  # float32 logits that a compiled graph may hold: there one cross-entropy is fastest


def chunk_rows(n_vocab, d_model, device_type) -> int:
    """Rows of logits to hold at once: 16 MB of them on a CPU, else 128 MB, but enough that adding to dw stays cheap."""
    budget = 16e6 if device_type == "cpu" else 128e6
    return max(2 ** int(math.log2(max(1, budget / (4 * n_vocab)))), 4 * d_model)


def hidden(params, config, tokens, *, tap=None, dropout=None, attention="fused", block=block) -> Tensor:
    """tokens (B,T) -> what the head reads, (B,T,C): everything but the last matrix product."""
    x, _ = residual(params, config, tokens, tap=tap, dropout=dropout, attention=attention, block=block)
    return normed(x, params["norm_f"], config, "norm_f", checked(tap))


def head_loss(params, config, x, targets) -> Tensor:
    """What the head reads (B,T,C), targets (B,T) where -100 does not count -> mean nats, float32, by chunks of rows."""
    p, x, targets = head(params), x.flatten(0, 1), targets.flatten()
    rows = chunk_rows(config.n_vocab_padded, config.d_model, x.device.type)
    arguments = (x, p["w"], p.get("b"), targets, config.n_vocab, config.logit_softcap, rows, kernels.weigh_)
    return ops.LinearCrossEntropy.apply(*arguments)[0]


def loss(params, config, tokens, targets, *, dropout=None, attention="fused") -> Tensor:
    """Mean nats per counted target (B,T), -100 does not count; a scalar, at least float32.

    Large (B,T,V) logits are never materialised: the head's gradient is made chunk by chunk (first derivatives only;
    for torch.func transforms use nats, which is plain autograd).
    """
    check_targets(tokens, targets)
    x = hidden(params, config, tokens, dropout=dropout, attention=attention)
    if torch.compiler.is_compiling() and 4 * targets.numel() * config.n_vocab_padded <= PLAIN_LOSS_BYTES:
        return token_nats(params, config, x, targets).sum() / (targets != -100).sum().clamp(min=1)
    return head_loss(params, config, x, targets)


def check_targets(tokens, targets) -> None:
    """Raise ValueError unless there is a target for each token."""
    if targets.shape != tokens.shape:
        raise ValueError(f"targets: expected {tuple(tokens.shape)} as the tokens, got {tuple(targets.shape)}")


def token_nats(params, config, x, targets) -> Tensor:
    """What the head reads (...,C), targets (...) -> nats (...), at least float32; 0 where the target is -100."""
    logits = ops.wide(linear(x, **head(params))[..., : config.n_vocab])
    logits = ops.softcap(logits, config.logit_softcap) if config.logit_softcap else logits
    return F.cross_entropy(logits.flatten(0, -2), targets.flatten(), reduction="none").view(targets.shape)


def nats(params, config, tokens, targets, *, tap=None, attention="fused") -> Tensor:
    """Negative log-likelihood of each target: tokens, targets (B,T) -> (B,T), at least float32; 0 where it is -100.

    tap sees every site but the logits, which are never whole. With attention "explicit" it can be differentiated any
    number of times.
    """
    check_targets(tokens, targets)
    x = hidden(params, config, tokens, tap=tap, attention=attention)
    rows = chunk_rows(config.n_vocab_padded, config.d_model, x.device.type)
    chunks = zip(x.flatten(0, 1).split(rows), targets.flatten().split(rows), strict=True)
    return torch.cat([token_nats(params, config, *chunk) for chunk in chunks]).view(targets.shape)
