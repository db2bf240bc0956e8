"""Decoding against the memory it reads: tokens a second, bytes a token, and a plain read of as many bytes in turns.

    python -m pytest benchmarks/bench_decode.py --benchmark-only

`steps` is decoding alone, a token read and a token drawn; `text` is a whole generate call, the prompt included, beside
that of transformers with the same weights. Packing is a row of its own. The models are random: speed does not ask.
"""

import pytest
import torch
from peers import transformers_gpt2

from gptcore import engine, kernels, tree
from gptcore.cache import fork, init_cache
from gptcore.config import architecture
from gptcore.device import generator
from gptcore.generate import GenerateOptions, generate
from gptcore.model import forward, init_params
from gptcore.sampling import PRESETS, sample

SHAPES = {
    "quick": architecture("gpt2", n_vocab=4096, n_context=256, n_layer=4, d_model=128, n_head=4),
    "7M": architecture("gpt2", n_vocab=8192, n_context=256, n_layer=6, d_model=256, n_head=4),
    "124M": architecture("gpt2", n_vocab=50257, n_context=1024, n_layer=12, d_model=768, n_head=12, mlp="gelu_tanh"),
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8}
GREEDY = PRESETS["greedy"]
PROBLEM = kernels.why_not("decode_")
needs_native = pytest.mark.skipif(bool(PROBLEM), reason=PROBLEM)
each_shape = pytest.mark.parametrize("shape", SHAPES)
each_dtype = pytest.mark.parametrize("dtype", DTYPES)


def params_of(shape):
    return init_params(SHAPES[shape], generator(1))


def prompt_of(config, n):
    return torch.randint(config.n_vocab, (1, n), generator=generator(2))


def bytes_a_token(packed, config, n_keys, cache_itemsize):
    """Every weight once, one row of positions, and the keys and values of one row."""
    stores = dict(zip(engine.leaf_names(config), packed.weights, strict=True))
    n_bytes = sum(x.numel() * x.itemsize for name, x in stores.items() if name != "positions.w")
    return n_bytes + 2 * config.n_layer * config.n_kv_head * config.d_head * n_keys * cache_itemsize


def label(benchmark, what):
    benchmark.group = f"{what}, {torch.get_num_threads()} threads"


@needs_native
@each_dtype
@each_shape
@pytest.mark.parametrize("n_context", [16, 128, 900])
def bench_decode_steps(race, benchmark, shape, dtype, n_context):
    config, n_steps = SHAPES[shape], 32 if shape != "124M" else 8
    if n_context + n_steps > config.n_context:
        pytest.skip(f"{shape} has {config.n_context} positions")
    packed = engine.pack(params_of(shape), config, DTYPES[dtype])
    rounded = engine.unpack(packed, config)
    tokens = prompt_of(config, n_context + 1)
    store = init_cache(config, 1, dtype=torch.float32 if dtype == "fp32" else torch.bfloat16)
    with torch.no_grad():
        _, cache = forward(rounded, config, tokens[:, :-1], store)
    words = {"seed": torch.tensor([1]), "position": cache.length + 1}
    n_bytes = bytes_a_token(packed, config, n_context, store.k[0].itemsize)
    plain = torch.ones(n_bytes // 8, dtype=torch.int64)

    def native(cache=cache):
        return engine.decode_(packed, cache, tokens[:, -1], **words, n_steps=n_steps, sampling=GREEDY)[0]

    @torch.no_grad()
    def eager(cache=cache):
        token, drawn = tokens[:, -1], []
        for step in range(n_steps):
            logits, cache = forward(rounded, config, token[:, None], cache)
            token = sample(logits[:, -1], seed=1, position=n_context + 1 + step, temperature=0.0)
            drawn.append(token.tolist())
        return drawn

    assert native(fork(cache)) == eager(fork(cache)), "the tokens differ"
    label(benchmark, f"decode {shape} {dtype}, context {n_context}")
    benchmark.extra_info |= {"n_tokens": n_steps, "n_bytes": n_bytes * n_steps}
    race({"native": native, "read": lambda: [plain.sum() for _ in range(n_steps)], "eager": eager})


@needs_native
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@each_shape
@pytest.mark.parametrize("preset", ["greedy", "balanced"])
def bench_generate_text(race, benchmark, shape, dtype, preset):
    config, n_new, n_prompt = SHAPES[shape], 64, 16
    params = tree.map(lambda x: x.to(DTYPES[dtype]), params_of(shape))
    packed, prompt = engine.pack(params, config), prompt_of(config, n_prompt)

    def text(who, packed=None):
        options = GenerateOptions(sampling=PRESETS[preset], max_new_tokens=n_new, engine=who)
        return lambda: [step.tokens[0] for step in generate(params, config, prompt.tolist(), options, packed=packed)]

    ways = {"native": text("native", packed), "native, packing": text("native"), "eager": text("eager")}
    if peer := transformers_gpt2(params, config):
        settings = PRESETS[preset]
        drawn = {"do_sample": True, "temperature": 1.0, "top_k": settings.top_k, "top_p": settings.top_p}
        ways["transformers"] = lambda: peer(prompt, n_new, **(drawn if settings.temperature else {"do_sample": False}))
    if dtype == "fp32":  # in bfloat16 transformers and forward round activations too: another model
        texts = {who: call() for who, call in ways.items() if preset == "greedy" or who != "transformers"}
        assert all(found == texts["native"] for found in texts.values()), "the texts differ"
    label(benchmark, f"text {shape} {dtype} {preset}, {n_prompt} + {n_new} tokens")
    benchmark.extra_info["n_tokens"] = n_new
    race(ways, rounds=5)


@needs_native
@each_dtype
@each_shape
def bench_pack(race, benchmark, shape, dtype):
    params = params_of(shape)
    label(benchmark, f"pack {shape} {dtype}")
    race({"pack": lambda: engine.pack(params, SHAPES[shape], DTYPES[dtype])}, rounds=5)
