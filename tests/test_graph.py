"""The step that a CUDA graph holds, run as it is on this CPU: the ordinary path's very text; on a GPU, captured."""

import pytest
import torch
from cases import CONFIGS, random_params, random_tokens

from gptcore import graph, kernels, tree
from gptcore.generate import GenerateOptions, generate, prefill
from gptcore.sampling import PRESETS

NAMES = ("gpt2", "llama", "alibi", "qwen3", "gqa", "softcaps", "window", "padded", "no_layer")


def texts(name, who, *, device="cpu", **options):
    """What three rows of different lengths become; float64 on a CPU, so that the batch changes no token."""
    config = CONFIGS[name]
    params = random_params(config, torch.float64 if device == "cpu" else torch.float32)
    params = tree.map(lambda leaf: leaf.to(device), params)
    prompts = [row[:n] for row, n in zip(random_tokens(config).tolist(), (3, 17, 1), strict=True)]
    options = GenerateOptions(engine=who, seed=[5, -1, 2**63 + 9], **options)
    return [step.tokens for step in generate(params, config, prompts, options)]


@pytest.mark.parametrize("preset", ["greedy", "balanced", "very-creative"])
@pytest.mark.parametrize("name", NAMES)
def test_the_step_draws_what_the_ordinary_path_draws(name, preset):
    """60 tokens with a context of 40, which is read again in between. Seen to fail with the position not advanced."""
    options = {"sampling": PRESETS[preset], "max_new_tokens": 60}
    assert texts(name, "graph", **options) == texts(name, "eager", **options)


def test_rows_that_end_make_room_for_the_others():
    """A stop token in the middle of what is drawn ahead: nothing beyond it is told, and the others go on."""
    first = texts("llama", "eager", max_new_tokens=30)
    stop = (first[4][0], first[11][2])
    ways = [texts("llama", who, max_new_tokens=30, stop=stop) for who in ("graph", "eager")]
    assert ways[0] == ways[1]
    assert any(-1 in tokens for tokens in ways[0])


def started(name="gpt2"):
    config = CONFIGS[name]
    params = random_params(config, torch.float32)
    _, cache = prefill(params, config, [[1, 2, 3], [4]])
    return params, cache, graph.prepare(params, config, cache, PRESETS["greedy"])


def test_every_step_writes_to_the_same_places():
    """What a graph would remember: no address changes, and the caller's handle stays as it is."""
    _, cache, steps = started()
    places = (steps.tokens, steps.seed, steps.position, steps.cache.length, *steps.cache.k, *steps.cache.v)
    before, length = [x.data_ptr() for x in places], cache.length.clone()
    words = {"seed": torch.tensor([1, 2]), "position": torch.tensor([3, 1])}
    tokens, longer = graph.decode_(steps, cache, torch.tensor([5, 6]), **words, n_steps=100)
    assert len(tokens) == graph.N_AHEAD
    assert [x.data_ptr() for x in places] == before
    assert torch.equal(cache.length, length)
    assert longer.length.tolist() == [3 + graph.N_AHEAD, 1 + graph.N_AHEAD]
    assert longer.bound == cache.bound + graph.N_AHEAD
    assert steps.serves(longer)


@pytest.mark.skipif(bool(kernels.why_not("sample")), reason=kernels.why_not("sample") or "built")
def test_logits_that_are_no_numbers_are_told_when_somebody_looks():
    """The good steps before come first, then the row and the position."""
    params, cache, steps = started()
    params["positions"]["w"][5] = torch.nan  # row 0 reads it with its third new token
    words = {"seed": torch.tensor([1, 2]), "position": torch.tensor([4, 2])}
    tokens, longer = graph.decode_(steps, cache, torch.tensor([5, 6]), **words, n_steps=8)
    assert len(tokens) == 2
    assert min(map(min, tokens)) >= 0
    words["position"] += 2
    with pytest.raises(ValueError, match="expected a finite largest logit in row 0, at position 6"):
        graph.decode_(steps, longer, torch.tensor(tokens[-1]), **words, n_steps=8)


def test_who_asks_for_a_graph_is_told_what_it_cannot_do():
    config = CONFIGS["gpt2"]
    params = random_params(config)
    with pytest.raises(ValueError, match="engine: expected what a graph serves, but nothing is cached"):
        list(generate(params, config, [[1]], GenerateOptions(engine="graph", cached=False)))
    with pytest.raises(ValueError, match="engine: expected what a graph serves, but a tap is given"):
        list(generate(params, config, [[1]], GenerateOptions(engine="graph"), tap=lambda name, value: value))
    assert graph.why_not(params) == "a graph needs a GPU, and the weights are on cpu"


@pytest.mark.gpu
@pytest.mark.filterwarnings("error:no CUDA graph")
@pytest.mark.parametrize("name", NAMES)
def test_a_captured_graph_draws_what_its_step_draws(name):
    """The warning would say that there is none, and its step would draw the same."""
    options = {"max_new_tokens": 60, "sampling": PRESETS["balanced"], "device": "cuda"}
    with kernels.using("native"):
        captured = texts(name, "graph", **options)
    assert captured == texts(name, "eager", **options)
