"""What sharing a question's context saves: 4 choices of 10 tokens after 200 tokens of context, shared or not.

    python -m pytest benchmarks/bench_choice.py --benchmark-json=benchmarks/results/choice.json

One thread; the answers are compared before anything is timed, and the two ways take turns.
"""

import time

import pytest
import torch

from gptcore import device
from gptcore.config import architecture
from gptcore.evaluate.choice import continuations
from gptcore.model import init_params

CONFIG = architecture("gpt2", n_vocab=4096, n_context=256, n_layer=4, d_model=128, n_head=4)
N_ITEMS, N_CHOICES, N_CONTEXT, N_ENDING, ROUNDS = 16, 4, 200, 10, 20


def requests():
    """Items whose choices follow each other, as a task brings them."""
    generator = device.generator("bench", "choice")
    ids = lambda n: torch.randint(CONFIG.n_vocab, (n,), generator=generator).tolist()
    contexts = [ids(N_CONTEXT) for _ in range(N_ITEMS)]
    return [(context, ids(N_ENDING)) for context in contexts for _ in range(N_CHOICES)]


@pytest.mark.parametrize("share", [True, False], ids=["shared", "unshared"])
def bench_choice(benchmark, share):
    """Each way by itself; the other's median of alternating rounds stands beside it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        params = init_params(CONFIG, device.generator("bench", "weights"))
        asked = requests()
        ways = {way: continuations(params, CONFIG, asked, share=way) for way in (True, False)}
        torch.testing.assert_close(ways[True].log_p, ways[False].log_p, rtol=1e-5, atol=1e-4)
        benchmark.group = f"{N_ITEMS} items, {N_CHOICES} choices of {N_ENDING} after {N_CONTEXT} tokens"
        benchmark.extra_info["n_fed"] = ways[share].n_fed
        benchmark.extra_info["ratio"] = alternating(params, asked)
        benchmark.pedantic(continuations, (params, CONFIG, asked), {"share": share}, rounds=ROUNDS, warmup_rounds=2)
    finally:
        torch.set_num_threads(threads)


def alternating(params, asked) -> dict:
    """Unshared over shared: the median ratio of rounds that take turns, and its quartiles."""
    ratios = []
    for _ in range(ROUNDS):
        seconds = []
        for share in (True, False):
            start = time.perf_counter()
            continuations(params, CONFIG, asked, share=share)
            seconds.append(time.perf_counter() - start)
        ratios.append(seconds[1] / seconds[0])
    low, middle, high = torch.tensor(ratios).quantile(torch.tensor([0.25, 0.5, 0.75])).tolist()
    return {"median": middle, "quartiles": [low, high]}
