"""What do the Triton kernels become, without a GPU?

    python -m benchmarks.aot [--capability 80 89 90 100] [--only WORDS] [--quick] [--json F]

Every launch that a set of calls makes is recorded and compiled ahead of time for each capability, at every tile of the search
space that fits the chip, and taken apart: registers, shared memory, the tensor-core instructions. The command fails if a kernel
spills registers to local memory, needs more shared memory than the chip has, holds none of the instructions that it is for, or
waits for the device to see what it wrote (MEMBAR.GPU).
Of each product it tells a roofline (`benchmarks.sass`). `--quick` takes the tile that `plan` picks and a few calls.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from benchmarks import sass
from benchmarks.common import table, write_json
from fqt.formats import Format, Shape3
from fqt.geometry import Geometry
from fqt.qtensor import QTensor, codes_dtype
from fqt.reference import norm as specification
from fqt.reference.norm import Source, Windows
from fqt.triton_kernels import calibrate, codes, decode, gather, norm, plan, prune, quantize, weight

MODULES = (calibrate, codes, decode, gather, norm, prune, quantize, weight)
CAPABILITIES = (80, 89, 90, 100)
_TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
_WINDOW = Geometry(16, 16, (3, 3), (1, 1), (1, 1, 1, 1), (1, 1), 1)


@dataclass(frozen=True)
class Launch:
    """A launch that was asked for. `product`: whether it is for the tensor cores."""

    call: str
    kernel: triton.JITFunction
    grid: tuple[int, ...]
    args: tuple[object, ...]
    constants: dict[str, object]

    @property
    def product(self) -> bool:
        return {"M", "N", "K"} <= set(self.constants)


@dataclass(frozen=True)
class _On(plan.Rules):
    """The rules on a chip that is not here. forced: the tile of every product whose sums it can hold in registers there."""

    chip: tuple[int, int] = (9, 0)
    forced: plan.Tile | None = None

    def tile(self, m: int, n: int, k: int, capability: tuple[int, int], programs: int = 1, **needs: Any) -> plan.Tile:
        if self.forced is not None and plan.fits_registers(self.forced, self.chip, **needs):
            return self.forced
        return super().tile(m, n, k, self.chip, programs, **needs)


class _Elsewhere:
    """A driver for a chip that is not here: enough of one to compile."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability  # kernels are cached by device

    def get_current_stream(self, device: object = None) -> int:
        return 0


def recorded(call: str, function: Callable[[], object]) -> list[Launch]:
    """The launches of a call. Nothing runs."""
    found: list[Launch] = []

    def record(kernel, grid, *args, warps: int = 4, stages: int = 2, **constants) -> None:
        if 0 not in grid:
            options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": False}
            found.append(Launch(call, kernel, grid, args, {**constants, **options}))

    before = [module.launch for module in MODULES]
    try:
        for module in MODULES:
            module.launch = record
        function()
    finally:
        for module, launch in zip(MODULES, before, strict=True):
            module.launch = launch
    return found


