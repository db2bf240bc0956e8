"""Checkpoints of the attention-to-detail project: the same logits, moments and head, whatever the file left out."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gptcore import checkpoint, optim, tree
from gptcore.model import forward, loss, param_spec
from gptcore.pretrained import open_checkpoint, save_run

SIZES = {"vocab_size": 300, "d_model": 32, "num_heads": 4, "num_layers": 2, "d_ff": 48, "dropout": 0.1}
POSITIONS = ("learned", "alibi", "rope")


class Attention(nn.Module):
    """Queries, keys and values as that project had them: pairs (2i, 2i+1) turn, or a slope falls with the distance."""

    def __init__(self, width, heads, position):
        super().__init__()
        self.heads, self.position = heads, position
        self.W_q, self.W_k, self.W_v, self.W_o = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x):
        length, d_head = x.shape[1], x.shape[2] // self.heads
        q, k, v = (
            w(x).view(len(x), length, self.heads, d_head).transpose(1, 2) for w in (self.W_q, self.W_k, self.W_v)
        )
        place = torch.arange(length)
        if self.position == "rope":
            rate = 1.0 / 10000 ** (torch.arange(0, d_head, 2) / d_head)
            angle = torch.outer(place, rate).repeat_interleave(2, dim=-1)
            aside = lambda t: torch.stack([-t[..., 1::2], t[..., ::2]], dim=-1).flatten(-2)
            q, k = (t * angle.cos() + aside(t) * angle.sin() for t in (q, k))
        scores = q @ k.transpose(-2, -1) / d_head**0.5
        if self.position == "alibi":
            slopes = torch.tensor([2 ** (-8 * (h + 1) / self.heads) for h in range(self.heads)])
            scores = scores - slopes[:, None, None] * (place[:, None] - place)
        scores = scores.masked_fill(place[None] > place[:, None], float("-inf"))
        return self.W_o((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


class Old(nn.Module):
    """The earlier model, with its names, its order of parts and its factor sqrt(d)."""

    def __init__(self, position, tied=True, vocab_size=300, d_model=32, num_heads=4, num_layers=2, d_ff=48, **_):
        super().__init__()
        part = lambda **parts: nn.ModuleDict(parts)
        self.token_embedding = part(embedding=nn.Embedding(vocab_size, d_model))
        if position == "learned":
            self.pos_encoding = part(pos_embedding=nn.Embedding(40, d_model))
        self.blocks = nn.ModuleList(
            part(
                attention=Attention(d_model, num_heads, position),
                ffn=part(linear1=nn.Linear(d_model, d_ff), linear2=nn.Linear(d_ff, d_model)),
                norm1=nn.LayerNorm(d_model), norm2=nn.LayerNorm(d_model),
            )
            for _ in range(num_layers)
        )  # fmt: skip
        self.ln_f, self.output_proj = nn.LayerNorm(d_model), nn.Linear(d_model, vocab_size, bias=not tied)
        if tied:
            self.output_proj.weight = self.token_embedding["embedding"].weight

    def forward(self, tokens):
        x = self.token_embedding["embedding"](tokens) * self.ln_f.weight.numel() ** 0.5
        if hasattr(self, "pos_encoding"):
            x = x + self.pos_encoding["pos_embedding"](torch.arange(tokens.shape[1]))
        for b in self.blocks:
            x = x + b["attention"](b["norm1"](x))
            x = x + b["ffn"]["linear2"](F.gelu(b["ffn"]["linear1"](b["norm2"](x))))
        return self.output_proj(self.ln_f(x))


def old(position, tied=True):
    """The earlier model with weights that no other test's draws can change."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return Old(position, tied)


