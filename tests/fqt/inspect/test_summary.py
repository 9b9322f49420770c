"""summary: every figure of the table against one worked out by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import fqt
from fqt import ops
from fqt.inspect.summary import Row
from tests.fqt.helpers import fits_convolutions

INT8 = fqt.load_recipe("int8").everywhere()
ONE_BIT = fqt.load_recipe("fqt_1bit").everywhere()


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def small() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 12, 3, stride=2, groups=4, bias=False),
        nn.Flatten(),
        nn.Linear(12 * 3 * 3, 5),
    )


def rows(model: nn.Module) -> dict[str, Row]:
    return {row.name: row for row in fqt.summary(model).rows}


# --- multiply-adds ----------------------------------------------------------------------------------------------------


def test_multiply_adds_are_unknown_before_a_forward_and_one_samples_after() -> None:
    model = fqt.convert(small(), "int8")
    assert {row.madds for row in fqt.summary(model).rows} == {None}
    model(torch.randn(7, 3, 8, 8))
    assert {name: row.madds for name, row in rows(model).items()} == {
        "0": 8 * 8 * 8 * 3 * 9,  # 64 positions, 8 outputs of 3 x 3 x 3
        "3": 3 * 3 * 12 * (8 // 4) * 9,  # (8 - 3) // 2 + 1 = 3
        "5": 108 * 5,
    }


CASES = {
    "linear": (nn.Linear(6, 5), (4, 6), 30),
    "linear_1d": (nn.Linear(6, 5), (6,), 30),
    "linear_tokens": (nn.Linear(6, 5), (4, 7, 6), 7 * 30),
    "linear_4d": (nn.Linear(6, 5), (4, 7, 2, 6), 14 * 30),
    "linear_empty_batch": (nn.Linear(6, 5), (0, 7, 6), 7 * 30),
    "conv": (nn.Conv2d(3, 4, (3, 2), stride=(2, 1), padding=(1, 0)), (2, 3, 7, 6), 4 * 5 * 4 * 3 * 6),
    "conv_unbatched": (nn.Conv2d(3, 4, 1), (3, 5, 6), 5 * 6 * 12),
    "conv_same": (nn.Conv2d(3, 4, 3, padding="same"), (1, 3, 5, 6), 5 * 6 * 4 * 27),
    "conv_reflect": (nn.Conv2d(3, 4, 3, padding=2, padding_mode="reflect"), (1, 3, 5, 6), 7 * 8 * 4 * 27),
    "conv_dilated": (nn.Conv2d(3, 4, 3, dilation=2), (1, 3, 7, 6), 3 * 2 * 4 * 27),
    "depthwise": (nn.Conv2d(6, 6, 3, groups=6, padding=1), (2, 6, 5, 5), 25 * 6 * 9),
}


@pytest.mark.parametrize(("layer", "shape", "expected"), CASES.values(), ids=CASES)
def test_multiply_adds_by_hand(layer: nn.Module, shape: tuple[int, ...], expected: int) -> None:
    fqt.convert(layer, INT8)
    layer(torch.randn(shape))
    assert fqt.summary(layer).rows[0].madds == expected
    fqt.revert(layer)


def test_multiply_adds_are_of_the_last_forward() -> None:
    layer = fqt.convert(nn.Conv2d(3, 4, 3), INT8)
    for size in (8, 5):
        layer(torch.randn(2, 3, size, size))
    assert fqt.summary(layer).rows[0].madds == 9 * 4 * 27


# --- bytes, parameters, bits --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [n for n in fqt.recipes() if n != "fp32"])
def test_packed_bytes_are_those_of_the_quantized_weight(name: str) -> None:
    recipe = fqt.load_recipe(name).everywhere()
    layers = [
        nn.Linear(13, 7),
        nn.Linear(8, 1),
        nn.Conv2d(5, 6, 3),
        nn.Conv2d(9, 6, (1, 3), groups=3),
        nn.Conv2d(4, 4, 3, groups=4),
    ]
    for layer in layers:
        if isinstance(layer, nn.Conv2d) and not fits_convolutions(recipe):
            continue
        fqt.convert(layer, recipe)
        q = layer.quantized_weight()
        assert q is not None
        assert fqt.summary(layer).rows[0].packed_bytes == q.nbytes


def test_packed_bytes_by_hand() -> None:
    assert fqt.summary(fqt.convert(nn.Linear(20, 6), ONE_BIT)).rows[0].packed_bytes == 6 * 3 + 6 * 4
    assert fqt.summary(fqt.convert(nn.Conv2d(10, 6, 3), ONE_BIT)).rows[0].packed_bytes == 6 * 9 * 2 + 6 * 4
    assert fqt.summary(fqt.convert(nn.Linear(20, 6), INT8)).rows[0].packed_bytes == 6 * 20 + 6 * 4
    assert fqt.summary(fqt.convert(nn.Linear(20, 6).bfloat16(), "fp32")).rows[0].packed_bytes == 6 * 20 * 2


def test_parameters_count_weight_and_bias() -> None:
    model = fqt.convert(small(), "int8")
    assert {name: row.parameters for name, row in rows(model).items()} == {
        "0": 8 * 27 + 8,
        "3": 12 * 2 * 9,
        "5": 108 * 5 + 5,
    }


@pytest.mark.parametrize(
    ("name", "bits", "kept"),
    [
        ("int8", (8, 8, 8), (1, 1, 1)),
        ("xnor", (1, 32, 32), (1, 1, 1)),
        ("fqt_1bit", (1, 4, 4), (1, 1 / 4, 1 / 4)),
        ("fqt_1bit_topk", (1, 4, 4), (1, 1 / 4, 1 / 4)),
        ("fqt_1bit_b1", (1, 1, 1), (1, 1, 1)),
        ("fqt_1bit_b8", (1, 8, 8), (1, 1 / 8, 1 / 8)),
        ("fqt_w1a1g4", (1, 4, 4), (1, 1, 1)),
        ("psq_b2", (1, 2, 2), (1, 1, 1)),
        ("dorefa_w1a2g6", (2, 6, 6), (1, 1, 1)),
        ("dorefa_w8a8g8", (8, 8, 8), (1, 1, 1)),
        ("dorefa_w4a32g4", (32, 4, 32), (1, 1, 1)),
    ],
)
def test_bits_and_kept_fraction_by_product(name: str, bits: tuple, kept: tuple) -> None:
    row = fqt.summary(fqt.convert(nn.Linear(6, 5), fqt.load_recipe(name).everywhere())).rows[0]
    products = ("output", "grad_input", "grad_weight")
    assert row.bits == dict(zip(products, bits, strict=True))
    assert row.kept == dict(zip(products, kept, strict=True))


# --- rows, reasons, the table ---------------------------------------------------------------------------------------------


class MyLinear(nn.Linear):
    """Somebody's."""


