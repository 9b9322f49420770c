"""The parts of `gpu_check` that time nothing: every kernel once at the tile that serves, NVIDIA's tools, random cases."""

from __future__ import annotations

import functools
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks.cases import covering
from benchmarks.gpu_asked import LARGEST
from benchmarks.gpu_machine import Machine
from benchmarks.gpu_parts import PRODUCTS, QUANTIZERS, WINDOW, Row, Task, asked_of, checked, operands, wrong
from fqt import ops, reference, selfcheck
from fqt.formats import Format
from fqt.ops import NORM, Kernel, Request
from fqt.quantizers import build
from fqt.testing import assert_same_codes, assert_same_scales, assert_same_values

ROOT = Path(__file__).parents[1]
FAMILIES = {"quantize": 12, "products": 12, "scales": 8, "norm": 10, "prune": 4, "float8": 2}
"""Random cases of a round, by family of tests/fqt/triton_kernels/cases.py."""


def smoke(machine: Machine) -> Iterator[Task]:
    """Each row of the table once, products first, at the tile that serves large operands."""
    rows = [row for row in ops.KERNELS if row.device == machine.device and row.backend != "reference"]
    for row in sorted(rows, key=lambda row: row.operator not in (*ops.PRODUCTS, "accumulate")):
        yield f"{row.operator} {row.label}", functools.partial(_smoked, row, machine)


def _smoked(kernel: Kernel, machine: Machine) -> Iterator[Row]:
    row: Row = {"name": kernel.operator, "backend": kernel.label}
    if kernel.operator in (*ops.PRODUCTS, "accumulate"):
        asked = (*covering(PRODUCTS, machine.device), ("accumulate", "sign", "sign", 1.0))
        named = [(left, right) for operator, left, right, _ in asked if operator == kernel.operator]
        for left, right in named:
            formats = (Format.parse(left), Format.parse(right))
            reason = kernel.refuses(Request(machine.device, formats))
            if reason is None:
                break
        else:
            yield row | {"absent": reason}
            return
        for geometry in (None, WINDOW):
            args = operands(kernel.operator, left, right, 1.0, checked(geometry), geometry)
            where = {"formats": f"{left} x {right}", "window": geometry is not None}
            yield row | where | _verdict(wrong(kernel, args, machine.device, rules=LARGEST[kernel.backend]))
        return
    reason = kernel.refuses(Request(machine.device, () if kernel.operator in NORM else (Format("sign", 1),)))
    if reason is not None:
        yield row | {"absent": reason}
    elif kernel.operator in NORM:
        yield row | _verdict(_said(functools.partial(selfcheck.compare, kernel, ops.load(kernel.function))))
    else:
        for operand, name, options in QUANTIZERS[:1] + QUANTIZERS[4:5]:
            yield (
                row
                | {"formats": name}
                | _verdict(_said(functools.partial(_quantized, kernel, operand, name, options, machine)))
            )


def _quantized(kernel: Kernel, operand: str, name: str, options: dict, machine: Machine) -> None:
    """`quantize`, one of its halves, or `decode`, against the reference. Raises AssertionError where they differ."""
    quantizer = build(name, operand, **options)
    assert quantizer is not None
    format, asked = quantizer.format(operand), asked_of(quantizer)
    x, key, function = torch.randn(9, 65, 72), torch.tensor(1), ops.load(kernel.function)
    there = {"key": key.to(machine.device), "stream": 2}
    if kernel.operator == "decode":
        q, _ = reference.quantize(x, format, key=key, stream=2, **asked)
        assert_same_values(function(selfcheck.moved(q, machine.device)).cpu(), reference.decode(q))
        return
    if kernel.operator == "quantize":
        q, _ = function(x.to(machine.device), format, **there, **asked)
        assert_same_codes(q, reference.quantize(x, format, key=key, stream=2, **asked)[0])
        return
    halves = {name: asked[name] for name in ("calibrate", "limits", "prune", "keep_one_in")}
    scales = reference.calibrate(x, format, key=key, stream=2, **halves)
    if kernel.operator == "calibrate":
        assert_same_scales(function(x.to(machine.device), format, **there, **halves), scales)
    else:
        given = selfcheck.moved(scales, machine.device)
        codes = function(x.to(machine.device), given, format, **there)
        assert_same_values(codes.cpu(), reference.encode(x, scales, format, key=key, stream=2))


def _said(compared) -> str:
    try:
        compared()
    except AssertionError as error:
        return " ".join(str(error).split())[:300] or "differs"
    return ""


def _verdict(found: str) -> Row:
    return {"wrong": found} if found else {"equal": True}


def sanitize(machine: Machine) -> Iterator[Task]:
    """The smoke run under compute-sanitizer, and what ncu says of the products; absent where a tool is not installed."""
    for tool in ("memcheck", "racecheck"):
        command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9"]
        yield tool, functools.partial(_under, command, machine)
    metrics = ("sm__throughput", "dram__throughput", "sm__inst_executed_pipe_tensor")
    wanted = ",".join(f"{metric}.avg.pct_of_peak_sustained_elapsed" for metric in metrics)
    command = ["ncu", "--metrics", wanted, "--kernel-name", "regex:_gather|_sums|gemm", "--launch-count", "8"]
    yield "ncu", functools.partial(_under, command, machine)


def _under(command: list[str], machine: Machine) -> Iterator[Row]:
    row: Row = {"name": " ".join(command[:3])}
    if shutil.which(command[0]) is None:
        yield row | {"absent": f"{command[0]} is not installed"}
        return
    with tempfile.TemporaryDirectory() as folder:
        part = [sys.executable, "-m", "benchmarks.gpu_part", "smoke", f"{folder}/rows.jsonl"]
        part += ["--dry-run"] * machine.small
        done = subprocess.run([*command, *part], cwd=ROOT, capture_output=True, text=True)
    lines = [line.strip() for line in done.stdout.splitlines() if "=====" in line or "pct_of_peak" in line]
    yield row | {"text": " | ".join(lines)[-2000:]} | ({} if done.returncode == 0 else {"failed": f"exit {done.returncode}"})


def fuzz(machine: Machine) -> Iterator[Task]:
    """Random cases in rounds, each with seeds of its own, then pytest's GPU tests."""
    for round in range(1 if machine.small else 3):
        for family, count in FAMILIES.items():
            yield f"{family} {round}", functools.partial(_fuzzed, family, round, 1 if machine.small else count, machine)
    yield "pytest -m gpu", _tested


def _fuzzed(family: str, seed: int, count: int, machine: Machine) -> Iterator[Row]:
    from tests.fqt.triton_kernels import cases  # imports Triton, which then decides whether it interprets

    row: Row = {"name": family, "seed": seed, "cases": count}
    yield row | _verdict(_said(functools.partial(cases.FAMILIES[family], machine.device, seed, count)))


def _tested() -> Iterator[Row]:
    """A row for each test that failed, as it does, and one for pytest's last line."""
    options = ["-v", "-m", "gpu", "-p", "no:cacheprovider", "--color=no", "-W", "default"]
    tests = [str(path.relative_to(ROOT)) for path in sorted(ROOT.glob("tests/fqt/*_kernels/test_gpu.py"))]
    process = subprocess.Popen(
        [sys.executable, "-m", "pytest", *options, *tests],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None
    last = ""
    for line in process.stdout:
        last = line.strip() or last
        if " FAILED" in line or " ERROR" in line:
            yield {"name": line.split()[0], "failed": "pytest"}
    yield {"name": "pytest -m gpu", "text": last} | ({} if process.wait() in (0, 5) else {"failed": last[:200]})
