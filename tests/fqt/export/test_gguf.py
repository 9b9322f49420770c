"""GGUF files hold the model's codes: read back by the package gguf, and by straight loops from the formats' description."""

from __future__ import annotations

import copy
import struct
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import fqt
from fqt.export import gguf_blocks

KINDS = gguf.GGMLQuantizationType


def read(path: Path) -> dict[str, gguf.ReaderTensor]:
    return {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}


def fields(path: Path) -> dict[str, object]:
    return {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}


def loops(raw: np.ndarray, kind: str) -> np.ndarray:
    """Dequantize Q1_0, of which the package gguf 0.19 knows the size alone, byte by byte."""
    assert kind == "Q1_0"
    rows = []
    for row in raw.reshape(-1, raw.shape[-1]):
        values = []
        for start in range(0, len(row), 18):
            (scale,) = struct.unpack("<e", row[start : start + 2].tobytes())
            values += [scale if row[start + 2 + j // 8] >> (j % 8) & 1 else -scale for j in range(128)]
        rows.append(values)
    return np.array(rows, dtype=np.float32)


def values(tensor: gguf.ReaderTensor) -> np.ndarray:
    name = tensor.tensor_type.name
    return loops(tensor.data, name) if name == "Q1_0" else gguf.quants.dequantize(tensor.data, tensor.tensor_type)


def in_half(q: fqt.QTensor) -> torch.Tensor:
    """The decoded values, with the scale in half precision."""
    return replace(q, scale=q.scale.half().float()).decode()


def linear(recipe: fqt.Recipe | str, inputs: int = 512, outputs: int = 7) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(inputs, outputs))
    with torch.no_grad():
        model[0].weight[0, :4] = torch.tensor([0.0, -0.0, 1e-30, -1e-30])
    return fqt.convert(model, fqt.load_recipe(recipe).everywhere() if isinstance(recipe, str) else recipe)


@pytest.mark.parametrize(
    ("recipe", "inputs", "kind", "bytes_"),
    [
        ("bitnet", 512, "TQ2_0", 132),
        ("xnor", 512, "Q1_0", 72),
        ("dorefa_w1a2g6", 128, "Q1_0", 18),
        ("int8", 96, "Q8_0", 102),
        ("int6", 96, "Q8_0", 102),
        ("int4", 96, "Q4_0", 54),
        ("bitnet", 96, "Q4_0", 54),  # 256 does not divide 96
        ("xnor", 96, "Q4_0", 54),
    ],
)
def test_codes_come_back_with_scales_in_half_precision(recipe, inputs, kind, bytes_, tmp_path):
    model = linear(recipe, inputs)
    result = fqt.export(model, tmp_path / "m.gguf")
    tensor = read(tmp_path / "m.gguf")["0.weight"]
    assert tensor.tensor_type == KINDS[kind] and tensor.data.shape == (7, bytes_)
    assert tensor.shape.tolist() == [inputs, 7], "ggml counts the fastest axis first"
    q = model[0].quantized_weight()
    assert torch.equal(torch.from_numpy(values(tensor)), in_half(q)[:, 0])
    relative = ((q.scale.half().float() - q.scale).abs() / q.scale).amax()
    assert result.measured["scale_error"] == float(relative) > 0
    assert fields(tmp_path / "m.gguf")["fqt.format.0.weight"] == f"{q.format.name} {q.shape}"
    bias = read(tmp_path / "m.gguf")["0.bias"]
    assert bias.tensor_type == KINDS.F32 and np.array_equal(bias.data, model[0].bias.detach().numpy())


def test_zero_has_a_positive_sign():
    signs = gguf_blocks.Rows.of(linear("xnor")[0].quantized_weight()).codes[0, :4]
    assert signs.tolist() == [1, 1, 1, -1]


@pytest.mark.parametrize("type", gguf_blocks.TYPES, ids=lambda type: type.name)
def test_blocks_hold_every_code_in_every_place(type, rng):
    assert gguf.GGML_QUANT_SIZES[KINDS[type.name]] == (type.block, len(type.pack(np.zeros((1, type.block), np.int16))[0]) + 2)
    codes = rng.choice(sorted(type.codes), (5, 3 * type.block)).astype(np.int16)
    scales = rng.uniform(0.1, 1, (5, 3)).astype(np.float16)
    data = type.encode(codes, scales)
    found = loops(data, type.name) if type.name == "Q1_0" else gguf.quants.dequantize(data, KINDS[type.name])
    assert np.array_equal(found, codes * scales.astype(np.float32).repeat(type.block, 1))


def test_a_convolution_is_a_matrix_and_buffers_come_along(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 64, 4), nn.Flatten(), nn.Linear(64, 2))
    fqt.convert(model, "xnor", fuse=False)
    fqt.export(model, tmp_path / "m.gguf")
    found = read(tmp_path / "m.gguf")
    assert found.keys() == model.state_dict().keys()
    q = model[2].quantized_weight()
    assert found["2.weight"].tensor_type == KINDS.Q1_0
    assert torch.equal(torch.from_numpy(values(found["2.weight"])), in_half(q).flatten(1))
    assert np.array_equal(found["1.running_var"].data, model[1].running_var.numpy())
    assert found["1.num_batches_tracked"].tensor_type == KINDS.I64 and found["1.num_batches_tracked"].data.tolist() == [0]
    assert found["0.weight"].tensor_type == KINDS.F16 and found["0.weight"].shape.tolist() == [3, 3, 3, 8]
    assert fields(tmp_path / "m.gguf")["general.architecture"] == "fqt"


