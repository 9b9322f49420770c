"""What do the kernels reach on this GPU? Builds, tests, compares and times, in one command.

    make gpu-check        (= python -m benchmarks.gpu_check [--json F] [--minutes 8] [--no-tests])

For a bare machine: torch, Triton, a compiler, the source tree in place, no network. Every row of the table of kernels that
serves this device is compared with the reference on the CPU and then timed; one that is off is reported as wrong and not
timed. A part that fails says why, and the others go on. What is absent (torchvision, torchao) is said. Exit status 2: no CUDA
device; 1: a wrong result, a failed part or failed tests.

    quantize   share = (bytes of x read once + bytes of codes) / time, over the bandwidth of x.copy_
    products   size^3, ms and times torch's bf16 matmul; operands packed in memory, whatever unpacking costs is in the time
    layers     convolutions against cuDNN's bf16 in channels_last: times of output, grad_input, grad_weight
    tiles      every tile of some products: the one that the plan picks by rule against the fastest
    steps      forward and backward, captured in a CUDA graph, against bf16 autocast with torch.compile
"""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from benchmarks.common import table, write_json
from benchmarks.gpu_parts import LAYER_FORMATS, LAYERS, SIZES, STEPS, Row, layers, matmuls, quantizers, steps
from benchmarks.gpu_tiles import tiles, verdicts
from fqt import ops

ROOT = Path(__file__).parents[1]
# what is to be reached on an H100 or H200: part, which rows, must, aim
TARGETS = (
    ("int8 output 8192^3 over bf16", {"part": "products", "formats": "int8:N x int8:O", "size": 8192}, "ratio", 1.4, 1.8),
    ("1-bit output 8192^3 over bf16", {"part": "products", "formats": "sign x sign:O", "size": 8192}, "ratio", 3.0, 8.0),
    ("quantize + pack, share of copy bandwidth", {"part": "quantize"}, "share", 0.7, 0.9),
    ("step int8 over bf16 + compile", {"part": "steps", "recipe": "int8"}, "ratio", 1.1, 1.5),
    ("step fqt_1bit over bf16 + compile", {"part": "steps", "recipe": "fqt_1bit"}, "ratio", 1.3, 2.5),
)


