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
MATTERS = ("CXX", "CUDA_HOME", "TORCH_CUDA_ARCH_LIST")


class Build(NamedTuple):
    """What came of it: whether anything was compiled, and what went wrong, if anything, in the compiler's words."""

    ok: bool
    compiled: bool
    text: str = ""


def fingerprint(root=ROOT) -> str:
    """A hash of all that a build depends on: sources, torch, Python, compiler, environment."""
    digest = hashlib.sha256()
    for path in [root / "setup.py", *sorted((root / "csrc").rglob("*"))]:
        if path.is_file():
            digest.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes())
    chosen = {name: value for name, value in os.environ.items() if name in MATTERS or name.startswith("GPTCORE_BUILD")}
    digest.update(json.dumps([sys.version, _version("torch"), _compiler(), sorted(chosen.items())]).encode())
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


def build(root=ROOT) -> Build:
    """Compile csrc/ in place unless the last success had the same fingerprint and its library is still there."""
    wanted, mark = fingerprint(root), root / MARK
    if is_built(wanted, root):
        return Build(ok=True, compiled=False)
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])  # ninja lives beside Python
    done = subprocess.run(
        command, cwd=root, env=os.environ | {"PATH": path}, text=True, errors="replace",
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
