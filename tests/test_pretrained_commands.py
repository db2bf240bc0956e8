"""invoke pretrained, import and export, typed: a hub on this machine, broken and hostile files, and what is left."""

import hashlib
import http.server
import json
import pickle
import struct
import threading
import zipfile
from dataclasses import asdict

import pytest

pytest.importorskip("resource", reason="the commands run in forked processes")

import torch
from safetensors.torch import load_file, save_file
from test_pretrained import oracle, theirs, tokens_of, train_words
from typed import snapshot, typed

from gptcore import checkpoint, tree
from gptcore.config import architecture
from gptcore.model import forward, init_params
from gptcore.pretrained import hub
from gptcore.pretrained.weights import WHOLE
from gptcore.tokenizer import named

pytestmark = pytest.mark.oracle
SHA = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny Llama as transformers saves it."""
    path = tmp_path_factory.mktemp("shelf") / "tiny-llama"
    oracle("llama").save_pretrained(path)
    train_words(path)
    return path


def copy(folder, to, **changed):
    """The folder with some files changed: bytes, JSON, or None for a file that is left out."""
    to.mkdir(parents=True)
    for path in folder.iterdir():
        (to / path.name).write_bytes(path.read_bytes())
    for name, content in changed.items():
        path = to / {"weights": "model.safetensors", "index": "model.safetensors.index.json"}.get(name, f"{name}.json")
        if content is None:
            path.unlink()
        else:
            path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return to


def settings(folder, **changed):
    return json.loads((folder / "config.json").read_text(encoding="utf-8")) | changed


def refused(done, *words):
    """Exit 2 and one line that has the words; no traceback."""
    assert done.status == 2, done.stdout + done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in done.stderr
    return True


# ------------------------------------------------------------------------------------------------ there and back again


def test_a_folder_becomes_a_run_that_speaks_and_goes_out_again(folder, tmp_path):
    done = typed("pretrained", folder, "--run", "mine", cwd=tmp_path)
    assert done.status == 0, done.stderr
    assert "invoke generate --run mine" in done.stdout
    run = checkpoint.read_run(tmp_path / "runs/mine")
    assert run["source"] == {"architecture": "LlamaForCausalLM", "source": "tiny-llama"}
    said = typed("generate", "--run", "mine", "--prompt", "It was", "--max-new-tokens", "5", cwd=tmp_path)
    assert said.status == 0, said.stderr
    assert "It was" in said.stdout
    (tmp_path / "text.txt").write_text("The best of times, the worst of times.\n" * 40, encoding="utf-8")
    checkpoint.create_run(tmp_path / "runs", "newer", {"mode": "quick"}, named("byte"))
    listed = typed("runs", cwd=tmp_path).stdout
    assert 0 < listed.index("mine") < listed.index("newer")
    scored = typed("evaluate", "--run", "mine", "--data", "text.txt", cwd=tmp_path)
    assert scored.status == 0, scored.stderr
    assert refused(typed("train", "--resume", "mine", cwd=tmp_path), "which was imported", "invoke train --init mine")
    out = typed("export", "--run", "mine", "--out", "there/back", cwd=tmp_path)
    assert out.status == 0, out.stderr
    assert "transformers' logits differ by at most" in out.stdout
    assert out.stderr == ""
    again = typed("import", "there/back", cwd=tmp_path)
    assert again.status == 0, again.stderr
    loaded = [checkpoint.load_model(name, root=tmp_path / "runs") for name in ("mine", "back")]
    assert all(map(torch.equal, *(tree.leaves(each.params) for each in loaded)))
    assert refused(typed("export", "--run", "mine", "--out", "there/back", cwd=tmp_path), "out: expected a new folder")
    assert refused(typed("import", "there/back", cwd=tmp_path), "run: expected a new name, got back")


def test_what_no_class_computes_is_told_and_leaves_nothing(tmp_path):
    config = architecture("gpt2", n_vocab=257, n_layer=1, d_model=16, n_head=2, mlp="relu2", n_context=16)
    run = checkpoint.create_run(tmp_path / "runs", "odd", {"mode": "x", "config": asdict(config)}, named("byte"))
    params = init_params(config, torch.Generator().manual_seed(0))
    checkpoint.save_step(run, 0, params=params, optimizer={}, rng={}, state={})
    before = snapshot(tmp_path)
    assert refused(typed("export", "--run", "odd", cwd=tmp_path), "GPT2LMHeadModel comes nearest, without mlp='relu2'")
    assert snapshot(tmp_path) == before


# --------------------------------------------------------------------------------------------- broken and hostile files


def header(entries, body=b""):
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text + body


def tensors(folder, change):
    leaves = load_file(folder / "model.safetensors")
    change(leaves)
    return leaves


ABSURD = {
    "a header of 2^60 bytes": struct.pack("<Q", 2**60) + b"{}",
    "a header that is no JSON": struct.pack("<Q", 8) + b"not json",
    "a header that is cut": struct.pack("<Q", 500) + b'{"a":',
    "nothing": b"",
    "offsets beyond the end": header({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}),
    "offsets that overlap": header(
        {n: {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} for n in ("a", "b")}, bytes(8)
    ),
    "a shape of 2^62 rows": header({"a": {"dtype": "F32", "shape": [2**62, 4], "data_offsets": [0, 16]}}, bytes(16)),
    "a pickle": pickle.dumps({"a": 1}),
}


@pytest.mark.parametrize("what", ABSURD)
def test_an_absurd_file_is_one_line(what, folder, tmp_path):
    bad = copy(folder, tmp_path / "bad", weights=ABSURD[what])
    assert refused(typed("import", bad, cwd=tmp_path), "model.safetensors: expected a safetensors file, got")
    assert not (tmp_path / "runs").exists()


TENSORS = {
    "a wrong shape": (lambda t: t.update({"model.norm.weight": torch.ones(7)}), "norm.weight: expected (64,), got"),
    "a missing one": (lambda t: t.pop("model.layers.1.mlp.up_proj.weight"), "missing model.layers.1.mlp.up_proj"),
    "an extra one": (lambda t: t.update({"model.layers.2.x": torch.ones(1)}), "not expected model.layers.2.x"),
    "whole numbers": (lambda t: t.update({"model.norm.weight": torch.ones(64).int()}), "expected 16, 32 or 64 bits"),
    "a NaN": (lambda t: t["model.norm.weight"].fill_(torch.nan), "model.norm.weight: expected finite numbers"),
    "an infinity": (lambda t: t["lm_head.weight"][0].fill_(torch.inf), "lm_head.weight: expected finite numbers"),
}  # fmt: skip


@pytest.mark.parametrize("what", TENSORS)
def test_a_wrong_tensor_is_one_line(what, folder, tmp_path):
    change, message = TENSORS[what]
    bad = copy(folder, tmp_path / "bad")
    save_file(tensors(folder, change), bad / "model.safetensors")
    assert refused(typed("import", bad, cwd=tmp_path), message)
    assert not list((tmp_path / "runs").glob("*"))


SETTINGS = {
    "no type": ({"model_type": None}, "expected a model_type of gpt2, gpt_neox, phi, llama, qwen2, qwen3, mpt"),
    "another type": ({"model_type": "bert"}, "got 'bert'"),
    "a negative count": ({"num_hidden_layers": -1}, "num_hidden_layers: expected a whole number from 1 to"),
    "a count of a billion": ({"num_hidden_layers": 10**9}, "memory: expected"),
    "a width of two billion": ({"hidden_size": 2**31, "head_dim": 2**31}, "memory: expected"),
    "layers that are not there": ({"num_hidden_layers": 100}, "weights: expected tensors of 100 layers, got"),
    "a text": ({"hidden_size": "64"}, "hidden_size: expected a whole number from 1 to 2147483648, got '64'"),
    "true": ({"vocab_size": True}, "vocab_size: expected a whole number"),
    "heads that do not divide": ({"num_key_value_heads": 3}, "n_kv_head: expected a divisor of n_head=4, got 3"),
    "a wider model": ({"hidden_size": 128, "head_dim": 16}, "expected (300, 128), got (300, 64)"),
    "a norm of nothing": ({"rms_norm_eps": 0}, "rms_norm_eps: expected a number above 0, got 0"),
    "an endless context": ({"max_position_embeddings": 10**15}, "max_position_embeddings: expected a whole number"),
    "another activation": ({"hidden_act": "gelu"}, "hidden_act: expected 'silu', the only value that is served"),
    "a stretch we lack": ({"rope_parameters": {"rope_type": "yarn"}}, "rope_type: expected one of default, linear,"),
    "a stretch by zero": ({"rope_parameters": {"rope_type": "linear", "factor": 0}}, "factor: expected a number above"),
    "a list": ({"rope_parameters": [1]}, "rope_parameters: expected settings by name, got [1]"),
}  # fmt: skip


@pytest.mark.parametrize("what", SETTINGS)
def test_an_impossible_setting_is_one_line(what, folder, tmp_path):
    changed, message = SETTINGS[what]
    bad = copy(folder, tmp_path / "bad", config=settings(folder, **changed))
    assert refused(typed("pretrained", bad, cwd=tmp_path), message)


def test_a_file_larger_than_any_machine_is_one_line(folder, tmp_path):
    """A terabyte of holes. Seen to fail: the mapping's own error ended the command, before the memory was asked."""
    bad = copy(folder, tmp_path / "bad", config=settings(folder, vocab_size=2**31))
    shape, size = [2**28, 64], 2**36
    names = {name: {"dtype": "F32", "shape": shape, "data_offsets": [i * size, i * size + size]} for i, name in
             enumerate(f"x{i}" for i in range(16))}  # fmt: skip
    with open(bad / WHOLE, "wb") as file:
        file.write(header(names))
        file.truncate(file.tell() + 16 * size)
    assert refused(typed("import", bad, "--dtype", "float32", cwd=tmp_path), "memory: expected", "bfloat16 needs half")
    small = copy(folder, tmp_path / "small", weights=None)
    (bad / WHOLE).rename(small / WHOLE)
    assert refused(typed("import", small, cwd=tmp_path))
    (small / WHOLE).unlink()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"config": b"\xff\xfe"}, "config.json: expected a JSON file"),
        ({"config": b"[" * 100_000}, "config.json: expected a JSON file"),
        ({"config": [1]}, "config.json: expected a JSON object, got list"),
        ({"config": None}, "config.json: expected a JSON file, got No such file"),
        ({"tokenizer": None}, "expected tokenizer.json, or vocab.json and merges.txt"),
        ({"tokenizer": {"version": "1.0"}}, "tokenizer: expected a tokenizer.json"),
        ({"weights": None}, "expected model.safetensors or model.safetensors.index.json, got neither"),
        ({"index": {"weight_map": {}}}, "expected a weight_map"),
        ({"index": {"weight_map": {"a": "../tiny-llama/model.safetensors"}}}, "expected plain names"),
        ({"index": {"weight_map": {"a": "/etc/passwd"}}}, "expected plain names of .safetensors files"),
        ({"index": {"weight_map": {"a": 7}}}, "expected plain names of .safetensors files, got '7'"),
        ({"index": {"weight_map": {"a": "gone.safetensors"}}}, "gone.safetensors: expected a safetensors file"),
    ],
    ids=str,
)  # fmt: skip
def test_a_broken_folder_is_one_line(changed, message, folder, tmp_path):
    assert refused(typed("import", copy(folder, tmp_path / "bad", **changed), cwd=tmp_path), message)


