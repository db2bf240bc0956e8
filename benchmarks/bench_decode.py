"""Decoding against the memory it reads and against its peers: tokens a second, bytes a token, all in turns.

    invoke benchmark --only decode
    invoke benchmark --only decode --run RUN

`steps` is decoding alone, a token read and a token drawn, beside llama.cpp and a plain read of as many bytes; `text` is
a whole generate call, the prompt included, beside that of transformers. Packing is a row of its own. The models are
random, because speed does not ask; --run measures a trained one instead. Before anything is timed, our ways must give
equal tokens, transformers in float32 too, and every other peer, read the same text, logits within TOLERANCE.
"""

import pytest
import torch
from peers import LlamaCpp, Transformers, why_not

from gptcore import checkpoint, engine, kernels, tree
from gptcore.cache import fork, init_cache
from gptcore.config import architecture
from gptcore.device import generator
from gptcore.generate import GenerateOptions, generate
from gptcore.model import forward, init_params
from gptcore.sampling import PRESETS, sample

MODE = {"n_context": 256, "n_head": 4, "mlp": "gelu_tanh"}  # llama.cpp's GPT-2 has no other GELU
SHAPES = {
    "quick": architecture("gpt2", n_vocab=4096, n_layer=4, d_model=128, **MODE),
    "medium": architecture("gpt2", n_vocab=100277, n_layer=4, d_model=256, **MODE),
    "full": architecture("gpt2", n_vocab=100277, n_layer=6, d_model=256, **MODE),
    "7M": architecture("gpt2", n_vocab=8192, n_layer=6, d_model=256, **MODE),
    "124M": architecture("gpt2", n_vocab=50257, n_context=1024, n_layer=12, d_model=768, n_head=12, mlp="gelu_tanh"),
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8}
# Of the logits' spread over the vocabulary, root mean square. In float32 llama.cpp looks GELU up in a table of float16.
TOLERANCE = {"fp32": 0.005, "bf16": 0.02, "int8": 0.05}
GREEDY = PRESETS["greedy"]
PROBLEM = kernels.why_not("decode_")
needs_native = pytest.mark.skipif(bool(PROBLEM), reason=PROBLEM)
each_dtype = pytest.mark.parametrize("dtype", DTYPES)


def pytest_generate_tests(metafunc):
    """Every shape, or the one run that was asked for."""
    shapes = ["run"] if metafunc.config.getoption("run") else SHAPES
    metafunc.parametrize("shape", shapes, scope="module")  # model takes it


@pytest.fixture(scope="module")
def model(shape, request):
    """(name, params, config) of a shape, or of the run."""
    if shape == "run":
        loaded = checkpoint.load_model(request.config.getoption("run"))
        return loaded.name, loaded.params, loaded.config
    return shape, init_params(SHAPES[shape], generator(1)), SHAPES[shape]


def prompt_of(config, n):
    return torch.randint(config.n_vocab, (1, n), generator=generator(2))


def bytes_a_token(packed, config, n_keys, cache_itemsize):
    """Every weight once, and the keys and values of one row; a single row of what is looked up, a kilobyte or so, is
    left out: tables, and an embedding that is not the head too."""
    looked_up = ("positions", "cos", "sin", *(() if config.tied else ("embed",)))
    stores = zip(engine.leaf_names(config), packed.weights, strict=True)
    n_bytes = sum(x.numel() * x.itemsize for name, x in stores if name.rpartition(".")[0] not in looked_up)
    return n_bytes + 2 * config.n_layer * config.n_kv_head * config.d_head * n_keys * cache_itemsize


