"""Looking inside against TransformerLens with the same weights, in one process on one thread.

    python -m pytest benchmarks/bench_interpret.py --benchmark-only

What both sides compute is compared before anything is timed, then they take turns. The peer is the HookedTransformer of
transformer-lens 3.9.0, as for the golden files; where that is not installed, ours runs alone and the line says so.
"""

import importlib.util
import os

import pytest
import torch
from golden.make import hooked, mapped

from gptcore.config import architecture
from gptcore.device import generator
from gptcore.interpret.pairs import logit_diff
from gptcore.interpret.patching import sweep
from gptcore.interpret.taps import chain, patch, put, record
from gptcore.model import embed, forward, init_params, run_blocks, unembed

os.environ.setdefault("TQDM_DISABLE", "1")  # the peer's sweeps draw a bar
CONFIG = architecture("gpt2", n_vocab=256, n_context=64, n_layer=8, d_model=64, n_head=4)
SHAPE = f"{CONFIG.n_layer} layers, C={CONFIG.d_model}"
LONELY = None if importlib.util.find_spec("transformer_lens") else "transformer-lens is not installed: ours alone"
ROUNDS = 21


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.no_grad():
        yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def params():
    return init_params(CONFIG, generator(1))


@pytest.fixture(scope="module")
def peer(params):
    return None if LONELY else hooked(params, CONFIG)


def tokens_of(rows, length=32):
    return torch.randint(CONFIG.n_vocab, (rows, length), generator=generator(2))


def agree(got, wanted):
    """The tolerance of the golden files."""
    finite = wanted.masked_fill(wanted.isinf(), 0)
    assert torch.equal(got.isinf(), wanted.isinf())
    assert (got.masked_fill(got.isinf(), 0) - finite).abs().max() <= 1e-5 * max(1.0, finite.abs().max())


def label(benchmark, what):
    benchmark.group = f"{what}, {SHAPE}, {torch.get_num_threads()} thread"
    if LONELY:
        benchmark.extra_info["why"] = LONELY


def bench_capture(race, benchmark, params, peer):
    """A forward that records every site, one that nobody watches, and run_with_cache."""
    tokens = tokens_of(8)

    def ours():
        tap, seen = record(CONFIG, "*")
        forward(params, CONFIG, tokens, tap=tap)
        return seen

    ways = {"every site": ours, "no tap": lambda: forward(params, CONFIG, tokens)}
    if peer:
        ways["run_with_cache"] = lambda: peer.run_with_cache(tokens)
        logits, cache = peer.run_with_cache(tokens)
        seen = ours()
        agree(seen["logits"], logits)
        for site, hook in mapped(CONFIG).items():
            agree(seen[site], cache[hook])
    label(benchmark, f"capture {tuple(tokens.shape)}")
    race(ways, rounds=ROUNDS)


def bench_resume(race, benchmark, params, peer):
    """The last two layers from the residual stream before them, and the whole forward."""
    tokens, first = tokens_of(8), 6
    x, _ = run_blocks(params, CONFIG, embed(params, CONFIG, tokens), last=first)

    def ours():
        return unembed(params, CONFIG, run_blocks(params, CONFIG, x, first=first)[0])

    ways = {f"from layer {first}": ours, "from the tokens": lambda: forward(params, CONFIG, tokens)[0]}
    agree(ours(), ways["from the tokens"]())
    if peer:
        ways["start_at_layer"] = lambda: peer(x, start_at_layer=first)
        agree(ours(), ways["start_at_layer"]())
    label(benchmark, f"resume at layer {first} {tuple(tokens.shape)}")
    race(ways, rounds=ROUNDS)


@pytest.mark.parametrize("first", [0, 7])
def bench_sweep(race, benchmark, params, peer, first):
    """resid_pre patched at every layer and position of one pair that differs from `first` on, clean run included."""
    clean = tokens_of(1)
    corrupt = put(clean, (0, first), (clean[0, first] + 1) % CONFIG.n_vocab)
    metric = logit_diff(3, 5)

    def ours():
        return sweep(params, CONFIG, clean, corrupt, "resid_pre", metric).patched[..., 0]

    ways = {"sweep": ours}
    if peer:
        from transformer_lens import patching

        def theirs():
            _, cache = peer.run_with_cache(clean)
            return patching.get_act_patch_resid_pre(peer, corrupt, cache, lambda logits: metric(logits[:, -1])[0])

        agree(ours(), theirs())
        ways["get_act_patch_resid_pre"] = theirs
    label(benchmark, f"resid_pre sweep {tuple(clean.shape)}, first difference at {first}")
    race(ways, rounds=ROUNDS)


def bench_graphs(benchmark, params, peer):
    """Into how many graphs dynamo cuts a forward that is recorded and edited: one, without a break."""
    tokens = tokens_of(8)
    tap, _ = record(CONFIG, "blocks.*.attn.pattern")
    edit = patch(CONFIG, {"blocks.0.attn.z": lambda z: put(z, (slice(None), slice(None), 1), 0.0)})
    calls = {"gptcore": lambda: torch._dynamo.explain(forward)(params, CONFIG, tokens, tap=chain(edit, tap))}
    if peer:
        calls["TransformerLens"] = lambda: torch._dynamo.explain(peer.run_with_cache)(tokens)
    label(benchmark, "dynamo's graphs")
    found = {}
    for name, call in calls.items():
        torch._dynamo.reset()
        told = call()
        found[name] = {"graphs": told.graph_count, "breaks": told.graph_break_count}
    torch._dynamo.reset()
    assert found["gptcore"] == {"graphs": 1, "breaks": 0}
    words = [f"{name} {n['graphs']} with {n['breaks']} breaks" for name, n in found.items()]
    benchmark.extra_info |= {"graphs": found, "why": ", ".join(words)}
    benchmark.pedantic(calls["gptcore"], rounds=1)
    torch._dynamo.reset()