def zoo() -> nn.Module:
    return nn.ModuleDict(
        {
            "first": nn.Conv2d(3, 4, 3),
            "middle": nn.Linear(4, 4),
            "mine": MyLinear(4, 4),
            "attention": nn.MultiheadAttention(4, 2, kdim=3),
            "lstm": nn.LSTM(4, 3),
            "embedding": nn.Embedding(7, 4),
            "lazy": nn.LazyLinear(3),
            "normed": parametrizations.weight_norm(MyLinear(4, 4)),
            "transposed": nn.ConvTranspose3d(4, 4, 1),
            "norm": nn.BatchNorm2d(4),
            "act": nn.ReLU(),
            "last": nn.Linear(4, 2),
        }
    )


def test_every_weight_has_a_row_and_every_float_one_its_reason() -> None:
    found = rows(fqt.convert(zoo(), "int8", skip="attention"))
    assert {name: (row.kind, row.note) for name, row in found.items() if row.bits["output"] == 32} == {
        "first": ("Conv2d", "kept float by the rule '<first>'"),
        "mine": ("MyLinear", "a subclass: left alone"),
        "attention": ("MultiheadAttention", "kept float by skip"),
        "attention.out_proj": (
            "NonDynamicallyQuantizableLinear",
            "kept float with 'attention', which multiplies its weight itself",
        ),
        "lstm": ("LSTM", "recurrent: torch multiplies its weights within one function, step by step in time"),
        "embedding": ("Embedding", "not a kind that fqt converts"),
        "lazy": ("LazyLinear", "lazy: it has no shape before its first forward; convert after that"),
        "normed": ("ParametrizedMyLinear", "a subclass: left alone"),
        "last": ("Linear", "kept float by the rule '<last>'"),
    }
    assert found["middle"].kind == "QuantLinear"
    assert [name for name in found if "." not in name] == [n for n, _ in zoo().named_children() if n in found], "in order"
    for row in found.values():
        if row.bits["output"] == 32:
            assert (row.backend, row.output, row.grad_input, row.grad_weight) == ("torch", *["float x float"] * 3)
    assert found["attention"].parameters == 4 * (4 + 3 + 4) + 12
    assert found["lstm"].packed_bytes == 4 * (12 * 4 + 12 * 3)
    assert found["normed"].parameters == 16 + 4 + 4


