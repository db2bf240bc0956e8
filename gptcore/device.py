"""Which machine we are on: the device, its name, its memory, the number format it multiplies well, and seeds.

What you learn here: one code path serves CUDA and ROCm (torch calls both "cuda"), and randomness is data: every
random stream is named by words that are hashed together, so streams never overlap and nothing global is touched.
"""

import ctypes
import hashlib
import os
import platform
import time

import torch


def present() -> list[str]:
    """The devices that torch can use here, best first."""
    cuda = [f"cuda:{index}" for index in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    return cuda + (["mps"] if torch.backends.mps.is_available() else []) + ["cpu"]


def pick(name="auto") -> torch.device:
    """auto, cpu, cuda, cuda:N or mps -> the device. Raises ValueError naming the devices that are present."""
    found = present()
    if name == "auto":
        return torch.device(found[0])
    wanted = "cuda:0" if name == "cuda" else name
    if wanted not in found:
        raise ValueError(f"device: expected auto or one of {', '.join(found)}, got {name}")
    return torch.device(wanted)


def backend_name(device) -> str:
    """What people call the device's backend. AMD is known by torch's build, never guessed from the card's name."""
    kind = torch.device(device).type
    if kind == "cuda":
        return "CUDA (AMD GPU via ROCm)" if torch.version.hip else "CUDA (NVIDIA GPU)"
    return {"mps": "MPS (Apple Silicon GPU)", "cpu": "CPU"}[kind]


def card_name(device) -> str:
    """The name of the card or processor."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
        if names:
            return names[0]
    return platform.processor() or platform.machine()


def total_memory(device) -> int:
    """Bytes of memory that the device has; on MPS and CPU the machine's own."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return 0


def keep_memory_() -> bool:
    """Let this process keep what it frees, where the C library is glibc; True if it does. For programs, not libraries.

    glibc gives a large block back to the system at once, and the system clears it again for the next one that asks: a
    training step that makes the same tensors a hundred times a second spent a fifth of its time so.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mmap_threshold, trim_threshold = -3, -1  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD of malloc.h
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(mmap_threshold, 2**30) and mallopt(trim_threshold, 2**31 - 1))


def synchronize(device) -> None:
    """Wait until the device has done what it was given: before a clock is read."""
    kind = torch.device(device).type
    if kind == "cuda":
        torch.cuda.synchronize(device)
    elif kind == "mps":
        torch.mps.synchronize()


def multiplies_bfloat16(device) -> bool:
    """Does the hardware multiply bfloat16 natively? MPS is left in float32."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device)[0] >= 8 or torch.version.hip is not None
    if device.type == "cpu":
        names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
        return any(getattr(torch.cpu, name, lambda: False)() for name in names)
    return False


def gemm_peak(device, dtype) -> float:
    """FLOP/s of the best of a few large square matrix products: what the device could do at most in that dtype."""
    n, best = 1024 if torch.device(device).type == "cpu" else 8192, float("inf")
    a = torch.ones(n, n, device=device, dtype=dtype)
    for _ in range(6):
        synchronize(device)
        began = time.perf_counter()
        a @ a
        synchronize(device)
        best = min(best, time.perf_counter() - began)
    return 2 * n**3 / best


def key(*words) -> int:
    """64 bits that depend on every word: key(seed, "order", epoch, group).

    torch's CPU generator keeps only the low 32 bits of a seed, so seeds and steps are hashed together, never shifted.
    """
    text = "/".join(str(word) for word in words)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def generator(*words) -> torch.Generator:
    """A CPU generator for the stream that the words name; weights drawn from it are equal on every device."""
    return torch.Generator().manual_seed(key(*words) & (2**63 - 1))
