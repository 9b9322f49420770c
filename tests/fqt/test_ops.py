"""The operators as torch sees them, and the table of kernels behind them."""

import itertools
import math
import re
import sys
import types

import numpy as np
import pytest
import torch
from torch._subclasses import FakeTensorMode

from fqt import ops, reference
from fqt.formats import Format
from fqt.geometry import Geometry
from fqt.ops import KERNELS, NORM, OPERATORS, Kernel, Request, load, select
from fqt.qtensor import QTensor, Scales
from fqt.testing import assert_same_codes, assert_same_values
from tests.fqt import oracle, oracle_products

pytestmark = pytest.mark.usefixtures("poisoned_memory")

GEOMETRY = Geometry(4, 3, (3, 2), (2, 1), (1, 0, 0, 1), (1, 1), 2)
KEY = torch.tensor(-77)


def quantize_arguments(x, name: str, calibrate: str, *, stochastic=False, prune="", keep=1, fold=None, pass_range=()):
    key = KEY if stochastic or prune else None
    return (x, fold, key, None, None, name, calibrate, (-1.0, 1.0), stochastic, prune, keep, 4, pass_range)


def operand(rng: np.random.Generator, name: str, shape: tuple[int, int, int], keep: float | None = None) -> QTensor:
    return oracle_products.random_operand(rng, Format.parse(name), shape, keep).q


def schema(*operands: QTensor) -> list:
    return [part for q in operands for part in (q.tensors(), q.format.name, q.shape)]


QUANTIZE_SAMPLES = {
    "sign": {"name": "sign", "calibrate": "none", "pass_range": (-1.0, 1.0)},
    "sign of channels": {"name": "sign:O", "calibrate": "absmean"},
    "stochastic": {"name": "uint4+:N", "calibrate": "minmax", "stochastic": True},
    "bernoulli": {"name": "uint4+:C", "calibrate": "minmax", "stochastic": True, "prune": "bernoulli", "keep": 2},
    "topk": {"name": "uint4+:NC", "calibrate": "minmax", "prune": "topk", "keep": 4},
    "folded": {"name": "int8:N", "calibrate": "absmax", "stochastic": True, "fold": torch.rand(1, 1, 5)},
    "16 bits": {"name": "int16:NP", "calibrate": "absmax"},
    "32 bits": {"name": "fixed32", "calibrate": "none"},
    "float8": {"name": "e4m3", "calibrate": "absmax", "stochastic": True},
}


@pytest.mark.parametrize("sample", QUANTIZE_SAMPLES)
@pytest.mark.every(2)
def test_opcheck_of_quantize(sample):
    x = torch.randn(3, 4, 5)
    torch.library.opcheck(torch.ops.fqt.quantize.default, quantize_arguments(x, **QUANTIZE_SAMPLES[sample]))


def test_opcheck_of_quantize_with_other_inputs():
    """Empty, with strides, in bfloat16: outputs must not share memory with each other or with the input."""
    arguments = {"name": "uint4+:N", "calibrate": "minmax", "pass_range": (-1.0, 1.0)}
    for x in (
        torch.empty(0, 4, 5),
        torch.empty(3, 4, 0),
        torch.randn(5, 4, 3).permute(2, 1, 0),
        torch.randn(3, 1, 5).expand(3, 4, 5),
        torch.randn(3, 4, 5, dtype=torch.bfloat16),
    ):
        torch.library.opcheck(torch.ops.fqt.quantize.default, quantize_arguments(x, **arguments))


def calibrate_arguments(x, name: str, calibrate: str, *, stochastic=False, prune="", keep=1, fold=None, pass_range=()):
    """As `quantize_arguments`; rounding and the estimator's range are no matter of calibrating."""
    return (x, fold, KEY if prune else None, None, None, name, calibrate, (-1.0, 1.0), prune, keep, 4)


def encode_arguments(x, name: str, calibrate: str, *, stochastic=False, fold=None, **rest):
    scales = torch.ops.fqt.calibrate(*calibrate_arguments(x, name, calibrate, fold=fold, **rest))
    return (x, list(scales), fold, KEY if stochastic else None, name, 4)


@pytest.mark.parametrize("backend", ["", "reference"])
@pytest.mark.parametrize("sample", QUANTIZE_SAMPLES)
@pytest.mark.every(2)
def test_opcheck_of_calibrate_and_encode(sample, backend):
    x = torch.randn(3, 4, 5)
    for operator, made in ((torch.ops.fqt.calibrate, calibrate_arguments), (torch.ops.fqt.encode, encode_arguments)):
        torch.library.opcheck(operator.default, (*made(x, **QUANTIZE_SAMPLES[sample]), backend))