def test_a_float_model_is_listed_too() -> None:
    found = rows(small())
    assert [row.note for row in found.values()] == ["kept float"] * 3
    assert found["3"].packed_bytes == 12 * 2 * 9 * 4
    assert fqt.summary(nn.ReLU()).rows == []


def test_the_products_are_described_with_what_was_decided() -> None:
    row = fqt.summary(fqt.convert(nn.Linear(6, 5), ONE_BIT)).rows[0]
    assert row.output == "sign/tensor x sign/channel"
    assert row.grad_input == "uint4/sample keep 1/4 bernoulli x sign/channel (folded)"
    assert row.grad_weight == "uint4/channel keep 1/4 bernoulli x sign/tensor"
    by_block = fqt.summary(fqt.convert(nn.Linear(6, 5), fqt.load_recipe("fqt_w1a1g4").everywhere())).rows[0]
    assert by_block.grad_weight == "uint4/sample_channel (by block) x sign/tensor"
    xnor = fqt.summary(fqt.convert(nn.Linear(6, 5), fqt.load_recipe("xnor").everywhere())).rows[0]
    assert xnor.grad_input == "float x sign/channel"


def test_the_backend_is_what_the_table_of_kernels_selects() -> None:
    layer = fqt.convert(nn.Conv2d(3, 4, 3), ONE_BIT)
    row = fqt.summary(layer).rows[0]
    chosen = []
    for product in ("output", "grad_input", "grad_weight"):
        request = ops.Request("cpu", layer.recipe.multiplied(product, "conv"), layer.window())
        chosen.append(ops.select(product, request)[0].label)
    assert row.backend == "+".join(dict.fromkeys(chosen))
    if "reference" in chosen:
        assert row.note, "why nothing faster serves it"


def test_a_faster_kernel_is_named_and_the_refusal_of_one_is_the_note(monkeypatch: pytest.MonkeyPatch) -> None:
    accepts = ops.Kernel("output", "fast", "cpu", "fqt.reference:output", lambda request: None)
    refuses = ops.Kernel("grad_input", "fast", "cpu", "fqt.reference:grad_input", lambda request: "only on Tuesdays")
    elsewhere = ops.Kernel("grad_weight", "gpu", "cuda", "fqt.reference:grad_weight", lambda request: None)
    reference = [k for k in ops.KERNELS if k.backend == "reference"]
    monkeypatch.setattr(ops, "KERNELS", [accepts, refuses, elsewhere, *reference])
    row = fqt.summary(fqt.convert(nn.Linear(6, 5), ONE_BIT)).rows[0]
    assert row.backend == "fast+reference"
    assert "fast: only on Tuesdays" in row.note
    assert "no low-bit kernel for cpu yet" in row.note  # grad_weight


