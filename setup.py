"""What pip builds: pure Python, and the native code where torch and a compiler are at hand.

`pip install -e .` builds in isolation, without torch, so it installs pure Python. `pip install --no-build-isolation
-e .` and `python setup.py build_ext --inplace` (which is `invoke build`) compile, unless GPTCORE_BUILD is "none".
"""

import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import setup

ASKED = "build_ext" in sys.argv  # asked for native code: a failure is an error. Through pip it is a line.


def say(line):
    """One line where pip -v and a terminal show it."""
    print(f"gptcore: {line}", file=sys.stderr)


def without(reason):
    """No native code, and why; an error where it was asked for."""
    if ASKED:
        sys.exit(f"gptcore: {reason}")
    say(f"{reason}: installing without native kernels (invoke build adds them)")
    return {}


def toolkit(torch, cpp):
    """What launch.cu is compiled for: "cuda", "hip" or "". Torch and the toolkit decide, not the GPU that is visible.

    GPTCORE_BUILD=cpu leaves it out; gpu compiles it even for a CPU torch, to see whether it compiles.
    """
    wanted = os.environ.get("GPTCORE_BUILD", "auto")
    if wanted == "cpu" or not (torch.version.cuda or torch.version.hip or wanted == "gpu"):
        return ""
    if torch.version.hip:
        if not cpp.ROCM_HOME:
            say("no ROCm (set ROCM_HOME): building for the CPU only")
        return "hip" if cpp.ROCM_HOME else ""
    homes = (os.environ.get("CUDA_HOME"), cpp.CUDA_HOME, "/usr/local/cuda")
    parts = ("bin/nvcc", "lib64/libcudart_static.a")
    home = next((home for home in homes if home and all(Path(home, part).exists() for part in parts)), None)
    if home is None:
        say("no CUDA toolkit (set CUDA_HOME): building for the CPU only")
        return ""
    version = subprocess.run([f"{home}/bin/nvcc", "--version"], capture_output=True, text=True).stdout
    found = re.search(r"release (\d+)\.(\d+)", version)
    release = tuple(map(int, found.groups())) if found else (0, 0)
    if torch.version.cuda and found and found[1] != torch.version.cuda.split(".")[0]:  # torch would refuse it later
        say(f"nvcc is of CUDA {found[1]}, torch of {torch.version.cuda}: building for the CPU only")
        return ""
    cpp.CUDA_HOME = home  # a CPU torch leaves it None
    # An nvcc before 12.8 knows no 12.0, and stops at a target that it does not know.
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0;9.0;12.0+PTX" if release >= (12, 8) else "8.0;9.0+PTX")
    return "cuda"


def gpu_code(torch, cpp):
    """What GPU code adds to the extension: sources, compiler flags, and where the runtime is."""
    kind = toolkit(torch, cpp)
    if not kind:
        return {"sources": [], "cxx": [], "nvcc": [], "libraries": [], "library_dirs": []}
    added = {"sources": ["csrc/gpu/launch.cu"], "cxx": ["-DGPTCORE_GPU"]}
    if kind == "hip":
        flags = {"nvcc": ["-O3", "-ffp-contract=off"], "libraries": ["amdhip64"]}
        return added | flags | {"library_dirs": [f"{cpp.ROCM_HOME}/lib"]}
    flags = {"nvcc": ["-O3", "-fmad=false", "-lineinfo"], "libraries": ["cudart_static", "rt", "dl", "pthread"]}
    return added | flags | {"library_dirs": [f"{cpp.CUDA_HOME}/lib64"]}


def native():
    """The extension module and how it is compiled, as setup's arguments."""
    if os.environ.get("GPTCORE_BUILD") == "none":
        return without("GPTCORE_BUILD=none")
    if sys.platform == "win32":
        return without("no native code for Windows yet")
    try:
        import torch
        from torch.utils import cpp_extension as cpp
    except ImportError:
        return without("no torch in the build environment")
    compiler = os.environ.get("CXX", "c++")
    if not shutil.which(compiler.split()[0]):
        return without(f"no C++ compiler ({compiler})")
    isas = {"x86_64": ["avx2", "avx512"], "aarch64": ["neon"], "arm64": ["neon"]}.get(platform.machine(), [])
    sources = ["ops", "module", "cpu/isa", "cpu/plan", "cpu/team", "cpu/generic", *(f"cpu/{name}" for name in isas)]
    # -ffp-contract=off: a fused multiply-add would change the sampler's weights. -g0: 0.2 MB instead of 3.8.
    flags = ["-O3", "-g0", "-fvisibility=hidden", "-ffp-contract=off", f'-DGPTCORE_TORCH="{torch.__version__}"']
    # libtorch.so must be needed by name, or the weak symbols of a GPU torch stay null.
    link = ["-Wl,--no-as-needed", "-ltorch"] if sys.platform == "linux" else []
    # no CUDAExtension: it links what a CPU torch lacks, so that one library would no longer serve both
    gpu = gpu_code(torch, cpp)
    more = os.environ.get("GPTCORE_BUILD_FLAGS", "").split()  # for the compiler and the linker: invoke sanitize's
    extension = cpp.CppExtension(
        "gptcore._C",
        [*(f"csrc/{name}.cpp" for name in sources), *gpu["sources"]],
        include_dirs=[str(Path("csrc").resolve())],
        libraries=gpu["libraries"],
        library_dirs=gpu["library_dirs"],
        extra_compile_args={"cxx": [*flags, *gpu["cxx"], *more], "nvcc": gpu["nvcc"]},
        extra_link_args=link + more,
    )

    class Build(cpp.BuildExtension):
        """torch's ninja build; through pip a failure is told and leaves a package that works without native code."""

        def run(self):
            if not torch.version.cuda:  # then torch does not watch the headers of what nvcc or hipcc compiles
                for old in Path(self.build_temp).rglob("launch.o"):
                    old.unlink()
            try:
                super().run()
            except Exception as error:  # whatever the tool chain raises: its own output stands above
                if ASKED:
                    raise
                self.extensions.clear()
                without(f"the native build failed ({error})")

    return {"ext_modules": [extension], "cmdclass": {"build_ext": Build}}


setup(**native())
