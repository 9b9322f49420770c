"""A backend that is named serves everything, forward and backward, or the conversion is refused."""

from __future__ import annotations

import copy
from collections import defaultdict

import pytest
import torch
from torch import nn

import fqt
from fqt import ops
from fqt.cpu import library
from fqt.formats import Format
from fqt.ops import Kernel, Request

ONE_BIT = fqt.load_recipe("fqt_1bit").everywhere()
INT8 = fqt.load_recipe("int8").everywhere()
SIGNS = Request("cpu", (Format("sign", 1), Format("sign", 1)))
built = pytest.mark.skipif(library.refuses() is not None, reason="the C++ kernels are not built")


@pytest.fixture(autouse=True)
def _nothing_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FQT_BACKEND", raising=False)


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> dict[str, set[str]]:
    """Operator -> backends that the table gave, from here on."""
    seen: dict[str, set[str]] = defaultdict(set)
    select = ops.select

    def spy(operator: str, request: Request):
        kernel, reasons = select(operator, request)
        seen[operator].add(kernel.label)
        return kernel, reasons

    monkeypatch.setattr(ops, "select", spy)
    return seen


def small() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(8 * 16, 4))


def step(model: nn.Module) -> list[torch.Tensor]:
    x = torch.linspace(-2, 2, 4 * 3 * 64).reshape(4, 3, 8, 8).requires_grad_()
    torch.manual_seed(1)
    y = model(x)
    y.square().sum().backward()
    assert x.grad is not None
    return [y.detach(), x.grad, *(p.grad for p in model.parameters() if p.grad is not None)]


@pytest.mark.every(2)
@pytest.mark.parametrize(
    ("backend", "compiled"),
    [("reference", False), pytest.param("cpu", False, marks=built), pytest.param("cpu", True, marks=built)],
)
def test_a_named_backend_serves_forward_and_backward(backend: str, compiled: bool, served: dict[str, set[str]]) -> None:
    plain = small()
    expected = step(fqt.convert(copy.deepcopy(plain), ONE_BIT))
    model = fqt.convert(copy.deepcopy(plain), ONE_BIT, backend=backend)
    served.clear()
    actual = step(torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model)  # type: ignore[arg-type]
    assert [served[operator] for operator in ("quantize", *ops.PRODUCTS)] == [{backend}] * 4
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@built
def test_the_choice_is_by_layer_and_travels_with_copies(served: dict[str, set[str]]) -> None:
    model = small()
    fqt.convert(model[1], ONE_BIT, backend="reference")
    fqt.convert(model[3], ONE_BIT)
    step(copy.deepcopy(model))
    assert served["output"] == {"reference", "cpu"}
    assert "backend=reference" in repr(model[1]) and "backend" not in repr(model[3])
    assert model[1].quantized_weight() is not None


def test_summary_shows_a_named_backend_and_revert_forgets_it() -> None:
    model = fqt.convert(small(), ONE_BIT, backend="reference")
    row = fqt.summary(model).rows[1]
    assert row.backend == "reference" and row.note == "backend 'reference' was named"
    assert row.served == dict.fromkeys(ops.PRODUCTS, "reference")
    assert all("backend" not in module.__dict__ for module in fqt.revert(model).modules())


def test_the_environment_is_the_default_and_the_argument_beats_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FQT_BACKEND", "reference")
    assert fqt.summary(fqt.convert(nn.Linear(4, 3), ONE_BIT)).rows[0].backend == "reference"
    assert ops.select("output", SIGNS)[0].backend == "reference"
    x, quantizer = torch.randn(2, 3, 4), ONE_BIT.quantizer("output", "x")
    assert quantizer is not None
    monkeypatch.setenv("FQT_BACKEND", "nothing")
    for call in (lambda: fqt.convert(nn.Linear(4, 3), ONE_BIT), lambda: fqt.quantize(x, quantizer, "x")):
        with pytest.raises(ValueError, match=r"unknown backend 'nothing' in FQT_BACKEND; known: .*reference"):
            call()
    fqt.convert(nn.Linear(4, 3), ONE_BIT, backend="reference")


def test_an_unknown_backend_is_refused_with_the_nearest_name() -> None:
    model = nn.Linear(4, 3)
    known = "cpu, cuda, triton, reference"
    with pytest.raises(ValueError, match=rf"unknown backend 'referense' \(did you mean 'reference'\?\); known: {known}"):
        fqt.convert(model, ONE_BIT, backend="referense")
    with pytest.raises(ValueError, match="unknown backend 'gpu'"):
        fqt.convert(model, "fp32", backend="gpu")


def refuses_grad_weight_of_convolutions(request: Request) -> str | None:
    return "no windows on Tuesdays" if request.geometry else None


