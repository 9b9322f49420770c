"""What `gpu_check` found, as tables of at most 60 lines, and how far each goal is reached."""

from __future__ import annotations

from benchmarks.common import table
from benchmarks.gpu_parts import LAYER_FORMATS, SIZES, Row
from benchmarks.gpu_steps import BASELINE
from benchmarks.gpu_tiles import verdicts
from fqt import ops

TARGETS = (
    ("int8 output 8192^3 over bf16", {"part": "products", "formats": "int8:N x int8:O", "size": 8192}, "ratio", 1.5, 1.8),
    ("int8 grad_weight 8192^3 over bf16", {"part": "products", "formats": "int8:C x int8", "size": 8192}, "ratio", 1.3, 1.8),
    ("1-bit output 8192^3 over bf16", {"part": "products", "formats": "sign x sign:O", "size": 8192}, "ratio", 3.0, 6.0),
    ("quantize + pack, share of copy bandwidth", {"part": "quantize"}, "share", 0.55, 0.55),
    ("step int8 over bf16 autocast", {"part": "steps", "recipe": "int8, bf16"}, "ratio", 1.0, 1.3),
    ("step fqt_1bit over bf16 autocast", {"part": "steps", "recipe": "fqt_1bit, float32"}, "ratio", 1.3, 2.0),
)
"""What is to be reached on an H100 or H200: in words, which rows, of which column, must, aim."""
TROUBLES = ("wrong", "failed", "absent", "stopped")


def compared(rows: list[Row]) -> list[Row]:
    """The figures, each set against what it is measured by: bf16's product of the size, bf16's step of the model, a copy.

    Those of a dry run, whose clock always says the same, are set against nothing.
    """
    figures = [row for row in rows if "begun" not in row and ("ended" not in row or "failed" in row)]
    if any(row.get("dry") for row in rows):
        return figures
    copies = [row["bytes"] / row["ms"] for row in figures if row.get("name") == "copy"]  # type: ignore[operator]
    bf16 = {row["size"]: row["ms"] for row in figures if row.get("formats") == "bf16 x bf16" and "ms" in row}
    steps = {row["name"]: row["ms"] for row in figures if row.get("recipe") == BASELINE and "ms" in row}
    for row in figures:
        by = {"products": bf16.get(row.get("size")), "steps": steps.get(row.get("name"))}.get(str(row["part"]))
        if "ms" in row and by is not None:
            row["ratio"] = by / row["ms"]  # type: ignore[operator]
        if row["part"] == "quantize" and "ms" in row and copies and row["name"] != "copy":
            row["share"] = row["bytes"] / row["ms"] / copies[-1]  # type: ignore[operator]
    return figures


def show(found: list[Row], sizes: tuple[int, ...] = SIZES) -> str:
    """The tables; what was wrong, failed or absent is in them."""
    rows = compared(found)
    parts: dict[str, list[Row]] = {}
    for row in rows:
        parts.setdefault(str(row["part"]), []).append(row)
    lines = []
    for part, of in parts.items():
        told = [
            f"{part}: {row.get('name', '')} {row.get('backend', '')} {row.get('task', '')}".strip() + _trouble(row)
            for row in of
        ]
        equal = sum("equal" in row for row in of)
        lines += [f"{part}: {equal} equal the reference"] * (equal > 0)
        lines += [text[:160] for text, row in zip(told, of, strict=True) if _trouble(row) and "absent" not in row][:4]
        lines += list(dict.fromkeys(f"{part}: absent: {row['absent']}" for row in of if "absent" in row))[:3]
    lines += table(["quantize", "backend", "ms", "share"], [
        [row["name"], row.get("backend", ""), _number(row, "ms"), _number(row, "share")]
        for row in parts.get("quantize", []) if "ms" in row
    ][:10]).splitlines()  # fmt: skip
    grouped: dict[tuple, dict[object, Row]] = {}
    for row in parts.get("products", []):
        if "formats" in row:
            grouped.setdefault((row.get("operator", ""), row["formats"], row["backend"]), {})[row.get("size")] = row
    lines += table(["product", "formats", "backend", *(f"{size}: ms (x bf16)" for size in sizes)], [
        [*key, *(_cell(by_size.get(size, by_size.get(None))) for size in sizes)] for key, by_size in grouped.items()
    ][:17]).splitlines()  # fmt: skip
    together: dict[object, dict[object, Row]] = {}
    for row in parts.get("layers", []):
        together.setdefault(row.get("name"), {})[row.get("recipe"), row.get("operator")] = row
    columns = [(recipe, operator) for recipe in LAYER_FORMATS for operator in ops.PRODUCTS]
    if together:
        lines += table(["layer, times cuDNN", *(f"{recipe} {operator}" for recipe, operator in columns)], [
            [name, *(_number(cells.get(column, {}), "ratio") for column in columns)] for name, cells in together.items()
        ][:7]).splitlines()  # fmt: skip
    lines += [f"tiles: {verdict}" for verdict in verdicts([row for row in parts.get("tiles", []) if "tile" in row])[:7]]
    by_model: dict[object, dict[object, Row]] = {}
    for row in parts.get("steps", []):
        by_model.setdefault(row.get("name"), {})[row.get("recipe")] = row
    recipes = list(dict.fromkeys(row["recipe"] for row in parts.get("steps", []) if "recipe" in row))
    lines += table(["step: ms (x bf16)", *map(str, recipes)], [
        [model, *(_cell(cells.get(recipe)) for recipe in recipes)] for model, cells in by_model.items()
    ][:5]).splitlines()  # fmt: skip
    reached = [f"{what}: {_best(rows, wanted, value)}; must {must}, aim {aim}" for what, wanted, value, must, aim in TARGETS]
    return "\n".join(lines[: 60 - len(reached)] + reached)


def _best(rows: list[Row], wanted: Row, value: str) -> str:
    found = [row for row in rows if value in row and all(row.get(key) == asked for key, asked in wanted.items())]
    return f"{max(float(row[value]) for row in found):.2f}" if found else "open"  # type: ignore[arg-type]


def _trouble(row: Row) -> str:
    return "".join(f" {word}: {row[word]}" for word in TROUBLES if word in row)


def _number(row: Row, key: str) -> str:
    return f"{row[key]:.3g}" if key in row else _trouble(row).strip()[:60]


def _cell(row: Row | None) -> str:
    if row is None:
        return ""
    if "ms" not in row:
        return _trouble(row).strip()[:60]
    return f"{row['ms']:.3g}" + (f" ({row['ratio']:.2f})" if "ratio" in row else "")
