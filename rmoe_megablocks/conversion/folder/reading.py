"""The weights of a folder by name, whoever wrote it: safetensors, or .bin files, of which nothing is run."""

import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from rmoe_megablocks.conversion.folder.shards import PADDING
from rmoe_megablocks.errors import UsageError

#: index and single file of each form, the better one first
_FORMS = (
    ("model.safetensors.index.json", "model.safetensors"),
    ("pytorch_model.bin.index.json", "pytorch_model.bin"),
)
_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}


class Folder:
    """Attributes:
    config: config.json.
    tensors: shape and dtype of every weight by name.
    """

    def __init__(self, folder: Path) -> None:
        """Reads configuration and headers. Raises UsageError with one line for what is missing or damaged."""
        self.folder = folder
        if not folder.is_dir():
            raise UsageError(f"{folder}: no such folder")
        self.config = _read_json(folder / "config.json")
        self._files = self._find()
        self._loaded: tuple[str, Mapping[str, Tensor]] = ("", {})
        self.tensors: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        for name in sorted(set(self._files.values())):
            self.tensors.update(self._headers(name))
        for name, file in self._files.items():
            if name not in self.tensors and name:
                raise UsageError(f"{folder}: {name} is missing in {file}, where the index places it")

    def _find(self) -> dict[str, str]:
        """File of each weight. A single file stands under the name ""; its weights are found in its header."""
        for index, single in _FORMS:
            if (self.folder / index).is_file():
                places = _read_json(self.folder / index).get("weight_map")
                if not isinstance(places, dict) or not places:
                    raise UsageError(f"{self.folder / index} has no weight_map")
                for name, file in places.items():
                    if not isinstance(file, str) or Path(file).name != file:
                        raise UsageError(f"{self.folder / index}: {name} would be in {file!r}, outside of the folder")
                return places
            if (self.folder / single).is_file():
                return {"": single}
        raise UsageError(f"{self.folder} has no weights: neither model.safetensors nor pytorch_model.bin, nor an index")

    def _headers(self, file: str) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        found = {}
        if file.endswith(".safetensors"):
            with self._open(file) as opened:
                for name in opened.keys():
                    part = opened.get_slice(name)
                    found[name] = (tuple(part.get_shape()), self._dtype(name, part.get_dtype()))
        else:
            for name, tensor in self._bin(file).items():
                found[name] = (tuple(tensor.shape), tensor.dtype)
        for name in found:
            if name in self.tensors:
                raise UsageError(f"{self.folder}: {name} is in {self._files[name]} and in {file}")
            self._files[name] = file
        return found

    def _dtype(self, name: str, dtype: str) -> torch.dtype:
        if dtype not in _DTYPES:
            raise UsageError(f"{self.folder}: {name} is of {dtype}, expected one of {', '.join(_DTYPES)}")
        return _DTYPES[dtype]

    def _open(self, file: str) -> Any:
        path = self.folder / file
        if not path.is_file():
            raise UsageError(f"{self.folder}: {file} is missing, which the index names")
        try:
            return safe_open(path, framework="pt")
        except SafetensorError as error:
            raise UsageError(f"{path} is damaged or no safetensors file ({error})") from error

    def _bin(self, file: str) -> Mapping[str, Tensor]:
        """The tensors of a .bin file; one file is kept, mapped into memory."""
        if self._loaded[0] == file:
            return self._loaded[1]
        path = self.folder / file
        try:
            found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except pickle.UnpicklingError as error:
            raise UsageError(
                f"{path} holds something else than tensors, which is not run: {str(error).splitlines()[0]}"
            ) from error
        except (OSError, RuntimeError, ValueError, EOFError) as error:
            raise UsageError(f"{path} cannot be read ({str(error).splitlines()[0]})") from error
        if not isinstance(found, dict) or not all(torch.is_tensor(value) for value in found.values()):
            raise UsageError(f"{path} is not a dictionary of tensors")
        self._loaded = (file, found)
        return found

    def read(self, name: str) -> Tensor:
        """A weight."""
        file = self._files[name]
        if not file.endswith(".safetensors"):
            return self._bin(file)[name]
        with self._open(file) as opened:
            return opened.get_tensor(name)

    def padding(self) -> dict[str, Tensor]:
        """Rows that Megatron had added to the vocabulary, by weight; empty where an export has left none."""
        if not (self.folder / PADDING).is_file():
            return {}
        with self._open(PADDING) as opened:
            return {name: opened.get_tensor(name) for name in opened.keys()}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise UsageError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read as JSON ({error})") from error
    if not isinstance(found, dict):
        raise UsageError(f"{path} is no JSON object")
    return found