@pytest.mark.parametrize(
    ("operator", "refuses", "words"),
    [
        ("grad_weight", refuses_grad_weight_of_convolutions, "grad_weight: .* of uint4.:C by sign on cpu: mine: no windows"),
        (
            "quantize",
            lambda request: "not today" if request.formats[0].bits == 4 else None,
            "quantize grad_input.g: .*not today",
        ),
        ("output", None, "output: .*it has no kernel for this device"),
    ],
)
def test_a_named_backend_that_cannot_serve_refuses_the_conversion(monkeypatch, operator, refuses, words) -> None:
    rows = [
        Kernel(name, "mine", "cpu", f"fqt.reference:{name}", refuses if name == operator else lambda request: None)
        for name in ("quantize", *ops.PRODUCTS)
        if refuses is not None or name != operator
    ]
    monkeypatch.setattr(ops, "KERNELS", [*rows, *ops.KERNELS])
    model = small()
    before = [(type(module), sorted(module.__dict__)) for module in model.modules()]
    with pytest.raises(ValueError, match=f"layer '0', {words}.*Name no backend, .* or 'reference'"):
        fqt.convert(model, ONE_BIT, backend="mine")
    assert [(type(module), sorted(module.__dict__)) for module in model.modules()] == before
    model = fqt.convert(model, ONE_BIT)
    assert "mine" in fqt.summary(model).rows[0].backend


@built
def test_the_cpu_backend_refuses_formats_that_it_has_no_kernel_for() -> None:
    wide = fqt.load_recipe("dorefa_w1a32g4")  # float activations, and nothing that multiplies codes
    assert fqt.convert(nn.Linear(4, 3), wide.everywhere(), backend="cpu")
    unsigned = fqt.Quantizer("uint", 16, calibrate="minmax", offset=True)
    recipe = fqt.Recipe("wide", fqt.Product(unsigned, unsigned), *[fqt.Product("float", "float")] * 2)
    with pytest.raises(ValueError, match=r"layer '', output: .* those of more than 8 in two's complement"):
        fqt.convert(nn.Linear(4, 3), recipe, backend="cpu")


def test_a_layer_that_moved_where_its_backend_is_not_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [Kernel(name, "here", "cpu", f"fqt.reference:{name}", lambda request: None) for name in ("quantize", *ops.PRODUCTS)]
    monkeypatch.setattr(ops, "KERNELS", [*rows, *ops.KERNELS])
    layer = fqt.convert(nn.Linear(4, 3), ONE_BIT, backend="here").to("meta")
    row = fqt.summary(layer).rows[0]
    assert row.backend == "none"
    assert "no kernel for this device, only for cpu: move the model there before its conversion" in row.note
    with pytest.raises(
        ValueError, match=r"'here' does not serve quantize of sign on meta: it has no kernel for this device, only for"
    ):
        fqt.convert(nn.Linear(4, 3, device="meta"), ONE_BIT, backend="here")
    layer = fqt.convert(nn.Linear(4, 3), ONE_BIT, backend="here")
    monkeypatch.setattr(ops, "KERNELS", [row for row in ops.KERNELS if (row.operator, row.backend) != ("output", "here")])
    with pytest.raises(ValueError, match="backend 'here' does not serve output"):
        layer(torch.randn(2, 4))


def test_a_backend_is_named_without_the_variants_of_its_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [Kernel(name, "mine", "cpu", f"fqt.reference:{name}", lambda r: None, name) for name in ("quantize", *ops.PRODUCTS)]
    monkeypatch.setattr(ops, "KERNELS", [*ops.KERNELS, *rows])
    row = fqt.summary(fqt.convert(nn.Linear(4, 3), INT8, backend="mine")).rows[0]
    assert row.served == {product: f"mine {product}" for product in ops.PRODUCTS}
    with pytest.raises(ValueError, match="unknown backend 'mine output'; known: cpu, cuda, triton, reference, mine"):
        fqt.convert(nn.Linear(4, 3), INT8, backend="mine output")


def test_decode_multiplies_nothing_and_is_not_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FQT_BACKEND", "cpu")
    assert ops.select("decode", Request("cpu", (Format("e4m3", 8),)))[0].backend == "reference"
    monkeypatch.setenv("FQT_BACKEND", "reference")
    assert ops.select("decode", Request("cpu", (Format("sign", 1),)))[0].backend == "reference"


def test_a_named_reference_is_no_warning(caplog: pytest.LogCaptureFixture) -> None:
    fqt.convert(nn.Linear(4, 3), INT8, backend="reference")
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


@built
def test_a_named_backend_is_asked_to_encode_where_a_registered_calibration_finds_the_scales() -> None:
    x, w = (fqt.Quantizer("int", 8, calibrate="percentile") for _ in "xw")
    recipe = fqt.Recipe("percentiles", fqt.Product(x, w), *[fqt.Product("float", "saved")] * 2)
    layer = fqt.convert(nn.Linear(4, 3), recipe, backend="cpu")
    assert {"encode output.x", "encode output.w", "output"} == set(layer.requests())
    floats = fqt.Quantizer("e4m3", 8, calibrate="percentile")
    recipe = fqt.Recipe("floats", fqt.Product(floats, "float"), *[fqt.Product("float", "saved")] * 2)
    with pytest.raises(ValueError, match=r"layer '', encode output.x: backend 'cpu' does not serve encode of e4m3 on cpu"):
        fqt.convert(nn.Linear(4, 3), recipe, backend="cpu")
