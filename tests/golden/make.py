"""What TransformerLens says about tiny random models of ours: one file an architecture, which ordinary tests only read.

    python tests/golden/make.py            writes tests/golden/*.safetensors and their SHA256SUMS
    python tests/golden/make.py --check    makes everything again and compares, writing nothing

Runs where transformer-lens==3.9.0 is installed (the last version whose HookedTransformer the files were made with) and
gptcore can be imported; nothing that gptcore computes goes into a file. A file holds the weights, rounded to bfloat16
and so exact in float32, and what the other side makes of them: every activation that both have, the logit lens, five
patching sweeps, gradients, copying and composition. Its metadata says the config, the versions and this script's code.
Axes: B rows, T tokens, L layers, H heads, D head width, C model width, V vocabulary.
"""

import hashlib
import json
import platform
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import click
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save

from gptcore import tree
from gptcore.config import architecture
from gptcore.model import activation_spec, head, param_spec

HERE = Path(__file__).parent
SIZES = {"n_vocab": 61, "n_context": 16, "n_layer": 2, "d_model": 32, "d_ff": 48, "n_head": 4}
CASES = {  # name -> (architecture, what differs from it)
    "gpt2": ("gpt2", {}),
    "alibi": ("alibi", {}),
    "llama": ("llama", {"n_kv_head": 2}),
    "qwen3": ("qwen3", {"n_kv_head": 2}),
    "phi": ("phi", {"rope_fraction": 0.5}),  # 0.4 of 8 numbers make no pairs
    "neox": ("neox", {}),
    "interleaved": ("llama", {"rope_interleaved": True, "rope_fraction": 0.75}),
}

SITES = {"embed": "hook_embed", "pos": "hook_pos_embed", "norm_f.scale": "ln_final.hook_scale"}
BLOCK_SITES = {  # below blocks.l on both sides
    "resid_pre": "hook_resid_pre", "resid_mid": "hook_resid_mid", "resid_post": "hook_resid_post",
    "norm_1.scale": "ln1.hook_scale", "norm_2.scale": "ln2.hook_scale",
    "attn.q": "attn.hook_q", "attn.k": "attn.hook_k", "attn.v": "attn.hook_v",
    "attn.q_rot": "attn.hook_rot_q", "attn.k_rot": "attn.hook_rot_k",
    "attn.scores": "attn.hook_attn_scores", "attn.pattern": "attn.hook_pattern", "attn.z": "attn.hook_z",
    "attn.out": "hook_attn_out", "mlp.pre": "mlp.hook_pre", "mlp.up": "mlp.hook_pre_linear",
    "mlp.post": "mlp.hook_post", "mlp.out": "hook_mlp_out",
}  # fmt: skip
SWEEPS = {  # our site -> the function of transformer_lens.patching
    "resid_pre": "get_act_patch_resid_pre",
    "resid_mid": "get_act_patch_resid_mid",
    "attn.out": "get_act_patch_attn_out",
    "mlp.out": "get_act_patch_mlp_out",
    "attn.z": "get_act_patch_attn_head_out_all_pos",
}


def config_of(name):
    """The config of a case."""
    arch, sizes = CASES[name]
    return architecture(arch, **SIZES | sizes)


def mapped(config) -> dict[str, str]:
    """{our site: the hook of TransformerLens} for every activation that both sides have, the logits apart."""
    blocks = {
        f"blocks.{i}.{ours}": f"blocks.{i}.{theirs}"
        for i in range(config.n_layer)
        for ours, theirs in BLOCK_SITES.items()
    }
    return {ours: theirs for ours, theirs in (SITES | blocks).items() if ours in activation_spec(config)}


