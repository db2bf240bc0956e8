"""The safetensors of a folder that somebody else wrote: names, shapes, and one mapped tensor at a time.

What you learn here: safetensors hold numbers and nothing that could run, but their headers and the index beside them
are still somebody's text. Nothing is trusted before it is checked: an index names plain files of its own folder, and a
header's shapes are compared with those of the model before a single number is read. Pickles are refused.
"""

import json
import re
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
LARGEST_JSON = 50_000_000  # bytes; the index of the largest models has about a million


def read_json(path) -> dict:
    """The object in a JSON file. Raises ValueError naming the file for anything else."""
    path = Path(path)
    try:
        if path.stat().st_size > LARGEST_JSON:
            raise ValueError(f"{path.stat().st_size:,} bytes")
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: expected a JSON file, got {getattr(error, 'strerror', None) or error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(content).__name__}")
    return content


def weight_files(folder) -> list[str]:
    """The names of the folder's safetensors. Raises ValueError for none, and for an index of other than plain names."""
    folder = Path(folder)
    if (folder / INDEX).is_file():
        names = read_json(folder / INDEX).get("weight_map")
        if not isinstance(names, dict) or not names:
            raise ValueError(f"{folder / INDEX}: expected a weight_map, got {type(names).__name__}")
        files = {name if isinstance(name, str) else repr(name) for name in names.values()}
        for name in sorted(files):
            if not re.fullmatch(r"[\w-][\w.-]*\.safetensors", name):
                raise ValueError(f"{folder / INDEX}: expected plain names of .safetensors files, got {name!r}")
        return sorted(files)
    if (folder / WHOLE).is_file():
        return [WHOLE]
    pickles = [path.name for path in sorted(folder.glob("*.bin")) + sorted(folder.glob("*.pt*"))]
    got = f"{pickles[0]}, a pickle, which could run anything" if pickles else "neither"
    raise ValueError(f"{folder}: expected {WHOLE} or {INDEX}, got {got}")


class Weights:
    """Every tensor of a folder by name. Raises ValueError, with the file's name, for what is no safetensors file."""

    def __init__(self, folder):
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        self._files = {}
        for file in weight_files(folder):
            path = Path(folder, file)
            try:
                opened = safe_open(path, framework="pt")
                names = list(opened.keys())
                for name in names:
                    part = opened.get_slice(name)
                    kind, shape = part.get_dtype(), tuple(part.get_shape())
                    if name in self.shapes:
                        raise ValueError(f"{path}: expected {name} in one file, got it a second time")
                    self.shapes[name], self.dtypes[name] = shape, DTYPES.get(kind)
                    self._files[name] = opened
            except (SafetensorError, OSError) as error:
                raise ValueError(f"{path}: expected a safetensors file, got {error}") from None
            except RuntimeError as error:  # more than the system lends addresses for
                raise ValueError(f"{path}: expected a file that can be mapped, got {error}") from None

    def read(self, name) -> Tensor:
        """The tensor as the file has it: mapped, not read yet, and not to be written to."""
        return self._files[name].get_tensor(name)
