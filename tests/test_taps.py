"""Taps record, change and differentiate every site, in any run: batched, cached, compiled, mapped.

The letters are those under which the identities of looking inside are known in this project: A5 ... A9.
"""

import pytest
import torch
from cases import CONFIGS, random_params, random_tokens

from gptcore import GenerateOptions, forward, generate, init_cache
from gptcore.interpret.taps import chain, gradients, patch, put, record, sites
from gptcore.model import activation_spec
from gptcore.sampling import Sampling

every_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())


def close(got, wanted, atol=1e-10):
    torch.testing.assert_close(got, wanted, rtol=0, atol=atol)


def test_patterns_stand_for_sites_in_the_order_of_a_forward():
    config = CONFIGS["gpt2"]
    assert sites(config, ["logits", "blocks.*.attn.z"]) == ["blocks.0.attn.z", "blocks.1.attn.z", "logits"]
    assert sites(config, "embed") == ["embed"]
    assert sites(config, "*") == list(activation_spec(config))
    assert sites(config, []) == []


@pytest.mark.parametrize("name", ["blocks.0.atn.q", "blocks.2.attn.q", "blocks.*.attn.q_rot", "elephant"])
def test_a_name_that_is_no_site_is_refused_with_the_nearest(name):
    config = CONFIGS["gpt2"]
    near = "logits" if name == "elephant" else "blocks.*attn.q"
    with pytest.raises(ValueError, match=f"site: expected a name of activation_spec such as .*{near}.*, got '{name}'"):
        record(config, {name})
    with pytest.raises(ValueError, match="site: expected"):
        patch(config, {name: lambda value: value})


def test_record_keeps_what_it_is_told_to():
    config = CONFIGS["llama"]
    params, tokens = random_params(config), random_tokens(config)
    params["embed"]["w"].requires_grad_()
    tap, seen = record(config, "blocks.*.attn.pattern")
    graph, kept = record(config, ["blocks.1.resid_post"], keep=lambda value: value)
    forward(params, config, tokens, tap=chain(tap, None, graph))
    assert list(seen) == ["blocks.0.attn.pattern", "blocks.1.attn.pattern"]
    close(seen["blocks.1.attn.pattern"].sum(-1), torch.ones(3, 4, 40, dtype=torch.float64))
    assert not seen["blocks.0.attn.pattern"].requires_grad
    assert kept["blocks.1.resid_post"].requires_grad
    assert chain(None) is None


def test_edits_follow_each_other_and_may_not_write_in_place():
    config = CONFIGS["gpt2"]
    params, tokens = random_params(config), random_tokens(config)
    tap, seen = record(config, "blocks.*.mlp.out")
    halve = {"blocks.*.mlp.out": lambda value: value / 2, "blocks.1.mlp.out": lambda value: put(value, (0, 3), 7.0)}
    forward(params, config, tokens, tap=chain(tap, patch(config, halve)))
    tap, edited = record(config, "blocks.*.mlp.out")
    forward(params, config, tokens, tap=chain(patch(config, halve), tap))
    close(edited["blocks.0.mlp.out"], seen["blocks.0.mlp.out"] / 2)
    assert (edited["blocks.1.mlp.out"][0, 3] == 7).all()
    assert not (seen["blocks.1.mlp.out"][0, 3] == 7).any()
    with pytest.raises(ValueError, match=r"tap at blocks\.0\.attn\.z: expected a new tensor"):
        forward(params, config, tokens, tap=patch(config, {"blocks.0.attn.z": lambda value: value.mul_(2)}))


@every_config
def test_a5_decoding_under_an_edit_in_every_layer_is_the_full_forward(config):
    """Token by token through the cache, values doubled and outputs scaled: what is stored is what was edited."""
    params, tokens = random_params(config), random_tokens(config, length=12)
    edits = {"blocks.*.attn.v": lambda v: v * 2, "blocks.*.mlp.out": lambda x: x * 0.9} if config.n_layer else {}
    names = [name for name in activation_spec(config) if not name.endswith(("scores", "pattern"))]
    whole_tap, whole = record(config, names)
    wanted, _ = forward(params, config, tokens, tap=chain(patch(config, edits), whole_tap))
    cache = init_cache(config, len(tokens), dtype=torch.float64)
    for step in range(tokens.shape[1]):
        tap, seen = record(config, names)
        logits, cache = forward(params, config, tokens[:, step, None], cache, tap=chain(patch(config, edits), tap))
        close(logits[:, 0], wanted[:, step])
        for name, value in seen.items():
            close(value[:, 0], whole[name][:, step].expand_as(value[:, 0]))
    if config.n_layer:
        assert not torch.allclose(wanted, forward(params, config, tokens)[0])


