"""Guards: the public face, what `import fqt` loads, and that each guard can fail."""

from __future__ import annotations

import ast
import copy
import pickle
import subprocess
import sys
import tomllib
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch

import fqt

ROOT = Path(__file__).parents[2]
PUBLIC = [
    "AdaPT", "Calibrated", "Calibration", "Estimator", "Exported", "Format", "Grid", "Grouping", "Memory", "Policy",
    "Precision", "Product", "ProductTransform", "Profile", "QTensor", "QuantConv2d", "QuantLinear", "QuantizedLayer",
    "Quantizer", "Recipe", "Recommendation", "Reconstructed", "Rule", "Scales", "Summary", "Transform", "bisect",
    "build_policy", "calibrate", "convert", "count_saved_bytes", "diff", "export", "freeze", "load", "load_recipe",
    "memory", "modelled_speedup", "observe_gradients", "profile", "quantize", "quantized_layers", "recipes", "recommend",
    "reconstruct", "register", "register_calibration", "register_estimator", "register_grid", "register_layer",
    "register_policy", "register_transform", "revert", "save", "summary",
]  # fmt: skip
NOT_AT_IMPORT = (
    "triton", "torchvision", "timm", "train", "tensorboard", "sklearn", "torch._dynamo", "torch._inductor", "gguf",
    "onnx", "transformers",
)  # fmt: skip


# --- names ---------------------------------------------------------------------------------------------------------------


def test_the_public_names_are_these() -> None:
    assert sorted(fqt.__all__) == sorted(PUBLIC), "a new name belongs in this list, the README and the CHANGELOG"
    assert fqt.__all__ == sorted(fqt.__all__, key=lambda name: (not name[0].isupper(), name)), "sorted, classes first"


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_is_there_and_documented(name: str) -> None:
    thing = getattr(fqt, name)
    assert thing.__doc__, f"fqt.{name} has no docstring"
    assert not thing.__doc__.startswith(f"{name}("), f"fqt.{name} has a dataclass's generated docstring"


def test_a_star_import_gives_exactly_the_public_names() -> None:
    namespace: dict[str, object] = {}
    exec("from fqt import *", namespace)  # noqa: S102
    assert sorted(set(namespace) - {"__builtins__"}) == sorted(PUBLIC)


def test_the_version_is_the_packages() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    assert f'version = "{fqt.__version__}"' in text


def test_functions_that_users_call_have_type_hints() -> None:
    for name in PUBLIC:
        thing = getattr(fqt, name)
        if callable(thing) and not isinstance(thing, type):
            assert "return" in thing.__annotations__, name


# --- imports ---------------------------------------------------------------------------------------------------------------


def loaded_after(*statements: str) -> list[set[str]]:
    """Top-level names in `NOT_AT_IMPORT` that a fresh interpreter has loaded after each statement, beyond torch's own."""
    shown = f"print(*[name for name in {NOT_AT_IMPORT!r} if name in sys.modules and name not in before])"
    code = "; ".join(["import sys, torch; before = set(sys.modules)", *(f"{one}; {shown}" for one in statements)])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    return [set(line.split()) for line in done.stdout.splitlines()]


def test_import_fqt_loads_nothing_heavy_and_never_train_and_a_step_on_the_cpu_no_triton() -> None:
    imported, stepped, guarded = loaded_after(
        "import fqt; fqt.load_recipe('fqt_1bit')",
        "fqt.convert(torch.nn.Linear(4, 3), fqt.load_recipe('fqt_1bit').everywhere())(torch.ones(2, 4)).sum().backward()",
        "import torchvision, train",
    )
    assert imported == set()
    assert "triton" not in stepped
    assert guarded >= {"torchvision", "train"}, "the guard can fail"


