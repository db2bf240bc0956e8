"""What the KV cache saves: the same greedy text with it and without it, by the same loop over forward, and natively.

    python -m pytest benchmarks/bench_kv_cache.py --benchmark-only

Without a cache n tokens cost n (n + 1) / 2 computed positions, with it n. The texts are compared before anything is
timed.
"""

import pytest
import torch

from gptcore import kernels
from gptcore.config import architecture
from gptcore.device import generator
from gptcore.generate import GenerateOptions, generate
from gptcore.model import init_params
from gptcore.sampling import PRESETS

CONFIG = architecture("gpt2", n_vocab=1000, n_context=1024, n_layer=4, d_model=128, n_head=4)
N_PROMPT = 5


@pytest.mark.parametrize("n_total", [10, 25, 50, 100, 200, 1024])
def bench_kv_cache(race, benchmark, n_total):
    params = init_params(CONFIG, generator(1))
    prompt = torch.randint(CONFIG.n_vocab, (N_PROMPT,), generator=generator(2)).tolist()

    def text(**ways):
        options = GenerateOptions(sampling=PRESETS["greedy"], max_new_tokens=n_total - N_PROMPT, **ways)
        return lambda: [step.tokens[0] for step in generate(params, CONFIG, [prompt], options)]

    ways = {"with cache": text(engine="eager"), "without cache": text(engine="eager", cached=False)}
    if not kernels.why_not("decode_"):
        ways["native"] = text(engine="native")
    texts = {name: call() for name, call in ways.items()}
    assert all(found == texts["with cache"] for found in texts.values()), "the texts differ"
    benchmark.group = f"kv-cache {n_total} tokens, {N_PROMPT} of them prompt, {torch.get_num_threads()} threads"
    benchmark.extra_info["n_tokens"] = n_total - N_PROMPT
    n = n_total - 1  # the last token is drawn and never read
    positions = n * (n + 1) // 2 - N_PROMPT * (N_PROMPT - 1) // 2
    benchmark.extra_info["why"] = f"positions computed: {n:,} with a cache, {positions:,} without"
    race(ways, rounds=5 if n_total <= 200 else 3)