def trained(position, tied=True):
    """(the model after three updates, its optimizer): AdamW over what decays, then over biases and norms."""
    model = old(position, tied)
    draw = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for leaf in model.parameters():
            leaf.add_(torch.randn(leaf.shape, generator=draw) * 0.1)
    still = lambda name: any(word in name for word in ("bias", "norm", "ln_f"))
    named = list(model.named_parameters())
    groups = [
        {"params": [leaf for name, leaf in named if not still(name)], "weight_decay": 0.01},
        {"params": [leaf for name, leaf in named if still(name)], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-2)
    for _ in range(3):
        update(model, optimizer)
    return model, optimizer


def batch():
    tokens = torch.randint(300, (4, 21), generator=torch.Generator().manual_seed(6))
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def update(model, optimizer):
    optimizer.zero_grad()
    tokens, targets = batch()
    F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten()).backward()
    optimizer.step()


def save(path, model, optimizer=None, compiled=False, **config):
    weights = {f"_orig_mod.{n}" if compiled else n: leaf for n, leaf in model.state_dict().items()}
    facts = {"epoch": 3, "train_loss": 2.5, "config": SIZES | config, "model_state_dict": weights}
    if optimizer:
        facts["optimizer_state_dict"] = optimizer.state_dict()
        facts["scheduler_state_dict"] = {"last_epoch": 3, "_step_count": 4}
    torch.save(facts, path)
    return path


def load(path, root, **ways):
    run = save_run(open_checkpoint(path, tokenizer="cl100k:300", **ways), name="old", root=root)
    return run, checkpoint.load_model(run)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "own head"])
@pytest.mark.parametrize("position", POSITIONS)
@torch.no_grad()
def test_logits_are_the_old_models(position, tied, compiled, tmp_path):
    """Seen to fail without the factor sqrt(d), and with rotary pairs (i, i + half)."""
    model = old(position, tied)
    for leaf in model.parameters():
        leaf.add_(torch.randn(leaf.shape, generator=torch.Generator().manual_seed(leaf.numel())) * 0.1)
    config = {"position_encoding_type": position, "max_seq_len": 40} if position == "rope" else {}
    _, ours = load(save(tmp_path / "old.pt", model, compiled=compiled, **config), tmp_path)
    assert (ours.config.position, ours.config.tied, ours.config.head_bias) == (position, tied, not tied)
    assert ours.config.n_context == (5000 if position == "alibi" else 40)
    tokens = batch()[0]
    logits, _ = forward(ours.params, ours.config, tokens)
    torch.testing.assert_close(logits, model(tokens), rtol=1e-6, atol=1e-5)  # of logits up to 40


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "own head"])
@pytest.mark.parametrize("position", POSITIONS)
def test_the_next_update_is_the_old_ones(position, tied, tmp_path):
    """Seen to fail with the moments in the model's order alone: the k-th is another weight's."""
    model, optimizer = trained(position, tied)
    path = save(tmp_path / "old.pt", model, optimizer, position_encoding_type=position)
    run, ours = load(path, tmp_path)
    step = checkpoint.load_step(checkpoint.find_step(run))
    params = tree.map(lambda leaf: leaf.requires_grad_(), ours.params)
    moving = optim.make(params, param_spec(ours.config), optim.Options(lr=1e-2))
    optim.load_state_(moving, step.optimizer)
    loss(params, ours.config, *batch()).backward()
    moving.step_()
    before = copy.deepcopy(model.state_dict())
    update(model, optimizer)
    assert not torch.equal(before["ln_f.weight"], model.ln_f.weight)
    again = load_again(tmp_path, model)
    for name, leaf in tree.walk(params):
        noise = name.endswith("k.b") and position != "rope"  # it moves all scores alike: its gradient is rounding
        # a hundredth of a step: where a gradient nearly vanishes, Adam divides rounding by itself
        torch.testing.assert_close(leaf.detach(), again[name], rtol=0, atol=1e-2 if noise else 1e-4)
    source = checkpoint.read_run(run)["source"]
    assert (source["epoch"], source["train_loss"]) == (3, 2.5)
    assert source["scheduler_state_dict"] == {"last_epoch": 3, "_step_count": 4}


