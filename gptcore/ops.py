"""The mathematics of a GPT, one equation a function.

What you learn here: how a position becomes a rotation or a slope, how five lines make attention, and why a single <= is
all the causality a GPT needs. This file is the specification; whatever is faster elsewhere must agree with it.
Axes: B rows, T new tokens, S keys, C model width, F MLP width, H heads (H_kv for keys and values), D head width,
V vocabulary. Positions are (B,T), or (1,T) where all rows agree.
Next: cache.py remembers keys and values; model.py stacks these functions into a GPT.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def wide(x) -> Tensor:
    """x in at least float32: bfloat16 keeps two or three digits, too few for sums, angles and softmax."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def linear(x, w, b=None, lora_a=None, lora_b=None) -> Tensor:
    """x w^T + b over the last axis, w (out,in); with LoRA's lora_a (R,in), lora_b (out,R) also (x a^T) b^T."""
    y = F.linear(x, w, b)
    if lora_a is None:
        return y
    a, b = lora_a.to(x.dtype), lora_b.to(x.dtype)  # they learn in float32 over a base in 16 bit
    return y + F.linear(F.linear(x, a), b)


# ------------------------------------------------------------------------------------------------------------- norms


def layernorm(x, w, b=None, *, eps, look=None) -> Tensor:
    """w * (x - mean) / sqrt(var + eps) + b over the last axis, (..., C) -> (..., C).  Ba et al. 2016, arXiv:1607.06450.

    look(scale) -> scale, if given, sees and may replace the divisor (..., 1).
    """
    if look is None:
        return F.layer_norm(x, x.shape[-1:], w, b, eps)
    centred = wide(x) - wide(x).mean(-1, keepdim=True)
    scale = look((centred.square().mean(-1, keepdim=True) + eps).sqrt())
    y = w * (centred / scale).to(x.dtype)
    return y if b is None else y + b


def rmsnorm(x, w, *, eps, look=None) -> Tensor:
    """w * x / sqrt(mean(x^2) + eps) over the last axis, as layernorm.  Zhang & Sennrich 2019, arXiv:1910.07467."""
    scale = (wide(x).square().mean(-1, keepdim=True) + eps).sqrt()
    if look is not None:
        scale = look(scale)
    return w * (wide(x) / scale).to(x.dtype)


NORMS = {"layernorm": layernorm, "rmsnorm": rmsnorm}


# --------------------------------------------------------------------------------------------------------- positions


def sinusoidal(positions, d_model) -> Tensor:
    """sin and cos of position / 10,000^(2i/C) in turn: (B,T) -> (B,T,C).  Vaswani et al. 2017, arXiv:1706.03762."""
    rate = 10_000.0 ** (-torch.arange(0, d_model, 2, device=positions.device, dtype=torch.float32) / d_model)
    angle = positions[..., None] * rate
    return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(-2)


def rotary_table(positions, d_rot, base, stretch=None) -> tuple[Tensor, Tensor]:
    """cos and sin of position * base^(-2i/d_rot), each (B,T,1,d_rot/2) in float32: bfloat16 would round 257 to 256.

    stretch(rate) -> rate, if given, slows the turning down for a longer context.
    """
    rate = base ** (-torch.arange(0, d_rot, 2, device=positions.device, dtype=torch.float32) / d_rot)
    angle = positions[:, :, None, None] * (stretch(rate) if stretch else rate)
    return angle.cos(), angle.sin()


def linear_stretch(rate, factor, **_) -> Tensor:
    """Every position divided by the factor.  Chen et al. 2023, arXiv:2306.15595."""
    return rate / factor


def llama3_stretch(rate, factor, low, high, n_trained) -> Tensor:
    """Slow pairs divided by the factor, fast ones as they are, mixed in between.  Llama 3.1, arXiv:2407.21783.

    A pair turns n_trained * rate / 2 pi times in the context it was trained on: slow is below low, fast above high.
    """
    fast = ((n_trained * rate / (2 * math.pi) - low) / (high - low)).clamp(0, 1)
    return fast * rate + (1 - fast) * rate / factor


STRETCHES = {"none": None, "linear": linear_stretch, "llama3": llama3_stretch}


def rotary(x, cos, sin, *, interleaved=False) -> Tensor:
    """Turn pairs of x's first numbers by the table's angles, x (B,T,H,D).  Su et al. 2021, arXiv:2104.09864.

    A pair is (i, i + half), or (2i, 2i+1) if interleaved; what the table does not reach passes (partial rotary).
    """
    turning, rest = wide(x).split([2 * cos.shape[-1], x.shape[-1] - 2 * cos.shape[-1]], dim=-1)
    a, b = turning.unflatten(-1, (-1, 2)).unbind(-1) if interleaved else turning.chunk(2, dim=-1)
    turned = [a * cos - b * sin, a * sin + b * cos]
    turned = torch.stack(turned, dim=-1).flatten(-2) if interleaved else torch.cat(turned, dim=-1)
    return torch.cat([turned, rest], dim=-1).to(x.dtype)