def test_formats_that_no_type_holds_are_floats(tmp_path):
    for recipe in ("dorefa_w8a8g8", "adapt"):
        model = linear(recipe, 64)
        fqt.export(model, tmp_path / "m.gguf")
        tensor = read(tmp_path / "m.gguf")["0.weight"]
        assert tensor.tensor_type == KINDS.F16
        assert np.array_equal(tensor.data, model[0].quantized_weight().decode()[:, 0].half().numpy())


def test_learned_steps_are_in_the_scale_and_not_in_the_file(tmp_path):
    x = fqt.Quantizer("int", 8, "token")
    w = fqt.Quantizer("int", 4, calibrate="lsq", estimator="lsq")
    recipe = fqt.Recipe("learned", fqt.Product(x, w), fqt.Product("float", "saved"), fqt.Product("float", "saved"))
    model = linear(recipe, 64)
    with torch.no_grad():
        model[0].quantizers["output_w"]["lsq"].step.fill_(0.0125)
    fqt.export(model, tmp_path / "m.gguf")
    found = read(tmp_path / "m.gguf")
    assert found.keys() == {"0.weight", "0.bias"} and found["0.weight"].tensor_type == KINDS.Q4_0
    assert torch.equal(torch.from_numpy(values(found["0.weight"])), in_half(model[0].quantized_weight())[:, 0])


def test_what_exceeds_half_precision_is_written_wider(tmp_path):
    model = linear("int8", 32)
    with torch.no_grad():
        model[0].weight.mul_(1e8)  # scales of 4e5
    fqt.export(model, tmp_path / "m.gguf")
    tensor = read(tmp_path / "m.gguf")["0.weight"]
    assert tensor.tensor_type == KINDS.F32
    assert np.array_equal(tensor.data, model[0].quantized_weight().decode()[:, 0].numpy())


def test_a_frozen_model_gives_the_same_file(tmp_path):
    torch.manual_seed(0)
    parts = {"attend": nn.MultiheadAttention(32, 2), "up": nn.ConvTranspose2d(32, 32, 3, stride=2), "out": nn.Linear(32, 9)}
    model = nn.ModuleDict(parts)
    fqt.convert(model, fqt.load_recipe("int4").everywhere())
    frozen = fqt.freeze(model)
    files = [fqt.export(one, tmp_path / f"{name}.gguf").path for name, one in (("trained", model), ("frozen", frozen))]
    assert files[0].read_bytes() == files[1].read_bytes()
    found = read(files[1])
    assert found.keys() == model.state_dict().keys()
    q = frozen["attend"].quantized_weight()
    assert torch.equal(torch.from_numpy(values(found["attend.in_proj_weight"])), in_half(q)[:, 0])


def test_a_tied_weight_is_a_float_where_it_is_read_as_one(tmp_path):
    model = nn.ModuleDict({"embed": nn.Embedding(5, 32), "head": nn.Linear(32, 5)})
    model["embed"].weight = model["head"].weight
    fqt.convert(model, fqt.load_recipe("int8").everywhere())
    fqt.export(model, tmp_path / "m.gguf")
    found = read(tmp_path / "m.gguf")
    assert [found[name].tensor_type for name in ("embed.weight", "head.weight")] == [KINDS.F16, KINDS.Q8_0]
    assert np.array_equal(found["embed.weight"].data, model["embed"].weight.detach().half().numpy())


# --- refusals ----------------------------------------------------------------------------------------------------------------


def refused(model: nn.Module, path: Path, words: str, **options) -> None:
    path.write_text("what was here")
    with pytest.raises((ValueError, TypeError), match=words):
        fqt.export(model, path, **options)
    assert path.read_text() == "what was here" and sorted(path.parent.iterdir()) == [path], "nothing is left behind"


def test_refusals_name_the_thing_and_the_remedy_and_keep_the_old_file(tmp_path):
    path = tmp_path / "m.gguf"
    refused(
        linear("bitnet", 100), path,
        r"weight '0.weight' has rows of 100 codes ternary, which no block divides \(TQ2_0 of 256, Q4_0 of 32, Q8_0 of 32\): "
        r"give the layer a multiple of 32 inputs, or keep it float by fqt.convert\(..., skip=\)",
    )  # fmt: skip
    spoilt = linear("int8", 32)
    with torch.no_grad():
        spoilt[0].weight[1, 2] = torch.nan
    refused(spoilt, path, "weight '0.weight' holds a NaN or an infinity: there is nothing to export")
    refused(linear("int8", 32), path, "a Sequential is written as bare tensors, which have no tokenizer", tokenizer=object())
    computed = nn.Sequential(parametrizations.weight_norm(nn.Linear(32, 3)))
    fqt.convert(computed, fqt.load_recipe("int8").everywhere())
    refused(computed, path, "layer '0' computes its weight by a parametrization.*fqt.freeze.*remove_parametrizations")


def test_a_path_that_cannot_be_written_says_so(tmp_path):
    model = linear("int8", 32)
    with pytest.raises(ValueError, match=r"'m.pt' does not end in .gguf or .onnx: choose such a name, or .* give format="):
        fqt.export(model, "m.pt")
    with pytest.raises(FileNotFoundError, match=r"the folder '.*none' of 'm.gguf' does not exist: make it first"):
        fqt.export(model, tmp_path / "none" / "m.gguf")


def test_a_missing_package_is_one_sentence_with_the_command(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        ValueError, match=r"^exporting to gguf needs gguf, which is not installed: pip install 'fqt\[export\]'$"
    ):
        fqt.export(linear("int8", 32), tmp_path / "m.gguf")


def test_the_model_is_left_as_it_was(tmp_path):
    model = linear("bitnet").train()
    model[0].weight.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    fqt.export(model, tmp_path / "m.gguf")
    assert model.training and not model[0].weight.requires_grad
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
