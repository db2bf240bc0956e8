"""Contestants take turns: this machine's speed drifts, so only ratios within one round mean anything."""

import contextlib
import os
import statistics
import sys
import time
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[1] / "tests"))  # cases.py is shared


def pytest_addoption(parser):
    """A trained model instead of random ones, where the text that it was trained on lies, and no disturbance."""
    parser.addoption("--run", help="A run or step folder; groups that need a model measure this one.")
    parser.addoption("--text-cache", default="data", help="The folder of its token shards.")
    parser.addoption("--realtime", action="store_true", help="Every measurement before all others' work.")


def seconds_per_call(call, budget=0.01):
    """One measurement: as many calls as fit in the budget, at least one."""
    start = time.perf_counter()
    call()
    once = time.perf_counter() - start
    if once > budget:
        return once
    n = max(1, int(budget / (once + 1e-9)))
    start = time.perf_counter()
    for _ in range(n):
        call()
    return (time.perf_counter() - start) / n


def cpu_seconds():
    """What (this process, all of them) have used since they began; (0, 0) where the system does not tell."""
    if not Path("/proc/stat").exists():
        return 0.0, 0.0
    user, nice, system, _, _, *interrupts = map(int, Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9])
    return sum(os.times()[:2]), (user + nice + system + sum(interrupts)) / os.sysconf("SC_CLK_TCK")


@contextlib.contextmanager
def undisturbed():
    """Every thread of this process runs before all others until the block ends; new ones inherit it."""

    def schedule(policy, priority):
        for thread in os.listdir("/proc/self/task"):
            with contextlib.suppress(ProcessLookupError):  # it has just ended
                os.sched_setscheduler(int(thread), policy, os.sched_param(priority))

    schedule(os.SCHED_FIFO, 1)
    try:
        yield
    finally:
        schedule(os.SCHED_OTHER, 0)


@pytest.fixture
def race(benchmark, capsys, request):
    """race({"native": call, "peer": call, ...}, rounds): a line of medians and ratios to the first, and its record."""

    quietly = undisturbed if request.config.getoption("realtime") else contextlib.nullcontext

    def seconds_of(call):
        with quietly():
            return seconds_per_call(call)

    def run(ways, rounds=9):
        for call in ways.values():
            call()
        began, before = time.perf_counter(), cpu_seconds()
        times = [{name: seconds_of(call) for name, call in ways.items()} for _ in range(rounds)]
        (mine, every), seconds = cpu_seconds(), time.perf_counter() - began
        others = (every - before[1] - mine + before[0]) / seconds / os.cpu_count()
        first = next(iter(ways))
        line = []
        for name in ways:
            own = [t[name] * 1e6 for t in times]
            ratios = sorted(t[name] / t[first] for t in times)
            row = {"us": statistics.median(own), "ratio": statistics.median(ratios), "spread": [ratios[1], ratios[-2]]}
            benchmark.extra_info[name] = row
            line.append(f"{name} {row['us']:.1f} us" + (f" ({row['ratio']:.1f}x)" if name != first else ""))
        benchmark.extra_info |= {"others": 0.0 if quietly is undisturbed else max(0.0, others), "rounds": rounds}
        benchmark.extra_info |= {"threads": torch.get_num_threads(), "torch": torch.__version__}
        with capsys.disabled():
            print(f"\n{benchmark.group}: {', '.join(line)}", end="")
        slow = benchmark.extra_info[first]["us"] > 1e5
        benchmark.pedantic(ways[first], rounds=1 if slow else 5, iterations=1 if slow else 3)

    return run
