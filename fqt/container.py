"""The file of a frozen model: its tensors as safetensors, and what they mean as JSON in the metadata. No pickle.

Two entries of the metadata are fqt's: "fqt", the JSON of a `Contents` with its version, and "fqt_crc32", the JSON's checksum.
The JSON gives a checksum of each tensor, its name, dtype and shape included, so that a file of which a bit has changed is
refused, with the name of what changed. The checksums are for faults, not against forgers: what a file says is checked all
the same.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor

from fqt.files import write_atomically
from fqt.formats import Format

VERSION = 1
_CONTENTS, _CHECKSUM = "fqt", "fqt_crc32"
_LENGTH = 8  # bytes of a safetensors file that give the length of its header


@dataclass(frozen=True)
class StoredWeight:
    """A packed weight: its format's name, and the shape of `fqt.packed.PackedWeight`."""

    format: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class StoredLayer:
    """A frozen layer.

    Attributes:
        kind: path of its plain class, "torch.nn.modules.linear.Linear".
        recipe: number of its recipe among `Contents.recipes`.
        dtype: of the float weight that it had, "float32".
        weights: what it multiplies by, in the order of `QuantizedLayer.split`; none where the recipe keeps the weight float.
    """

    kind: str
    recipe: int
    dtype: str
    weights: tuple[StoredWeight, ...]


@dataclass(frozen=True)
class Contents:
    """What a file holds, beside its tensors.

    Attributes:
        model: class of the model.
        layers: name -> frozen layer.
        recipes: those of the layers, as plain values, backward included.
        exchanged: name of a module -> class of torch.nn that conversion gave it.
        fused: whether BatchNorm and pooling work together with 1-bit layers.
        lent: names of modules that call their layers where they would multiply by their weights.
        tied: name -> name of the tensor that is stored for it.
        checksums: name of a stored tensor -> CRC-32 of it.
        factory: {"name": ..., "arguments": {...}} of what builds the architecture; empty if nothing was recorded.
    """

    model: str
    layers: Mapping[str, StoredLayer]
    recipes: tuple[Mapping[str, Any], ...]
    exchanged: Mapping[str, str]
    fused: bool
    lent: tuple[str, ...]
    tied: Mapping[str, str]
    checksums: Mapping[str, int]
    factory: Mapping[str, Any]


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a file. dtype: safetensors' word for it; nbytes: of its data."""

    dtype: str
    shape: tuple[int, ...]
    nbytes: int


class FileError(ValueError):
    """A file that is not what it says it is."""


# --- writing ----------------------------------------------------------------------------------------------------------


def write(path: Path, tensors: Mapping[str, Tensor], contents: Contents) -> None:
    """Write a file in one step; `contents.checksums` are made here.

    Raises:
        OSError: it could not be written; what stood at `path` stands there still.
    """
    stored = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    plain = {field.name: getattr(contents, field.name) for field in fields(Contents)}
    plain["layers"] = {
        name: [layer.kind, layer.recipe, layer.dtype, [[weight.format, list(weight.shape)] for weight in layer.weights]]
        for name, layer in contents.layers.items()
    }
    plain["checksums"] = {name: checksum(name, tensor) for name, tensor in stored.items()}
    text = json.dumps({"version": VERSION, **plain}, separators=(",", ":"), sort_keys=True)
    whole = to_bytes(stored, {_CONTENTS: text, _CHECKSUM: str(zlib.crc32(text.encode()))})
    try:
        write_atomically(path, lambda file: file.write(whole))
    except OSError as error:
        why = error.strerror or str(error)
        said = f"{path} could not be written ({why}); what stood there is whole: give another place"
        raise OSError(error.errno, said) from error


def checksum(name: str, tensor: Tensor) -> int:
    """CRC-32 of a contiguous tensor, its name, dtype and shape included."""
    head = zlib.crc32(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
    return zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy(), head)  # type: ignore[arg-type]  numpy has a buffer


# --- reading ----------------------------------------------------------------------------------------------------------


class Reader:
    """An open file, of whose tensors nothing has been read yet.

    Attributes:
        contents: what it says that it holds.
        tensors: name -> tensor, of what it stores.
        header_bytes: of the safetensors header and the number in front of it.
    """

    def __init__(self, path: Path, file: Any) -> None:
        self.path, self._file = path, file
        self.contents = _contents(dict(file.metadata() or {}))
        self.tensors = {name: _described(file.get_slice(name)) for name in file.keys()}  # noqa: SIM118  no mapping
        for name in self.tensors.keys() ^ self.contents.checksums.keys():
            raise FileError(f"tensor {name!r} is in the header or among the checksums, and not in both")
        self.header_bytes = path.stat().st_size - sum(tensor.nbytes for tensor in self.tensors.values())
        for name, layer in self.contents.layers.items():
            _check_layer(name, layer, self)

    def tensor(self, name: str) -> Tensor:
        """A tensor's values, in memory of its own. FileError where they are not those that were written."""
        tensor = self._file.get_tensor(name).clone()
        if checksum(name, tensor) != self.contents.checksums[name]:
            raise FileError(f"the data of tensor {name!r} have another checksum than when they were written")
        return tensor


