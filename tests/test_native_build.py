"""Building the native code: nothing to do costs nothing, a failure is told with its text and harms nobody."""

import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from tools import compile_gpu, native

ROOT = Path(__file__).parents[1]


@pytest.fixture
def checkout(tmp_path):
    """A copy of what is built from, without anything built."""
    ignore = shutil.ignore_patterns("*.so", "__pycache__")
    for name in ("gptcore", "csrc"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=ignore)
    for name in ("setup.py", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


def test_the_fingerprint_follows_sources_and_environment(checkout, monkeypatch):
    before = native.fingerprint(checkout)
    assert native.fingerprint(checkout) == before
    header = checkout / "csrc/kernels/types.h"
    text = header.read_text()
    header.write_text(text + "// touched\n")
    assert native.fingerprint(checkout) != before
    header.write_text(text)
    assert native.fingerprint(checkout) == before
    monkeypatch.setenv("GPTCORE_BUILD", "cpu")
    assert native.fingerprint(checkout) != before


def test_the_fingerprint_follows_a_toolkit_that_comes_later(checkout, monkeypatch):
    """Or `invoke build`, which the report names where there is no GPU code, would say that nothing changed."""
    home = checkout / "cuda"
    monkeypatch.setenv("CUDA_HOME", str(home))
    before = native.fingerprint(checkout)
    stand_in_nvcc(home, "12.8")
    assert native.fingerprint(checkout) != before


def test_a_failed_build_is_told_and_not_remembered(checkout, monkeypatch):
    monkeypatch.setenv("CXX", "/bin/false")
    for _ in range(2):
        result = native.build(checkout)
        assert not result.ok
        assert "torch operators will be used" in result.text
        assert "/bin/false" in result.text
    assert not (checkout / native.MARK).exists()


def test_without_a_compiler_the_reason_is_one_line(checkout, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert "gptcore: no C++ compiler (no-such-compiler)" in native.build(checkout).text


@pytest.mark.parametrize("compiler", ["no-such-compiler", "/bin/false"])
def test_a_wheel_is_made_all_the_same(checkout, monkeypatch, compiler):
    """What pip runs: a failure is told, and the package is pure Python."""
    monkeypatch.setenv("CXX", compiler)
    command = [sys.executable, "setup.py", "bdist_wheel", "-q"]
    done = subprocess.run(command, cwd=checkout, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert done.returncode == 0, done.stdout
    assert "installing without native kernels (invoke build adds them)" in done.stdout
    assert list((checkout / "dist").glob("*.whl"))


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        (
            "CXX",
            "/bin/false",
            ["building the native kernels, once", "native kernels not built (invoke build shows why)"],
        ),
        ("CXX", "no-such-compiler", []),
        ("GPTCORE_BUILD", "none", []),
        ("GPTCORE_KERNELS", "reference", []),
    ],
)
def test_commands_that_profit_build_first_where_that_is_wanted_and_possible(checkout, monkeypatch, name, value, said):
    monkeypatch.setenv(name, value)
    lines = []
    native.build_first(lines.append, checkout)
    assert [line.split(":")[0] for line in lines] == said


def invoke_build(**environment):
    command = [sys.executable, "-m", "invoke", "build"]
    return subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True)


def test_a_failed_build_ends_with_1_and_the_reason():
    done = invoke_build(CXX="/bin/false")
    assert (done.returncode, done.stdout) == (1, "")
    assert "/bin/false" in done.stderr
    assert "torch operators will be used" in done.stderr


def test_a_build_without_changes_is_one_line():
    if not native.is_built(native.fingerprint()):
        pytest.skip("native kernels not built")
    done = invoke_build()
    assert (done.returncode, done.stdout, done.stderr) == (0, "native kernels: nothing changed\n", "")


# -------------------------------------------------------------------------------------------------- instruction sets


def wide_functions(path):
    """The object file's functions with AVX instructions, whose names all begin with v, and those among them that other
    files may have too."""
    run = lambda *words: subprocess.run([*words, str(path)], capture_output=True, text=True, check=True).stdout
    parts = re.split(r"^[0-9a-f]+ <(.*)>:$", run("objdump", "-d"), flags=re.MULTILINE)[1:]
    used = {name for name, text in zip(parts[::2], parts[1::2], strict=True) if re.search(r"\tv[a-z]", text)}
    return used, used & {line.split()[-1] for line in run("nm").splitlines() if line.split()[-2] in "WV"}


