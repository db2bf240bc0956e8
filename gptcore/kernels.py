"""Native or reference: the one place that chooses, and can say why.

What you learn here: a fast twin is worth having only if nobody can tell who computed. Each operator is one row of a
table: the native way, the reference in plain torch, and a condition. Native code has no gradients and knows no function
transforms, so it never serves where those are needed. GPTCORE_KERNELS=auto|native|reference decides for a process.
Axes: B rows, T new tokens, H heads (H_kv for keys and values), D head width, V vocabulary.
Next: model.py attends through kv_attention_ and learns through weigh_, engine.py decodes through decode_; csrc/ops.cpp
holds the other side.
"""

import contextlib
import importlib
import importlib.util
import math
import os
import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch

from gptcore import ops, sampling
from gptcore.cache import append_

ABI = 4  # the operators' schemas, as csrc/module.cpp numbers them
NOT_BUILT = "native kernels not built (invoke build)"
MODES = ("auto", "native", "reference")
STORED = (torch.float32, torch.bfloat16, torch.float16)
ON_GPU = {"kv_attention_": False, "sample": False}  # was it run there? True with the first results that are committed


class Op(NamedTuple):
    """One operator: two ways of the same signature, and unserved(*tensors) -> why native cannot, or an empty string.

    decode_ has no reference here: its twin is generate's own loop over the other operators.
    """

    native: Callable
    reference: Callable | None
    unserved: Callable
    condition: str


# ---------------------------------------------------------------------------------------------------------- attention


def kv_attention_(
    q, k, v, k_cache, v_cache, length, *, n_keys, scale=None, alibi_slopes=None, window=0, softcap=0.0,
    cos=None, sin=None, interleaved=False,
) -> torch.Tensor:  # fmt: skip
    """Append k, v (B,H_kv,T,D) to the caches (B,H_kv,n_context,D) at length (B,), and attend: q, z (B,H,T,D).

    Query i of a row sees key j iff j <= length + i (and j > length + i - window); scores are scale q.k (1/sqrt(D)),
    capped, minus alibi_slopes (H,) times the distance. cos, sin (B,T,1,d_rot/2), of ops.rotary_table, turn q and k
    first. n_keys is the host's bound: at least every length + T; where native code on a GPU meets a longer row, it
    writes nothing there and gives it NaN, because nobody looks. Raises ValueError for values out of range, before
    anything is written.
    """
    if not q.shape[2] <= n_keys <= k_cache.shape[2]:
        raise ValueError(f"n_keys: expected {q.shape[2]} to n_context={k_cache.shape[2]}, got {n_keys}")
    if window < 0 or softcap < 0:
        raise ValueError(f"window, softcap: expected at least 0, got {window}, {softcap}")
    way = choose("kv_attention_", q, k, v, k_cache, v_cache)
    return way(
        q, k, v, k_cache, v_cache, length,
        n_keys=n_keys, scale=scale, alibi_slopes=alibi_slopes, window=window, softcap=softcap,
        cos=cos, sin=sin, interleaved=interleaved,
    )  # fmt: skip


def _attention_reference(
    q, k, v, k_cache, v_cache, length, *, n_keys, scale, alibi_slopes, window, softcap, cos, sin, interleaved
):
    """rotary, append_, and then attention as ops.py defines it."""
    positions = length[:, None] + torch.arange(q.shape[2], device=q.device)
    q, k = q.transpose(1, 2), k.transpose(1, 2)
    if cos is not None:
        q, k = (ops.rotary(x, cos, sin, interleaved=interleaved) for x in (q, k))
    k = append_(k_cache, k, positions)[:, :, :n_keys].to(q.dtype)
    v = append_(v_cache, v.transpose(1, 2), positions)[:, :, :n_keys].to(q.dtype)
    if scale is not None:
        q = q * (scale * math.sqrt(q.shape[-1]))  # ops.py divides by it
    rules = {"slopes": alibi_slopes, "window": window}
    if softcap:
        pattern = ops.attention_scores(q, k, positions, **rules, softcap=softcap).softmax(-1)
        return ops.attention_mix(pattern, v).transpose(1, 2)
    return ops.attention_fused(q, k, v, positions, **rules).transpose(1, 2)