class Payload:
    """Unpickled, it would make a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("where", ["file.pt", "folder/pytorch_model.bin"])
@pytest.mark.parametrize("plain", [True, False], ids=["a bare pickle", "torch's own archive"])
def test_a_pickle_with_a_payload_is_refused_and_does_not_run(where, plain, folder, tmp_path):
    """Seen to fail with weights_only=False: the file is there."""
    path, trace = tmp_path / where, tmp_path / "it-ran"
    if where.startswith("folder"):
        copy(folder, tmp_path / "folder", weights=None)
    content = {"model_state_dict": Payload(trace), "config": {}}
    if plain:
        path.write_bytes(pickle.dumps(content))
    else:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", pickle.dumps(content, protocol=2))
            archive.writestr("archive/version", "3\n")
            archive.writestr("archive/byteorder", "little")
    done = typed("import", path.parent if where.startswith("folder") else path, cwd=tmp_path)
    assert refused(done, "a pickle" if where.startswith("folder") else "which weights_only=True reads")
    assert not trace.exists()


def test_the_payload_of_that_test_would_run(tmp_path):
    pickle.loads(pickle.dumps(Payload(tmp_path / "it-ran")))
    assert (tmp_path / "it-ran").exists()


@pytest.mark.parametrize("what", ["nothing.pt", "text.pt", "list.pt", "cut.pt"])
def test_other_files_are_one_line(what, tmp_path):
    if what == "text.pt":
        (tmp_path / what).write_text("hello")
    if what == "list.pt":
        torch.save([1, 2], tmp_path / what)
    if what == "cut.pt":
        torch.save({"config": {}}, tmp_path / what)
        (tmp_path / what).write_bytes((tmp_path / what).read_bytes()[:300])
    assert refused(typed("import", what, cwd=tmp_path))


# --------------------------------------------------------------------------------------------- a hub on this machine


class Hub(http.server.BaseHTTPRequestHandler):
    """The hub's layout over one folder; `rules` says what goes wrong, `seen` what was asked."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *words):
        """Silence."""

    def do_HEAD(self):
        """Like do_GET, without the content."""
        self.do_GET(head=True)

    def do_GET(self, head=False):
        """The API, or a file, or what the rules say."""
        server, path = self.server, self.path.split("?")[0]
        server.seen.append((self.command, path, self.headers.get("Range")))
        statuses = server.rules.get("status", [])
        if statuses and server.rules.get("on", "") in path:
            status = statuses.pop(0)
            return self.answer(status, json.dumps({"error": "no"}).encode(), {"X-Error-Message": "no"})
        if path.startswith("/api/models/me/tiny"):
            files = [{"rfilename": p.name, "size": p.stat().st_size} for p in sorted(server.folder.iterdir())]
            about = {"id": "me/tiny", "sha": SHA, "siblings": files, "tags": ["license:mit"]}
            return self.answer(200, json.dumps(about).encode())
        file = server.folder / path.rsplit("/", 1)[-1]
        if not path.startswith(f"/me/tiny/resolve/{SHA}/") or not file.is_file():
            return self.answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        content = file.read_bytes()
        tags = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": SHA, "Accept-Ranges": "bytes"}
        if begin := int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").split("-")[0]):
            tags["Content-Range"] = f"bytes {begin}-{len(content) - 1}/{len(content)}"
        cut = server.rules.pop("cut", None) if not head and file.suffix == ".safetensors" else None
        self.answer(206 if begin else 200, content[begin:], tags, head, cut)

    def answer(self, status, content, headers=(), head=False, cut=None):
        """Send it; cut: only so many bytes, then hang up."""
        self.send_response(status)
        for name, value in (dict(headers) | {"Content-Length": str(len(content))}).items():
            self.send_header(name, value)
        self.end_headers()
        if not head and self.command != "HEAD":
            self.wfile.write(content[:cut] if cut else content)
        if cut:
            self.wfile.flush()
            self.close_connection = True


