"""Build the native kernels, but only when something that matters changed.

`invoke build` calls build(), commands that profit call build_first(). Nothing here imports torch, so that finding out
that there is nothing to do costs milliseconds.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
MARK = Path("build/native.json")
MATTERS = ("CXX", "CUDA_HOME", "TORCH_CUDA_ARCH_LIST", "ROCM_HOME", "PYTORCH_ROCM_ARCH")
TESTS = ("tests/test_kernels.py", "tests/test_engine.py")
SANITIZERS = "-O1 -g -fsanitize=address,undefined -fno-sanitize-recover=undefined"


class Build(NamedTuple):
    """What came of it: whether anything was compiled, and what went wrong, if anything, in the compiler's words."""

    ok: bool
    compiled: bool
    text: str = ""


def fingerprint(root=ROOT) -> str:
    """A hash of all that a build depends on: sources, torch, Python, compiler, toolkits, environment."""
    digest = hashlib.sha256()
    for path in [root / "setup.py", *sorted((root / "csrc").rglob("*"))]:
        if path.is_file():
            digest.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes())
    chosen = {name: value for name, value in os.environ.items() if name in MATTERS or name.startswith("GPTCORE_BUILD")}
    tools = [_compiler(), _toolkits()]
    digest.update(json.dumps([sys.version, _version("torch"), tools, sorted(chosen.items())]).encode())
    return digest.hexdigest()


def is_built(wanted, root=ROOT) -> bool:
    """Was the last success of the fingerprint `wanted`, and is its library still there?"""
    library, mark = root / "gptcore" / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}", root / MARK
    return library.exists() and mark.exists() and json.loads(mark.read_text()).get("fingerprint") == wanted


def build_first(say, root=ROOT) -> None:
    """Before a command that profits: build what is missing or stale, where that is possible; say(line) tells it.

    Must run before gptcore is imported, which loads the library once. A failure is a line, and torch operators serve.
    """
    unwanted = os.environ.get("GPTCORE_BUILD") == "none" or os.environ.get("GPTCORE_KERNELS") == "reference"
    compiler = shutil.which(os.environ.get("CXX", "c++").split()[0])
    if unwanted or not compiler or sys.platform == "win32" or not (root / "setup.py").exists():
        return
    if is_built(fingerprint(root), root):
        return
    say("building the native kernels, once")
    if not build(root).ok:
        say("native kernels not built (invoke build shows why): going on without them")


def build(root=ROOT, **more) -> Build:
    """Compile csrc/ in place unless the last success had the same fingerprint and its library is still there.

    more are variables of the environment that setup.py reads, for a root that is built with them only.
    """
    wanted, mark = fingerprint(root), root / MARK
    if is_built(wanted, root):
        return Build(ok=True, compiled=False)
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])  # ninja lives beside Python
    done = subprocess.run(
        command, cwd=root, env=os.environ | {"PATH": path} | more, text=True, errors="replace",
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    if done.returncode:
        last = "\n".join(done.stdout.strip().splitlines()[-20:])
        return Build(ok=False, compiled=False, text=f"{last}\nnative kernels not built: torch operators will be used")
    mark.parent.mkdir(exist_ok=True)
    fresh = mark.with_suffix(".tmp")
    fresh.write_text(json.dumps({"fingerprint": wanted}))
    fresh.replace(mark)
    return Build(ok=True, compiled=True)


def copy(folder, root=ROOT) -> None:
    """What the native code's tests need, without anything built: what is built there leaves the checkout alone."""
    unbuilt = shutil.ignore_patterns("*.so", "__pycache__")
    for name in ("gptcore", "csrc", "tests"):
        shutil.copytree(root / name, folder / name, ignore=unbuilt)
    for name in ("setup.py", "pyproject.toml"):
        shutil.copy(root / name, folder)


def sanitizing() -> dict:
    """The environment in which Python loads a library that was built with SANITIZERS.

    The runtime must come before everything else, and libstdc++ with it, or it cannot see exceptions thrown. Leaks are
    not looked for: Python keeps what it keeps. Raises ValueError where the compiler has no such runtime.
    """
    compiler = os.environ.get("CXX", "c++").split()
    found = []
    for library in ("libasan.so", "libstdc++.so"):
        done = subprocess.run([*compiler, f"-print-file-name={library}"], capture_output=True, text=True)
        found += [done.stdout.strip()]
        if not Path(found[-1]).is_absolute():
            raise ValueError(f"CXX: expected a gcc with {library}, got {compiler[0]}")
    return {
        "LD_PRELOAD": " ".join(found), "ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "print_stacktrace=1",
    }  # fmt: skip


def _version(package):
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _compiler():
    command = [*os.environ.get("CXX", "c++").split(), "--version"]
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout
    except OSError as error:
        return str(error)


def _toolkits():
    """Where GPU compilers are, links followed: one that is installed later, or another release, builds again."""
    homes = [os.environ.get("CUDA_HOME"), "/usr/local/cuda", os.environ.get("ROCM_HOME"), "/opt/rocm"]
    places = os.pathsep.join([*(f"{home}/bin" for home in homes if home), os.environ.get("PATH", "")])
    found = [shutil.which(name, path=places) for name in ("nvcc", "hipcc")]
    return [path and os.path.realpath(path) for path in found]
