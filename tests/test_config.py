import dataclasses
import math

import pytest

from gptcore.config import ARCHITECTURES, CHOICES, ModelConfig, architecture, padded_vocab


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"d_model": 130}, "d_model: expected a multiple of n_head=4, got 130"),
        ({"n_kv_head": 3}, "n_kv_head: expected a divisor of n_head=4, got 3"),
        ({"n_layer": -1}, "n_layer: expected a whole number of at least 0, got -1"),
        ({"n_layer": 2.0}, "n_layer: expected a whole number of at least 0, got 2.0"),
        ({"n_head": 0}, "n_head: expected at least 1, got 0"),
        ({"dropout": 1.0}, r"dropout: expected a number in \[0, 1\), got 1.0"),
        ({"position": "rope", "rope_fraction": 0.1}, "rope_fraction x d_head: expected an even width .*, got 3"),
        ({"position": "sinusoidal", "d_model": 33, "n_head": 3}, "expected an even width for sinusoidal"),
        ({"rope_fraction": 1.5}, r"rope_fraction: expected a number in \(0, 1\], got 1.5"),
        ({"n_vocab_padded": 99}, "n_vocab_padded: expected at least n_vocab=100, got 99"),
        ({"rope_base": 0.0}, "rope_base: expected a number above 0, got 0.0"),
        ({"norm_eps": math.nan}, "norm_eps: expected a number, got nan"),
        ({"rope_base": "x"}, "rope_base: expected a number, got 'x'"),
        ({"tied": "no"}, "tied: expected True or False, got 'no'"),
        ({"rope_factor": 0.0}, "rope_factor: expected a number above 0, got 0.0"),
        ({"rope_low": 4.0}, "rope_high: expected a number above rope_low=4.0, got 4.0"),
        ({"logit_softcap": -1.0}, "logit_softcap: expected a number of at least 0, got -1.0"),
    ],
    ids=str,
)  # fmt: skip
def test_a_wrong_size_is_refused_with_expected_and_got(sizes, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig(n_vocab=100, **sizes)


@pytest.mark.parametrize("axis", CHOICES)
def test_every_axis_is_a_closed_choice(axis):
    with pytest.raises(ValueError, match=f"{axis}: expected one of {', '.join(CHOICES[axis])}, got 'banana'"):
        ModelConfig(n_vocab=100, **{axis: "banana"})


def test_an_unknown_architecture_or_size_is_refused():
    with pytest.raises(
        ValueError, match="arch: expected one of gpt2, alibi, llama, qwen3, phi, neox, seed, got 'gpt9'"
    ):
        architecture("gpt9", n_vocab=10)
    with pytest.raises(ValueError, match="sizes: expected fields of ModelConfig, got n_lyer"):
        architecture("gpt2", n_vocab=10, n_lyer=3)


def test_a_config_survives_a_round_trip_through_a_dict():
    for name in ARCHITECTURES:
        config = architecture(name, n_vocab=100, d_model=80, n_head=2)
        assert ModelConfig(**dataclasses.asdict(config)) == config


def test_derived_widths_and_padding():
    config = ModelConfig(n_vocab=100_277, d_model=256)
    assert (config.d_head, config.d_ff, config.n_kv_head, config.n_vocab_padded) == (64, 1024, 4, 100_277)
    assert architecture("seed", n_vocab=10, position="rope").rope_interleaved
    assert architecture("phi", n_vocab=10, d_model=320).d_rot == 32  # 0.4 of 80
    assert [padded_vocab(n) for n in (50, 4095, 4096, 50_257, 100_277)] == [50, 4095, 4096, 50_304, 100_352]
