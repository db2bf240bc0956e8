"""Path patching: one edge alone. G1 ... G4 are the letters of these identities in this project."""

import pytest
import torch
from cases import CONFIGS, random_params, twins

from gptcore import forward
from gptcore.interpret.attribution import answer, decompose, direct, direction, seen_at
from gptcore.interpret.nodes import Node, heads, readers, writers
from gptcore.interpret.pairs import logit, logit_diff
from gptcore.interpret.patching import sweep
from gptcore.interpret.paths import path_patch
from gptcore.interpret.taps import patch, record
from gptcore.model import activation_spec, normed
from gptcore.ops import linear

every_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
TARGET = torch.tensor([3, 8, 1])
METRIC, LOGITS = logit_diff(TARGET, 5), [Node("logits")]


def close(got, wanted, atol=1e-9):
    torch.testing.assert_close(got, wanted, rtol=0, atol=atol)


@every_config
def test_g1_with_the_norm_held_a_head_tells_the_logits_its_direct_effect(config):
    params, (clean, corrupt) = random_params(config), twins(config, 2)
    found = path_patch(params, config, clean, corrupt, writers(config), LOGITS, logit(TARGET), norm="linear")
    scale = seen_at(params, config, corrupt, [], -1)[1]["norm_f.scale"]
    along = direction(params, config, scale, answer(params, config, TARGET, None, corrupt)[0])
    parts = [dict(zip(*decompose(params, config, tokens), strict=True)) for tokens in (clean, corrupt)]
    for group, patched in zip(found.senders, found.patched, strict=True):
        moved = ((parts[0][group[0]] - parts[1][group[0]])[:, -1] * along).sum(-1)
        if config.logit_softcap:  # the effect is on the logit before the cap
            before = direct(params, config, corrupt, TARGET).logit
            close(patched, config.logit_softcap * torch.tanh((before + moved) / config.logit_softcap))
        else:
            close(patched - found.corrupt, moved)


@every_config
def test_g2_all_senders_together_make_the_clean_logits(config):
    """Exactly, the positions being the same. Seen to fail with heads that answer to earlier senders."""
    params, (clean, corrupt) = random_params(config), twins(config, 2)
    every = tuple(writers(config))
    found = path_patch(params, config, clean, corrupt, [every, ()], LOGITS, METRIC)
    close(found.patched[0], METRIC(forward(params, config, clean)[0][:, -1]))
    close(found.patched[1], found.corrupt)
    close(found.clean, found.patched[0])


@pytest.mark.parametrize("name", ["gpt2", "phi", "neox", "qwen3", "wide_heads"])
def test_g3_a_receiver_reads_the_corrupt_stream_plus_the_message(name):
    """Queries, keys, an MLP: W norm(x_corrupt + delta), delta being what the sender changed."""
    config = CONFIGS[name]
    params, (clean, corrupt) = random_params(config), twins(config, 2)
    sender, p = Node("blocks.0.attn.z", 2), params["blocks"][1]
    listeners = [Node("blocks.1.attn.q", 1), Node("blocks.1.attn.k", 0), Node("blocks.1.mlp")]
    found = path_patch(params, config, clean, corrupt, [Node("embed"), sender], listeners, METRIC)
    nodes, parts = decompose(params, config, clean)
    moved = (parts - decompose(params, config, corrupt).parts)[nodes.index(sender)]
    tap, seen = record(config, "blocks.1.resid_*")
    forward(params, config, corrupt, tap=tap)
    x = normed(seen["blocks.1.resid_pre"] + moved, p["norm_1"], config, "", None)
    close(found.received["blocks.1.attn.q"][1], linear(x, **p["attn"]["q"]).unflatten(-1, (-1, config.d_head)))
    close(found.received["blocks.1.attn.k"][1], linear(x, **p["attn"]["k"]).unflatten(-1, (-1, config.d_head)))
    stream = seen["blocks.1.resid_mid" if config.block == "sequential" else "blocks.1.resid_pre"]
    x = normed(stream + moved, p.get("norm_2", p["norm_1"]), config, "", None)
    close(found.received["blocks.1.mlp.pre"][1], linear(x, **p["mlp"]["gate" if "gate" in p["mlp"] else "up"]))
    head = lambda site, h: {site: lambda value: value.clone().index_copy_(
        2, torch.tensor([h]), found.received[site][1][:, :, [h]]
    )}  # fmt: skip
    whole = {
        site: lambda value, site=site: found.received[site][1]
        for site in found.received
        if site.startswith("blocks.1.mlp")
    }
    edits = head("blocks.1.attn.q", 1) | head("blocks.1.attn.k", 0) | whole
    close(found.patched[1], METRIC(forward(params, config, corrupt, tap=patch(config, edits))[0][:, -1]))


def test_g4_exact_and_linear_norms_differ_and_agree_for_small_messages():
    config = CONFIGS["gpt2"]
    params, (clean, corrupt) = random_params(config), twins(config, 2)

    def gap(share):
        """The largest difference, relative to the message, when the sender writes only a share of its change."""
        small = {**params, "blocks": [dict(p, attn=dict(p["attn"])) for p in params["blocks"]]}
        o = small["blocks"][0]["attn"]["o"]
        small["blocks"][0]["attn"]["o"] = o | {"w": o["w"] * share}
        exact, linear_ = (
            path_patch(small, config, clean, corrupt, heads(config)[:4], LOGITS, METRIC, norm=norm)
            for norm in ("exact", "linear")
        )
        return (exact.patched - linear_.patched).abs().max().item()

    assert gap(1.0) > 0.01
    assert gap(1e-4) < 1e-4 * gap(1.0) * 30  # first order in the message: what differs falls with it


@every_config
def test_with_everything_open_it_is_activation_patching(config):
    params, (clean, corrupt) = random_params(config), twins(config, 2)
    ways = {"heads": "recompute", "mlps": "recompute"}
    if not config.n_layer:
        return
    found = path_patch(params, config, clean, corrupt, heads(config), LOGITS, METRIC, **ways)
    wanted = sweep(params, config, clean, corrupt, "attn.z", METRIC)
    close(found.patched, wanted.patched.flatten(0, 1))
    frozen = path_patch(params, config, clean, corrupt, heads(config), LOGITS, METRIC)
    if config.n_layer > 1:
        assert (found.patched - frozen.patched).abs().max() > 1e-3


def test_what_does_not_fit_is_refused():
    config = CONFIGS["gpt2"]
    params, (clean, corrupt) = random_params(config), twins(config, 2)
    run = lambda senders, receivers, **ways: path_patch(
        params, config, clean, corrupt, senders, receivers, METRIC, **ways
    )
    with pytest.raises(
        ValueError, match=r"node: expected one such as embed or blocks\.1\.mlp\.out, got blocks\.0\.attn\.q\[1\]"
    ):
        run([Node("blocks.0.attn.q", 1)], LOGITS)
    with pytest.raises(ValueError, match="site: expected a name of activation_spec"):
        run([Node("blocks.7.attn.z", 1)], LOGITS)
    with pytest.raises(ValueError, match="receivers: expected the logits alone"):
        run([Node("embed")], readers(config)[-2:])
    with pytest.raises(ValueError, match="norm: expected one of exact, linear, got 'none'"):
        run([Node("embed")], LOGITS, norm="none")
    assert "blocks.0.attn.z" in activation_spec(config)
