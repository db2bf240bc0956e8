"""What we measure ourselves against: the same weights in torch.nn modules, in transformers and in llama.cpp.

Those that decode have logits(tokens), teacher forced, and text(prompt, n_new), a whole text; where one cannot be had,
why_not says why, so that a table without it says so too.
Axes: T tokens of one row, V vocabulary.
"""

import ctypes
import importlib.util
import logging
import tempfile
import weakref
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from gptcore.config import architecture
from gptcore.pretrained import export, gpt2
from gptcore.pretrained.gguf import tensors, write_numbers


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

    def params(self):
        """The weights as a gptcore tree: the way back."""
        pair = lambda layer: {"w": layer.weight.detach(), "b": layer.bias.detach()}

        def block(b):
            parts = zip("qkv", b.attn.qkv.weight.detach().chunk(3), b.attn.qkv.bias.detach().chunk(3), strict=True)
            attn = {n: {"w": w, "b": bias} for n, w, bias in parts} | {"o": pair(b.attn.out)}
            mlp = {"up": pair(b.mlp[0]), "down": pair(b.mlp[2])}
            return {"norm_1": pair(b.norm_1), "attn": attn, "norm_2": pair(b.norm_2), "mlp": mlp}

        tables = {"embed": {"w": self.embed.weight.detach()}, "positions": {"w": self.positions.weight.detach()}}
        return tables | {"blocks": [block(b) for b in self.blocks], "norm_f": pair(self.norm_f), "head": {}}


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

    step.optimizer = optimizer
    return step


# ----------------------------------------------------------------------------------------------------------- decoding

PACKAGES = {  # what a peer is made of: the module and what installs it
    "transformers": {"transformers": "transformers"},
    "llama.cpp": {"llama_cpp": "llama-cpp-python", "gguf": "gguf"},
}
GELUS = {"gelu": "gelu", "gelu_tanh": "gelu_new"}  # transformers' names; llama.cpp computes the second for either


def why_not(name, config) -> str:
    """Why this peer cannot hold a model of this config here; an empty string if it can."""
    free = ("n_vocab", "n_vocab_padded", "n_context", "n_layer", "d_model", "n_head", "d_ff", "norm_eps", "dropout")
    plain = architecture("gpt2", mlp=config.mlp, **{field: getattr(config, field) for field in free})
    if config != plain or config.mlp not in GELUS:
        return "the model is no GPT-2"
    if name == "llama.cpp" and (config.d_model % 32 or config.d_ff % 32):
        return "rows of its Q8_0 are multiples of 32"
    missing = [package for module, package in PACKAGES[name].items() if importlib.util.find_spec(module) is None]
    return f"not installed (pip install {' '.join(missing)})" if missing else ""


class Transformers:
    """transformers' GPT-2 with the weights of a gptcore model, in their dtype; its cache is its own."""

    def __init__(self, params, config):
        from transformers import GPT2Config, GPT2LMHeadModel

        params, config = export.plain(params, config)
        shape = GPT2Config(**gpt2.config_to(config), bos_token_id=None, eos_token_id=None)
        self.model = GPT2LMHeadModel(shape).eval().to(params["embed"]["w"].dtype)
        leaves = {name: leaf.make() for name, leaf in export.leaves_of(params, config, gpt2).items()}
        missing, extra = self.model.load_state_dict(leaves, strict=False)
        assert (missing, extra) == (["lm_head.weight"], []), "the head is the embedding, and all else has its weights"

    @torch.no_grad()
    def logits(self, tokens):
        """tokens (T,) -> (T,V), float32."""
        return self.model(tokens[None]).logits[0].float()

    def text(self, prompt, n_new, **how):
        """generate() as its users call it, greedy unless `how` says otherwise: prompt (T,) -> n_new ids."""
        how = {"do_sample": False} | how
        lengths = {"min_new_tokens": n_new, "max_new_tokens": n_new, "pad_token_id": 0}
        ids = self.model.generate(prompt[None], attention_mask=torch.ones_like(prompt[None]), **lengths, **how)
        return ids[0, len(prompt) :].tolist()