def hooked(params, config):
    """The HookedTransformer with our weights: nothing folded, nothing centred, no token put before the text."""
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    c, rope = config, config.position == "rope"
    model = HookedTransformer(
        HookedTransformerConfig(
            n_layers=c.n_layer, d_model=c.d_model, n_ctx=c.n_context, n_heads=c.n_head, d_head=c.d_head, d_mlp=c.d_ff,
            d_vocab=c.n_vocab, eps=c.norm_eps, device="cpu", init_weights=False, default_prepend_bos=False,
            normalization_type={"layernorm": "LN", "rmsnorm": "RMS"}[c.norm],
            positional_embedding_type={"learned": "standard", "rope": "rotary", "alibi": "alibi"}[c.position],
            rotary_dim=c.d_rot if rope else None, rotary_base=c.rope_base, rotary_adjacent_pairs=c.rope_interleaved,
            act_fn={"gelu": "gelu", "gelu_tanh": "gelu_new", "swiglu": "silu"}[c.mlp], gated_mlp=c.mlp == "swiglu",
            n_key_value_heads=c.n_kv_head if c.n_kv_head != c.n_head else None, use_qk_norm=c.qk_norm,
            parallel_attn_mlp=c.block != "sequential",
        )
    )  # fmt: skip
    state = {"embed.W_E": params["embed"]["w"]} | named("ln_final", params["norm_f"])
    if not rope:  # with ALiBi it is there and goes unread
        state["pos_embed.W_pos"] = params.get("positions", {"w": torch.zeros(c.n_context, c.d_model)})["w"]
    state |= {{"w": "unembed.W_U", "b": "unembed.b_U"}[kind]: leaf.T for kind, leaf in head(params).items()}
    for i, p in enumerate(params["blocks"]):
        block = named("ln1", p["norm_1"]) | named("ln2", p.get("norm_2", p["norm_1"]))
        for kind, n_head in (("q", c.n_head), ("k", c.n_kv_head), ("v", c.n_kv_head)):
            grouped = "_" if n_head != c.n_head else ""
            leaf = {x: w.unflatten(0, (n_head, c.d_head)) for x, w in p["attn"][kind].items()}  # (H,D,C), (H,D)
            block[f"attn.{grouped}W_{kind.upper()}"] = leaf["w"].mT
            if "b" in leaf:
                block[f"attn.{grouped}b_{kind.upper()}"] = leaf["b"]
        block["attn.W_O"] = p["attn"]["o"]["w"].T.unflatten(0, (c.n_head, c.d_head))
        outputs = {"attn.b_O": p["attn"]["o"], "mlp.b_in": p["mlp"]["up"], "mlp.b_out": p["mlp"]["down"]}
        block |= {name: leaf["b"] for name, leaf in outputs.items() if "b" in leaf}
        inputs = {"up": "W_in", "gate": "W_gate", "down": "W_out"}
        block |= {f"mlp.{inputs[name]}": leaf["w"].T for name, leaf in p["mlp"].items()}
        if c.qk_norm:
            block |= {f"attn.{name}.w": p["attn"][name]["w"] for name in ("q_norm", "k_norm")}
        state |= {f"blocks.{i}.{name}": value for name, value in block.items()}
    wrong = model.load_state_dict(state, strict=False)  # buffers are missing, and biases that we do not have: zeros
    zeros = [name for name, value in model.named_parameters() if name in wrong.missing_keys and value.any()]
    if wrong.unexpected_keys or zeros:
        raise ValueError(f"weights: missing {zeros}, not expected {wrong.unexpected_keys}")
    return model.eval()


def named(prefix, leaves):
    """{"prefix.w": ..., "prefix.b": ...} of a norm."""
    return {f"{prefix}.{name}": leaf for name, leaf in leaves.items()}