@pytest.fixture
def server(folder):
    """A hub in a thread."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as made:
        made.folder, made.rules, made.seen = folder, {}, []
        made.daemon_threads = True
        thread = threading.Thread(target=made.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        yield made
        made.shutdown()
        thread.join()


def ask(server, tmp_path, *words, **environment):
    """invoke pretrained, with that hub and an own cache."""
    place = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_address[1]}", "HF_HOME": str(tmp_path / "cache")}
    return typed("pretrained", *words, cwd=tmp_path, **place | {"HF_HUB_OFFLINE": "0"} | environment)


def test_a_model_of_the_hub_becomes_a_run_at_its_commit(server, folder, tmp_path):
    done = ask(server, tmp_path, "me/tiny", "--yes")
    assert done.status == 0, done.stderr
    assert "mit" in done.stdout
    assert "LlamaForCausalLM" in done.stdout
    run = checkpoint.read_run(tmp_path / "runs/tiny")
    assert run["source"] == {
        "architecture": "LlamaForCausalLM", "source": "me/tiny", "revision": SHA, "licence": "mit",
    }  # fmt: skip
    model, tokens = checkpoint.load_model("tiny", root=tmp_path / "runs"), tokens_of()
    with torch.no_grad():
        ours, _ = forward(model.params, model.config, tokens)
    torch.testing.assert_close(ours, theirs(folder, tokens), rtol=0, atol=1e-5)
    fetched = {path.rsplit("/", 1)[-1] for verb, path, _ in server.seen if verb == "GET" and "/resolve/" in path}
    assert fetched == {"config.json", "tokenizer.json", "model.safetensors"}
    server.seen.clear()
    again = ask(server, tmp_path, "me/tiny", "--yes", "--run", "offline", HF_HUB_OFFLINE="1")
    assert again.status == 0, again.stderr
    assert server.seen == []


def test_of_a_divided_model_only_the_files_that_its_index_names_are_fetched(server, folder, tmp_path):
    server.folder = copy(folder, tmp_path / "divided")
    leaves = load_file(folder / WHOLE)
    (server.folder / WHOLE).rename(server.folder / "consolidated.safetensors")
    halves = {"one.safetensors": sorted(leaves)[::2], "two.safetensors": sorted(leaves)[1::2]}
    for file, names in halves.items():
        save_file({name: leaves[name] for name in names}, server.folder / file)
    index = {"weight_map": {name: file for file, names in halves.items() for name in names}}
    (server.folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert ask(server, tmp_path, "me/tiny", "--yes").status == 0
    fetched = {path.rsplit("/", 1)[-1] for verb, path, _ in server.seen if verb == "GET" and path.endswith("tensors")}
    assert fetched == set(halves)
    (server.folder / "two.safetensors").unlink()
    message = "expected two.safetensors, which the index of me/tiny names, got no such file"
    assert refused(ask(server, tmp_path, "me/tiny", "--yes", "--run", "again"), message)


def test_a_cut_download_goes_on_where_it_stopped(server, folder, tmp_path):
    """The library takes ten MiB at a time, so the model is of 25 MB."""
    server.folder = copy(folder, tmp_path / "wide", config=settings(folder, intermediate_size=16_000))
    widen = lambda leaf: torch.cat([leaf] * 200, dim=leaf.shape.index(80)).contiguous()
    leaves = load_file(folder / "model.safetensors")
    save_file({n: widen(leaf) if 80 in leaf.shape else leaf for n, leaf in leaves.items()}, server.folder / WHOLE)
    server.rules = {"cut": 15 * 2**20}
    done = ask(server, tmp_path, "me/tiny", "--yes")
    assert done.status == 0, done.stderr
    ranges = [way for verb, path, way in server.seen if verb == "GET" and path.endswith(WHOLE)]
    assert ranges == [None, f"bytes={10 * 2**20}-"]
    model = checkpoint.load_model("tiny", root=tmp_path / "runs")
    assert torch.equal(model.params["blocks"][1]["mlp"]["up"]["w"][-80:], leaves["model.layers.1.mlp.up_proj.weight"])


def test_files_that_have_arrived_are_not_fetched_again(server, tmp_path):
    server.rules = {"status": [403] * 20, "on": "model.safetensors"}
    assert refused(
        ask(server, tmp_path, "me/tiny", "--yes"), "expected me/tiny's model.safetensors from the hub, got 403"
    )
    assert not (tmp_path / "runs").exists()
    server.rules, server.seen[:] = {}, []
    assert ask(server, tmp_path, "me/tiny", "--yes").status == 0
    fetched = {path.rsplit("/", 1)[-1] for verb, path, _ in server.seen if "/resolve/" in path}
    assert fetched == {"model.safetensors"}


@pytest.mark.parametrize(
    ("name", "rules", "message"),
    [
        ("me/tiny", {"status": [401] * 20}, "got 401: there is no such model, or it is not for everybody"),
        ("me/tiny", {"status": [403] * 20}, "got 403: its owner wants a licence accepted first"),
        ("me/tiny", {"status": [429] * 20}, "got 429: too many requests"),
        ("me/tiny", {"status": [500] * 20}, "got 500"),
        ("me/gone", {}, "expected me/gone from the hub, got 404"),
    ],
)  # fmt: skip
def test_what_the_hub_refuses_is_one_line(name, rules, message, server, tmp_path):
    server.rules = rules
    assert refused(ask(server, tmp_path, name, "--yes"), message)
    assert not (tmp_path / "runs").exists()


def test_nobody_there_offline_and_unasked(server, tmp_path):
    assert refused(ask(server, tmp_path, "me/tiny"), "yes: expected --yes where no terminal can be asked")
    assert refused(ask(server, tmp_path / "", "me/other", HF_HUB_OFFLINE="1"), "expected me/other in the hub's cache")
    assert refused(
        ask(server, tmp_path, "no-such-word"), "expected a folder, owner/model or one of phi-1, phi-1_5, phi-2"
    )
    server.server_address = ("127.0.0.1", 9)  # nobody listens there
    assert refused(ask(server, tmp_path, "me/tiny", "--yes"), "expected me/tiny from the hub, got")


def test_a_model_that_fits_no_machine_is_refused_before_its_download(server, folder, tmp_path):
    huge = settings(folder, hidden_size=2**17, intermediate_size=2**19, num_hidden_layers=200, head_dim=2**15)
    server.folder = copy(folder, tmp_path / "huge", config=huge)
    done = ask(server, tmp_path, "me/tiny", "--yes")
    assert refused(done, "memory: expected", "GB for this model, got")
    assert not [path for _, path, _ in server.seen if path.endswith(".safetensors")]


def test_a_billion_layers_are_counted_without_listing_them(server, folder, tmp_path):
    """Seen to fail: the list of a billion layers' leaves filled the memory before anything was refused."""
    server.folder = copy(folder, tmp_path / "deep", config=settings(folder, num_hidden_layers=10**9))
    assert refused(ask(server, tmp_path, "me/tiny", "--yes"), "memory: expected", "GB for this model, got")


def test_short_names_are_ids_of_the_hub():
    assert hub.repository_name("phi-2") == "microsoft/phi-2"
    assert hub.repository_name("me/tiny") == "me/tiny"
    for wrong in ("../x/y", "a/b/c", "/etc", "a b/c", ""):
        with pytest.raises(ValueError, match="pretrained: expected a folder, owner/model or one of"):
            hub.repository_name(wrong)


@pytest.mark.parametrize("command", ["import", "pretrained"])
def test_help_is_help_where_an_argument_is_required(command, tmp_path):
    """Seen to fail: Invoke took --help for the argument."""
    done = typed(command, "--help", cwd=tmp_path)
    assert done.status == 0
    assert "--dtype" in done.stdout
