"""Tokenizers: any text comes back, special strings stay text, streams keep characters whole, identity is checked."""

import hashlib
import json
import random

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from gptcore import tokenizer
from tools import doctor

SAMPLE = (
    "Return the number of items in a container. If the container is empty, return 0.\n\n"
    "    >>> len([1, 22, 333])\n    3\n\n" + "Ünïcödé, 日本語, 👩‍👩‍👧 and 1234567 numbers. " * 3
) * 20
ANY_TEXT = st.text(st.characters(codec=None), max_size=200)  # surrogates included
SPECIAL = "<|endoftext|> <|fim_prefix|><|endofprompt|> </s>"
NAMES = ["bpe:320", "byte", "cl100k_base", "cl100k:2048", "imported"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """One of each kind by name; "imported" is a foreign byte-level file with its own special tokens."""
    from tokenizers import decoders, models, pre_tokenizers, trainers

    model = tokenizers.Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    special = ["</s>", "<|fim_prefix|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    model.train_from_iterator(
        [SAMPLE],
        trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    model.add_tokens(["    "])  # not special: ordinary text may produce it
    path = tmp_path_factory.mktemp("imported") / "tokenizer.json"
    model.save(str(path))
    found = {name: tokenizer.named(name, [SAMPLE]) for name in NAMES if name != "imported"}
    return found | {"imported": tokenizer.named(str(path))}


def utf8(text):
    return text.encode("utf-8", "replace")


@pytest.mark.parametrize("name", NAMES)
@settings(deadline=None, max_examples=60)
@given(text=ANY_TEXT)
def test_any_text_comes_back(made, name, text):
    """Lone surrogates read as "?". Seen to fail without the replacement in _parts (U+FFFD, or a TypeError)."""
    it = made[name]
    ids = it.encode(text)
    assert it.decode_bytes(ids) == utf8(text)
    assert it.decode(ids) == utf8(text).decode()
    assert it.n_bytes[ids].sum() == len(utf8(text))
    assert not set(ids) & set(it.special.values())


@settings(deadline=None, max_examples=60)
@given(data=st.binary(max_size=100))
def test_bytes_come_back_through_byte(data):
    it = tokenizer.named("byte")
    assert it.n_vocab == 257
    assert it.decode_bytes(list(data)) == data
    assert it.decode(list(data)) == data.decode("utf-8", "replace")
    assert it.encode(data.decode("latin-1")) == list(data.decode("latin-1").encode())


@pytest.mark.parametrize("name", NAMES)
@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_a_stream_joins_to_what_decode_makes(made, name, data):
    """For any ids, broken characters included. Seen to fail when feed decoded each token by itself."""
    it = made[name]
    ids = data.draw(st.lists(st.integers(0, it.n_vocab - 1), max_size=40))
    stream = it.stream()
    assert "".join([stream.feed(id) for id in ids] + [stream.end()]) == it.decode(ids)


def test_half_a_character_waits():
    stream = tokenizer.named("byte").stream()
    assert [stream.feed(byte) for byte in "a👍".encode()] == ["a", "", "", "", "👍"]
    assert stream.end() == ""
    assert [stream.feed(byte) for byte in "👍".encode()[:2]] == ["", ""]
    assert stream.end() == "�"
    assert stream.feed(65) == "A"  # afresh after the end


@pytest.mark.parametrize("name", NAMES)
def test_special_strings_are_text(made, name):
    """Seen to fail with tiktoken's encode (raises) and without encode_special_tokens (special ids)."""
    it = made[name]
    ids = it.encode(SPECIAL)
    assert it.decode(ids) == SPECIAL
    assert not set(ids) & set(it.special.values())
    assert it.decode([it.eot, *ids, it.eot]) == SPECIAL  # special ids add nothing
    assert it.n_bytes[it.eot] == 0


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_is_its_texts(made, name):
    texts = ["", "one", SAMPLE, SPECIAL, "\ud800"]
    assert made[name].encode_batch(texts) == [made[name].encode(text) for text in texts]
    assert made[name].encode_batch([]) == []


@pytest.mark.parametrize("name", NAMES)
def test_an_id_outside_the_vocabulary_is_refused(made, name):
    it = made[name]
    for id in (-1, it.n_vocab):
        with pytest.raises(ValueError, match=rf"^id: expected 0 to {it.n_vocab - 1}, got {id}$"):
            it.decode([id])
        with pytest.raises(ValueError, match=r"^id: expected"):
            it.stream().feed(id)


@pytest.mark.parametrize("name", ["bpe:320", "cl100k_base", "imported"])
@pytest.mark.parametrize(
    "text", [" " * 10**6 + "x", "\t" * 10**6 + "y", "a" * 200_000], ids=["spaces", "tabs", "letters"]
)
def test_endless_runs_do_not_crash(made, name, text):
    """tiktoken's regex engine overflows its stack on long white space. Seen to fail (a panic) without the cuts."""
    assert made[name].decode(made[name].encode(text)) == text


def test_trained_ids_are_the_same_through_both_libraries(made, tmp_path):
    it = made["bpe:320"]
    it.save(tmp_path / "tokenizer.json")
    peer = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    rng = random.Random(1)
    letters = "".join(chr(rng.choice([rng.randrange(32, 127), rng.randrange(0x3000, 0xD800)])) for _ in range(20_000))
    ids = [rng.randrange(it.eot) for _ in range(2_000)]  # neighbours that no text of the training made
    for text in (SAMPLE, letters, it.decode(ids)):
        assert it.encode(text) == peer.encode(text).ids


def test_training_is_determined_by_the_text():
    one, two = tokenizer.train_bpe([SAMPLE], 320), tokenizer.train_bpe(iter([SAMPLE]), 320)
    assert one.fingerprint == two.fingerprint
    assert one.fingerprint != tokenizer.train_bpe([SAMPLE], 319).fingerprint
    assert (one.name, one.n_vocab, one.eot) == ("bpe:320", 320, 319)


def test_too_little_text_gives_fewer_ids():
    it = tokenizer.named("bpe:4096", ["abcabc"])
    assert 257 < it.n_vocab < 300
    assert it.name == f"bpe:{it.n_vocab}"
    assert tokenizer.named("bpe:300", []).n_vocab == 257


def test_where_the_two_libraries_differ_the_trainer_encodes():
    """{1,3}+ is possessive for tiktoken and a nested repeat for `tokenizers`: the probe notices, and a load knows.

    Seen to fail without the probe: tiktoken's ids then belong to merges that it never made.
    """
    trap = r"\p{L}+|\p{N}{1,3}+|[^\p{L}\p{N}]+"
    text = "1234567 1234567 1234567 " * 50
    trained = tokenizer.train_bpe([text], 300, trap)
    peer = tokenizers.Tokenizer.from_str(trained.json)
    for it in (trained, tokenizer.parse(trained.json, "again", trap)):
        assert it.encode(text) == peer.encode(text).ids


@pytest.mark.parametrize("name", NAMES)
def test_save_and_load(made, name, tmp_path):
    it, path = made[name], tmp_path / "tokenizer.json"
    it.save(path)
    again = tokenizer.load(path)
    assert [file.name for file in tmp_path.iterdir()] == ["tokenizer.json"]
    assert (again.fingerprint, again.eot, again.tokens) == (it.fingerprint, it.eot, it.tokens)
    assert again.encode(SAMPLE + SPECIAL) == it.encode(SAMPLE + SPECIAL)
    assert again.name == (str(path) if name == "imported" else it.name)


def test_a_changed_named_tokenizer_is_refused(tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps({"name": "byte", "fingerprint": "0" * 64}), encoding="utf-8")
    with pytest.raises(ValueError, match=f"^tokenizer byte: expected fingerprint {'0' * 64}, got [0-9a-f]{{64}}$"):
        tokenizer.load(path)


def test_cl100k_base_is_the_published_one():
    it = tokenizer.named("cl100k_base")
    assert (it.n_vocab, it.eot, len(it.special)) == (100_277, 100_257, 5)
    assert it.encode("hello world") == [15339, 1917]
    assert it.encode("1234567") == [4513, 10961, 22]
    assert it.decode([100_256, 100_261]) == ""  # gaps in the numbering
    assert it.n_bytes.shape == (100_277,)


def test_a_prefix_of_cl100k_is_a_complete_bpe():
    it = tokenizer.named("cl100k:2048")
    assert (it.n_vocab, it.eot) == (2048, 2047)
    known = set(it.tokens)
    for token in it.tokens[256:-1]:
        assert any(token[:cut] in known and token[cut:] in known for cut in range(1, len(token)))


def test_without_the_file_the_message_names_a_way_out(tmp_path, monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # the discard port: refused at once
    with pytest.raises(ValueError, match=r"^tokenizer: expected nothing's file in .*--tokenizer bpe:4096"):
        tokenizer._file("nothing", "nothing.tiktoken", "0" * 64)
    assert not list(tmp_path.iterdir())


def test_doctor_looks_where_the_tokenizer_does(tmp_path, monkeypatch):
    """Seen to fail: told to keep no cache, the tokenizer looks in none, and doctor named the next folder's."""
    name = hashlib.sha1((tokenizer.FILES + tokenizer.CL100K_FILE[0]).encode()).hexdigest()
    (tmp_path / name).write_bytes(b"IQ== 0\n")
    monkeypatch.setenv("DATA_GYM_CACHE_DIR", str(tmp_path))
    for folder in ("", str(tmp_path)):  # no cache, and a file that is another
        monkeypatch.setenv("TIKTOKEN_CACHE_DIR", folder)
        found = tokenizer.find_file(*tokenizer.CL100K_FILE)
        assert doctor.cl100k_base() == (f"in {found.parent}" if found else "") != f"in {tmp_path}"


def test_tiktokens_cache_comes_first_and_is_verified(tmp_path, monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    cached = tmp_path / hashlib.sha1((tokenizer.FILES + "tiny.tiktoken").encode()).hexdigest()
    cached.write_bytes(b"IQ== 0\nIg== 1\n")
    sha256 = hashlib.sha256(cached.read_bytes()).hexdigest()
    assert tokenizer._ranks("tiny", "tiny.tiktoken", sha256) == [b"!", b'"']
    cached.write_bytes(b"IQ== 0\nIg== 2\n")
    with pytest.raises(ValueError, match="expected tiny's file"):
        tokenizer._ranks("tiny", "tiny.tiktoken", sha256)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("bpe", "tokenizer: expected bpe:N, .* got 'bpe'"),
        ("bpe:x", "got 'bpe:x'"),
        ("word", "got 'word'"),
        ("bpe:256", "tokenizer: expected at least 257 ids .* got 256"),
        ("cl100k:256", "tokenizer: expected cl100k:N with N from 257 to 100257, got 256"),
        ("cl100k:100258", "got 100258"),
        ("nowhere/tokenizer.json", "tokenizer: expected a tokenizer.json, got nowhere/tokenizer.json: .*No such file"),
    ],
)
def test_wrong_names_are_refused(name, message):
    with pytest.raises(ValueError, match=message):
        tokenizer.named(name, ["text"])


def test_bpe_needs_text():
    with pytest.raises(ValueError, match=r"^texts: expected the text to train bpe:300 on, got none$"):
        tokenizer.named("bpe:300")


def words_without_end():
    return tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, "a"))


def bytes_without_end():
    model = tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0}, []))
    model.decoder = tokenizers.decoders.ByteLevel()
    return model


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "tokenizer: expected a tokenizer.json, got .*tokenizer.json"),
        ("{}", "tokenizer: expected a tokenizer.json, got .*tokenizer.json"),
        (words_without_end, "expected a byte-level BPE, got a WordLevel decoded by None"),
        (bytes_without_end, "as a special token, got none in .*tokenizer.json"),
    ],
)
def test_files_that_are_no_tokenizer_of_ours_are_refused(content, message, tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text(content if isinstance(content, str) else content().to_str(), encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        tokenizer.load(path)