def _attention_native(q, k, v, k_cache, v_cache, length, **rules):
    return _below_autograd(torch.ops.gptcore.kv_attention_, q, k, v, k_cache, v_cache, length.contiguous(), **rules)


def _attention_unserved(q, k, v, k_cache, v_cache):
    if k.dtype != q.dtype or v.dtype != q.dtype:
        return f"queries of {q.dtype} beside keys of {k.dtype} and values of {v.dtype} are not served"
    if k_cache.dtype not in STORED or v_cache.dtype != k_cache.dtype:
        return f"a cache of {k_cache.dtype} and {v_cache.dtype} is not served"
    return f"a head of {q.shape[-1]} is not served" if q.shape[-1] > 256 else ""


# ----------------------------------------------------------------------------------------------------------- sampling


def sample(logits, *, seed, position, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0) -> torch.Tensor:
    """Draw one token a row: logits (V,) or (B,V) -> int64 () or (B,). Exactly sampling.sample, whoever computes."""
    settings = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    return choose("sample", logits)(logits, seed=seed, position=position, **settings)


def sample_ahead(logits, *, seed, position, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0) -> torch.Tensor:
    """As sample, but native code waits for nothing: -1 for a row that cannot be drawn from, and who asks finds out.

    Settings are not checked either. A step that is captured in a graph draws so.
    """
    settings = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    native = choose("sample", logits) is _sample_native
    return (_sample_unseen if native else sampling.sample)(logits, seed=seed, position=position, **settings)


def _sample_unseen(logits, *, seed, position, **settings):
    rows = logits.reshape(-1, logits.shape[-1]).contiguous()
    words = {"seed": _words("seed", seed, rows), "position": _words("position", position, rows)}
    return _below_autograd(torch.ops.gptcore.sample, rows, **words, **settings).view(logits.shape[:-1])


def _sample_native(logits, *, seed, position, **settings):
    sampling.check_settings(**settings)
    tokens = _sample_unseen(logits, seed=seed, position=position, **settings)
    if tokens.min() < 0:
        row = int((tokens.view(-1) < 0).nonzero()[0])
        best = logits.reshape(-1, logits.shape[-1])[row].amax().item()
        raise ValueError(f"logits: expected a finite largest logit in row {row}, got {best}")
    return tokens


def _words(name, value, rows):
    """A seed or position for every row, int64 (B,)."""
    if isinstance(value, int) and -(2**63) <= value < 2**64:
        return torch.full((len(rows),), value - 2**64 if value >= 2**63 else value, device=rows.device)
    if isinstance(value, torch.Tensor) and value.dtype == torch.int64 and value.shape in ((), (len(rows),)):
        return value.to(rows.device).expand(len(rows))
    got = f"{value.dtype} {tuple(value.shape)}" if isinstance(value, torch.Tensor) else repr(value)
    raise ValueError(f"{name}: expected an int of 64 bits or int64 ({len(rows)},), got {got}")


def _sample_unserved(logits):
    if logits.dim() not in (1, 2) or not logits.numel() > 0 or logits.shape[-1] > 2**22:
        return f"logits of shape {tuple(logits.shape)} are not served"
    return ""


# ----------------------------------------------------------------------------------------------------------- decoding


def decode_(weights, plan, constants, tokens, k, v, length, *, seed, position, stop, steps, n_threads=0, **sampling_of):
    """`steps` whole steps for B rows: tokens (B,) are read at length (B,), drawn ones are read next; keys are appended.

    weights, plan, constants as engine.pack makes them; k, v the cache's buffers, a layer each; seed, position (B,),
    position being the index of the first token drawn; a row ends after a token of stop (N,), or when its cache is full.
    -> (tokens (B,steps), -1 after a row's end, new lengths (B,)). n_threads 0: as torch, at most a CPU each. Raises
    ValueError for settings out of range, and where native code cannot serve.
    """
    sampling.check_settings(**sampling_of)
    if reason := why_not("decode_", *k, *v):
        raise ValueError(f"decode_: expected what native code serves, but {reason}")
    words = {"seed": seed.contiguous(), "position": position.contiguous(), "stop": stop}
    counts = {"steps": steps, "n_threads": n_threads}
    arguments = (weights, plan, constants, tokens.contiguous(), k, v, length.contiguous())
    return _below_autograd(torch.ops.gptcore.decode_, *arguments, **words, **counts, **sampling_of)