def imports_of(sources: Iterable[tuple[str, str]]) -> set[tuple[str, str]]:
    """(file, top-level module) of each import statement, those within functions included."""
    found = set()
    for name, text in sources:
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Import):
                found |= {(name, alias.name.split(".")[0]) for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                found.add((name, node.module.split(".")[0]))
    return found


ALLOWED = {"fqt", "torch", "numpy", "safetensors", "yaml", "tqdm"} | set(sys.stdlib_module_names)
OPTIONAL = {
    "triton_kernels": {"triton"},
    "cuda_kernels": {"cuda", "triton"},
    "integrations": {"accelerate", "lightning", "transformers"},
    "export": {"gguf", "ml_dtypes", "onnx_ir", "onnxruntime", "transformers"},
}


def foreign(sources: Iterable[tuple[str, str]]) -> set[tuple[str, str]]:
    return {
        (name, module)
        for name, module in imports_of(sources)
        if module not in ALLOWED and module not in OPTIONAL.get(Path(name).parent.name, set())
    }


def library() -> list[tuple[str, str]]:
    paths = sorted((ROOT / "fqt").rglob("*.py"))
    assert len(paths) > 15
    return [(str(path.relative_to(ROOT)), path.read_text()) for path in paths]


def test_the_library_imports_only_what_it_declares() -> None:
    assert foreign(library()) == set()


def test_the_declared_imports_guard_can_fail() -> None:
    bad = "def f():\n    from train.loop import run\n    import torchvision.models as m\n"
    assert foreign([("fqt/bad.py", bad)]) == {("fqt/bad.py", "train"), ("fqt/bad.py", "torchvision")}
    assert foreign([("fqt/triton_kernels/good.py", "import triton")]) == set()


# --- the sources -------------------------------------------------------------------------------------------------------------


def swallowing(sources: Iterable[tuple[str, str]]) -> list[str]:
    """Bare excepts, and ImportErrors caught: no fallback by exception."""
    found = []
    for name, text in sources:
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ExceptHandler):
                caught = "" if node.type is None else ast.unparse(node.type)
                if any(word in caught for word in ("ImportError", "ModuleNotFoundError", "BaseException")) or caught in (
                    "",
                    "Exception",
                ):
                    found.append(f"{name}:{node.lineno} except {caught}")
    return found


def test_no_fallback_by_exception() -> None:
    assert swallowing(library()) == []


def test_the_fallback_guard_can_fail() -> None:
    for caught in ("", " Exception", " ImportError", " (ValueError, ModuleNotFoundError)"):
        assert swallowing([("bad.py", f"try:\n    import fast\nexcept{caught}:\n    fast = None\n")])
    assert not swallowing([("good.py", "try:\n    f()\nexcept ValueError as error:\n    raise TypeError from error\n")])


def too_long(sources: Iterable[tuple[str, str]], limit: int) -> list[str]:
    return [f"{name}: {len(text.splitlines())} lines" for name, text in sources if len(text.splitlines()) > limit]


def test_files_stay_readable() -> None:
    assert too_long(library(), 400) == []


def test_the_length_guard_can_fail() -> None:
    assert too_long([("bad.py", "x = 1\n" * 401)], 400) == ["bad.py: 401 lines"]


# --- recipes -----------------------------------------------------------------------------------------------------------------


def test_the_built_in_recipes_are_these() -> None:
    assert fqt.recipes() == [
        "adapt", "adapt_calibrated", "bitnet", "bitnet_g4", "bitnet_g6",
        "dorefa_w1a1g4", "dorefa_w1a2g6", "dorefa_w8a8g8", "fp32", "fqt_1bit", "fqt_1bit_b1", "fqt_1bit_b2", "fqt_1bit_b8",
        "fqt_1bit_topk", "fqt_w1a1g4", "fqt_w1a1g6", "int4", "int6", "int8", "int8_token",
        "psq_b1", "psq_b2", "psq_b4", "psq_b8", "xnor",
    ]  # fmt: skip


@pytest.mark.parametrize("name", fqt.recipes())
def test_every_built_in_recipe_loads_under_its_name_and_survives_copies(name: str) -> None:
    recipe = fqt.load_recipe(name)
    assert recipe.name == name
    assert copy.deepcopy(recipe) == recipe == pickle.loads(pickle.dumps(recipe))
    assert hash(copy.deepcopy(recipe)) == hash(recipe)


def test_recipes_are_packaged() -> None:
    data = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["fqt"]
    assert {"py.typed", "recipes/*.yaml"} <= set(data)
    assert (ROOT / "fqt" / "py.typed").exists()


# --- the fast path of the docstring -------------------------------------------------------------------------------------------


def test_the_one_line_of_the_readme_works() -> None:
    model = torch.nn.Sequential(*[torch.nn.Linear(4, 4) for _ in range(3)])
    model = fqt.convert(model, "fqt_1bit")
    model(torch.ones(2, 4)).sum().backward()
    assert [type(m).__name__ for m in model] == ["Linear", "QuantLinear", "Linear"]