def alibi_slopes(n_head, device=None) -> Tensor:
    """2^(-8(h+1)/H) for head h of H, (H,).  Press et al. 2021, arXiv:2108.12409.

    As published, an H that is no power of two takes the slopes of the power below it, then every other one of the
    power above.
    """
    below = 2 ** int(math.log2(n_head))
    head = torch.arange(n_head, device=device)  # nothing comes from the host: a CUDA graph can hold it
    every_other = (2 * (head - below) + 1) * -4 / below
    return torch.exp2(torch.where(head < below, (head + 1) * -8 / below, every_other))


# --------------------------------------------------------------------------------------------------------- attention


def visible(positions, n_keys, window=0) -> Tensor:
    """The one rule: the query at position p sees key j iff j <= p (and j > p - window).  (B,T) -> (B,1,T,S)."""
    keys = torch.arange(n_keys, device=positions.device)
    p = positions[:, None, :, None]
    return (keys <= p) & (keys > p - window) if window else keys <= p


def attention_bias(positions, n_keys, slopes) -> Tensor:
    """ALiBi: minus a head's slope times the distance of key and query, (B,T), (H,) -> (B,H,T,S)."""
    distance = positions[:, None, :, None] - torch.arange(n_keys, device=positions.device)
    return -slopes[:, None, None] * distance


def attention_scores(q, k, positions, *, slopes=None, window=0, softcap=0.0) -> Tensor:
    """q k^T / sqrt(D), capped, biased, and -inf where a key is invisible.  q (B,T,H,D), k (B,H_kv,S,D) -> (B,H,T,S)."""
    q = q.unflatten(2, (k.shape[1], -1))  # query head h reads key head h // (H / H_kv)
    scores = wide(torch.einsum("btkgd,bksd->bkgts", q, k)).flatten(1, 2) / math.sqrt(q.shape[-1])
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if slopes is not None:
        scores = scores + attention_bias(positions, k.shape[2], slopes)
    return scores.masked_fill(~visible(positions, k.shape[2], window), -torch.inf)


def attention_mix(pattern, v) -> Tensor:
    """Every query's average of the values, weighted by its pattern.  (B,H,T,S), (B,H_kv,S,D) -> (B,T,H,D)."""
    pattern = pattern.to(v.dtype).unflatten(1, (v.shape[1], -1))
    return torch.einsum("bkgts,bksd->btkgd", pattern, v).flatten(2, 3)


def attention_fused(q, k, v, positions, *, slopes=None, window=0, causal=False) -> Tensor:
    """softmax(scores) v in one pass through torch's kernel: mix(softmax(scores)) without the pattern in memory.

    causal says that the T queries are the first T positions and the keys are theirs: then no mask is built.
    """
    q, n_keys = q.transpose(1, 2), k.shape[2]
    causal = causal and slopes is None and not window
    mask = None if causal else visible(positions, n_keys, window)
    if slopes is not None:
        mask = attention_bias(positions, n_keys, slopes).to(q.dtype).masked_fill(~mask, -torch.inf)
    grouped = {"enable_gqa": True} if q.shape[1] != k.shape[1] else {}
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, **grouped).transpose(1, 2)


# --------------------------------------------------------------------------------------------------------------- MLP


def gelu(x) -> Tensor:
    """x Phi(x), with Phi the normal distribution function.  Hendrycks & Gimpel 2016, arXiv:1606.08415."""
    return F.gelu(x)


def gelu_tanh(x) -> Tensor:
    """GELU by its tanh approximation, as GPT-2 was trained."""
    return F.gelu(x, approximate="tanh")


def relu2(x) -> Tensor:
    """max(x, 0)^2.  So et al. 2021, arXiv:2109.08668."""
    return F.relu(x).square()


def silu(x) -> Tensor:
    """x sigmoid(x): the gate of SwiGLU.  Shazeer 2020, arXiv:2002.05202."""
    return F.silu(x)


ACTIVATIONS = {"gelu": gelu, "gelu_tanh": gelu_tanh, "relu2": relu2, "swiglu": silu}


# ----------------------------------------------------------------------------------------------------------- dropout


def scramble(x) -> Tensor:
    """A 32-bit integer hash (multiply and xorshift) on int64 tensors that hold 32-bit numbers."""
    x = (x ^ (x >> 16)) * 0x21F0AAAD & 0xFFFFFFFF  # both factors are below 2^31: the product fits an int64
    x = (x ^ (x >> 15)) * 0x735A2D97 & 0xFFFFFFFF
    return x ^ (x >> 15)


def fold(seed, number) -> Tensor:
    """A new seed from a seed and a small number, int64 tensors: every row, layer and site gets its own."""
    low, high = seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF
    low = scramble(low ^ scramble(high + number & 0xFFFFFFFF))
    return low | (scramble(low ^ high) >> 1 << 32)  # 63 bits: never negative