def readable(n_bytes):
    """int64 ones on huge pages, where the weights lie too: on small ones a read is slower, and we would look better."""
    return engine.huge_pages(n_bytes // 8 * 8).view(torch.int64).fill_(1)


def compared(name, theirs, ours, dtype):
    """A line on how near a peer's logits (T,V) are to ours of the same text; an error where it computes otherwise."""
    spread = (ours - ours.mean(1, keepdim=True)).square().mean().sqrt()
    error = ((theirs - ours).square().mean().sqrt() / spread).item()
    assert error < TOLERANCE[dtype], f"{name}'s logits differ by {100 * error:.2g} % of their spread"
    n_same = (theirs.argmax(1) == ours.argmax(1)).sum().item()
    return f"{name}: logits within {100 * error:.2g} %, {n_same} of {len(ours)} likeliest tokens the same"


def label(benchmark, what, lines=()):
    benchmark.group = f"{what}, {torch.get_num_threads()} threads"
    benchmark.extra_info["why"] = "\n".join(lines)


@needs_native
@pytest.mark.parametrize("n_context", [16, 128, 900])
@each_dtype
def bench_decode_steps(race, benchmark, model, dtype, n_context):
    name, params, config = model
    n_steps = 32 if config.d_model < 512 else 8
    if n_context + n_steps > config.n_context:
        pytest.skip(f"{name} has {config.n_context} positions")
    packed = engine.pack(params, config, DTYPES[dtype])
    rounded = engine.unpack(packed, config)
    tokens = prompt_of(config, n_context + 1)
    store = init_cache(config, 1, dtype=torch.float32 if dtype == "fp32" else torch.bfloat16)
    with torch.no_grad():
        _, cache = forward(rounded, config, tokens[:, :-1], store)
    words = {"seed": torch.tensor([1]), "position": cache.length + 1}
    n_bytes = bytes_a_token(packed, config, n_context, store.k[0].itemsize)
    plain = readable(n_bytes)

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

    found = native(fork(cache))
    assert found == eager(fork(cache)), "the tokens differ"
    ways = {"native": native, "read": lambda: [plain.sum() for _ in range(n_steps)]}
    if reason := why_not("llama.cpp", config):
        line = f"llama.cpp: {reason}"
    else:
        peer = LlamaCpp(params, config, DTYPES[dtype], torch.get_num_threads())
        text = torch.cat([tokens[0], torch.tensor(found)[:-1, 0]])
        with torch.no_grad():
            ours = forward(rounded, config, text[None])[0][0, -n_steps:, : config.n_vocab]
        line = compared("llama.cpp", peer.logits(text)[-n_steps:], ours, dtype)

        def llama_cpp():
            peer.rewind(n_context)
            return peer.go_on(int(tokens[0, -1]), n_steps)

        ways["llama.cpp"] = llama_cpp
    label(benchmark, f"decode {name} {dtype}, context {n_context}", [line])
    benchmark.extra_info |= {"n_tokens": n_steps, "n_bytes": n_bytes * n_steps}
    race(ways | {"eager": eager})


@needs_native
@pytest.mark.parametrize("preset", ["greedy", "balanced"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def bench_generate_text(race, benchmark, model, dtype, preset):
    name, params, config = model
    n_new, n_prompt, settings = 64, 16, PRESETS[preset]
    params = tree.map(lambda x: x.to(DTYPES[dtype]), params)
    packed, prompt = engine.pack(params, config), prompt_of(config, n_prompt)

    def text(who, packed=None):
        options = GenerateOptions(sampling=settings, max_new_tokens=n_new, engine=who)
        return lambda: [step.tokens[0] for step in generate(params, config, prompt.tolist(), options, packed=packed)]

    ways = {"native": text("native", packed), "native, packing": text("native"), "eager": text("eager")}
    if reason := why_not("transformers", config):
        line = f"transformers: {reason}"
    else:
        peer = Transformers(params, config)
        drawn = {"do_sample": True, "temperature": 1.0, "top_k": settings.top_k, "top_p": settings.top_p}
        ways["transformers"] = lambda: peer.text(prompt[0], n_new, **(drawn if settings.temperature else {}))
        whole = torch.cat([prompt[0], torch.tensor(ways["native"]())])
        with torch.no_grad():
            ours = forward(tree.map(torch.Tensor.float, params), config, whole[None])[0][0, :, : config.n_vocab]
        line = compared("transformers", peer.logits(whole), ours, dtype)
    if dtype == "fp32":  # in bfloat16 transformers and forward round activations too: another model
        texts = {who: call() for who, call in ways.items() if preset == "greedy" or who != "transformers"}
        assert all(found == texts["native"] for found in texts.values()), "the texts differ"
    label(benchmark, f"text {name} {dtype} {preset}, {n_prompt} + {n_new} tokens", [line])
    benchmark.extra_info["n_tokens"] = n_new
    race(ways, rounds=5)


@needs_native
@each_dtype
def bench_pack(race, benchmark, model, dtype):
    name, params, config = model
    label(benchmark, f"pack {name} {dtype}")
    race({"pack": lambda: engine.pack(params, config, DTYPES[dtype])}, rounds=5)