def _decode_unserved(*stores):
    kinds = {x.dtype for x in stores}
    if len(kinds) > 1 or not kinds <= set(STORED):
        return f"{' and '.join(sorted(map(str, kinds)))} together are not served"
    return ""


# ----------------------------------------------------------------------------------------------------------- the loss


def weigh_(logits, targets, *, n_vocab, softcap=0.0):
    """Logits (N,V_padded) become the gradient of their own nats, but for a factor a row: as ops.weigh_."""
    return choose("weigh_", logits)(logits, targets, n_vocab=n_vocab, softcap=softcap)


def _weigh_native(logits, targets, *, n_vocab, softcap):
    return _below_autograd(torch.ops.gptcore.weigh_, logits, targets, n_vocab=n_vocab, softcap=softcap)


# ------------------------------------------------------------------------------------------------------------- choice

_ATTENTION = Op(_attention_native, _attention_reference, _attention_unserved, "CPU, three storage types, head <= 256")
_SAMPLE = Op(_sample_native, sampling.sample, _sample_unserved, "CPU, three storage types, V <= 2^22")
_DECODE = Op(decode_, None, _decode_unserved, "CPU, float32 or bfloat16 (int8 where packed so)")
_WEIGH = Op(_weigh_native, ops.weigh_, lambda _: "", "CPU, three storage types")
OPS = {"kv_attention_": _ATTENTION, "sample": _SAMPLE, "decode_": _DECODE, "weigh_": _WEIGH}


def choose(name, *tensors) -> Callable:
    """The way that computes op `name` on these tensors. Raises ValueError where native is forced and cannot serve."""
    reason = why_not(name, *tensors)
    if reason and _mode == "native":
        raise ValueError(f"{name}: expected what native code serves, as GPTCORE_KERNELS=native asks, but {reason}")
    return OPS[name].reference if reason else OPS[name].native


def why_not(name, *tensors) -> str:
    """Why native code does not compute op `name` on these tensors; an empty string if it does."""
    if _mode == "reference":
        return "GPTCORE_KERNELS=reference"
    if _problem:
        return _problem
    for x in tensors:
        if x.device.type != "cpu" and (reason := _why_not_on(x.device.type, name)):
            return reason
        if x.requires_grad and torch.is_grad_enabled():
            return "a gradient is needed"
        if _transformed(x):
            return "a torch.func transform is active"
    if tensors and tensors[0].dtype not in STORED:
        return f"{tensors[0].dtype} is not served"
    return OPS[name].unserved(*tensors) if tensors else ""


def _why_not_on(device_type, name):
    """Why native code does not serve op `name` on such a device, seen from the device alone; an empty string if so."""
    if device_type != "cuda" or name not in ON_GPU:  # torch's name for ROCm is cuda too
        return f"there is no native code for {device_type} yet"
    if not _gpu_code:
        return "native kernels are built without GPU code (invoke build)"
    if not ON_GPU[name] and _mode != "native":
        return "it was not yet run on a GPU (GPTCORE_KERNELS=native takes it)"
    return ""


def _transformed(x):
    if torch.compiler.is_compiling():  # the tracer knows this question only; a traced grad shows as requires_grad
        return torch._C._functorch.is_batchedtensor(x)
    return torch._C._functorch.maybe_current_level() is not None


def _load() -> str:
    """Load the native library; -> what is wrong, or an empty string. Raises ValueError for a bad GPTCORE_ISA."""
    global _gpu_code
    found = importlib.util.find_spec("gptcore._C")
    if found is None or os.path.dirname(found.origin) != os.path.dirname(__file__):  # another checkout's is not ours
        return NOT_BUILT
    try:
        library = importlib.import_module("gptcore._C")
    except ImportError as error:  # its text says what: a library of another Python, a missing symbol, a broken file
        return f"native kernels do not load (invoke build): {error}"
    if library.build_info()["abi"] != ABI:
        return f"native kernels are stale (invoke build): abi {library.build_info()['abi']}, expected {ABI}"
    _gpu_code = library.build_info()["gpu"]
    if name := os.environ.get("GPTCORE_ISA"):
        library.set_isa(name)
    _describe()
    return ""