@contextmanager
def reading(path: Path) -> Iterator[Reader]:
    """A file, open.

    Raises:
        FileNotFoundError: there is none, or it is no plain file.
        FileError: it is none of fqt, is cut off or damaged, or says what cannot be: which, by name.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not there, or is no file: give one that fqt.save wrote")
    try:
        with safe_open(path, framework="pt") as file:
            yield Reader(path, file)
    except SafetensorError as error:
        raise FileError(f"{path} is no whole safetensors file ({error}): get it again") from error
    except FileError as error:
        raise FileError(f"{path}: {error}: get it again, or save the model anew") from error


def _described(part: Any) -> StoredTensor:
    dtype, shape = str(part.get_dtype()), tuple(part.get_shape())
    bits = next((bits for bits in (64, 32, 16, 8, 4) if dtype.endswith(str(bits))), 8)  # BOOL, F8_E4M3
    bits = 8 if dtype.startswith("F8") else bits
    return StoredTensor(dtype, shape, math.prod(shape) * bits // 8)


def _contents(metadata: dict[str, str]) -> Contents:
    """What the metadata say, of the right types and numbers that agree."""
    if _CONTENTS not in metadata:
        raise FileError("it is a safetensors file, but none of fqt.save: its metadata have no entry 'fqt'")
    text = metadata[_CONTENTS]
    if metadata.get(_CHECKSUM) != str(zlib.crc32(text.encode())):
        raise FileError("its metadata 'fqt' have another checksum than when they were written")
    try:
        plain = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FileError(f"its metadata 'fqt' are no JSON ({error})") from error
    _is(plain, dict, "the metadata 'fqt'")
    version = plain.pop("version", None)
    if version != VERSION:
        raise FileError(f"its format has version {version!r}, and this fqt reads version {VERSION}: use the fqt that wrote it")
    known = [field.name for field in fields(Contents)]
    for name in plain.keys() ^ set(known):
        raise FileError(f"key {name!r} of its metadata is missing or unknown")
    for name, kind in (("model", str), ("fused", bool), ("lent", list), ("recipes", list), ("factory", dict)):
        _is(plain[name], kind, name)
    _each(plain["exchanged"], str, "exchanged")
    _each(plain["tied"], str, "tied")
    _each(plain["checksums"], int, "checksums")
    for number, recipe in enumerate(plain["recipes"]):
        _is(recipe, dict, f"recipes[{number}]")
    for number, name in enumerate(plain["lent"]):
        _is(name, str, f"lent[{number}]")
    _each(plain["layers"], list, "layers")
    layers = {name: _layer(f"layer {name!r}", layer, len(plain["recipes"])) for name, layer in plain["layers"].items()}
    for alias, name in plain["tied"].items():
        if name not in plain["checksums"] or alias in plain["checksums"]:
            raise FileError(f"tensor {alias!r} is tied to {name!r}, which is not stored, or is stored itself")
    return Contents(**{**plain, "layers": layers, "recipes": tuple(plain["recipes"]), "lent": tuple(plain["lent"])})


def _layer(where: str, plain: list, recipes: int) -> StoredLayer:
    if len(plain) != 4:
        raise FileError(f"{where} has {len(plain)} entries, not kind, recipe, dtype and weights")
    kind, recipe, dtype, weights = plain
    for value, wanted, what in zip(plain, (str, int, str, list), ("kind", "recipe", "dtype", "weights"), strict=True):
        _is(value, wanted, f"{what} of {where}")
    if not 0 <= recipe < recipes:
        raise FileError(f"{where} follows recipe {recipe} of {recipes}")
    if not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise FileError(f"the dtype {dtype!r} of {where} is none of torch")
    found = []
    for weight in weights:
        _is(weight, list, f"a weight of {where}")
        if len(weight) != 2 or type(weight[0]) is not str or type(weight[1]) is not list or len(weight[1]) not in (2, 4):
            raise FileError(f"a weight of {where} is {str(weight)[:80]}, not a format and two or four sizes")
        if not all(type(size) is int and 0 < size < 1 << 40 for size in weight[1]):
            raise FileError(f"a weight of {where} has sizes {str(weight[1])[:80]}")
        found.append(StoredWeight(weight[0], tuple(weight[1])))
    return StoredLayer(kind, recipe, dtype, tuple(found))


def _check_layer(name: str, layer: StoredLayer, reader: Reader) -> None:
    """That the tensors of its weights have the dtypes and shapes of the formats."""
    for number, weight in enumerate(layer.weights):
        try:
            format = Format.parse(weight.format)
        except ValueError as error:
            raise FileError(f"layer {name!r}: {error}") from error
        o, i, *window = weight.shape
        shape = (o, math.prod(window), i)
        wanted = {"codes": ({16: "I16", 32: "I32"}.get(format.storage_bits, "U8"), format.packed_shape(shape))}
        wanted |= {part: ("F32", (format.groups(shape),)) for part in ("scale", *(["offset"] if format.offset else []))}
        for part, (dtype, sizes) in wanted.items():
            full = f"{name}.packed.{number}.{part}".lstrip(".")
            found = reader.tensors.get(reader.contents.tied.get(full, full))
            if found is None or (found.dtype, found.shape) != (dtype, sizes):
                said = "missing" if found is None else f"{found.dtype} of shape {found.shape}"
                needed = f"{weight.format} of {weight.shape} needs {dtype} of shape {sizes}"
                raise FileError(f"tensor {full!r} is {said}, and {needed}")


def _is(value: object, kind: type, what: str) -> None:
    if type(value) is not kind:
        raise FileError(f"{what} is {str(value)[:80]!r}, not a {kind.__name__}")


def _each(value: Any, kind: type, what: str) -> None:
    """A mapping of names to values of one kind."""
    _is(value, dict, what)
    for name, item in value.items():
        _is(item, kind, f"{name!r} of {what}")
