"""What every test shares: one thread a process, and markers that skip with their reason."""

import os

# Before torch: small tensors are faster on one thread, threads that wait soon sleep, and children inherit both.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("GOMP_SPINCOUNT", "3000")
# Before the hub's libraries: --data auto must not fetch what no test asked for; tests with a hub of their own say so.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import importlib.util
import signal
import socket
import subprocess
import sys
from functools import cache

import models
import pytest
import torch

# A shell's background job ignores Ctrl-C, and so would every child: what the tests send it could not arrive.
signal.signal(signal.SIGINT, signal.default_int_handler)


@cache
def missing(marker) -> str:
    """Why tests with this marker cannot run here; empty if they can."""
    if marker == "gpu" and not torch.cuda.is_available():
        return "no CUDA or ROCm device"
    if marker == "oracle" and importlib.util.find_spec("transformers") is None:
        return "transformers is not installed"
    if marker == "network":
        try:
            socket.create_connection(("huggingface.co", 443), timeout=3).close()
        except OSError as error:
            return f"the hub cannot be reached: {error}"
    return ""


@pytest.fixture(scope="session")
def trained():
    """(params, config) of models.trained, made once a test run: 10 to 15 s."""
    return models.trained()


def pytest_collection_modifyitems(config, items):
    """Skip what this machine cannot do, and what takes minutes unless it was asked for."""
    for item in items:
        for marker in ("gpu", "network", "oracle"):
            if item.get_closest_marker(marker) and (reason := missing(marker)):
                item.add_marker(pytest.mark.skip(reason=reason))
        if item.get_closest_marker("slow") and "slow" not in config.option.markexpr:
            item.add_marker(pytest.mark.skip(reason="takes minutes: pytest -m slow runs it"))


@pytest.fixture
def busy():
    """Eight processes that compute all the time, while the test lasts."""
    processes = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(8)]
    yield
    for process in processes:
        process.kill()
        process.wait()