def load_again(folder, model):
    kind = next((b["attention"].position for b in model.blocks), "alibi")
    foreign = open_checkpoint(save(folder / "after.pt", model, position_encoding_type=kind), tokenizer="cl100k:300")
    return {name: leaf.make() for name, leaf in foreign.leaves.items()}


BROKEN = {
    "no config": (lambda f: f.pop("config"), "expected config, a dict by name, got NoneType"),
    "no weights": (lambda f: f.update(model_state_dict=[1]), "expected model_state_dict, a dict by name, got list"),
    "a missing weight": (lambda f: f["model_state_dict"].pop("ln_f.bias"), "missing ln_f.bias, not expected none"),
    "an extra one": (lambda f: f["model_state_dict"].update(x=torch.ones(1)), "missing none, not expected x"),
    "another shape": (lambda f: f["model_state_dict"].update({"ln_f.bias": torch.ones(7)}), "expected (32,), got (7,)"),
    "a NaN": (lambda f: f["model_state_dict"]["ln_f.bias"].fill_(torch.nan), "ln_f.bias: expected finite numbers"),
    "a width that is a text": (lambda f: f["config"].update(d_model="32"), "d_model: expected a whole number"),
    "a billion layers": (lambda f: f["config"].update(num_layers=10**9), "num_layers: expected tensors of 1,000"),
    "dropout of 2": (lambda f: f["config"].update(dropout=2.0), "dropout: expected a number in [0, 1), got 2.0"),
    "a width of two billion": (lambda f: f["config"].update(d_model=2**31), "expected at most 72,057,594,037,927,936"),
    "a sparse weight": (
        lambda f: f["model_state_dict"].update({"ln_f.bias": torch.ones(32).to_sparse()}),
        "ln_f.bias: expected a dense tensor with its numbers, got torch.sparse_coo",
    ),
    "a moment that is a text": (
        lambda f: f["optimizer_state_dict"]["state"][0].update(exp_avg="x"), "expected exp_avg (300, 32) of",
    ),
    "other positions": (lambda f: f["config"].update(position_encoding_type="xpos"), "encoding_type: expected one"),
    "moments of another model": (
        lambda f: f["optimizer_state_dict"]["state"].pop(0), "optimizer_state_dict: expected the states of",
    ),
    "a moment's shape": (
        lambda f: f["optimizer_state_dict"]["state"][0].update(exp_avg=torch.ones(3)), "expected exp_avg (300, 32) of",
    ),
}  # fmt: skip


@pytest.mark.parametrize("content", [b"", b"GGUF", b"{}", b"hello"], ids=str)
def test_what_is_no_checkpoint_is_called_so(content, tmp_path):
    """Seen to fail: a GGUF file was "Unsupported operand 0 Check the documentation of torch"."""
    (tmp_path / "old.pt").write_bytes(content)
    with pytest.raises(ValueError, match=r"old.pt: expected a .pt file as torch.save writes them, got another format"):
        open_checkpoint(tmp_path / "old.pt")


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_file_is_named(what, tmp_path):
    change, message = BROKEN[what]
    path = save(tmp_path / "old.pt", *trained("alibi"))
    content = torch.load(path, weights_only=True)
    change(content)
    torch.save(content, path)
    with pytest.raises(ValueError) as error:  # noqa: PT011 (the message is compared below)
        open_checkpoint(path, tokenizer="cl100k:300")
    assert message in str(error.value)


def test_a_file_without_moments_is_a_model_and_formats_convert(tmp_path):
    model = old("learned")
    foreign = open_checkpoint(save(tmp_path / "old.pt", model), tokenizer="cl100k:300", dtype="bfloat16")
    assert foreign.optimizer == {}
    assert {leaf.dtype for leaf in foreign.leaves.values()} == {torch.bfloat16}
    with pytest.raises(ValueError, match="tokenizer: expected at most 300 ids as the model has, got 400"):
        open_checkpoint(tmp_path / "old.pt", tokenizer="cl100k:400")