def test_the_table_is_aligned_and_sums_up() -> None:
    model = fqt.convert(small(), "int8")
    before = str(fqt.summary(model))
    assert "?" in before
    model(torch.randn(2, 3, 8, 8))
    text = str(fqt.summary(model))
    lines = text.splitlines()
    assert lines[0].split() == [
        "layer", "kind", "output", "grad_input", "grad_weight", "parameters", "MAdds", "weight", "bytes", "backend", "note",
    ]  # fmt: skip
    assert len(lines) == 1 + 1 + 3 + 1 + 1
    total = 8 * 27 + 8 + 12 * 18 + 545
    assert lines[-1].split()[:3] == ["total", f"{total:,}", f"{13824 + 1944 + 540:,}"]
    assert lines[2].split()[:3] == ["0", "Conv2d", "float"]
    assert "13,824" in lines[2]
    columns = [lines[0].index(word) for word in ("kind", "output", "grad_input", "grad_weight", "backend")]
    for line in lines[2:5]:
        for column in columns:
            assert line[column - 1 : column].isspace() or len(line) < column
    assert all(line == line.rstrip() for line in lines)


def test_a_shared_module_is_counted_once() -> None:
    shared = nn.Linear(4, 4)
    model = fqt.convert(nn.ModuleDict({"a": shared, "b": shared}), INT8)
    assert [row.name for row in fqt.summary(model).rows] == ["a"]


def test_a_converted_layer_that_no_forward_called_stands_as_float() -> None:
    class Borrows(nn.Module):
        """As attention blocks do that hand their layers' weights to one function."""

        def __init__(self) -> None:
            super().__init__()
            self.inner, self.outer = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.outer(nn.functional.linear(x, self.inner.weight))

    model = fqt.convert(Borrows(), INT8)
    assert {row.backend == "torch" for row in fqt.summary(model).rows} == {False}, "nothing is known before a forward"
    model(torch.randn(2, 6))
    inner, outer = fqt.summary(model).rows
    assert (inner.kind, inner.backend, inner.bits["output"], inner.madds) == ("QuantLinear", "torch", 32, None)
    assert inner.note == "converted, but not called by the forwards since: nothing of it ran in low bits"
    assert outer.bits["output"] == 8


def test_counting_leaves_the_output_alone_and_goes_with_revert() -> None:
    model = small().eval()
    x = torch.randn(2, 3, 8, 8)
    expected: Tensor = model(x)
    fqt.convert(model, "int8")
    model(x)
    fqt.revert(model)
    assert torch.equal(model(x), expected)
    assert {row.madds for row in fqt.summary(model).rows} == {None}
    assert not any(m._forward_hooks for m in model.modules())


def test_recurrent_layers_and_fused_experts_stand_there_with_their_reason() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate_up_proj, self.down_proj = nn.Parameter(torch.randn(3, 4, 8)), nn.Parameter(torch.randn(3, 8, 4))
            self.place = nn.Parameter(torch.randn(1, 5, 4))

    model = nn.ModuleDict({"linear": nn.Linear(4, 4), "lstm": nn.LSTM(4, 4), "gru": nn.GRU(4, 4), "experts": Experts()})
    rows = {row.name: row for row in fqt.summary(fqt.convert(model, INT8)).rows}
    reason = "recurrent: torch multiplies its weights within one function, step by step in time"
    assert (rows["lstm"].kind, rows["lstm"].note, rows["gru"].note) == ("LSTM", reason, reason)
    assert rows["experts"].note == (
        "matrices in one 3-d parameter (gate_up_proj, down_proj), as of fused experts, that no layer multiplies: left alone"
    )
    assert rows["experts"].packed_bytes == 2 * 3 * 4 * 8 * 4