def calls(quick: bool, rules: plan.Rules = plan.RULES) -> Iterator[tuple[str, Callable[[], object]]]:
    """Name and call, of every family: formats, granularities, windows, pruning. rules: of the products."""
    x, key = torch.zeros(8, 256, 128), torch.tensor(1)
    channels_first = torch.zeros(8, 128, 256).transpose(1, 2)
    quantizers = [
        ("sign", {"calibrate": "none", "pass_range": (-1.0, 1.0)}),
        ("sign:O", {"calibrate": "absmean"}),
        ("uint4+:N", {"calibrate": "minmax", "stochastic": True, "prune": "bernoulli", "keep_one_in": 4}),
        ("uint4+:C", {"calibrate": "minmax", "stochastic": True, "prune": "topk", "keep_one_in": 4}),
        ("e4m3:N", {"calibrate": "absmax"}),
    ]
    if not quick:
        quantizers += [
            *((f"int8{axes}", {"calibrate": "absmax", "stochastic": True}) for axes in ("", ":N", ":NP", ":C", ":NC")),
            *((f"uint{bits}+:NC", {"calibrate": "minmax", "stochastic": True}) for bits in (1, 2, 4, 6, 16)),
            ("uint2", {"calibrate": "none", "limits": (0.0, 1.0), "pass_range": (0.0, 1.0)}),
            ("fixed8", {"calibrate": "none", "limits": (-1.0, 1.0), "stochastic": True}),
            ("e5m2", {"calibrate": "absmax", "stochastic": True}),
            ("ternary", {"calibrate": "absmean"}),
        ]
    for name, options in quantizers:
        format = Format.parse(name)
        yield f"quantize {name}", lambda f=format, o=options: quantize.quantize(x, f, key=key, **o)
        if not quick:
            yield f"quantize {name} NCHW", lambda f=format, o=options: quantize.quantize(channels_first, f, key=key, **o)

    # on a device an argument that is 1 is a constant: another program than for any other size
    yield "quantize one", lambda: quantize.quantize(x[:1, :1, :1], Format.parse("sign:O"), calibrate="absmean")

    for name in ("uint4+:N", "sign") if quick else ("uint4+:NC", "sign", "int8:C", "e4m3", "fixed12"):
        yield f"decode {name}", lambda n=name: decode.decode(zeros(n, (8, 256, 128)))

    products = [
        ("output", "sign", "sign:O", False), ("grad_input", "uint4+:N", "sign", True),
        ("grad_weight", "uint4+:C", "sign", True), ("grad_weight", "uint4+:NC", "sign", False),
        ("output", "int8:N", "int8:O", False), ("output", "e4m3", "e4m3", False),
    ]  # fmt: skip
    if not quick:
        products += [
            ("accumulate", "sign", "sign:O", False), ("output", "uint2", "sign", False), ("output", "uint8", "uint8+", False),
            ("grad_input", "int8:N", "int8", False), ("grad_input", "uint8+:N", "uint8+", False),
            ("grad_weight", "int8:C", "int8", False), ("grad_weight", "uint6+:N", "uint2", True),
            ("grad_weight", "uint8+:N", "uint8", False), ("grad_input", "e5m2:N", "e4m3", False),
            ("grad_weight", "e5m2:C", "e4m3", False),
        ]  # fmt: skip
    for operator, left, right, pruned in products:
        for geometry in (_WINDOW, None) if not quick else (_WINDOW if left != "int8:N" else None,):
            where = "3x3" if geometry else "linear"
            run = functools.partial(product, operator, left, right, geometry, pruned, rules)
            yield f"{operator} {left} {right} {where}", run

    affine, windows = torch.zeros(4, 128), Windows(16, 16, (2, 2))
    source = Source(torch.zeros(8, 256, 128, dtype=torch.int16), torch.zeros(128), torch.zeros(128))
    g, kept = torch.zeros(8, 64, 128), torch.ones(8, dtype=torch.bool)
    norms: dict[str, tuple] = {
        "norm_sign": (source, affine, windows, -1.0, 1.0), "norm_grad": (g, kept, source, affine, windows, affine[:2]),
    }  # fmt: skip
    if not quick:
        norms |= {
            "norm_sums": (source,), "norm_value": (source, affine, windows),
            "norm_grad_sums": (g, kept, source, affine, windows),
        }  # fmt: skip
    for name, args in norms.items():
        assert hasattr(specification, name)
        yield name, lambda n=name, a=args: getattr(norm, n)(*a)


def product(
    operator: str, left: str, right: str, geometry: Geometry | None, pruned: bool, rules: plan.Rules, channels: int = 256
) -> Tensor:
    """A product of zeros: 64 images of 16 x 16, or as many tokens."""
    shape = (64, 256, channels)
    w_shape = (channels, 9 if geometry else 1, channels)
    if operator in ("output", "accumulate"):
        a, b = zeros(left, shape), zeros(right, w_shape)
        if operator == "accumulate":
            return gather.accumulate(a, b, geometry, rules=rules)
        return gather.output(a, b, torch.zeros(channels), geometry, rules=rules)
    g = zeros(left, shape, pruned)
    if operator == "grad_input":
        mask = torch.zeros(Format("sign", 1).packed_shape(shape), dtype=torch.uint8)
        return gather.grad_input(g, zeros(right, w_shape), mask, geometry, shape, rules=rules)
    return weight.grad_weight(g, zeros(right, shape), geometry, rules=rules)


def zeros(name: str, shape: Shape3, pruned: bool = False) -> QTensor:
    """A quantized tensor of zeros."""
    format = Format.parse(name)
    groups = format.groups(shape)
    codes_ = torch.zeros(format.packed_shape(shape), dtype=codes_dtype(format))
    index = torch.zeros(groups, dtype=torch.int32) if pruned else None
    return QTensor(codes_, torch.zeros(groups), torch.zeros(groups) if format.offset else None, index, format, shape)


