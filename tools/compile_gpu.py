"""invoke compile-gpu: does the GPU code compile, without a GPU and without a torch that knows one?

nvcc makes NVIDIA's code. Any clang with AMD's target makes AMD's, without ROCm: csrc/gpu/port.h speaks HIP in clang's
own words. What compiles is not yet what runs: the emulator's tests say what the text means.
"""

import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import click

ROOT = Path(__file__).resolve().parents[1]
SOURCE = "csrc/gpu/launch.cu"
NVIDIA, AMD = ("sm_80", "sm_90"), ("gfx90a", "gfx1100")  # A100, H100; MI200 with warps of 64, RX 7900 with 32
CLANGS = ("clang++", *(f"clang++-{n}" for n in range(22, 15, -1)))


def nvcc() -> str:
    """Where nvcc is; empty if there is none."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return shutil.which("nvcc") or shutil.which(f"{home}/bin/nvcc") or ""


def amd_clang() -> str:
    """A clang that makes code for AMD's GPUs; empty if there is none."""
    for found in filter(None, map(shutil.which, CLANGS)):
        targets = subprocess.run([found, "--print-targets"], capture_output=True, text=True).stdout
        if "amdgcn" in targets:
            return found
    return ""


def commands(folder) -> Iterator[tuple[str, list[str]]]:
    """(target, how it is compiled into the folder), for every target that has a compiler here."""
    if compiler := nvcc():
        for target in NVIDIA:
            kind = f"-gencode=arch={target.replace('sm', 'compute')},code={target}"
            flags = ["-std=c++17", "-O3", "-fmad=false", "-Xptxas", "-v", kind]
            yield target, [compiler, "-c", *flags, SOURCE, "-o", f"{folder}/{target}.o"]
    if compiler := amd_clang():
        for target in AMD:
            alone = [
                "--offload-device-only",
                "-nogpulib",
                "-nogpuinc",
                "--no-gpu-bundle-output",
                "-DGPTCORE_HIP_NOHEADER",
            ]
            flags = ["-std=c++17", "-O3", "-ffp-contract=off", "-x", "hip", f"--offload-arch={target}", *alone]
            yield target, [compiler, "-S", *flags, SOURCE, "-o", f"{folder}/{target}.s"]


def measured(text) -> str:
    """What ptxas or clang's assembly says of its kernels: how many, registers at most, bytes or registers spilled."""
    registers = re.findall(r"Used (\d+) registers|^ +\.vgpr_count: +(\d+)", text, re.MULTILINE)
    spills = re.findall(r"(\d+) bytes spill stores|^ +\.vgpr_spill_count: +(\d+)", text, re.MULTILINE)
    number = lambda pair: int(pair[0] or pair[1])
    most, spilled = max(map(number, registers), default=0), sum(map(number, spills))
    return f"{len(registers)} kernels, at most {most} registers, {spilled} spilled"


@click.command("compile-gpu")
def compile_gpu():
    """Compile the GPU code for NVIDIA and AMD, where there is a compiler; needs no GPU."""
    with tempfile.TemporaryDirectory() as folder:
        wanted = dict(commands(folder))
        for who, targets in (("nvcc", NVIDIA), ("clang++ with AMD's target", AMD)):
            if targets[0] not in wanted:
                click.echo(f"{', '.join(targets)}: skipped, no {who}")
        run = lambda command: subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            results = dict(zip(wanted, pool.map(run, wanted.values()), strict=True))
        for target, done in results.items():
            if done.returncode:
                click.echo(f"{target}: does not compile\n{done.stdout}{done.stderr}", err=True)
                continue
            assembly = Path(folder, f"{target}.s")
            text = assembly.read_text() if assembly.exists() else done.stdout + done.stderr  # ptxas speaks there
            click.echo(f"{target}: {measured(text)}")
    return int(any(done.returncode for done in results.values()))