@pytest.mark.parametrize("sample", QUANTIZE_SAMPLES)
def test_calibrate_then_encode_is_quantize(sample):
    """Through the schemas, where what is absent is an empty tensor."""
    asked, x = QUANTIZE_SAMPLES[sample], torch.randn(3, 4, 5)
    format = Format.parse(asked["name"])
    codes, *rest, _ = torch.ops.fqt.quantize(*quantize_arguments(x, **asked))
    expected = QTensor.from_tensors((codes, *rest), format, (3, 4, 5))
    scales = Scales.from_tensors(torch.ops.fqt.calibrate(*calibrate_arguments(x, **asked)), format)
    encoded = torch.ops.fqt.encode(*encode_arguments(x, **asked))
    assert_same_codes(scales.of(encoded, format, (3, 4, 5)), expected)


@pytest.mark.parametrize("name", ["sign", "uint4+:C", "fixed32", "e5m2:NC"])
def test_opcheck_of_decode(name, rng):
    q = operand(rng, name, (3, 4, 5))
    torch.library.opcheck(torch.ops.fqt.decode.default, (q.tensors(), name, q.shape))


@pytest.mark.parametrize("geometry", [None, GEOMETRY], ids=["linear", "conv"])
@pytest.mark.parametrize("names", [("sign", "sign"), ("uint4+", "uint3+:O")], ids=str)
def test_opcheck_of_output(names, geometry, rng):
    x = operand(rng, names[0], (2, 12, 4))
    w = operand(rng, names[1], (6, 6, 2) if geometry else (6, 1, 4))
    flat = geometry.flat() if geometry else []
    for bias in (None, torch.randn(6)):
        torch.library.opcheck(torch.ops.fqt.output.default, (*schema(x, w), bias, flat))


@pytest.mark.parametrize("geometry", [None, GEOMETRY], ids=["linear", "conv"])
def test_opcheck_of_grad_input(geometry, rng):
    positions = math.prod(geometry.output_size) if geometry else 12
    w = operand(rng, "sign", (6, 6, 2) if geometry else (6, 1, 4))
    flat = geometry.flat() if geometry else []
    none, mask = torch.empty(0, dtype=torch.uint8), torch.full((2, 12, 1), 5, dtype=torch.uint8)
    for keep, bits in ((None, none), (0.5, mask)):
        g = operand(rng, "uint4+:N", (2, positions, 6), keep)
        torch.library.opcheck(torch.ops.fqt.grad_input.default, (*schema(g, w), bits, (2, 12, 4), flat))


@pytest.mark.parametrize("geometry", [None, GEOMETRY], ids=["linear", "conv"])
@pytest.mark.parametrize("name", ["uint4+:C", "uint4+:NC"])
def test_opcheck_of_grad_weight(name, geometry, rng):
    positions = math.prod(geometry.output_size) if geometry else 12
    x = operand(rng, "sign", (2, 12, 4))
    flat = geometry.flat() if geometry else []
    for keep in (None, 0.5):
        g = operand(rng, name, (2, positions, 6), keep)
        torch.library.opcheck(torch.ops.fqt.grad_weight.default, (*schema(g, x), flat))


def test_opcheck_of_draw_key():
    """Without the comparison of values: a draw differs from the next."""
    torch.library.opcheck(torch.ops.fqt.draw_key.default, (torch.randn(2),), test_utils=("test_schema", "test_faketensor"))


def test_keys_come_from_torchs_generator_and_use_64_bits():
    like = torch.empty(0)
    torch.manual_seed(3)
    keys = [int(torch.ops.fqt.draw_key(like)) for _ in range(200)]
    torch.manual_seed(3)
    assert [int(torch.ops.fqt.draw_key(like)) for _ in range(200)] == keys
    assert len(set(keys)) == 200
    assert {key < 0 for key in keys} == {True, False}
    ones = np.array([sum(key >> bit & 1 for key in keys) for bit in range(64)])
    oracle.assert_mean(ones, 200, np.full(64, 0.5), np.full(64, 0.25))
    key = torch.ops.fqt.draw_key(like)
    assert key.shape == ()
    assert key.dtype == torch.int64


# --- fake kernels ----------------------------------------------------------------------------------------------------


def assert_alike(real: torch.Tensor, fake: torch.Tensor, what: object) -> None:
    assert (real.shape, real.dtype, real.device) == (fake.shape, fake.dtype, fake.device), what
    for size, one, other in zip(real.shape, real.stride(), fake.stride(), strict=True):
        assert size <= 1 or real.numel() == 0 or one == other, (what, real.stride(), fake.stride())