def dropout(x, rate, seed) -> Tensor:
    """Zero a share `rate` of x and scale up the rest.  Srivastava et al. 2014, JMLR 15.

    The mask is a hash of (seed, element number), not a draw from a generator: equal in eager, compiled, recomputed.
    seed is int64, 0-dim for all of x, or (B,) for its rows, whose masks then do not depend on who shares the batch.
    """
    rest = x.shape[seed.dim() :]
    number, seed = torch.arange(rest.numel(), device=x.device).view(rest), seed.view(*seed.shape, *[1] * len(rest))
    low, high = seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF
    stays = scramble(scramble(number & 0xFFFFFFFF ^ low) ^ high) >= int(rate * 2**32)
    return torch.where(stays, x / (1 - rate), 0.0)


# -------------------------------------------------------------------------------------------------------------- loss


def softcap(x, cap) -> Tensor:
    """cap * tanh(x / cap): like x while small, never beyond cap.  Gemma 2, arXiv:2408.00118."""
    return cap * torch.tanh(x / cap)


def weigh_(logits, targets, *, n_vocab, softcap=0.0):
    """Logits (N,V_padded) become the gradient of their own nats, but for a factor a row -> (sums (N,), nats (N,)).

    That is e^(z - top), less the row's sum at its target, and 0 from n_vocab on, z being the capped logit: divided by
    the row's sum it is the gradient. The factor is left to who multiplies, so one pass and one exp are enough.
    """
    real, index = logits[:, :n_vocab], targets[:, None]
    z = softcap * torch.tanh(wide(real) / softcap) if softcap else wide(real)
    slope = 1 - (z / softcap).square() if softcap else None
    top, wanted = z.amax(-1, keepdim=True), z.gather(-1, index)
    e = (z - top).exp_()
    sums = e.sum(-1, keepdim=True)
    e.scatter_add_(-1, index, -sums)
    real.copy_(e * slope if softcap else e)
    logits[:, n_vocab:] = 0
    return sums[:, 0], (sums.log() + top - wanted)[:, 0]


class LinearCrossEntropy(torch.autograd.Function):
    """Mean nats of targets under softmax(softcap(x w^T + b)): rows a chunk at a time, the (N,V) logits never kept.

    The gradients are made on the way, while a chunk's weights are at hand, as 2411.09009 (arXiv) and others do. What a
    row of the softmax is divided by is a factor of x and of dx, so no pass over the logits divides.
    Apply to x (N,C), w (V_padded,C), b (V_padded,) or None, targets (N,) where -100 does not count, then n_vocab, cap
    (0: none), rows, the size of a chunk, and weigh_, this module's or a twin; the first result is the loss. Products
    are made in the dtype of x, whatever that of w, and their sums in that of w; but those of float16 in float32, which
    alone holds a row's sum of e^(z - top). First derivatives only, once.
    """

    @staticmethod
    def forward(x, w, b, targets, n_vocab, cap, rows, weigh_=weigh_):
        """The mean, and the gradients of the mean with respect to x, w and b."""
        dx, dw, db = torch.empty_like(x), None, None
        share = (targets != -100).to(torch.promote_types(x.dtype, torch.float32))
        share, nats = share / share.sum().clamp(min=1), share.new_zeros(())
        index = targets.masked_fill(targets == -100, 0)  # any other target outside V is refused by weigh_
        x = x.float() if x.dtype == torch.float16 else x
        narrow, bias = w.to(x.dtype), None if b is None else b.to(x.dtype)
        for xc, tc, sc, dxc in zip(x.split(rows), index.split(rows), share.split(rows), dx.split(rows), strict=True):
            g = F.linear(xc, narrow, bias)  # (rows,V): becomes its own gradient, but for the factor
            sums, each = weigh_(g, tc, n_vocab=n_vocab, softcap=cap)
            factor = (sc / sums)[:, None]
            nats += (each * sc).sum()
            dxc.copy_((g @ narrow) * factor)
            more = (g.T @ (xc * factor).to(x.dtype)).to(torch.promote_types(w.dtype, torch.float32))
            dw = more if dw is None else dw.add_(more)
            if b is not None:
                more = (g.T @ factor.to(x.dtype))[:, 0].to(dw.dtype)
                db = more if db is None else db.add_(more)
        return nats, dx, dw.to(w.dtype), None if b is None else db.to(b.dtype)

    @staticmethod
    def setup_context(ctx, inputs, output):
        """Keep the gradients that forward made."""
        _, dx, dw, db = output
        ctx.mark_non_differentiable(*(g for g in (dx, dw, db) if g is not None))
        ctx.save_for_backward(dx, dw, db)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad, *_):
        """The chain rule: everything scales with the loss's own gradient."""
        dx, dw, db = (g if g is None else g.mul_(grad) for g in ctx.saved_tensors)  # in place: a second time is refused
        return dx, dw, db, None, None, None, None, None