def report() -> dict:
    """What is used and why: mode, per op {"used", "why", "gpu"}; of the library isa, isas, compiler, built_with, gpu.

    An op's gpu is why native code does not serve it on a GPU, an empty string if it does.
    """
    rows = {
        name: {"used": "reference", "why": why, "gpu": why}
        if (why := why_not(name))
        else {"used": "native", "why": op.condition, "gpu": _why_not_on("cuda", name)}
        for name, op in OPS.items()
    }
    found = {"mode": _mode, "torch": torch.__version__, "ops": rows}
    if _mode == "reference" or _problem:
        return found
    library = importlib.import_module("gptcore._C")
    info = library.build_info()
    return found | {
        "isa": library.isa(), "isas": info["isas"], "compiler": info["compiler"], "built_with": info["torch"],
        "gpu": info["gpu"],
    }  # fmt: skip


@contextlib.contextmanager
def using(mode, isa=None):
    """For tests and benchmarks: another mode, and another instruction set, until the block ends."""
    old = _mode
    _choose(mode)
    library = None if isa is None else importlib.import_module("gptcore._C")
    old_isa = library and library.isa()
    try:
        if library:
            library.set_isa(isa)
        yield
    finally:
        _choose(old)
        if library:
            library.set_isa(old_isa)


def _choose(mode):
    """The mode from now on; the library is loaded when it may be needed for the first time."""
    global _mode, _problem
    if mode not in MODES:
        raise ValueError(f"GPTCORE_KERNELS: expected one of {', '.join(MODES)}, got {mode}")
    _mode = mode
    if mode != "reference" and _problem is None:
        _problem = _load()
        if _problem and _problem != NOT_BUILT and mode == "auto":  # not built is a choice, and report() tells it
            warnings.warn(f"{_problem}: using torch ops", RuntimeWarning, stacklevel=2)


# ----------------------------------------------------------------------------------------- what torch must know of them


def _below_autograd(op, *args, **kwargs):
    """Call an op whose inputs need no gradient, as choose has seen: the refusal below need not be asked again."""
    if torch.compiler.is_compiling():
        return op(*args, **kwargs)
    with torch._C._AutoDispatchBelowAutograd():
        return op(*args, **kwargs)


def _describe():
    """Result shapes for the compiler, and a refusal where autograd would be silently wrong."""
    torch.library.register_fake("gptcore::sample", lambda logits, *, seed, **_: seed.new_empty(len(logits)))
    torch.library.register_fake("gptcore::kv_attention_", lambda q, *_, **__: q.new_empty(q.shape))
    torch.library.register_fake("gptcore::decode_", _fake_decode)
    torch.library.register_fake("gptcore::weigh_", _fake_weigh)
    for name in OPS:
        _autograd.impl(name, _refusal(getattr(torch.ops.gptcore, name).default), "Autograd", with_keyset=True)


def _fake_decode(weights, plan, constants, tokens, k, v, length, *, steps, **_):
    return tokens.new_empty((len(tokens), steps)), tokens.new_empty(len(tokens))


def _fake_weigh(logits, targets, **_):
    return tuple(logits.new_empty(len(logits), dtype=torch.float32) for _ in range(2))


_autograd = torch.library.Library("gptcore", "IMPL")


def _refusal(op):
    def call(keyset, *args, **kwargs):
        given = [x for arg in (*args, *kwargs.values()) for x in (arg if isinstance(arg, list | tuple) else [arg])]
        tensors = [x for x in given if isinstance(x, torch.Tensor)]
        if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
            raise NotImplementedError(f"{op.name()} is inference only: call it under torch.no_grad()")
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(keyset & torch._C._after_autograd_keyset, *args, **kwargs)

    return call


_gpu_code = False  # does the library have GPU code, and torch the runtime for it?
_problem: str | None = None  # why the library cannot be used; None before it was asked for
_choose(os.environ.get("GPTCORE_KERNELS", "auto"))