def drawn(config, seed):
    """Random weights in bfloat16, {our name: leaf}, gains and biases too, and tokens clean and corrupt, each (2,8)."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda leaf: (leaf.mean + 0.2 * torch.randn(leaf.shape, generator=generator)).to(torch.bfloat16)
    weights = {name: draw(leaf) for name, leaf in param_spec(config).items()}
    clean = torch.randint(config.n_vocab, (2, 8), generator=generator)
    corrupt = clean.clone()
    corrupt[0, 2], corrupt[1, [1, 5]] = (clean[0, 2] + 1) % config.n_vocab, (clean[1, [1, 5]] + 7) % config.n_vocab
    return weights, clean, corrupt


def golden(name) -> dict[str, torch.Tensor]:
    """Everything that the file of a case holds.

    Patching puts the clean value (layer, position) or (layer, head) into the corrupt run, one pair at a time; what is
    stored is the difference of the logits of target and foil at the last position, not yet a recovery.
    """
    from transformer_lens import patching

    config = config_of(name)
    weights, clean, corrupt = drawn(config, seed=list(CASES).index(name))
    model = hooked(tree.nest({path: leaf.float() for path, leaf in weights.items()}), config)
    with torch.no_grad():
        logits, cache = model.run_with_cache(clean)
        lens = model.unembed(cache.accumulated_resid(apply_ln=True).flatten(0, 1)).unflatten(0, (-1, len(clean)))
        likely = logits[:, -1].topk(2).indices
        wrong = model(corrupt)[:, -1].argmax(-1)
    target, foil = likely[:, 0], torch.where(wrong == likely[:, 0], likely[:, 1], wrong)  # (B,)

    def difference(logits, rows=slice(None)):
        return (logits[:, -1].gather(-1, target[rows, None]) - logits[:, -1].gather(-1, foil[rows, None]))[:, 0]

    def sweep(function, row):
        pair = slice(row, row + 1)
        _, cache = model.run_with_cache(clean[pair])
        return getattr(patching, function)(model, corrupt[pair], cache, lambda logits: difference(logits, pair).sum())

    values = {f"weights/{path}": leaf for path, leaf in weights.items()}
    values |= {"clean": clean, "corrupt": corrupt, "target": target, "foil": foil, "lens": lens}  # lens (L+1,B,T,V)
    values |= {f"sites/{ours}": cache[theirs] for ours, theirs in mapped(config).items()} | {"sites/logits": logits}
    with torch.no_grad():
        values |= {"metric/clean": difference(logits), "metric/corrupt": difference(model(corrupt))}
        for site, function in SWEEPS.items():
            if f"blocks.0.{site}" in mapped(config):
                values[f"patch/{site}"] = torch.stack([sweep(function, row) for row in range(len(clean))])
        for space, matrix in (("vocabulary", model.W_E @ model.OV @ model.W_U), ("residual", model.OV)):
            eigenvalues = matrix.eigenvalues
            values[f"copying/{space}"] = eigenvalues.sum(-1).real / eigenvalues.abs().sum(-1)  # (L,H)
        values["composition/k"] = model.all_composition_scores("K")  # (L,H,L,H): earlier, later
    zs = {}
    hooks = [(f"blocks.{i}.attn.hook_z", lambda z, hook: zs.update({hook.name: z})) for i in range(config.n_layer)]
    metric = difference(model.run_with_hooks(corrupt, fwd_hooks=hooks)).sum()
    slopes = torch.autograd.grad(metric, list(zs.values()))
    values |= {f"gradients/blocks.{i}.attn.z": slope for i, slope in enumerate(slopes)}
    return {key: value.detach().clone(memory_format=torch.contiguous_format) for key, value in values.items()}


def code_digest() -> str:
    """The sha256 of what makes the values: this script without its opening words and its command."""
    source = Path(__file__).read_text(encoding="utf-8")
    makes = source[source.index("\nimport") : source.index("\n@click.command")]
    return hashlib.sha256(makes.encode()).hexdigest()


def about(path) -> dict:
    """What a file says of itself: config, versions, code. One entry, as several have no fixed order there."""
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["about"])


def apart(got, stored) -> dict[str, float]:
    """{key: largest difference} where it is above 1e-6 x max(1, largest value); inf where a key or shape differs."""
    found = {key: float("inf") for key in got.keys() ^ stored.keys()}
    for key in got.keys() & stored.keys():
        a, b = (torch.nan_to_num(x.double(), neginf=-1e9) for x in (got[key], stored[key]))
        known = b.abs().masked_fill(b == -1e9, 0)
        error = (a - b).abs().max().item() if a.shape == b.shape else float("inf")
        if error > 1e-6 * max(1.0, known.max().item()):
            found[key] = error
    return found


@click.command()
@click.option("--check", is_flag=True, help="Compare with the files that are there; write nothing.")
def main(check):
    """Make the golden files with TransformerLens."""
    torch.set_num_threads(1)
    versions = {package: version(package) for package in ("transformer-lens", "torch", "transformers", "safetensors")}
    told = {"versions": versions | {"python": platform.python_version()}, "code": code_digest()}
    sums, wrong = {}, 0
    for name in CASES:
        path, values = HERE / f"{name}.safetensors", golden(name)
        if check:
            differing = apart(values, load_file(path))
            click.echo(
                f"{path.name}: {len(values)} values, " + (f"differing: {differing}" if differing else "as stored")
            )
            wrong += bool(differing)
            continue
        words = json.dumps(told | {"config": asdict(config_of(name))}, sort_keys=True)
        data = save(values, metadata={"about": words})
        path.write_bytes(data)
        sums[path.name] = hashlib.sha256(data).hexdigest()
        click.echo(f"{path.name}: {len(values)} values, {len(data):,} bytes")
    if not check:
        lines = [f"{digest}  {file}\n" for file, digest in sorted(sums.items())]
        (HERE / "SHA256SUMS").write_text("".join(lines), encoding="utf-8")
    raise SystemExit(1 if wrong else 0)


if __name__ == "__main__":
    main()
