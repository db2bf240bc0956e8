"""The lenses: every reading by its definition, on every architecture; the tuned lens on the trained model."""

import math

import pytest
import torch
from cases import CONFIGS, random_params, random_tokens
from models import repeat_batch

from gptcore import forward, generator, tree, unembed
from gptcore.interpret import lens as lenses
from gptcore.interpret.lens import fit_tuned_lens, load_tuned_lens, logit_lens, save_tuned_lens, streams_of
from gptcore.interpret.taps import record

every_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())


def close(got, wanted, atol=1e-10):
    torch.testing.assert_close(got, torch.as_tensor(wanted, dtype=got.dtype), rtol=0, atol=atol)


@every_config
def test_the_last_reading_is_the_model(config):
    """The stream after the last block through unembed is forward's own logits, bit for bit."""
    params, tokens = random_params(config), random_tokens(config, length=11)
    logits, _ = forward(params, config, tokens)
    _, streams = streams_of(params, config, tokens)
    assert torch.equal(unembed(params, config, streams[-1]), logits)
    found = logit_lens(params, config, tokens)
    assert found.names == ("embed", *map(str, range(config.n_layer)))
    assert torch.equal(found.top[-1, ..., 0], logits.argmax(-1))
    close(found.top_p[-1], logits.softmax(-1).topk(5).values)
    assert (found.kl[-1] == 0).all()
    close(found.p[-1, :, :-1], logits.softmax(-1)[:, :-1].gather(-1, tokens[:, 1:, None])[..., 0])
    assert (logit_lens(params, config, tokens, logits.argmax(-1)).rank[-1] == 0).all()


@every_config
@pytest.mark.parametrize("sites", ["resid", "all"])
def test_a_reading_is_its_definition(config, sites):
    """Against the recorded streams, the norm's statistics made anew from each."""
    params, tokens = random_params(config), random_tokens(config, length=11)
    tap, seen = record(config, "*")
    forward(params, config, tokens, tap=tap)
    streams = {"embed": seen["blocks.0.resid_pre"] if config.n_layer else streams_of(params, config, tokens)[1][0]}
    for layer in range(config.n_layer):
        if sites == "all" and config.block == "sequential":
            streams[f"{layer}.mid"] = seen[f"blocks.{layer}.resid_mid"]
        streams[str(layer)] = seen[f"blocks.{layer}.resid_post"]
    found = logit_lens(params, config, tokens, 7, temperature=0.7, sites=sites, k=3)
    assert found.names == tuple(streams)
    final = (seen["logits"] / 0.7).log_softmax(-1)
    for row, x in enumerate(streams.values()):
        logits = unembed(params, config, x) / 0.7
        p = logits.softmax(-1)
        close(found.top_p[row], p.topk(3).values)
        close(p.gather(-1, found.top[row]), found.top_p[row])
        close(found.p[row], p[..., 7])
        assert torch.equal(found.rank[row], (logits > logits[..., 7, None]).sum(-1))
        close(found.entropy[row], -(p * p.log()).sum(-1))
        close(found.kl[row], (final.exp() * (final - p.log())).sum(-1))
    assert (found.target == 7).all()


def test_an_empty_head_says_nothing():
    """Entropy ln V, every rank 0, KL 0, and the embedding has settled."""
    config = CONFIGS["neox"]
    params, tokens = random_params(config), random_tokens(config, length=11)
    params["head"]["w"].zero_()
    found = logit_lens(params, config, tokens)
    close(found.entropy, torch.full_like(found.entropy, math.log(config.n_vocab)))
    assert (found.rank[..., :-1] == 0).all()
    assert (found.kl == 0).all()
    assert (found.settled == 0).all()


def test_the_default_target_is_the_next_token():
    """The last position has none: no probability, no rank. Ids may be given for each position."""
    config = CONFIGS["gpt2"]
    params, tokens = random_params(config), random_tokens(config, length=11)
    found = logit_lens(params, config, tokens)
    assert torch.equal(found.target[:, :-1], tokens[:, 1:])
    assert (found.target[:, -1] == -1).all()
    assert found.p[..., -1].isnan().all()
    assert (found.rank[..., -1] == -1).all()
    own = random_tokens(config, length=11, seed=9)
    each = logit_lens(params, config, tokens, own)
    logits, _ = forward(params, config, tokens)
    close(each.p[-1], logits.softmax(-1).gather(-1, own[..., None])[..., 0])


def test_a_token_settles_where_it_stays_on_top():
    config = CONFIGS["gpt2"]
    params, tokens = random_params(config), random_tokens(config, rows=20)
    found = logit_lens(params, config, tokens)
    top = found.top[..., 0]
    for row in range(3):
        here = found.settled == row
        assert here.any()
        assert (top[row:, here] == top[-1, here]).all()
        assert row == 0 or (top[row - 1, here] != top[-1, here]).all()


