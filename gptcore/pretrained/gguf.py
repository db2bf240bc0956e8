"""A model of ours as one GGUF file, which llama.cpp and what is built on it load.

What you learn here: the file holds the tensors, the numbers of the config and the tokenizer, each under a name that the
reader knows for its architecture. It goes through transformers' names, for which the gguf package has the table. Two
traps: llama.cpp turns the pairs (2i, 2i+1) for Llama alone, so there rows change places, and its GELU is the tanh one.
"""

import contextlib
import importlib.util
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from gptcore import files, model, ops, tokenizer, tree
from gptcore.pretrained import gpt2, llama, phi, qwen2, qwen3
from gptcore.pretrained.export import find_class, plain
from gptcore.pretrained.table import pairs

KNOWN = {gpt2: "GPT2", llama: "LLAMA", phi: "PHI2", qwen2: "QWEN2", qwen3: "QWEN3"}
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # what a token is
N_PROBE = 48  # tokens whose logits are compared
SHARE = 0.02  # largest difference of a logit, as a share of the logits' standard deviation


def export_file(params, config, words, path) -> str:
    """Write a model as a GGUF file, load it with llama-cpp-python where that is installed, and say what was found.

    Raises ValueError where the gguf package is missing, where llama.cpp has no such architecture, if the file exists,
    and where logits differ by more than SHARE of their spread; the file appears once all that is past.
    """
    if importlib.util.find_spec("gguf") is None:
        raise ValueError("format: expected the gguf package, got none; pip install -e '.[gguf]' brings it")
    path = Path(path)
    if path.exists():
        raise ValueError(f"out: expected a new file, got {path}, which exists")
    check_words(words)
    params, config = plain(params, config)
    architecture = find_class(config, KNOWN)
    path.parent.mkdir(parents=True, exist_ok=True)
    new = files.unseen(path)
    try:
        write_file(params, config, words, new, architecture)
        said = compare(params, config, words, new)
        os.replace(new, path)
    finally:
        new.unlink(missing_ok=True)
    erf = config.mlp == "gelu"
    return said + ("; its GELU is the tanh approximation, a little different from this model's" if erf else "")


def check_words(words) -> None:
    """Raise ValueError for a tokenizer whose pieces are not bytes: the file would need scores that nobody has."""
    if json.loads(tokenizer.as_json(words))["decoder"]["type"] != "ByteLevel":
        raise ValueError(f"format: expected a byte-level tokenizer for a GGUF file, got {words.name}")


def write_file(params, config, words, path, architecture) -> None:
    """The numbers, the tokenizer, the tensors: vectors in float32, matrices as they are or in float32."""
    import gguf

    kind = getattr(gguf.MODEL_ARCH, KNOWN[architecture])
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[kind])
    write_numbers(writer, config)
    write_words(writer, words, config.n_vocab)
    for name, leaf in tensors(params, config, architecture):
        write_tensor(writer, name, leaf)
    if config.rope_scaling == "llama3":  # llama.cpp divides a pair's rate by its factor
        rate = config.rope_base ** (-torch.arange(0, config.d_rot, 2, dtype=torch.float32) / config.d_rot)
        settings = {"factor": config.rope_factor, "low": config.rope_low, "high": config.rope_high}
        slower = ops.llama3_stretch(rate, **settings, n_trained=config.rope_trained)
        write_tensor(writer, "rope_freqs.weight", rate / slower)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def tensors(params, config, architecture) -> Iterator[tuple[str, Tensor]]:
    """The weights of a plain model under GGUF's names, laid out as its readers expect them."""
    import gguf

    leaves = dict(tree.walk(params))
    names = gguf.get_tensor_name_map(getattr(gguf.MODEL_ARCH, KNOWN[architecture]), config.n_layer)
    for pair in pairs(architecture.TABLE, config):
        leaf = pair.how.join([leaves[name] for name in pair.ours], config)
        if architecture is llama and re.search(r"\.[qk]_proj\.", pair.theirs):
            leaf = _interleaved(leaf, config.d_head)
        yield names.get_name(pair.theirs, try_suffixes=(".weight", ".bias")), _as_stored(pair, leaf)


def _as_stored(pair, leaf):
    """GPT-2's matrices are (in, out) in transformers alone; GGUF has (out, in)."""
    inward = leaf.dim() == 2 and re.search(r"\.(c_attn|c_proj|c_fc)\.", pair.theirs)
    return leaf.T if inward else leaf