class LlamaCpp:
    """llama.cpp with the weights of a gptcore model in float32, bfloat16 or int8, which is its Q8_0.

    Through its C interface, because its Python class copies every step's logits. Keys and values are float32 beside
    float32 weights and float16 otherwise, its default.
    """

    def __init__(self, params, config, dtype, n_threads):
        import llama_cpp as c

        self.c, self.n_vocab = c, config.n_vocab
        logging.getLogger("llama-cpp-python").setLevel(logging.CRITICAL)  # it tells of every weight it loads
        c.llama_backend_init()
        how = c.llama_model_default_params()
        how.load_mode = c.LLAMA_LOAD_MODE_NONE  # into memory: the file is gone before anything is read
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "model.gguf")
            write_gguf(path, params, config, dtype)
            model = c.llama_model_load_from_file(bytes(path), how)
        assert model, "llama.cpp does not load its file"
        how = c.llama_context_default_params()
        how.n_ctx = how.n_batch = config.n_context
        how.n_threads = how.n_threads_batch = n_threads
        if dtype == torch.float32:
            how.type_k = how.type_v = c.GGML_TYPE_F32
        self.context = c.llama_init_from_model(model, how)
        assert self.context, "llama.cpp makes no context"
        self.memory = c.llama_get_memory(self.context)
        weakref.finalize(self, _free, c, model, self.context)

    def read(self, tokens):
        """Read these ids after those it has read -> the last one's logits (V,), valid until the next call."""
        ids = (self.c.llama_token * len(tokens))(*tokens)
        status = self.c.llama_decode(self.context, self.c.llama_batch_get_one(ids, len(tokens)))
        assert status == 0, f"llama_decode: {status}"
        first = self.c.llama_get_logits_ith(self.context, -1).contents
        row = (ctypes.c_float * self.n_vocab).from_address(ctypes.addressof(first))
        return torch.frombuffer(row, dtype=torch.float32)

    def rewind(self, n):
        """Forget all but the first n tokens."""
        self.c.llama_memory_seq_rm(self.memory, 0, n, -1)

    def logits(self, tokens):
        """tokens (T,) -> (T,V), float32, one after another as in decoding."""
        self.rewind(0)
        return torch.stack([self.read([token]).clone() for token in tokens.tolist()])

    def go_on(self, token, n_new):
        """Read a token, and then n_new - 1 that it finds most likely -> n_new ids."""
        drawn = [token]
        for _ in range(n_new):
            drawn.append(int(self.read(drawn[-1:]).argmax()))
        return drawn[1:]

    def text(self, prompt, n_new):
        """The greedy text: prompt (T,) -> n_new ids."""
        self.rewind(0)
        first = int(self.read(prompt.tolist()).argmax())
        return [first, *self.go_on(first, n_new - 1)]


def write_gguf(path, params, config, dtype):
    """A model of GPT-2's kind in llama.cpp's format: matrices as F32, BF16 or Q8_0, positions and vectors as F32."""
    import gguf

    types = gguf.GGMLQuantizationType
    kind = {torch.float32: types.F32, torch.bfloat16: types.BF16, torch.int8: types.Q8_0}[dtype]
    params, config = export.plain(params, config)
    writer = gguf.GGUFWriter(path, "gpt2")
    writer.add_tokenizer_model("no_vocab")
    write_numbers(writer, config)
    for name, leaf in tensors(params, config, gpt2):
        one = kind if leaf.dim() == 2 and name != "position_embd.weight" else types.F32
        writer.add_tensor(name, gguf.quants.quantize(leaf.float().contiguous().numpy(), one), raw_dtype=one)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _free(c, model, context):
    c.llama_free(context)
    c.llama_model_free(model)
