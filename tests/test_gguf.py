"""GGUF: what is written has every tensor and number, and llama.cpp computes from it what we compute."""

import pytest
import tokenizers
import torch
from cases import random_params
from test_pretrained import ORACLES, oracle, train_words

from gptcore import tokenizer, tree
from gptcore.config import architecture
from gptcore.model import forward
from gptcore.pretrained import gguf as ours
from gptcore.pretrained import open_folder

gguf = pytest.importorskip("gguf", reason="the extra .[gguf] is not installed")
pytestmark = pytest.mark.oracle

SERVED = [name for name in ORACLES if name not in ("neox", "neox-sequential", "mpt", "gpt2-untied")]


def model_of(name, folder):
    oracle(name).save_pretrained(folder)
    train_words(folder)
    foreign = open_folder(folder)
    return tree.nest({name: leaf.make() for name, leaf in foreign.leaves.items()}), foreign.config, foreign.tokenizer


@pytest.mark.parametrize("name", SERVED)
def test_llama_cpp_computes_what_we_compute(name, tmp_path):
    """Seen to fail without the change of rows for Llama."""
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    params, config, words = model_of(name, tmp_path / "tiny")
    said = ours.export_file(params, config, words, tmp_path / "deep" / "tiny.gguf")
    assert "its tokenizer gives equal ids" in said
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["tiny.gguf"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", SERVED)
def test_every_tensor_is_there(name, dtype, tmp_path):
    params, config, words = model_of(name, tmp_path / "tiny")
    params = tree.map(lambda leaf: leaf.to(dtype), params)
    architecture = ours.find_class(ours.plain(params, config)[1], ours.KNOWN)
    ours.write_file(*ours.plain(params, config), words, tmp_path / "tiny.gguf", architecture)
    read = gguf.GGUFReader(tmp_path / "tiny.gguf")
    n_leaves = len(list(tree.walk(params)))
    fused = {"gpt2": 4 * config.n_layer}.get(name, 0)  # q, k, v and their biases are two tensors there
    assert len(read.tensors) == n_leaves - fused + (name == "llama3")
    embedding = next(tensor for tensor in read.tensors if tensor.name == "token_embd.weight")
    bits = params["embed"]["w"].contiguous().view(torch.uint8)
    assert torch.equal(torch.from_numpy(embedding.data.copy()).view(torch.uint8).flatten(), bits.flatten())
    texts = read.fields["tokenizer.ggml.tokens"]
    assert len(texts.data) == config.n_vocab


def test_wrong_logits_are_seen(tmp_path):
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    params, config, words = model_of("qwen2", tmp_path / "tiny")
    ours.export_file(params, config, words, tmp_path / "tiny.gguf")
    other = tree.map(lambda leaf: leaf * 1.1, params)
    with pytest.raises(ValueError, match=r"export: expected llama\.cpp's logits within 2% of their spread, got"):
        ours.compare(other, config, words, tmp_path / "tiny.gguf")


def test_our_own_runs_and_what_is_refused(tmp_path):
    sizes = {"n_vocab": 300, "n_context": 64, "n_layer": 2, "d_model": 64, "n_head": 4}
    words = tokenizer.named("cl100k:300")
    config = architecture("gpt2", **sizes)
    params = tree.map(lambda leaf: leaf * 0.3, random_params(config, torch.float32))
    said = ours.export_file(params, config, words, tmp_path / "own.gguf")
    assert "its GELU is the tanh approximation" in said
    with pytest.raises(ValueError, match="out: expected a new file, got"):
        ours.export_file(params, config, words, tmp_path / "own.gguf")
    neox = architecture("neox", **sizes)
    with pytest.raises(ValueError, match="export: expected a model that transformers has a class for"):
        ours.export_file(random_params(neox, torch.float32), neox, words, tmp_path / "neox.gguf")
    assert not (tmp_path / "neox.gguf").exists()
    with torch.no_grad():
        assert forward(params, config, torch.zeros(1, 3, dtype=torch.long))[0].isfinite().all()


def test_the_kinds_of_tokens_are_those_of_the_tokenizer(tmp_path):
    """A token that was added and isn't special is text, which a reader looks for before it cuts."""
    oracle("qwen2").save_pretrained(tmp_path)
    train_words(tmp_path)
    text = tmp_path / "tokenizer.json"
    model = tokenizers.Tokenizer.from_file(str(text))
    model.add_tokens(["<think>"])
    model.save(str(text))
    words, n_vocab = tokenizer.load(text), model.get_vocab_size() + 2
    writer = gguf.GGUFWriter(tmp_path / "words.gguf", "qwen2")
    ours.write_words(writer, words, n_vocab)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    field = gguf.GGUFReader(tmp_path / "words.gguf").fields["tokenizer.ggml.token_type"]
    kinds = [int(field.parts[at][0]) for at in field.data]
    found = {words.eot: "CONTROL", model.token_to_id("<think>"): "USER_DEFINED", n_vocab - 1: "UNUSED"}
    assert {id: gguf.TokenType(kinds[id]).name for id in found} == found
    assert kinds.count(gguf.TokenType.NORMAL) == n_vocab - 2 - len(words.special) - 1