def _interleaved(leaf, d_head):
    """Rows of pairs (i, i + half) as pairs (2i, 2i+1)."""
    return leaf.unflatten(0, (-1, 2, d_head // 2)).transpose(1, 2).flatten(0, 2)


def write_tensor(writer, name, leaf) -> None:
    """One tensor under its name there; bfloat16, which numpy lacks, as its bytes."""
    import gguf

    leaf = leaf.detach().cpu()
    if leaf.dtype == torch.bfloat16 and leaf.dim() == 2:
        words = leaf.contiguous().view(torch.uint8).numpy()
        writer.add_tensor(name, words, raw_dtype=gguf.GGMLQuantizationType.BF16)
    else:
        writer.add_tensor(name, leaf.float().contiguous().numpy())


def write_numbers(writer, config) -> None:
    """The config, as the reader of every architecture expects it."""
    writer.add_context_length(config.n_context)
    writer.add_embedding_length(config.d_model)
    writer.add_block_count(config.n_layer)
    writer.add_feed_forward_length(config.d_ff)
    writer.add_head_count(config.n_head)
    writer.add_head_count_kv(config.n_kv_head)
    writer.add_key_length(config.d_head)
    writer.add_value_length(config.d_head)
    writer.add_vocab_size(config.n_vocab)
    (writer.add_layer_norm_rms_eps if config.norm == "rmsnorm" else writer.add_layer_norm_eps)(config.norm_eps)
    if config.position == "rope":
        writer.add_rope_dimension_count(config.d_rot)
        writer.add_rope_freq_base(config.rope_base)
    if config.rope_scaling == "linear":
        import gguf

        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(config.rope_factor)


def write_words(writer, words, n_vocab) -> None:
    """The tokenizer: every id's text, what kind it is, the merges, and the way text is cut."""
    parts = json.loads(tokenizer.as_json(words))
    known = {id: text for text, id in parts["model"]["vocab"].items()}
    known |= {token["id"]: token["content"] for token in parts["added_tokens"]}
    special = set(words.special.values())
    texts = [known.get(id, f"[unused {id}]") for id in range(n_vocab)]
    added = {token["id"] for token in parts["added_tokens"]}  # found in a text before it is cut, unlike the merged ones
    kinds = [
        CONTROL if id in special else USER_DEFINED if id in added else NORMAL if id in known else UNUSED
        for id in range(n_vocab)
    ]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(way_of_cutting(parts["pre_tokenizer"]))
    writer.add_token_list(texts)
    writer.add_token_types(kinds)
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in parts["model"]["merges"]])
    writer.add_bos_token_id(words.eot)
    writer.add_eos_token_id(words.eot)
    writer.add_add_bos_token(False)


def way_of_cutting(cut) -> str:
    """llama.cpp's name for a pre-tokenizer: it knows those of published models and no others."""
    text = json.dumps(cut)
    if r"\\p{N}{1,3}" in text:
        return "llama-bpe"
    return "qwen2" if r"(?i:'s|'t|" in text else "gpt-2"


@torch.no_grad()
def compare(params, config, words, path) -> str:
    """What llama.cpp makes of the file, beside us: a sentence. Raises ValueError where its logits differ."""
    if importlib.util.find_spec("llama_cpp") is None:
        return "written, not loaded: llama-cpp-python, which would, is not installed"
    import llama_cpp

    n_tokens = min(N_PROBE, config.n_context)
    tokens = torch.randint(
        min(words.n_vocab, config.n_vocab), (1, n_tokens), generator=torch.Generator().manual_seed(0)
    )
    wide = {"type_k": llama_cpp.GGML_TYPE_F32, "type_v": llama_cpp.GGML_TYPE_F32, "flash_attn": False}
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
        there = llama_cpp.Llama(str(path), n_ctx=n_tokens, n_batch=n_tokens, logits_all=True, verbose=False, **wide)
        there.eval(tokens[0].tolist())
        theirs = torch.from_numpy(there.scores[:n_tokens].copy())
        text = "The quick brown fox, 1234 times.\n\n  Naïve, isn't it?"
        ids = there.tokenize(text.encode(), add_bos=False, special=False)
        there.close()
    ours, _ = model.forward(tree.map(lambda leaf: leaf.float().cpu(), params), config, tokens)
    share = ((ours[0] - theirs).abs().max() / ours.std()).item()
    if not share <= SHARE:
        raise ValueError(f"export: expected llama.cpp's logits within {SHARE:.0%} of their spread, got {share:.1%}")
    same = "gives equal ids" if ids == words.encode(text) else "cuts text in another way, ids may differ"
    return f"llama.cpp's logits differ by at most {share:.2%} of their spread, its tokenizer {same}"