@every_config
def test_a6_a_ragged_batch_sees_what_each_row_sees_alone(config):
    """Rows of 3, 9 and 12 tokens, padded on the right: what stands at a row's own positions is the row's alone."""
    params, tokens = random_params(config), random_tokens(config, length=12)
    tap, seen = record(config, "*")
    forward(params, config, tokens, tap=tap)
    for row, length in enumerate((3, 9, 12)):
        tap, alone = record(config, "*")
        forward(params, config, tokens[row : row + 1, :length], tap=tap)
        for name, value in alone.items():
            mine = seen[name][min(row, len(seen[name]) - 1)]
            close(mine[:, :length, :length] if name.endswith(("scores", "pattern")) else mine[:length], value[0])


def test_a7_recording_and_editing_compile_to_one_graph():
    config = CONFIGS["qwen3"]
    params, tokens = random_params(config), random_tokens(config)
    edit = patch(config, {"blocks.0.attn.z": lambda z: put(z, (slice(None), slice(None), 1), 0.0)})

    def run(way):
        tap, seen = record(config, "blocks.*.attn.pattern")
        return way(params, config, tokens, tap=chain(edit, tap))[0], seen

    tap, _ = record(config, "blocks.*.attn.pattern")
    explained = torch._dynamo.explain(forward)(params, config, tokens, tap=chain(edit, tap))
    assert (explained.graph_count, explained.graph_break_count) == (1, 0)
    got, wanted = run(torch.compile(forward, fullgraph=True, backend="eager")), run(forward)
    assert torch.equal(got[0], wanted[0])
    assert got[1].keys() == wanted[1].keys()
    assert torch.equal(got[1]["blocks.1.attn.pattern"], wanted[1]["blocks.1.attn.pattern"])


def test_a8_a_map_over_head_masks_is_the_loop():
    config = CONFIGS["gpt2"]
    params, tokens = random_params(config), random_tokens(config)

    def ablated(mask):
        return forward(params, config, tokens, tap=patch(config, {"blocks.0.attn.z": lambda z: z * mask[:, None]}))[0]

    masks = 1 - torch.eye(config.n_head, dtype=torch.float64)
    close(torch.func.vmap(ablated)(masks), torch.stack([ablated(mask) for mask in masks]))


@every_config
def test_a9_gradients_are_central_differences_at_every_kind_of_site(config):
    """Along a random direction at one site each; float64, step 1e-4. Seen to fail when the site's value is a leaf."""
    params, tokens = random_params(config), random_tokens(config, rows=2, length=9)
    weights = torch.randn(2, 9, config.n_vocab, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    scalar = lambda tap: (forward(params, config, tokens, tap=tap)[0] * weights).mean()
    last = config.n_layer - 1
    # The scores of hidden keys are -inf and stay it. Directions have length 1, or the step would grow with the site.
    kinds = [
        name for name in activation_spec(config) if name != "positions" and not name.startswith(f"blocks.{last - 1}.")
    ]
    found, seen = gradients(scalar, kinds)
    generator = torch.Generator().manual_seed(4)
    for name in kinds:
        direction = torch.randn(seen[name].shape, dtype=torch.float64, generator=generator)
        direction = direction.masked_fill(seen[name] == -torch.inf, 0)
        direction /= direction.norm()
        move = lambda step, name=name, d=direction: scalar(patch(config, {name: lambda value: value + step * d}))
        with torch.no_grad():
            wanted = (move(1e-4) - move(-1e-4)) / 2e-4
        got = (found[name] * direction).sum()
        assert abs(got - wanted) <= 1e-6 * max(abs(wanted), 1e-4), name


def test_gradients_need_a_scalar_and_sites_that_are_met():
    config = CONFIGS["gpt2"]
    params, tokens = random_params(config), random_tokens(config)
    run = lambda tap: forward(params, config, tokens, tap=tap)[0]
    with pytest.raises(ValueError, match="run: expected a scalar, got shape"):
        gradients(run, ["embed"])
    with pytest.raises(ValueError, match=r"names: expected sites that the run meets, got blocks\.7\.attn\.z"):
        gradients(lambda tap: run(tap).mean(), ["embed", "blocks.7.attn.z"])
    first = lambda tap: run(tap)[:, 0].sum()
    with torch.no_grad():
        found, _ = gradients(first, ["blocks.0.attn.z"])
    assert found["blocks.0.attn.z"][:, 0].abs().sum() > 0
    assert (found["blocks.0.attn.z"][:, 1:] == 0).all()  # later positions do not reach the first logits


def test_a_generation_goes_on_under_an_edit_cached_as_uncached():
    """20 greedy tokens with a head silenced: the same with and without the cache, and others than without the edit."""
    config = CONFIGS["llama"]
    params, prompts = random_params(config), [[5, 3, 9, 30], [7, 7]]
    tap = patch(config, {"blocks.*.attn.z": lambda z: put(z, (slice(None), slice(None), 2), 0.0)})

    def text(tap, cached):
        options = GenerateOptions(sampling=Sampling(temperature=0.0), max_new_tokens=20, cached=cached)
        return [step.tokens for step in generate(params, config, prompts, options, tap=tap)]

    edited = text(tap, True)
    assert edited == text(tap, False)
    assert edited != text(None, True)
