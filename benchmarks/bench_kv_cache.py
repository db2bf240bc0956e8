"""What the KV cache saves: the same greedy text with it and without it, by the same loop over forward, and natively.

    invoke benchmark --only kv-cache

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

SMALL = {"n_layer": 4, "d_model": 128, "n_head": 4}
SHAPES = {
    "small": architecture("gpt2", n_vocab=1000, n_context=1024, **SMALL),
    "quick": architecture("gpt2", n_vocab=4096, n_context=256, **SMALL),  # as --mode quick trains it
}
N_PROMPT = 5


@pytest.mark.parametrize(("shape", "n_total"), [*(("small", n) for n in (10, 25, 50, 100, 200, 1024)), ("quick", 256)])
def bench_kv_cache(race, benchmark, shape, n_total):
    config = SHAPES[shape]
    params = init_params(config, generator(1))
    prompt = torch.randint(config.n_vocab, (N_PROMPT,), generator=generator(2)).tolist()

    def text(**ways):
        options = GenerateOptions(sampling=PRESETS["greedy"], max_new_tokens=n_total - N_PROMPT, **ways)
        return lambda: [step.tokens[0] for step in generate(params, config, [prompt], options)]

    ways = {"with cache": text(engine="eager"), "without cache": text(engine="eager", cached=False)}
    native = {} if kernels.why_not("decode_") else {"native": text(engine="native")}
    ways = native | ways if shape == "quick" else ways | native  # the first one is what the others are measured by
    texts = {name: call() for name, call in ways.items()}
    assert all(found == texts["with cache"] for found in texts.values()), "the texts differ"
    benchmark.group = (
        f"kv-cache {shape}, {n_total} tokens, {N_PROMPT} of them prompt, {torch.get_num_threads()} threads"
    )
    benchmark.extra_info["n_tokens"] = n_total - N_PROMPT
    n = n_total - 1  # the last token is drawn and never read
    positions = n * (n + 1) // 2 - N_PROMPT * (N_PROMPT - 1) // 2
    benchmark.extra_info["why"] = f"positions computed: {n:,} with a cache, {positions:,} without"
    race(ways, rounds=5 if n_total <= 200 else 3)
