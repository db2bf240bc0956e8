"""Steering adds a direction in every kind of run, and only where it is told to."""

import pytest
import torch
from cases import CONFIGS, random_params, random_tokens

from gptcore import GenerateOptions, forward, generate
from gptcore.interpret.steering import mean_difference, steer
from gptcore.interpret.taps import chain, record
from gptcore.sampling import Sampling

deep = pytest.mark.parametrize(
    "config", [c for c in CONFIGS.values() if c.n_layer], ids=[n for n, c in CONFIGS.items() if c.n_layer]
)


def close(got, wanted, atol=1e-10):
    torch.testing.assert_close(got, wanted, rtol=0, atol=atol)


def texts(params, config, tap, prompts, cached=True):
    options = GenerateOptions(sampling=Sampling(temperature=0.0), max_new_tokens=20, cached=cached)
    return [step.tokens for step in generate(params, config, prompts, options, tap=tap)]


@deep
def test_the_vector_is_the_difference_of_the_means_at_the_last_tokens(config):
    params, tokens = random_params(config), random_tokens(config, rows=4, length=9)
    rows = [tokens[0, :5].tolist(), tokens[1].tolist(), tokens[2, :2].tolist(), tokens[3].tolist()]
    found = mean_difference(params, config, rows[:2], rows[2:], config.n_layer - 1)
    ends = []
    for ids in rows:
        tap, seen = record(config, f"blocks.{config.n_layer - 1}.resid_post")
        forward(params, config, torch.tensor([ids]), tap=tap)
        ends.append(seen[f"blocks.{config.n_layer - 1}.resid_post"][0, -1])
    close(found, (ends[0] + ends[1] - ends[2] - ends[3]) / 2)


@deep
def test_a_steered_generation_is_the_same_with_and_without_a_cache(config):
    """20 greedy tokens; no scale is no steering, and the steered text is another one."""
    params, prompts = random_params(config), [[5, 3, 9, 30], [7, 7, 8, 1]]
    vector = torch.randn(config.d_model, generator=torch.Generator().manual_seed(1))
    plain = texts(params, config, None, prompts)
    assert texts(params, config, steer(config, vector, 0, 0.0), prompts) == plain
    for positions in ("all", "prompt", "generated", slice(2, 15, 3)):
        tap = steer(config, vector, 0, 40.0, positions, n_prompt=4)
        steered = texts(params, config, tap, prompts)
        assert steered == texts(params, config, tap, prompts, cached=False)
        assert steered != plain


def test_the_positions_are_the_ones_that_were_named():
    config = CONFIGS["gpt2"]
    params, tokens = random_params(config), random_tokens(config, length=9)
    vector = torch.ones(config.d_model)
    tap, plain = record(config, "blocks.1.resid_post")
    forward(params, config, tokens, tap=tap)
    for positions, wanted in [
        ("all", range(9)),
        ("prompt", range(4)),
        ("generated", range(4, 9)),
        (slice(3), range(3)),
        (slice(1, None, 3), (1, 4, 7)),
    ]:
        tap, seen = record(config, "blocks.1.resid_post")
        forward(params, config, tokens, tap=chain(steer(config, vector, 1, 2.0, positions, n_prompt=4), tap))
        moved = seen["blocks.1.resid_post"] - plain["blocks.1.resid_post"]
        expected = torch.zeros(9, dtype=torch.float64)
        expected[list(wanted)] = 2.0
        close(moved, expected[None, :, None].expand_as(moved))


def test_far_along_a_head_row_that_token_comes_first():
    """After the last block nothing but a norm and the head follows: enough of a token's row, and it is the answer."""
    config = CONFIGS["gpt2"]
    params, tokens = random_params(config), random_tokens(config, length=9)
    row = params["embed"]["w"]
    centred = row - row.mean(1, keepdim=True)
    target = int((centred * params["norm_f"]["w"]).norm(dim=1).argmax())  # a row that no other outdoes along itself
    vector = centred[target] * params["norm_f"]["w"]
    before, _ = forward(params, config, tokens)
    after, _ = forward(params, config, tokens, tap=steer(config, vector, config.n_layer - 1, 1e4))
    assert not (before[:, -1].argmax(-1) == target).all()
    assert (after.argmax(-1) == target).all()


def test_what_does_not_fit_is_refused():
    config = CONFIGS["gpt2"]
    vector = torch.zeros(config.d_model)
    with pytest.raises(ValueError, match="layer: expected 0 to 1, got 2"):
        steer(config, vector, 2)
    with pytest.raises(ValueError, match=r"vector: expected shape \(40,\), got \(3,\)"):
        steer(config, torch.zeros(3), 1)
    with pytest.raises(ValueError, match="positions: expected all, prompt, generated or a slice, got 'end'"):
        steer(config, vector, 1, positions="end")
    with pytest.raises(ValueError, match="n_prompt: expected the number of the prompt's tokens for generated"):
        steer(config, vector, 1, positions="generated")
    tap = steer(config, vector, 1, positions="prompt", n_prompt=[3, 4])
    with pytest.raises(ValueError, match="n_prompt: expected one for all or 3 rows, got 2"):
        forward(random_params(config), config, random_tokens(config, length=9), tap=tap)
    with pytest.raises(ValueError, match="texts: expected at least one token in each of at least one text"):
        mean_difference(random_params(config), config, [[1], []], [[2]], 0)
