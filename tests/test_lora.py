"""LoRA: the start is the model, only the second tree learns, and merged equals laid over."""

import pytest
import torch
from cases import CONFIGS, random_params, random_tokens

from gptcore import engine, generate, optim, tree
from gptcore.device import generator
from gptcore.generate import GenerateOptions
from gptcore.lora import PARTS, init_lora, lora_spec, merge, second, trained_spec
from gptcore.model import check_params, forward
from gptcore.pretrained import sizes
from gptcore.train import TrainOptions, copy_of, gradients_, init_state, loss_function, train_step_

NAMES = ["gpt2", "phi", "gqa", "wide_heads", "seed"]
OPTIONS = TrainOptions(n_steps=20, optimizer=optim.Options(lr=1e-2), warmup=0.0)


def laid(name, dtype=torch.float32):
    """(config, base, base with a fresh second tree of rank 3 over it)."""
    config = CONFIGS[name]
    base = random_params(config, dtype)
    return config, base, tree.overlay(base, init_lora(config, 3, generator(1)))


def batch(config):
    tokens = random_tokens(config, 4, 21)
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def learned(name):
    config, base, params = laid(name)
    before = {leaf: value.clone() for leaf, value in tree.walk(base)}
    state = init_state(params, config, OPTIONS)
    losses = [train_step_(params, config, batch(config), state, OPTIONS)["loss"] for _ in range(12)]
    return config, base, params, before, losses


@pytest.mark.parametrize("name", NAMES)
def test_a_fresh_second_tree_changes_nothing(name):
    config, base, params = laid(name)
    tokens = random_tokens(config)
    assert torch.equal(forward(params, config, tokens)[0], forward(base, config, tokens)[0])


@pytest.mark.parametrize("name", NAMES)
def test_a_second_tree_in_float32_lies_over_weights_in_bfloat16(name):
    """Seen to fail without the cast: the first validation of a fine-tuned import ended in torch's own error."""
    config, base, params = laid(name, torch.bfloat16)
    tokens = random_tokens(config)
    assert torch.equal(forward(params, config, tokens)[0], forward(base, config, tokens)[0])


@pytest.mark.parametrize("name", NAMES)
def test_only_the_second_tree_learns(name):
    """Seen to fail with gradients for every leaf."""
    config, base, params, before, losses = learned(name)
    assert losses[-1] < losses[0]
    assert all(torch.equal(leaf, before[path]) for path, leaf in tree.walk(base))
    assert not any(leaf.requires_grad or leaf.grad is not None for leaf in tree.leaves(base))
    fresh = dict(tree.walk(init_lora(config, 3, generator(1))))
    assert all(not torch.equal(leaf, fresh[path]) for path, leaf in tree.walk(second(params, config)))
    check_params(base, config)


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_merged_is_laid_over(name):
    """Seen to fail with lora_a and lora_b exchanged in merge."""
    with torch.enable_grad():
        config, base, params, _, _ = learned(name)
    whole = merge(base, second(params, config))
    check_params(whole, config)
    tokens = random_tokens(config)
    ours, theirs = forward(whole, config, tokens)[0], forward(params, config, tokens)[0]
    assert (ours - forward(base, config, tokens)[0]).abs().max() > 0.1
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * max(1.0, theirs.abs().max().item() / 10))


def test_rows_are_the_specs_and_a_rank_of_zero_is_refused():
    config, _, params = laid("gqa")
    spec = lora_spec(config, 3)
    assert len(spec) == config.n_layer * len(PARTS) * 2
    assert {name: tuple(leaf.shape) for name, leaf in tree.walk(second(params, config))} == {
        name: leaf.shape for name, leaf in spec.items()
    }
    assert trained_spec(params, config) == spec
    assert sum(leaf.numel() for leaf in tree.leaves(second(params, config))) == sizes.lora_weights(config, 3)
    with pytest.raises(ValueError, match="lora: expected a rank of at least 1, got 0"):
        lora_spec(config, 0)


def test_frozen_weights_may_be_bfloat16():
    """The second tree stays float32 and learns; a copy for measuring shares what is frozen."""
    config, base, params = laid("phi", torch.bfloat16)
    options = TrainOptions(n_steps=20, optimizer=optim.Options(lr=1e-2), warmup=0.0, dtype="bfloat16")
    copy = copy_of(params, config)
    assert copy["embed"]["w"] is base["embed"]["w"]
    state = init_state(params, config, options)
    losses = [train_step_(params, config, batch(config), state, options)["loss"] for _ in range(12)]
    assert losses[-1] < losses[0]
    assert {leaf.dtype for leaf in tree.leaves(second(params, config))} == {torch.float32}
    assert torch.equal(
        copy["blocks"][0]["attn"]["q"]["lora_b"], torch.zeros_like(copy["blocks"][0]["attn"]["q"]["lora_b"])
    )


def test_the_decoder_says_that_it_waits_for_the_merge():
    config, _, params = laid("gpt2")
    if not engine.why_not(random_params(config, torch.float32), config):
        assert engine.why_not(params, config) == "LoRA that is not merged is not served"
    steps = list(generate(params, config, [[1, 2]], GenerateOptions(max_new_tokens=3)))
    assert len(steps) == 3


@pytest.mark.parametrize("name", ["gpt2", "phi", "seed"])
@pytest.mark.parametrize("over", [False, True], ids=["all weights", "LoRA"])
def test_recomputing_gives_the_same_gradients(name, over):
    """Dropout included: its masks are a function of the seed."""
    config, base, params = laid(name)
    found = []
    for recompute in (False, True):
        copy = copy_of(params if over else base, config)
        options = TrainOptions(n_steps=2, recompute=recompute)
        state = init_state(copy, config, options)
        gradients_(copy, config, batch(config), 0, options)
        found.append([leaf.grad for leaf in state.optimizer.named_params.values()])
    assert all(map(torch.equal, *found))


def test_recomputing_keeps_less():
    """Bytes that autograd saves: with recomputation hardly more than one activation a block."""
    config = CONFIGS["gpt2"]
    kept = []
    for recompute in (False, True):
        params, n_bytes = random_params(config, torch.float32), 0

        def pack(value):
            nonlocal n_bytes
            n_bytes += value.numel() * value.itemsize
            return value

        init_state(params, config, OPTIONS)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
            tokens, targets = batch(config)
            loss_function(config, "float32", "fused", False, recompute)(params, tokens, targets, None)
        kept.append(n_bytes)
    assert kept[1] < kept[0] / 2
