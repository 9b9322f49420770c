"""transformers: a checkpoint folder that `AutoModel....from_pretrained` loads.

"transformers"  the plain float model with the decoded codes as weights. Its activations are not quantized.
"bitnet"        a model of a BitNet recipe for transformers' own BitNet layers (`BitNetQuantConfig`, offline): ternary weights,
                four a byte, and activations that are rounded to 8 bits by token, as the recipe's are.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BitNetQuantConfig, PreTrainedModel

from fqt.export.result import Exported
from fqt.export.weights import Entry, entries
from fqt.inspect.trial import feed
from fqt.layers import quantized_layers
from fqt.reference import unpack

_A_BYTE = 4
"""Ternary weights that transformers packs in a byte: those of the rows r, r + O/4, r + O/2 and r + 3 O/4."""


def export(model: nn.Module, path: Path, format: str, tokenizer: Any = None, example: object = None) -> Exported:
    """Write the folder `path`, which exists and is empty; see `fqt.export`."""
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"format {format!r} is for models of transformers, not for a {type(model).__name__}: use fqt.save")
    given = entries(model)
    codes = {entry.name: entry for entry in given if entry.q is not None}
    tied: Mapping[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    apart = next((key for pair in tied.items() for key in pair if key in codes), None)
    if apart is not None:
        raise ValueError(
            f"{apart!r} is tied to a weight that is read as a float, and has codes of its own, so no plain checkpoint holds "
            f"both as one: keep that layer float by fqt.convert(..., skip={apart.rpartition('.')[0]!r})"
        )
    dtype = model.dtype
    if format == "bitnet":
        state = {name: value for entry in given for name, value in _bitnet(entry, dtype).items()}
        notes = (
            "scales are divided by where fqt multiplies by them: a product differs by rounding, and where that flips an "
            "activation's code behind it, by a step of that",
        )
        quantization: dict[str, Any] | None = _configuration(model)
    else:
        state = {entry.name: entry.value.to(dtype) if entry.value.is_floating_point() else entry.value for entry in given}
        kinds = sorted({str(x.quantizer) for x in _activations(model)})
        notes = (f"activations are floats, where the model's are {' and '.join(kinds)}",) if kinds else ()
        quantization = None
    # what is tied is written once, under the name that transformers reads it by
    model.save_pretrained(path, state_dict={name: value for name, value in state.items() if name not in tied})
    if quantization is not None:
        file = path / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": quantization}, indent=2) + "\n")
    if tokenizer is not None:
        tokenizer.save_pretrained(path)
    measured: dict[str, object] = {"format": format, "weights": len(codes)}
    return Exported(path, measured | ({} if example is None else compare(model, path, example)), notes)


def compare(model: PreTrainedModel, path: Path, example: object) -> dict[str, object]:
    """The logits of the loaded checkpoint against the model's: largest difference, relative difference, top-1 agreement."""
    loaded = type(model).from_pretrained(path).eval()
    training = model.training
    try:
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            ours, theirs = (feed(one.eval(), example)[0].double() for one in (model, loaded))  # type: ignore[index]
    finally:
        if training:
            model.train()
    return {
        "largest_difference": float((ours - theirs).abs().max()),
        "relative_difference": float((ours - theirs).norm() / ours.norm()),
        "top1_agreement": float((ours.argmax(-1) == theirs.argmax(-1)).double().mean()),
    }


def _activations(model: nn.Module) -> list[Any]:
    found = (layer.recipe.operand("output", "x") for _, layer in quantized_layers(model))
    return [x for x in found if x is not None]


# --- BitNet ------------------------------------------------------------------------------------------------------------------


def _bitnet(entry: Entry, dtype: torch.dtype) -> dict[str, Tensor]:
    """An entry as transformers' BitLinear has it."""
    if entry.q is None:
        return {entry.name: entry.value.to(dtype) if entry.value.is_floating_point() else entry.value}
    rows = entry.q.shape[0]
    if rows % _A_BYTE:
        raise ValueError(
            f"weight {entry.name!r} has {rows} rows, and transformers packs those of {_A_BYTE} quarters together: give "
            f"the layer a multiple of {_A_BYTE} outputs, or keep it float by "
            f"fqt.convert(..., skip={entry.name.rpartition('.')[0]!r})"
        )
    quarters = (unpack(entry.q.codes, entry.q.format, entry.q.shape)[:, 0].cpu() + 1).to(torch.uint8).chunk(_A_BYTE)
    packed = sum((quarter << 2 * i for i, quarter in enumerate(quarters)), torch.zeros_like(quarters[0]))
    return {entry.name: packed, f"{entry.name}_scale": (1 / entry.q.scale.cpu()).to(dtype)}


def _configuration(model: nn.Module) -> dict[str, Any]:
    """`quantization_config`. ValueError for a layer that is not as BitNet's."""
    layers = dict(quantized_layers(model))
    for name, layer in layers.items():
        x, w = (layer.recipe.operand("output", letter) for letter in "xw")
        words = [str(None if operand is None else operand.quantizer) for operand in (x, w)]
        if words != ["int8/token", "ternary/tensor"] or not isinstance(layer, nn.Linear):
            raise ValueError(
                f"layer {name!r}, a {type(layer).__name__}, takes activations {words[0]} and weights {words[1]}; transformers' "
                f"BitNet layers are linear, with int8/token and ternary/tensor: use recipe 'bitnet', or format='transformers'"
            )
    kept = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name not in layers]
    return BitNetQuantConfig(modules_to_not_convert=kept).to_dict()