def examined(launch: Launch, capability: int) -> dict[str, object]:
    """Compile for a capability and take apart.

    Raises:
        RuntimeError: it spills, needs too much shared memory, or is a product without tensor cores.
    """
    driver.set_active(_Elsewhere(capability))  # type: ignore[arg-type]
    compiled = launch.kernel.warmup(*launch.args, grid=launch.grid, **launch.constants)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage, code = _told("cuobjdump", "-res-usage", file.name), _told("nvdisasm", "-c", file.name)
    local = len(re.findall(r"\b(?:STL|LDL)\b", code))
    row = {
        "kernel": launch.kernel.fn.__name__,
        "call": launch.call,
        "capability": capability,
        "tile": "x".join(str(launch.constants[size]) for size in "MNK") if launch.product else "",
        "warps": launch.constants["num_warps"],
        "stages": launch.constants["num_stages"],
        "registers": int(re.findall(r"REG:(\d+)", usage)[0]),
        "shared_bytes": compiled.metadata.shared,
        "local": local,
        "tensor_cores": sorted(set(re.findall(sass.TENSOR_CORES, code))),
    }
    loop = sass.inner_loop(code) if launch.product else None
    if loop is not None:
        row |= _modelled(loop, launch, capability, row)
    limit = plan.shared_bytes((capability // 10, capability % 10))
    name = f"{row['kernel']} {row['tile']} of {launch.call} for sm_{capability}"
    if local:
        raise RuntimeError(f"{name} spills registers: {local} accesses to local memory")
    if compiled.metadata.shared > limit:
        raise RuntimeError(f"{name} needs {compiled.metadata.shared:,} bytes of shared memory, the chip has {limit:,}")
    if launch.product and not row["tensor_cores"]:
        raise RuntimeError(f"{name} holds no tensor-core instruction")
    if fences := len(re.findall(sass.FENCES, code)):
        raise RuntimeError(
            f"{name} waits {fences} times for the device to see what it wrote (MEMBAR.GPU): is an atomic not relaxed?"
        )
    return row


def _modelled(loop: sass.Loop, launch: Launch, capability: int, row: dict[str, object]) -> dict[str, object]:
    """Of a product's loop: instructions for each of the tensor cores', blocks that share a multiprocessor, and the roofline."""
    chip, warps = capability / 10, int(launch.constants["num_warps"])  # type: ignore[call-overload]
    together = sass.blocks(chip, int(row["registers"]), int(row["shared_bytes"]), warps)  # type: ignore[call-overload]
    m, n, k = (int(launch.constants[size]) for size in "MNK")  # type: ignore[call-overload]
    kind = "float8" if launch.constants.get("FLOAT") else "int8"
    cycles = sass.roofline(loop, (m, n, k), kind, chip, warps, together)
    return {"loop": loop.instructions, "mmas": loop.products, "pending": loop.pending, "blocks": together, **cycles}


def _told(tool: str, *arguments: str) -> str:
    return subprocess.run([_TOOLS / tool, *arguments], capture_output=True, text=True, check=True).stdout


def measure(capabilities: list[int], quick: bool, only: str = "") -> tuple[list[dict[str, object]], list[str]]:
    """Rows of everything that compiled as it should, and what did not."""
    rows: list[dict[str, object]] = []
    failures: list[str] = []
    for capability in capabilities:
        seen: set[tuple] = set()
        chip = (capability // 10, capability % 10)
        fitting = [t for t in plan.TILES if t.bytes <= plan.shared_bytes(chip)]
        made = [dict(calls(quick, _On(chip=chip, forced=forced))) for forced in ([None] if quick else fitting)]
        for name in made[0]:
            if only not in name:
                continue
            if capability < 89 and ("e4m3" in name or "e5m2" in name) and not name.startswith("quantize"):
                continue  # refused there
            for launch in itertools.chain.from_iterable(recorded(name, functions[name]) for functions in made):
                key = (launch.kernel.fn.__name__, str(sorted(launch.constants.items())), str([type(a) for a in launch.args]))
                if key in seen:
                    continue
                seen.add(key)
                try:
                    rows.append(examined(launch, capability))
                    print(".", end="", file=sys.stderr, flush=True)
                except Exception as error:  # noqa: BLE001  the rest of the table is worth having
                    failures.append(" ".join(f"sm_{capability}, {name}: {type(error).__name__}: {error}".split())[:600])
    return rows, failures


def _cells(row: dict[str, Any]) -> list[str]:
    """The last five columns of a product's row."""
    if "loop" not in row:
        return [""] * 5
    waits = "" if row["pending"] is None else f" wait {row['pending']}"
    cycles = f"{row['issue']:.0f} : {row['tensor']:.0f}{waits}"
    return [f"{row['loop']} / {row['mmas']}", str(row["blocks"]), cycles, f"{row['share']:.2f}", f"{row['bytes']:.0f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--capability", type=int, nargs="+", default=list(CAPABILITIES))
    parser.add_argument("--only", default="", help='calls whose name holds this, such as "grad_weight" or "sign:O 3x3"')
    parser.add_argument("--quick", action="store_true", help="a few calls, at the tiles that are picked")
    parser.add_argument("--json", type=Path, help="write the rows here")
    args = parser.parse_args()
    rows, failures = measure(args.capability, args.quick, args.only)
    head = ["kernel", "call", "sm", "tile", "warps", "stages", "registers", "shared", "tensor cores", "loop / mma", "blocks",
            "issue : tensor", "share", "bytes"]  # fmt: skip
    print(
        table(
            head,
            [
                [row["kernel"], row["call"], row["capability"], row["tile"], row["warps"], row["stages"], row["registers"],
                 f"{row['shared_bytes']:,}", " ".join(row["tensor_cores"]), *_cells(row)]  # type: ignore[arg-type]
                for row in rows
            ],
        )
    )  # fmt: skip
    if args.json:
        write_json(args.json, rows)
    if failures:
        sys.exit("\n".join(failures))


if __name__ == "__main__":
    main()