@pytest.mark.skipif(not shutil.which("objdump"), reason="no objdump")
def test_an_instruction_set_is_used_by_its_own_kernels_only():
    """Of an inline function the linker takes any file's copy, and a lesser machine would run it. Seen to fail with a
    whole file compiled by -mavx512f."""
    objects = list((ROOT / "build").glob("temp*/csrc/**/*.o"))
    owners = {"avx2", "avx512"}
    if not owners <= {path.stem for path in objects}:
        pytest.skip("no kernels for AVX are built here")
    for path in objects:
        used, shared = wide_functions(path)
        assert bool(used) == (path.stem in owners), f"{path.name}: {sorted(used)[:3]}"
        assert not shared, f"{path.name}: {sorted(shared)[:3]}"


# ------------------------------------------------------------------------------------------------------------ for GPUs


def stand_in_nvcc(home, release):
    """A CUDA toolkit of which only the version is there."""
    for name in ("bin", "lib64"):
        (home / name).mkdir(parents=True)
    (home / "lib64/libcudart_static.a").touch()
    (home / "bin/nvcc").write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {release}, V{release}.1'\n")
    (home / "bin/nvcc").chmod(0o755)


@pytest.mark.parametrize(
    ("release", "kind", "targets", "said"),
    [
        ("12.8", "cuda", "8.0;9.0;12.0+PTX", ""),
        ("12.6", "cuda", "8.0;9.0+PTX", ""),  # which knows no 12.0
        ("13.0", "", None, "gptcore: nvcc is of CUDA 13, torch of 12.6: building for the CPU only\n"),
    ],
)
def test_gpu_code_is_made_for_what_the_toolkit_knows(tmp_path, monkeypatch, capsys, release, kind, targets, said):
    stand_in_nvcc(tmp_path, release)
    monkeypatch.setattr(sys, "argv", ["setup.py", "--name"])
    monkeypatch.setenv("GPTCORE_BUILD", "none")
    setup = runpy.run_path(str(ROOT / "setup.py"))
    capsys.readouterr()
    for name in ("GPTCORE_BUILD", "TORCH_CUDA_ARCH_LIST"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    torch = SimpleNamespace(version=SimpleNamespace(cuda="12.6", hip=None))
    found = SimpleNamespace(CUDA_HOME=None, ROCM_HOME=None)
    assert setup["toolkit"](torch, found) == kind
    assert os.environ.pop("TORCH_CUDA_ARCH_LIST", None) == targets
    assert capsys.readouterr().err == said


def compile_for_gpus(path, **environment):
    """invoke compile-gpu where only the folder's compilers are found."""
    command = [sys.executable, "-m", "invoke", "compile-gpu"]
    places = os.environ | {"PATH": str(path), "CUDA_HOME": str(path)} | environment
    return subprocess.run(command, cwd=ROOT, env=places, capture_output=True, text=True)


def test_without_a_gpu_compiler_the_check_is_skipped_and_says_so(tmp_path):
    done = compile_for_gpus(tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "sm_80, sm_90: skipped, no nvcc\ngfx90a, gfx1100: skipped, no clang++ with AMD's target\n"


def test_gpu_code_that_does_not_compile_is_an_error_with_the_compilers_words(tmp_path):
    (tmp_path / "nvcc").write_text("#!/bin/sh\necho launch.cu: nonsense; exit 2\n")
    (tmp_path / "nvcc").chmod(0o755)
    done = compile_for_gpus(tmp_path)
    assert done.returncode == 1
    assert "sm_90: does not compile\nlaunch.cu: nonsense\n" in done.stderr


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "    0 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads\nptxas info    : Used 168 registers\n"
            "    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads\nptxas info    : Used 32 registers\n",
            "2 kernels, at most 168 registers, 8 spilled",
        ),
        (
            "    .vgpr_count:     60\n    .vgpr_spill_count: 0\n    .vgpr_count:     24\n    .vgpr_spill_count: 3\n",
            "2 kernels, at most 60 registers, 3 spilled",
        ),
    ],
)
def test_registers_are_counted_as_the_compilers_tell_them(text, said):
    assert compile_gpu.measured(text) == said
