"""The emulator of csrc/emu from Python: the GPU's kernels on this CPU, called as gptcore.kernels calls an operator.

A small library a warp width, built by the C++ compiler on first use and kept in build/ under the hash of its sources.
"""

import ctypes
import hashlib
import os
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
COMPILER = os.environ.get("CXX", "c++").split()
FLAGS = ["-O2", "-std=c++17", "-shared", "-fPIC", "-ffp-contract=off", "-U_FORTIFY_SOURCE"]  # that one forbids fibers
WARPS = (32, 64)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # in types.h's order


def missing() -> str:
    """Why there is no emulator here; empty if there can be."""
    if sys.platform != "linux":
        return "the emulator's fibers are for Linux"
    if not shutil.which(COMPILER[0]):
        return f"no C++ compiler for the emulator ({COMPILER[0]})"
    works = subprocess.run([*COMPILER, "--version"], capture_output=True).returncode == 0
    return "" if works else f"the C++ compiler does not work ({COMPILER[0]})"


@cache
def libraries() -> dict:
    """The library of each warp width, both built at once where they are not there."""
    digest = hashlib.sha256(" ".join([*COMPILER, *FLAGS]).encode())
    for path in sorted(p for folder in ("emu", "gpu", "kernels") for p in (ROOT / "csrc" / folder).iterdir()):
        digest.update(path.read_bytes())
    paths = {warp: ROOT / "build" / f"emulator-{warp}-{digest.hexdigest()[:16]}.so" for warp in WARPS}
    (ROOT / "build").mkdir(exist_ok=True)
    for old in set((ROOT / "build").glob("emulator-*.so")) - set(paths.values()):
        old.unlink(missing_ok=True)
    started = []
    for warp, path in paths.items():
        if not path.exists():
            fresh = path.with_suffix(f".{os.getpid()}")
            command = [*COMPILER, *FLAGS, f"-DGPTCORE_WARP={warp}", "csrc/emu/emulator.cpp", "-o", str(fresh)]
            started.append((subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True), fresh, path))
    for process, fresh, path in started:
        _, errors = process.communicate()
        assert process.returncode == 0, errors
        fresh.replace(path)
    found = {warp: ctypes.CDLL(str(path)) for warp, path in paths.items()}
    for library in found.values():
        library.gptcore_gpu_error.restype = ctypes.c_char_p
        library.gptcore_emu_attention.restype = ctypes.c_int64
    return found


def trouble(warp) -> str:
    """What went wrong in the last call."""
    return libraries()[warp].gptcore_gpu_error(1).decode()


def _call(function, tensors, numbers, factors, seed):
    pointers = (ctypes.c_void_p * len(tensors))(*(None if x is None else x.data_ptr() for x in tensors))
    numbers = (ctypes.c_int64 * len(numbers))(*numbers)
    return function(pointers, numbers, (ctypes.c_double * len(factors))(*factors), ctypes.c_uint64(seed))


def kv_attention_(
    q, k, v, k_cache, v_cache, length, *, n_keys, scale=None, alibi_slopes=None, window=0, softcap=0.0,
    cos=None, sin=None, interleaved=False, warp=32, seed=0, n_processor=4,
):  # fmt: skip
    """As kernels.kv_attention_ -> (z, how many floats of partial results there were: 0 if the keys were not split)."""
    store = torch.full((q.numel() + 128,), 7.0, dtype=q.dtype)
    z = store[64:-64].view(q.shape)
    tensors = (z, q, k, v, k_cache, v_cache, length, alibi_slopes, cos, sin)
    strides = [n for x in tensors[1:6] for n in x.stride()[:3]]
    sizes = [len(q), q.shape[1], k.shape[1], q.shape[2], q.shape[3], window, n_keys]
    kinds = [DTYPES.index(q.dtype), DTYPES.index(k_cache.dtype)]
    factors = [q.shape[3] ** -0.5 if scale is None else scale, softcap]
    function = libraries()[warp].gptcore_emu_attention
    turning = [0 if cos is None else cos.shape[-1], interleaved]
    n_partial = _call(function, tensors, [*strides, *sizes, *kinds, n_processor, *turning], factors, seed)
    assert n_partial >= 0, trouble(warp)
    assert (store[:64] == 7).all(), "written before z"
    assert (store[-64:] == 7).all(), "written behind z"
    return z, n_partial


def sample(
    logits, *, seed, position, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, warp=32, order=0, n_thread=256
) -> torch.Tensor:
    """As kernels.sample, for logits (B,V), seed and position (B,); -1 for a row that cannot be drawn from."""
    tokens = torch.full((len(logits),), -7)
    numbers = [*logits.shape, logits.stride(0), top_k, DTYPES.index(logits.dtype), n_thread]
    factors = [top_p, min_p, 1 / temperature if temperature else 0.0]
    function = libraries()[warp].gptcore_emu_sample
    code = _call(function, (tokens, logits, seed, position), numbers, factors, order)
    assert code == 0, trouble(warp)
    return tokens


def wrong(which, *, warp=32, seed=0):
    """A kernel with a mistake -> (error code, what each of its 64 threads wrote)."""
    out = torch.full((64,), -1, dtype=torch.int32)
    return libraries()[warp].gptcore_emu_wrong(which, ctypes.c_void_p(out.data_ptr()), ctypes.c_uint64(seed)), out