def tested() -> Iterator[Row]:
    """`pytest -m gpu`, with the extension built beside it."""
    build = None
    if not (ROOT / "fqt/_cpu.so").exists():
        command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
        build = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        options = ["-q", "-m", "gpu", "-W", "default", "--continue-on-collection-errors"]
        command = [sys.executable, "-m", "pytest", *options, "tests/fqt"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    finally:
        if build is not None:
            said, _ = build.communicate()
    if build is not None:
        last = (said.strip().splitlines() or [""])[-1]
        yield {"part": "tests", "name": "build"} | ({} if build.returncode == 0 else {"failed": last[:200]})
    failures = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    for line in failures[:5]:
        yield {"part": "tests", "name": "pytest -m gpu", "failed": line[:200]}
    summary = (done.stdout.strip().splitlines() or [done.stderr[-200:]])[-1]
    # 5: nothing was collected; a collection error outside these tests leaves 1 or 2 and is named above
    yield {"part": "tests", "name": "pytest -m gpu", "text": summary} | ({} if done.returncode == 0 else {"failed": summary})


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """TimeoutError once so many seconds have passed."""

    def stop(*_: object) -> None:
        raise TimeoutError("no time left")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.01))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def collect(part: str, rows: Iterator[Row], seconds: float) -> list[Row]:
    """The rows of a part; where it fails or its time is over, those until then and why."""
    found: list[Row] = []
    start = time.monotonic()
    try:
        with within(seconds):
            for row in rows:
                found.append(row)
                print(f"{time.monotonic() - start:6.1f} s  {row}", file=sys.stderr, flush=True)
    except Exception as error:  # noqa: BLE001  a part that fails does not stop the rest
        found.append({"part": part, "name": part, "failed": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"})
    return found


def show(rows: list[Row], sizes: tuple[int, ...] = SIZES) -> str:
    """The tables, at most 60 lines in all; what was wrong, failed or absent is in them."""
    names = ("tests", "quantize", "products", "layers", "tiles", "steps")
    parts = {part: [row for row in rows if row["part"] == part] for part in names}
    lines = [f"tests: {row.get('text', row['name'])}{_trouble(row)}" for row in parts["tests"]][:4]
    lines += table(["quantize", "backend", "ms", "share"], [
        [row["name"], row.get("backend", ""), _number(row, "ms"), _number(row, "share")] for row in parts["quantize"]
    ][:10]).splitlines()  # fmt: skip
    grouped: dict[tuple, dict[object, Row]] = {}
    for row in parts["products"]:
        key = (row.get("operator", ""), row.get("formats", row.get("name")), row.get("backend", ""))
        grouped.setdefault(key, {})[row.get("size")] = row
    lines += table(["product", "formats", "backend", *(f"{size}: ms (x bf16)" for size in sizes)], [
        [*key, *(_cell(by_size.get(size, by_size.get(None))) for size in sizes)] for key, by_size in grouped.items()
    ][:17]).splitlines()  # fmt: skip
    together: dict[tuple, dict[object, Row]] = {}
    for row in parts["layers"]:
        together.setdefault((row["name"],), {})[row.get("recipe"), row.get("operator")] = row
    columns = [(recipe, operator) for recipe in LAYER_FORMATS for operator in ops.PRODUCTS]
    lines += table(["layer, times cuDNN", *(f"{recipe} {operator}" for recipe, operator in columns)], [
        [key[0], *(_number(cells.get(column, cells.get((None, None), {})), "ratio") for column in columns)]
        for key, cells in together.items()
    ][:7]).splitlines()  # fmt: skip
    lines += [f"tiles: {verdict}" for verdict in verdicts(parts["tiles"])[:6]]
    by_model: dict[object, dict[object, Row]] = {}
    for row in parts["steps"]:
        by_model.setdefault(row["name"], {})[row.get("recipe", "")] = row
    recipes = list(dict.fromkeys(row.get("recipe", "") for row in parts["steps"]))
    lines += table(["step: ms (x bf16)", *map(str, recipes)], [
        [model, *(_cell(cells.get(recipe)) for recipe in recipes)] for model, cells in by_model.items()
    ][:5]).splitlines()  # fmt: skip
    reached = [f"{what}: {_best(rows, wanted, value)}; must {must}, aim {aim}" for what, wanted, value, must, aim in TARGETS]
    return "\n".join(lines[: 60 - len(reached)] + reached)


def _best(rows: list[Row], wanted: Row, value: str) -> str:
    found = [row for row in rows if value in row and all(row.get(key) == asked for key, asked in wanted.items())]
    return f"{max(float(row[value]) for row in found):.2f}" if found else "open"  # type: ignore[arg-type]


def _trouble(row: Row) -> str:
    return "".join(f" {word}: {row[word]}" for word in ("wrong", "failed") if word in row)


def _number(row: Row, key: str) -> str:
    return f"{row[key]:.3g}" if key in row else _trouble(row).strip()[:60]


def _cell(row: Row | None) -> str:
    if row is None:
        return ""
    if "ms" not in row:
        return _trouble(row).strip()[:60]
    return f"{row['ms']:.3g}" + (f" ({row['ratio']:.2f})" if "ratio" in row else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument("--minutes", type=float, default=7.5, help="time for everything")
    parser.add_argument("--no-tests", action="store_true", help="neither build nor run pytest")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("no CUDA device: nothing to time. On one this runs pytest -m gpu, then times quantizers, products of")
        print(f"{SIZES[0]} to {SIZES[-1]}, {len(LAYERS)} convolutions and the steps of {', '.join(STEPS)}.")
        sys.exit(2)
    from triton.testing import do_bench

    def bench(function: Callable[[], object]) -> float:
        return float(do_bench(function, warmup=10, rep=50, return_mode="median"))

    torch.manual_seed(0)
    deadline = time.monotonic() + 60 * args.minutes
    print(f"{torch.cuda.get_device_name()}, capability {torch.cuda.get_device_capability()}, torch {torch.__version__}")
    # name, what runs, the share of the remaining time that it may take at most
    parts: list[tuple[str, Iterator[Row], float]] = [] if args.no_tests else [("tests", tested(), 0.4)]
    parts += [
        ("quantize", quantizers("cuda", bench), 0.3),
        ("products", matmuls("cuda", bench), 0.5),
        ("layers", layers("cuda", bench), 0.5),
        ("steps", steps("cuda", bench), 0.7),
        ("tiles", tiles("cuda", bench), 1.0),
    ]
    rows: list[Row] = [{"part": "device", "name": torch.cuda.get_device_name(), "cuda": torch.version.cuda}]
    for name, part, share in parts:
        rows += collect(name, part, share * (deadline - time.monotonic()))
        torch.cuda.empty_cache()
    print(show(rows))
    if args.json:
        write_json(args.json, rows)
    sys.exit(any("wrong" in row or "failed" in row for row in rows))


if __name__ == "__main__":
    main()
