"""What we measure ourselves against: the same model, written the usual way from torch.nn modules."""

import torch
import torch.nn.functional as F
from torch import nn


class Attention(nn.Module):
    """Causal self-attention through torch's fused kernel, q, k and v from one projection."""

    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.qkv = nn.Linear(config.d_model, 3 * config.d_model)
        self.out = nn.Linear(config.d_model, config.d_model)

    def forward(self, x):
        """x (B,T,C) -> (B,T,C)."""
        q, k, v = (part.unflatten(-1, (self.n_head, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1))
        z = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(z.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Pre-norm attention and MLP, each added to the residual stream."""

    def __init__(self, config):
        super().__init__()
        self.norm_1, self.attn = nn.LayerNorm(config.d_model), Attention(config)
        self.norm_2 = nn.LayerNorm(config.d_model)
        self.mlp = nn.Sequential(
            nn.Linear(config.d_model, config.d_ff), nn.GELU(), nn.Linear(config.d_ff, config.d_model)
        )

    def forward(self, x):
        """x (B,T,C) -> (B,T,C)."""
        x = x + self.attn(self.norm_1(x))
        return x + self.mlp(self.norm_2(x))


class ModuleGPT(nn.Module):
    """GPT-2's shape as modules: learned positions, tied head, mean cross-entropy over the whole (B,T,V)."""

    def __init__(self, config):
        super().__init__()
        self.embed = nn.Embedding(config.n_vocab, config.d_model)
        self.positions = nn.Embedding(config.n_context, config.d_model)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm_f = nn.LayerNorm(config.d_model)
        self.head = nn.Linear(config.d_model, config.n_vocab, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens, targets):
        """tokens, targets (B,T) -> mean nats per token."""
        x = self.embed(tokens) + self.positions(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm_f(x))
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    def load(self, params):
        """Take the weights of a gptcore model of the same shape, so that both compute the same loss."""
        own = {"embed.weight": params["embed"]["w"], "positions.weight": params["positions"]["w"]}
        own |= {"norm_f.weight": params["norm_f"]["w"], "norm_f.bias": params["norm_f"]["b"]}
        for i, p in enumerate(params["blocks"]):
            for kind in ("w", "b"):
                word = {"w": "weight", "b": "bias"}[kind]
                own[f"blocks.{i}.attn.qkv.{word}"] = torch.cat([p["attn"][n][kind] for n in ("q", "k", "v")])
                own[f"blocks.{i}.attn.out.{word}"] = p["attn"]["o"][kind]
                own[f"blocks.{i}.mlp.0.{word}"] = p["mlp"]["up"][kind]
                own[f"blocks.{i}.mlp.2.{word}"] = p["mlp"]["down"][kind]
                own |= {f"blocks.{i}.{norm}.{word}": p[norm][kind] for norm in ("norm_1", "norm_2")}
        missing, extra = self.load_state_dict(own | {"head.weight": params["embed"]["w"]}, strict=False)
        assert not missing, missing
        assert not extra, extra


def module_step(model, *, compiled, autocast):
    """One update as nanoGPT does it: autocast forward, backward, clip at 1.0, fused AdamW -> step(tokens, targets)."""
    decays = [p for p in model.parameters() if p.dim() > 1]
    rest = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": decays, "weight_decay": 0.01}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=3e-4, fused=True)
    run = torch.compile(model) if compiled else model

    def step(tokens, targets):
        with torch.autocast(tokens.device.type, dtype=torch.bfloat16, enabled=autocast):
            loss = run(tokens, targets)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step


def transformers_gpt2(params, config):
    """transformers' GPT-2 with a gptcore model's weights: text(prompt (1,T), n_new, **how) -> ids; None without it."""
    try:
        from transformers import GPT2Config, GPT2LMHeadModel
    except ImportError:
        return None
    shape = GPT2Config(
        vocab_size=config.n_vocab, n_positions=config.n_context, n_embd=config.d_model, n_layer=config.n_layer,
        n_head=config.n_head, activation_function={"gelu": "gelu", "gelu_tanh": "gelu_new"}[config.mlp],
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model = GPT2LMHeadModel(shape).eval().to(params["embed"]["w"].dtype)
    body = model.transformer
    copies = [(body.wte.weight, params["embed"]["w"]), (body.wpe.weight, params["positions"]["w"])]
    copies += _both(body.ln_f, params["norm_f"])
    for block, p in zip(body.h, params["blocks"], strict=True):
        copies += _both(block.ln_1, p["norm_1"]) + _both(block.ln_2, p["norm_2"])
        joined = {kind: torch.cat([p["attn"][name][kind] for name in "qkv"]) for kind in "wb"}
        layers = [
            (block.attn.c_attn, joined), (block.attn.c_proj, p["attn"]["o"]),
            (block.mlp.c_fc, p["mlp"]["up"]), (block.mlp.c_proj, p["mlp"]["down"]),
        ]  # fmt: skip
        for module, leaf in layers:  # stored as (in, out) there
            copies += _both(module, {"w": leaf["w"].T, "b": leaf["b"]})
    with torch.no_grad():
        for theirs, ours in copies:
            theirs.copy_(ours)

    def text(prompt, n_new, **how):
        mask = torch.ones_like(prompt)
        ids = model.generate(
            prompt, attention_mask=mask, min_new_tokens=n_new, max_new_tokens=n_new, pad_token_id=0, **how
        )
        return ids[0, prompt.shape[1] :].tolist()

    return text


def _both(module, leaf):
    return [(module.weight, leaf["w"]), (module.bias, leaf["b"])]
