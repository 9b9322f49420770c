"""ONNX files compute what the frozen model does, as onnxruntime runs them, and say how nearly."""

from __future__ import annotations

from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

import fqt
from fqt.export import onnx as exporter
from tests.fqt.export.cases import recipe

# torch's exporter warns of its own parts
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")


def network() -> tuple[nn.Module, Tensor]:
    """A convolution, BatchNorm and a linear layer of each of six recipes."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Conv2d(8, 4, (3, 2), padding="same", groups=2), nn.Flatten(),
        nn.Linear(144, 40), nn.Linear(40, 40), nn.Linear(40, 40), nn.Linear(40, 5),
    )  # fmt: skip
    by_name = {"0": "int8", "2": "xnor", "4": "bitnet", "5": "int4", "6": "dorefa_w1a2g6", "7": "fqt_1bit"}
    fqt.convert(model, "int8", overrides={name: recipe(each) for name, each in by_name.items()})
    x = torch.randn(5, 3, 6, 6)
    model(x)
    return model, x


def types(path: Path) -> list[str]:
    """The initializers' types that hold codes."""
    names = [onnx.TensorProto.DataType.Name(one.data_type) for one in onnx.load(path).graph.initializer]
    return sorted(name for name in names if "INT" in name and name != "INT64")


@pytest.mark.parametrize(
    ("multiply", "opset", "operators", "codes"),
    [
        ("float", 25, {"Conv", "MatMul", "DequantizeLinear"}, ["INT2"] * 4 + ["INT4", "INT8"]),
        ("integer", 21, {"ConvInteger", "MatMulInteger"}, ["INT8"] * 6),
        ("nbits", 21, {"Conv", "MatMulNBits", "DequantizeLinear"}, ["INT4", "INT8"] + ["UINT8"] * 4),
    ],
)
@pytest.mark.every(2)
def test_onnxruntime_computes_what_the_frozen_model_does(multiply, opset, operators, codes, tmp_path):
    model, x = network()
    path = tmp_path / "m.onnx"
    result = fqt.export(model, path, x, multiply=multiply, opset=opset)
    assert model.training, "the model is left as it was"
    found = onnx.load(path)
    onnx.checker.check_model(found)
    products = {"Conv", "MatMul", "ConvInteger", "MatMulInteger", "MatMulNBits", "DequantizeLinear"}
    assert {node.op_type for node in found.graph.node} & products == operators
    assert types(path) == codes
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    frozen = fqt.freeze(model)
    with torch.no_grad():
        for batch in (x, torch.randn(2, 3, 6, 6), torch.zeros(1, 3, 6, 6)):
            (y,) = session.run(None, {session.get_inputs()[0].name: batch.numpy()})
            torch.testing.assert_close(torch.from_numpy(y), frozen(batch), atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        model[7].weight.neg_()
    other = exporter.compare(fqt.freeze(model), path, x)
    assert other["relative_difference"] > 0.5 and other["top1_agreement"] < 1, "another model is seen"
    said = {prop.key: prop.value for prop in found.metadata_props}
    assert int(said["fqt.bytes"]) == path.stat().st_size == result.nbytes
    assert float(said["fqt.largest_difference"]) == result.measured["largest_difference"] <= 1e-5
    assert float(said["fqt.top1_agreement"]) == 1 and said["fqt.batch"] == "any" and said["fqt.multiply"] == multiply


def test_results_out_of_tolerance_are_an_error():
    good = {"relative_difference": 0.009, "largest_difference": 1.0, "top1_agreement": 0.5}
    exporter._check(good, 0.01, Path("m.onnx"))
    for bad in (0.011, float("nan")):
        with pytest.raises(ValueError, match=r"onnxruntime computes something else from m.onnx: .* above tolerance=0.01"):
            exporter._check(good | {"relative_difference": bad}, 0.01, Path("m.onnx"))


def test_wrong_arguments_are_refused_by_name(tmp_path):
    model, x = network()
    path = tmp_path / "m.onnx"
    with pytest.raises(ValueError, match="a model is traced by running it: give fqt.export an example, a batch of real data"):
        fqt.export(model, path)
    with pytest.raises(ValueError, match="multiply 'int' is not one of 'float', 'integer', 'nbits'"):
        fqt.export(model, path, x, multiply="int")
    with pytest.raises(ValueError, match="opset 18 has no 4-bit tensors: give one from 21 on"):
        fqt.export(model, path, x, opset=18)
    with pytest.raises(ValueError, match="tokenizer= has no effect on onnx, which takes example, multiply, opset, tolerance"):
        fqt.export(model, path, x, tokenizer=object())
    with pytest.raises(ValueError, match="nothing in this Linear is converted"):
        fqt.export(nn.Linear(2, 2), path, torch.zeros(2, 2))
    assert not list(tmp_path.iterdir())
