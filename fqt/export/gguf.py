"""GGUF: the file that llama.cpp and its relatives read.

A quantized weight is written in the smallest type of `fqt.export.gguf_blocks` that holds its codes and whose blocks divide its
rows. Codes are the model's own, and so are the scales, rounded to half precision. Every other matrix is F16 (F32 where a value
exceeds half precision), every vector F32.

A causal language model of `fqt.export.gguf_llama.ARCHITECTURES` gets the names, metadata and tokenizer by which llama.cpp runs
it. Any other module is written as bare tensors under the names of its state dict: architecture "fqt", and for each quantized
tensor a key `fqt.format.<name>`, its format's name and the logical shape, such as "ternary (10, 1, 256)". A convolution's
weight is then a matrix, (output channels, taps * input channels).
"""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import torch
from torch import Tensor, nn

from fqt.export.gguf_blocks import TYPES, Rows, packed
from fqt.export.gguf_llama import ARCHITECTURES, Language
from fqt.export.result import Exported
from fqt.export.weights import Entry, entries


def export(model: nn.Module, path: Path, tokenizer: object | None = None) -> Exported:
    """Write `path`; see `fqt.export`."""
    if type(model).__name__ not in ARCHITECTURES and tokenizer is not None:
        raise ValueError(
            f"a {type(model).__name__} is written as bare tensors, which have no tokenizer: leave tokenizer away, or export "
            f"one of {', '.join(ARCHITECTURES)}"
        )
    language = Language(model, tokenizer) if type(model).__name__ in ARCHITECTURES else None
    writer = gguf.GGUFWriter(None, "fqt" if language is None else language.architecture)
    types: dict[str, int] = {}
    notes, error = [], 0.0
    if language is not None:
        language.describe(writer)
        notes += language.notes
    for entry in entries(model):
        name = entry.name if language is None else language.name_of(entry)
        if name is None:
            continue
        order = None if language is None else language.order_of(entry)
        array, kind, lost = _encoded(entry, order, bare=language is None)
        if entry.q is not None and language is None:
            writer.add_string(f"fqt.format.{name}", f"{entry.q.format.name} {entry.q.shape}")
        writer.add_tensor(name, array, raw_dtype=kind)
        types[kind.name] = types.get(kind.name, 0) + 1
        error = max(error, lost)
    for name, value in () if language is None else language.more():
        writer.add_tensor(name, value.numpy())
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_file_type(_file_type(types))
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    notes.append(f"scales in half precision, off by at most {error:.2g} of their value")
    return Exported(path, {"tensors": types, "scale_error": error}, tuple(notes))


def _encoded(entry: Entry, order: Tensor | None, *, bare: bool) -> tuple[np.ndarray, gguf.GGMLQuantizationType, float]:
    """An entry as GGUF stores it, its type, and the largest relative error of a scale.

    Args:
        order: in which its rows go; None leaves them.
        bare: whether a matrix of another shape than the plain layer's may stand for its weight.

    Raises:
        ValueError: a row of codes is no multiple of any block that holds them.
    """
    kinds = gguf.GGMLQuantizationType
    if entry.q is not None and (bare or entry.value.dim() == 2):
        rows = Rows.of(entry.q) if order is None else Rows.of(entry.q).permuted(order)
        fitting = [type for type in TYPES if type.holds(entry.q.format)]
        for type in fitting:
            found = packed(rows, type)
            if found is not None:
                return found[0], kinds[type.name], found[1]
        if fitting and rows.block_scales(fitting[-1].block) is None and rows.block_scales(1) is not None:
            choices = ", ".join(f"{type.name} of {type.block}" for type in fitting)
            raise ValueError(
                f"weight {entry.name!r} has rows of {rows.codes.shape[1]} codes {entry.q.format.name}, which no block divides "
                f"({choices}): give the layer a multiple of {fitting[-1].block} inputs, or keep it float by "
                f"fqt.convert(..., skip=)"
            )
    value = entry.value if order is None else entry.value[order]
    if not value.is_floating_point():
        return np.atleast_1d(value.numpy()), kinds[{torch.int64: "I64", torch.int32: "I32"}[value.dtype]], 0.0
    value = value.float()
    fits = value.dim() > 1 and bool((value.half().isfinite() | ~value.isfinite()).all())
    return np.atleast_1d((value.half() if fits else value).numpy()), kinds.F16 if fits else kinds.F32, 0.0


def _file_type(types: dict[str, int]) -> int:
    """What `general.file_type` says: the type of most quantized tensors."""
    quantized = {name: count for name, count in types.items() if name in {type.name for type in TYPES}}
    most = max(quantized, key=lambda name: quantized[name]) if quantized else "F16" if "F16" in types else "F32"
    return gguf.LlamaFileType["ALL_F32" if most == "F32" else f"MOSTLY_{most}"]
