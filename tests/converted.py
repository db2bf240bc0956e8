"""Models of transformers with our weights: tiny ones from a config, nothing downloaded.

A family is a row: its config's own words, and where each of our modules lies. Ours are x w^T + b as torch's Linear; the
few that lie otherwise, GPT-2's transposed and joint ones and NeoX's, joint head by head, have a line each.
"""

from typing import NamedTuple

import torch

from gptcore import tree


class Family(NamedTuple):
    """The class of its models, its config's words beyond the common ones, and its modules; {i} is the layer."""

    model: str
    words: dict
    modules: dict


LLAMA = {
    "embed": "model.embed_tokens", "norm_f": "model.norm", "norm_1": "model.layers.{i}.input_layernorm",
    "attn.q": "model.layers.{i}.self_attn.q_proj", "attn.k": "model.layers.{i}.self_attn.k_proj",
    "attn.v": "model.layers.{i}.self_attn.v_proj", "attn.o": "model.layers.{i}.self_attn.o_proj",
    "norm_2": "model.layers.{i}.post_attention_layernorm", "mlp.gate": "model.layers.{i}.mlp.gate_proj",
    "mlp.up": "model.layers.{i}.mlp.up_proj", "mlp.down": "model.layers.{i}.mlp.down_proj",
}  # fmt: skip
FAMILIES = {
    "gpt2": Family("GPT2LMHeadModel", {"activation_function": "gelu"}, {
        "embed": "transformer.wte", "positions": "transformer.wpe", "norm_f": "transformer.ln_f",
        "norm_1": "transformer.h.{i}.ln_1", "attn.qkv": "transformer.h.{i}.attn.c_attn",
        "attn.o": "transformer.h.{i}.attn.c_proj", "norm_2": "transformer.h.{i}.ln_2",
        "mlp.up": "transformer.h.{i}.mlp.c_fc", "mlp.down": "transformer.h.{i}.mlp.c_proj",
    }),
    "llama": Family("LlamaForCausalLM", {}, LLAMA),
    "qwen3": Family("Qwen3ForCausalLM", {}, LLAMA | {
        "attn.q_norm": "model.layers.{i}.self_attn.q_norm", "attn.k_norm": "model.layers.{i}.self_attn.k_norm",
    }),
    "phi": Family("PhiForCausalLM", {"partial_rotary_factor": 0.4, "hidden_act": "gelu_new"}, LLAMA | {
        "norm_f": "model.final_layernorm", "attn.o": "model.layers.{i}.self_attn.dense",
        "mlp.up": "model.layers.{i}.mlp.fc1", "mlp.down": "model.layers.{i}.mlp.fc2",
    }),
    "neox": Family("GPTNeoXForCausalLM", {"rotary_pct": 0.25, "hidden_act": "gelu"}, {
        "embed": "gpt_neox.embed_in", "norm_f": "gpt_neox.final_layer_norm",
        "norm_1": "gpt_neox.layers.{i}.input_layernorm", "norm_2": "gpt_neox.layers.{i}.post_attention_layernorm",
        "attn.qkv": "gpt_neox.layers.{i}.attention.query_key_value", "attn.o": "gpt_neox.layers.{i}.attention.dense",
        "mlp.up": "gpt_neox.layers.{i}.mlp.dense_h_to_4h", "mlp.down": "gpt_neox.layers.{i}.mlp.dense_4h_to_h",
    }),
}  # fmt: skip
JOINT = {"gpt2": False, "neox": True}  # whose q, k and v are one matrix: head by head?


def in_transformers(family, params, config):
    """transformers' causal language model of a family with our weights, attention eager so that patterns come out."""
    import transformers

    name, words, modules = FAMILIES[family]
    made = getattr(transformers, name)
    sizes = {
        "vocab_size": config.n_vocab, "hidden_size": config.d_model, "num_hidden_layers": config.n_layer,
        "num_attention_heads": config.n_head, "max_position_embeddings": config.n_context,
        "bos_token_id": None, "eos_token_id": None, "tie_word_embeddings": config.tied,
    }  # fmt: skip
    if family != "gpt2":  # the widths of its heads and MLP follow from d_model
        sizes |= {"intermediate_size": config.d_ff, "num_key_value_heads": config.n_kv_head, "head_dim": config.d_head}
        sizes |= {"rms_norm_eps": config.norm_eps, "layer_norm_eps": config.norm_eps}
    model = made(made.config_class(**sizes | words, attn_implementation="eager")).eval()
    head = next(name for name, module in model.named_modules() if module is model.get_output_embeddings())
    modules, state = modules | {"head": head}, {}
    for path, leaf in tree.walk(joined(params, config, JOINT[family]) if family in JOINT else params):
        _, i, rest = path.split(".", 2) if path.startswith("blocks.") else ("", "", path)
        module, kind = rest.rsplit(".", 1)
        if family == "gpt2" and kind == "w" and module.startswith(("attn", "mlp")):
            leaf = leaf.T  # its Conv1D is (in, out)
        state[f"{modules[module].format(i=i)}.{'weight' if kind == 'w' else 'bias'}"] = leaf
    missing, extra = model.load_state_dict(state, strict=False)
    lost = set(missing) & {name for name, _ in model.named_parameters()}  # a tied head is no parameter of its own there
    if lost or extra:
        raise ValueError(f"weights: missing {sorted(lost)}, not expected {extra}")
    return model


def joined(params, config, by_head):
    """Our weights with q, k and v of each block as one leaf: after each other, or head by head."""

    def block(p):
        attn = {"qkv": {}, "o": p["attn"]["o"]}
        for kind in p["attn"]["q"]:
            parts = [p["attn"][name][kind] for name in "qkv"]
            heads = torch.stack([part.unflatten(0, (config.n_head, config.d_head)) for part in parts], dim=1)
            attn["qkv"][kind] = heads.flatten(0, 2) if by_head else torch.cat(parts)
        return p | {"attn": attn}

    return params | {"blocks": [block(p) for p in params["blocks"]]}