@every_config
def test_chunks_change_nothing(config, monkeypatch):
    params, tokens = random_params(config), random_tokens(config, length=11)
    whole = logit_lens(params, config, tokens)
    monkeypatch.setattr(lenses, "CHUNK_BYTES", 4 * config.n_vocab * 5)  # five rows of 33
    parts = logit_lens(params, config, tokens)
    for name, got, wanted in zip(whole._fields, parts, whole, strict=True):
        if name != "names":
            torch.testing.assert_close(got, wanted, rtol=0, atol=1e-12, equal_nan=True)


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"temperature": 0}, "temperature: expected a number above 0, got 0"),
        ({"k": 0}, "k: expected 1 to 61, got 0"),
        ({"k": 62}, "k: expected 1 to 61, got 62"),
        ({"target": 61}, "target: expected ids below 61, got 61"),
        ({"target": torch.zeros(2, 2, dtype=torch.long)}, r"target: expected an id or ids \(3, 40\), got \(2, 2\)"),
        ({"sites": "x"}, "sites: expected resid or all, got 'x'"),
        ({"sites": "all", "tuned": {}}, "sites: expected resid with a tuned lens"),
    ],
)
def test_what_is_wrong_is_refused(options, line):
    config = CONFIGS["gpt2"]
    with pytest.raises(ValueError, match=line):
        logit_lens(random_params(config), config, random_tokens(config), **options)


# ------------------------------------------------------------------------------------------------------ the tuned lens


@every_config
def test_an_unfitted_tuned_lens_is_the_logit_lens(config):
    params, tokens = random_params(config), random_tokens(config, length=11)
    if not config.n_layer:
        with pytest.raises(ValueError, match="n_layer: expected a model with blocks"):
            fit_tuned_lens(params, config, lambda step: tokens, steps=0)
        return
    tuned = fit_tuned_lens(params, config, lambda step: tokens, steps=0)
    assert (tuned["a"].shape, tuned["b"].shape) == (
        (config.n_layer, *2 * (config.d_model,)),
        (config.n_layer, config.d_model),
    )
    fitted, plain = (logit_lens(params, config, tokens, tuned=way)[1:] for way in (tuned, None))
    for got, wanted in zip(fitted, plain, strict=True):
        assert torch.equal(got.nan_to_num(nan=-1), wanted.nan_to_num(nan=-1))


def test_a_tuned_lens_reads_early_layers_better(trained):
    """On held-out rows of the trained model, at both layers; the model stays as it is."""
    params, config = trained
    before = tree.map(torch.clone, params)
    batches = lambda step: repeat_batch(config, 32, ("tuned", step))[0]
    tuned = fit_tuned_lens(params, config, batches, steps=150)
    held_out = repeat_batch(config, 32, ("held out",))[0]
    plain, fitted = (logit_lens(params, config, held_out, tuned=way).kl.mean((1, 2)) for way in (None, tuned))
    assert (fitted[:-1] < 0.9 * plain[:-1]).all()
    assert fitted[-1] == 0
    assert all(map(torch.equal, tree.leaves(params), tree.leaves(before)))
    assert not any(leaf.requires_grad for leaf in (*tree.leaves(params), *tuned.values()))


def test_a_model_that_wants_gradients_gets_none():
    config = CONFIGS["llama"]
    params, tokens = random_params(config), random_tokens(config, length=11)
    for leaf in tree.leaves(params):
        leaf.requires_grad_()
    tuned = fit_tuned_lens(params, config, lambda step: tokens, steps=2)
    assert all(leaf.grad is None for leaf in tree.leaves(params))
    assert all((leaf != 0).any() for leaf in tuned["a"])


def test_a_lens_is_saved_for_its_model_alone(tmp_path):
    config = CONFIGS["gpt2"]
    stream = generator(1)
    tuned = {"a": torch.randn(2, 40, 40, generator=stream), "b": torch.randn(2, 40, generator=stream)}
    path = tmp_path / "tuned_lens.safetensors"
    save_tuned_lens(path, tuned, "ab" * 32)
    loaded = load_tuned_lens(path, config, "ab" * 32)
    assert all(torch.equal(loaded[name], tuned[name]) for name in ("a", "b"))
    with pytest.raises(ValueError, match="expected a lens fitted to model cdcdcdcd, got one fitted to abababab"):
        load_tuned_lens(path, config, "cd" * 32)
    with pytest.raises(ValueError, match="expected translators"):
        load_tuned_lens(path, CONFIGS["six_heads"], "ab" * 32)
    path.write_bytes(b"no tensors")
    with pytest.raises(ValueError, match="expected a tuned lens, got"):
        load_tuned_lens(path, config, "ab" * 32)
