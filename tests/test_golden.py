"""What another implementation said about the same weights, kept in small files: every activation agrees.

tests/golden/make.py wrote the files with TransformerLens; here they are only read, so nothing needs to be installed. A
file that is missing, or is not the one that the script wrote, fails.
"""

import hashlib
import importlib.util

import pytest
import torch
from golden import make
from safetensors.torch import load_file

from gptcore import ModelConfig, forward, tree
from gptcore.interpret.induction import composition, copying_eigenvalues
from gptcore.interpret.lens import logit_lens
from gptcore.interpret.pairs import logit_diff
from gptcore.interpret.patching import sweep
from gptcore.interpret.taps import gradients, record
from gptcore.model import activation_spec, check_params

each_case = pytest.mark.parametrize("case", make.CASES)
PEER = "transformer-lens is not installed"
needs_peer = pytest.mark.skipif(importlib.util.find_spec("transformer_lens") is None, reason=PEER)


def golden(case):
    """(params, config, {key: what is stored}) of a case, weights in float32."""
    config, stored = make.config_of(case), load_file(make.HERE / f"{case}.safetensors")
    weights = {name.removeprefix("weights/"): x.float() for name, x in stored.items() if name.startswith("weights/")}
    return tree.nest(weights), config, stored


def agree(got, stored, what, tolerance=1e-5):
    """|got - stored| <= tolerance x max(1, largest stored), with the same infinities."""
    assert got.shape == stored.shape, what
    assert torch.equal(got.isinf(), stored.isinf()), what
    got, stored = got.masked_fill(got.isinf(), 0), stored.masked_fill(stored.isinf(), 0)
    error, size = (got - stored).abs().max().item(), max(1.0, stored.abs().max().item())
    assert error <= tolerance * size, f"{what}: off by {error:.1e} at size {size:.1f}"


def test_the_files_are_those_that_the_script_wrote():
    """Each with its sum, none beside them, and together below a megabyte."""
    lines = (make.HERE / "SHA256SUMS").read_text(encoding="utf-8").splitlines()
    sums = {file: digest for digest, file in (line.split() for line in lines)}
    found = {path.name: path.read_bytes() for path in make.HERE.glob("*.safetensors")}
    assert sums == {name: hashlib.sha256(data).hexdigest() for name, data in found.items()}
    assert sums.keys() == {f"{case}.safetensors" for case in make.CASES}
    assert max(map(len, found.values())) <= 150_000
    assert sum(map(len, found.values())) <= 1_000_000


@each_case
def test_a_file_says_what_it_is(case):
    """The config and the very script: whoever changes either makes the files again."""
    params, config, _ = golden(case)
    about = make.about(make.HERE / f"{case}.safetensors")
    check_params(params, config)
    assert ModelConfig(**about["config"]) == config
    assert about["code"] == make.code_digest(), "run tests/golden/make.py, and see that its --check agreed before"
    assert about["versions"]["transformer-lens"] == "3.9.0"


@each_case
def test_a2_every_activation_is_that_of_transformer_lens(case):
    """Seen to fail with pairs (i, i + half) where they are interleaved, and with projections 2e-5 too large."""
    params, config, stored = golden(case)
    tap, seen = record(config, "*")
    forward(params, config, stored["clean"], tap=tap)
    names = [name.removeprefix("sites/") for name in stored if name.startswith("sites/")]
    theirs_lacks = {"positions", "norm_f"} | {name for name in seen if name.endswith(("norm_1", "norm_2", "_normed"))}
    assert set(names) == set(activation_spec(config)) - theirs_lacks
    for name in names:
        agree(seen[name], stored[f"sites/{name}"], name)


@each_case
def test_h1_gradients_at_z_are_those_of_transformer_lens(case):
    """Of the logit difference at the last position, summed over the pairs, in the corrupt run."""
    params, config, stored = golden(case)

    def run(tap):
        logits = forward(params, config, stored["corrupt"], tap=tap)[0][:, -1]
        return (logits.gather(-1, stored["target"][:, None]) - logits.gather(-1, stored["foil"][:, None])).sum()

    found, _ = gradients(run, [f"blocks.{i}.attn.z" for i in range(config.n_layer)])
    assert len(found) == 2
    for name, value in found.items():
        agree(value, stored[f"gradients/{name}"], name, tolerance=1e-6)


@each_case
def test_f1_sweeps_are_those_of_transformer_lens(case):
    """The patched logit difference of every cell: residual stream, what attention and MLP write, and every head."""
    params, config, stored = golden(case)
    metric = logit_diff(stored["target"], stored["foil"])
    names = [name.removeprefix("patch/") for name in stored if name.startswith("patch/")]
    assert set(names) == {site for site in make.SWEEPS if f"blocks.0.{site}" in activation_spec(config)}
    for site in names:
        found = sweep(params, config, stored["clean"], stored["corrupt"], site, metric)
        agree(found.clean, stored["metric/clean"], "clean")
        agree(found.corrupt, stored["metric/corrupt"], "corrupt")
        agree(found.patched.movedim(-1, 0), stored[f"patch/{site}"], site)


@each_case
def test_the_lens_is_that_of_transformer_lens(case):
    """accumulated_resid through the final norm and the head: an embed row, then one a block."""
    params, config, stored = golden(case)
    found = logit_lens(params, config, stored["clean"], sites="resid")
    log_p = stored["lens"].log_softmax(-1)  # (R,B,T,V)
    target = stored["clean"].roll(-1, 1)[:, :-1].expand(len(log_p), -1, -1)[..., None]
    wanted = log_p[:, :, :-1].gather(-1, target)
    agree(stored["lens"][-1], stored["sites/logits"], "the last row")
    agree(found.top_p, log_p.exp().topk(5).values, "top_p")
    agree(log_p.exp().gather(-1, found.top), found.top_p, "top")
    agree(found.p[:, :, :-1], wanted[..., 0].exp(), "p")
    assert torch.equal(found.rank[:, :, :-1], (log_p[:, :, :-1] > wanted).sum(-1))
    agree(found.entropy, -(log_p.exp() * log_p).sum(-1), "entropy")
    agree(found.kl, (log_p[-1].exp() * (log_p[-1] - log_p)).sum(-1), "kl")


@each_case
def test_copying_and_composition_are_those_of_transformer_lens(case):
    params, config, stored = golden(case)
    agree(copying_eigenvalues(params, config, "tokens").float(), stored["copying/vocabulary"], "vocabulary")
    agree(copying_eigenvalues(params, config, "residual").float(), stored["copying/residual"], "residual")
    later = composition(params, config, "k")[0, :, 1]  # (H,H); theirs holds 0 where ours says that there is no pair
    agree(later, stored["composition/k"][0, :, 1], "K-composition")


@needs_peer
@each_case
def test_made_again_the_values_are_the_same(case):
    assert not make.apart(make.golden(case), load_file(make.HERE / f"{case}.safetensors"))


def test_a_difference_is_seen():
    stored = {"a": torch.tensor([1.0, -torch.inf]), "b": torch.zeros(2)}
    assert not make.apart({"a": torch.tensor([1.0 + 5e-7, -torch.inf]), "b": torch.zeros(2)}, stored)
    assert make.apart({"a": torch.tensor([1.0 + 3e-6, -torch.inf]), "b": torch.zeros(2)}, stored).keys() == {"a"}
    assert make.apart({"a": torch.tensor([1.0, 0.0]), "b": torch.zeros(3)}, stored).keys() == {"a", "b"}
    assert make.apart({"a": stored["a"]}, stored) == {"b": float("inf")}