def faked(operator, *arguments):
    """The operator's outputs, and those of its fake kernel."""
    with FakeTensorMode() as mode:
        fakes = torch.utils._pytree.tree_map_only(torch.Tensor, mode.from_tensor, arguments)
        fake = operator(*fakes)
    real = operator(*arguments)
    return [(real, fake)] if isinstance(real, torch.Tensor) else list(zip(real, fake, strict=True))


FORMATS = [
    Format(grid, bits, axes, offset)
    for grid, bits, offset in (
        [("sign", 1, False), ("ternary", 2, False), ("e4m3", 8, False), ("e5m2", 8, False)]
        + [("int", b, False) for b in (2, 4, 5, 8, 9, 16)]
        + [("uint", b, True) for b in (1, 2, 3, 4, 8, 12, 16)]
        + [("uint", 2, False), ("fixed", 1, False), ("fixed", 16, False), ("fixed", 17, False), ("fixed", 32, False)]
    )
    for axes in ("", "N", "O", "NP", "C", "NC")
]


@pytest.mark.parametrize(("shape", "every"), [((3, 4, 5), 1), ((1, 1, 1), 5), ((0, 3, 5), 5), ((2, 1, 17), 5)], ids=str)
def test_fake_codes_are_like_the_real_ones(shape, every):
    """Of every format, or of every fifth one."""
    x = torch.randn(shape)
    variants = [("", (-1.0, 1.0)), ("bernoulli", ()), ("topk", ()), ("", ())]
    for i, format in list(enumerate(FORMATS))[::every]:
        prune, pass_range = variants[(i + i // 6) % 4]
        calibrate = "minmax" if format.offset else "none" if format.grid in ("fixed", "uint") else "absmax"
        if format.grid == "sign":
            calibrate = "absmean"
        arguments = quantize_arguments(
            x, format.name, calibrate, stochastic=format.grid != "sign", prune=prune, keep=2 if prune else 1,
            pass_range=pass_range,
        )  # fmt: skip
        pairs = faked(torch.ops.fqt.quantize.default, *arguments)
        scales = faked(torch.ops.fqt.calibrate.default, *arguments[:8], *arguments[9:12])
        given = [real for real, _ in scales]
        encoded = faked(torch.ops.fqt.encode.default, x, given, None, KEY if arguments[8] else None, format.name, 4)
        for real, fake in (*pairs, *scales, *encoded):
            assert_alike(real, fake, (format, prune, pass_range))
        codes = [real for real, _ in pairs][:4]
        for real, fake in faked(torch.ops.fqt.decode.default, codes, format.name, shape):
            assert_alike(real, fake, format)


def test_fake_products_are_like_the_real_ones(rng):
    none = torch.empty(0, dtype=torch.uint8)
    geometries = [None, GEOMETRY, Geometry(1, 12, (1, 1), (1, 1), (0, 0, 0, 0), (1, 1), 1)]
    geometries += [
        Geometry(4, 3, (4, 3), (1, 1), (0, 0, 0, 0), (1, 1), 4),
        Geometry(2, 6, (3, 3), (1, 3), (1, 1, 1, 1), (1, 1), 2),
    ]
    for geometry, samples in itertools.product(geometries, (0, 1, 3)):
        flat = geometry.flat() if geometry else []
        positions = math.prod(geometry.output_size) if geometry else 12
        taps, groups = (math.prod(geometry.kernel), geometry.groups) if geometry else (1, 1)
        x_shape, w_shape, g_shape = (samples, 12, 4), (8, taps, 4 // groups), (samples, positions, 8)
        x, w = operand(rng, "uint2+", x_shape), operand(rng, "uint3+", w_shape)
        g, g_channel = operand(rng, "uint4+:N", g_shape), operand(rng, "uint4+:C", g_shape, 0.5)
        for real, fake in (
            *faked(torch.ops.fqt.output.default, *schema(x, w), torch.randn(8), flat),
            *faked(torch.ops.fqt.grad_input.default, *schema(g, w), none, x_shape, flat),
            *faked(torch.ops.fqt.grad_weight.default, *schema(g, x), flat),
            *faked(torch.ops.fqt.grad_weight.default, *schema(g_channel, x), flat),
        ):
            assert_alike(real, fake, (geometry, samples))
            assert real.is_contiguous()


# --- what crosses the schema -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("geometry", [None, GEOMETRY], ids=["linear", "conv"])
def test_the_operators_are_the_references_functions(geometry, rng):
    positions = math.prod(geometry.output_size) if geometry else 12
    flat, bias = geometry.flat() if geometry else [], torch.randn(6)
    x, w = operand(rng, "uint2+", (3, 12, 4)), operand(rng, "uint3+", (6, 6, 2) if geometry else (6, 1, 4))
    for keep in (None, 0.5):
        g = operand(rng, "uint4+:N", (3, positions, 6), keep)
        mask = torch.from_numpy(rng.integers(0, 256, (3, 12, 1)).astype(np.uint8))
        none = torch.empty(0, dtype=torch.uint8)
        assert_same_values(torch.ops.fqt.output(*schema(x, w), bias, flat), reference.output(x, w, bias, geometry).contiguous())
        for bits, expected in ((none, None), (mask, mask)):
            assert_same_values(
                torch.ops.fqt.grad_input(*schema(g, w), bits, (3, 12, 4), flat),
                reference.grad_input(g, w, expected, geometry, (3, 12, 4)),
            )
        assert_same_values(torch.ops.fqt.grad_weight(*schema(g, x), flat), reference.grad_weight(g, x, geometry))
    assert_same_values(torch.ops.fqt.decode(x.tensors(), x.format.name, x.shape), x.decode())


@pytest.mark.parametrize("geometry", [GEOMETRY, Geometry(9, 8, (1, 5), (2, 3), (1, 2, 3, 4), (5, 6), 7)], ids=str)
def test_a_geometry_crosses_a_schema_as_integers(geometry):
    assert Geometry.unflatten(geometry.flat()) == geometry
    assert all(type(i) is int for i in geometry.flat())
    assert Geometry.unflatten([]) is None


def test_autocast_stays_out_of_the_operators(rng):
    x, w = operand(rng, "int8", (3, 40, 64)), operand(rng, "int8:O", (6, 1, 64))
    plain = torch.ops.fqt.output(*schema(x, w), None, [])
    with torch.autocast("cpu", torch.bfloat16):
        assert_same_values(torch.ops.fqt.output(*schema(x, w), None, []), plain)


def test_a_malformed_format_name_is_a_clear_error():
    with pytest.raises(ValueError, match="'int99x' is not a format name"):
        torch.ops.fqt.quantize(*quantize_arguments(torch.randn(1, 1, 1), "int99x", "absmax"))


# --- the table of kernels --------------------------------------------------------------------------------------------

SIGNS = Request("cpu", (Format("sign", 1), Format("sign", 1)))


@pytest.fixture
def table(monkeypatch):
    """A table with the reference alone, and nothing loaded."""
    rows = [row for row in KERNELS if row.backend == "reference"]
    monkeypatch.setattr(ops, "KERNELS", rows)
    load.cache_clear()
    yield rows
    load.cache_clear()


@pytest.fixture
def a_kernel(monkeypatch):
    """A module with a kernel in it: the output is all 42."""
    module = types.ModuleType("a_kernel_of_a_test")
    module.output = lambda x, w, bias, geometry: torch.full((x.shape[0], x.shape[1], w.shape[0]), 42.0)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return f"{module.__name__}:output"


def row(function: str, refuses=lambda request: None, device="cpu", operator="output") -> Kernel:
    return Kernel(operator, "mine", device, function, refuses)


def test_every_operator_has_the_reference_as_its_last_row():
    for operator in OPERATORS:
        rows = [kernel for kernel in KERNELS if kernel.operator == operator]
        assert rows[-1].backend == "reference"
        assert rows[-1].function == f"fqt.reference{'.norm' if operator in NORM else ''}:{operator}"
        assert [kernel.backend for kernel in rows].count("reference") == 1
        assert rows[-1].refuses(SIGNS) is None
        assert rows[-1].device == ""
    assert {kernel.operator for kernel in KERNELS} == set(OPERATORS)


@pytest.mark.parametrize("operator", OPERATORS)
def test_the_reference_serves_every_device_and_format(operator):
    for format in FORMATS:
        for device in ("cpu", "cuda", "mps"):
            formats = (format,) if operator in ("quantize", "calibrate", "encode", "decode") else (format, format)
            kernel, reasons = select(operator, Request(device, formats, GEOMETRY))
            assert kernel.operator == operator
            assert all(re.fullmatch(r"[\w ]+: .+", str(reason)) for reason in reasons)


def test_a_row_that_is_added_is_preferred(table, a_kernel, rng):
    x, w = operand(rng, "sign", (2, 3, 4)), operand(rng, "sign", (5, 1, 4))
    table.insert(0, row(a_kernel))
    kernel, reasons = select("output", SIGNS)
    assert (kernel.backend, reasons) == ("mine", [])
    assert torch.equal(torch.ops.fqt.output(*schema(x, w), None, []), torch.full((2, 3, 5), 42.0))
    assert select("grad_input", SIGNS)[0].backend == "reference", "of another operator nothing changes"


def test_the_reasons_of_rows_that_refuse_are_reported_in_order(table, a_kernel, rng):
    asked = []

    def refuses(request: Request) -> str | None:
        asked.append(request)
        return None if request.formats[0].bits == 8 else f"{request.formats[0].name} is too narrow"

    table.insert(0, row(a_kernel, refuses))
    table.insert(1, row(a_kernel, lambda request: "not today"))
    x, w = operand(rng, "sign", (2, 3, 4)), operand(rng, "sign", (5, 1, 4))
    kernel, reasons = select("output", SIGNS)
    assert kernel.backend == "reference"
    assert [str(reason) for reason in reasons] == ["mine: sign is too narrow", "mine: not today"]
    assert not torch.equal(torch.ops.fqt.output(*schema(x, w), None, []), torch.full((2, 3, 5), 42.0))
    assert asked[-1] == Request("cpu", (x.format, w.format), None)
    image = Geometry(1, 3, (1, 1), (1, 1), (0, 0, 0, 0), (1, 1), 1)
    torch.ops.fqt.output(*schema(x, w), None, image.flat())
    assert asked[-1] == Request("cpu", (x.format, w.format), image)
    eight = Request("cpu", (Format("int", 8), Format("int", 8)))
    assert select("output", eight)[0].backend == "mine"


def test_a_row_for_another_device_is_not_asked(table, a_kernel):
    def refuses(request: Request) -> str | None:
        raise AssertionError("asked")

    before = select("output", SIGNS)
    table.insert(0, row(a_kernel, refuses, device="cuda"))
    assert select("output", SIGNS) == before
    with pytest.raises(AssertionError, match="asked"):
        select("output", Request("cuda", SIGNS.formats))


def test_an_import_error_of_a_row_surfaces(table, rng):
    x, w = operand(rng, "sign", (2, 3, 4)), operand(rng, "sign", (5, 1, 4))
    table.insert(0, row("fqt.no_such_module:output"))
    with pytest.raises(ModuleNotFoundError, match=r"fqt\.no_such_module"):
        torch.ops.fqt.output(*schema(x, w), None, [])
    table[0] = row("fqt.reference:no_such_function")
    with pytest.raises(AttributeError, match="no_such_function"):
        torch.ops.fqt.output(*schema(x, w), None, [])


def test_an_error_within_a_kernel_surfaces(table, a_kernel, rng):
    def broken(*arguments):
        raise RuntimeError("the kernel failed")

    sys.modules["a_kernel_of_a_test"].output = broken  # type: ignore[attr-defined]
    table.insert(0, row(a_kernel))
    x, w = operand(rng, "sign", (2, 3, 4)), operand(rng, "sign", (5, 1, 4))
    with pytest.raises(RuntimeError, match="the kernel failed"):
        torch.ops.fqt.output(*schema(x, w), None, [])


def test_importing_fqt_loads_no_kernel(tmp_path):
    """The functions of the rows are imported when they are first used."""
    import subprocess

    code = "import fqt, sys; assert 'triton' not in sys.modules; import fqt.ops; assert fqt.ops.load.cache_info().currsize == 0"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)


def test_kernels_get_contiguous_operands(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch):
    """Kernels of GPUs address codes and scales by numbers: a view of every other one would be read wrong, without an error."""
    seen: list[torch.Tensor] = []
    module = types.ModuleType("a_kernel_that_looks")

    def output(x: QTensor, w: QTensor, *rest: object) -> torch.Tensor:
        seen.extend([*x.tensors(), *w.tensors()])
        return reference.output(x, w, *rest)  # type: ignore[arg-type]

    module.output = output  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    kernel = Kernel("output", "looking", "cpu", f"{module.__name__}:output", lambda request: None)
    monkeypatch.setattr(ops, "KERNELS", [kernel, *KERNELS])
    x, w = operand(rng, "uint4+:N", (3, 2, 10)), operand(rng, "sign:O", (5, 1, 10))
    apart = [[t.repeat_interleave(2, 0)[::2] for t in q.tensors()] for q in (x, w)]
    arguments = (apart[0], x.format.name, x.shape, apart[1], w.format.name, w.shape)
    assert_same_values(torch.ops.fqt.output(*arguments, None, []), reference.output(x, w, None, None))
    assert seen and all(t.is_contiguous() for t in seen)
