"""Folders of the Hugging Face hub: which files a model needs, and fetching them.

What you learn here: a name such as main moves, a commit does not. The hub is asked once which commit a name means
today; every file then comes from that commit, and the run remembers it. Where a connection breaks, the hub's library
goes on with the rest of the file; where the command is stopped, the files that have arrived are kept. Nothing that
could run is ever fetched.
"""

import contextlib
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from gptcore.pretrained.weights import INDEX, WHOLE, weight_files

NAMES = {
    "phi-1": "microsoft/phi-1", "phi-1_5": "microsoft/phi-1_5", "phi-2": "microsoft/phi-2",
    "gpt2": "openai-community/gpt2", "gpt2-medium": "openai-community/gpt2-medium",
    "gpt2-large": "openai-community/gpt2-large", "gpt2-xl": "openai-community/gpt2-xl",
    **{f"pythia-{size}": f"EleutherAI/pythia-{size}" for size in ("14m", "70m", "160m", "410m", "1b", "1.4b", "2.8b")},
    **{f"smollm2-{size.lower()}": f"HuggingFaceTB/SmolLM2-{size}" for size in ("135M", "360M", "1.7B")},
    "qwen2-0.5b": "Qwen/Qwen2-0.5B", "qwen2.5-0.5b": "Qwen/Qwen2.5-0.5B", "qwen2.5-1.5b": "Qwen/Qwen2.5-1.5B",
    "qwen3-0.6b": "Qwen/Qwen3-0.6B-Base", "qwen3-1.7b": "Qwen/Qwen3-1.7B-Base",
}  # fmt: skip
SMALL = ("config.json", "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", INDEX)


class Repository(NamedTuple):
    """A model in the hub at one commit: the files it needs here, each with its bytes."""

    name: str  # owner/model
    revision: str  # the commit
    licence: str
    files: dict[str, int]

    @property
    def n_bytes(self) -> int:
        """Bytes to download."""
        return sum(self.files.values())


def repository_name(name) -> str:
    """The owner/model that a short name or a hub id means. Raises ValueError for other words."""
    if name in NAMES:
        return NAMES[name]
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name):
        raise ValueError(f"pretrained: expected a folder, owner/model or one of {', '.join(NAMES)}, got {name}")
    return name


def find(name, revision=None) -> Repository:
    """Ask the hub what a model is made of at a revision (a branch, tag or commit), offline its cache.

    Raises ValueError in one line for a model that is not there or not for everybody, and where nobody answers.
    """
    import huggingface_hub as hub
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return _cached(name, revision)
    with _told(name):
        info = hub.HfApi().model_info(name, revision=revision, files_metadata=True, timeout=30)
    sizes = {file.rfilename: file.size or 0 for file in info.siblings or ()}
    if "config.json" not in sizes or sizes.keys().isdisjoint({WHOLE, INDEX}):
        raise ValueError(f"pretrained: expected config.json and safetensors in {name}, got {len(sizes)} files without")
    weights = [WHOLE]
    if WHOLE not in sizes:  # the index tells; a repository may hold the same weights in other files beside
        with _told(f"{name}'s {INDEX}"):
            index = hub.hf_hub_download(name, INDEX, revision=info.sha)
        weights = weight_files(Path(index).parent)
    if missing := sorted(set(weights) - sizes.keys()):
        raise ValueError(f"pretrained: expected {missing[0]}, which the index of {name} names, got no such file")
    wanted = [file for file in SMALL if file in sizes and (file != INDEX or weights != [WHOLE])]
    licence = (info.card_data or {}).get("license") or next(
        (tag.removeprefix("license:") for tag in info.tags or () if tag.startswith("license:")), "not stated"
    )
    return Repository(name, info.sha, str(licence), {file: sizes[file] for file in (*wanted, *sorted(weights))})


def _cached(name, revision):
    """The model as the hub's cache has it: the commit that was fetched last, or the one that revision begins."""
    from huggingface_hub import constants

    found = Path(constants.HF_HUB_CACHE, f"models--{name.replace('/', '--')}", "snapshots").glob(f"{revision or ''}*")
    folder = max(found, key=lambda path: path.stat().st_mtime_ns, default=None)
    if folder is None or not (folder / "config.json").is_file():
        asked = f"commit {revision} of {name}" if revision else name
        raise ValueError(f"pretrained: expected {asked} in the hub's cache, because HF_HUB_OFFLINE is set, got nothing")
    files = {path.name: path.stat().st_size for path in sorted(folder.iterdir()) if path.is_file()}
    weights = weight_files(folder)
    kept = {file: size for file, size in files.items() if file in SMALL or file in weights}
    return Repository(name, folder.name, "as told when it was downloaded", kept)


def fetch(repository, files=None) -> Iterator[tuple[str, Path]]:
    """Fetch files, all that are needed by default: (name, path in the hub's cache) as each has arrived.

    Files that are there already are not fetched again. Raises ValueError in one line, also for a disk too small.
    """
    import huggingface_hub as hub
    from huggingface_hub import constants

    cache = Path(constants.HF_HUB_CACHE)
    cache.mkdir(parents=True, exist_ok=True)
    files = list(repository.files if files is None else files)
    missing = sum(repository.files[file] for file in files if not _has(repository, file))
    if (free := shutil.disk_usage(cache).free) < missing:
        raise ValueError(
            f"pretrained: expected {missing / 1e9:.1f} GB of free disk for the download, got {free / 1e9:.1f}"
        )
    for file in files:
        with _told(f"{repository.name}'s {file}"):
            path = hub.hf_hub_download(repository.name, file, revision=repository.revision)
        yield file, Path(path)


def _has(repository, file):
    import huggingface_hub as hub

    return isinstance(hub.try_to_load_from_cache(repository.name, file, revision=repository.revision), str)


@contextlib.contextmanager
def _told(what):
    """What the hub's library raises, as a ValueError in one line; its own lines about it are left out."""
    from huggingface_hub import errors
    from huggingface_hub.utils import logging

    # The library's own base classes are those of the HTTP client it uses, whichever that is.
    known = (*errors.HfHubHTTPError.__bases__, errors.EntryNotFoundError, ValueError)
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    except known as error:
        raise ValueError(f"pretrained: expected {what} from the hub, got {_reason(error)}") from None
    finally:
        logging.set_verbosity(verbosity)


def _reason(error):
    from huggingface_hub.errors import LocalEntryNotFoundError

    while isinstance(error, LocalEntryNotFoundError) and error.__cause__:
        error = error.__cause__  # "nothing in the cache either" is not the reason
    status = getattr(getattr(error, "response", None), "status_code", "")
    text = f"{status} {' '.join(str(error).split())[:200] or type(error).__name__}".strip()
    return {
        401: "401: there is no such model, or it is not for everybody (set HF_TOKEN)",
        403: "403: its owner wants a licence accepted first (set HF_TOKEN)",
        404: "404: not found",
        429: "429: too many requests, try again in some minutes; files that have arrived are kept",
    }.get(status, text)
