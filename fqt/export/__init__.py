"""export: a trained model in the files of other runtimes. One module a kind of file, each imported when it is asked for."""

from __future__ import annotations

import importlib
import importlib.util
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from torch import nn

from fqt.export.result import Exported
from fqt.files import sync_folder

__all__ = ["Exported", "export"]

_PACKAGES = {
    "gguf": ("gguf",),
    "onnx": ("onnx", "onnxscript"),
    "transformers": ("transformers", "safetensors"),
    "bitnet": ("transformers", "safetensors"),
}
"""Format -> the packages that write it."""
_OPTIONS = {
    "gguf": ("tokenizer",),
    "onnx": ("example", "multiply", "opset", "tolerance"),
    "transformers": ("example", "tokenizer"),
    "bitnet": ("example", "tokenizer"),
}
"""Format -> the arguments of `export` that it takes."""


def export(
    model: nn.Module,
    path: str | Path,
    example: object = None,
    *,
    format: str | None = None,
    tokenizer: object | None = None,
    multiply: str | None = None,
    opset: int | None = None,
    tolerance: float | None = None,
) -> Exported:
    """Write a converted model, frozen or not, for another runtime. The suffix of `path` says which; a folder needs `format`.

    `.gguf`: for llama.cpp. transformers' LlamaForCausalLM, and Mistral's, Qwen2's and Qwen3's, with metadata and tokenizer;
    any other module as bare tensors. Quantized weights keep their codes, ternary ones in 2 bits, those of signs in 1.

    `.onnx`: standard operators, of which onnxruntime computes what the model does; it is run on the example where it is
    installed, and the differences stand in the file's metadata (`fqt.largest_difference` and so on). A model that is not frozen
    is frozen for it, in a copy.

    A folder: for transformers, `format="transformers"` the float model with decoded weights, for every recipe;
    `format="bitnet"` with its own BitNet layers, for recipe "bitnet".

    Args:
        model: it is not changed.
        path: what is there is replaced when the new file is whole, and stays if writing fails. A folder must not exist.
        example: an input as `fqt.convert` takes it: a batch of real data. Needed for `.onnx`; for a folder the logits of what
            is loaded again are compared on it.
        format: "transformers" or "bitnet", of a folder.
        tokenizer: a fast tokenizer of transformers, of a language model; a GGUF file without one speaks numbers of tokens.
        multiply: of `.onnx`: "float" (the default; the smallest files), "integer" or "nbits", see `fqt.export.onnx`.
        opset: of `.onnx`, 21 by default; from 25 on ternary weights and signs take 2 bits in place of 4.
        tolerance: of `.onnx`: the largest ||difference|| / ||output|| that is accepted, 0.01 by default.

    Returns:
        What was written, what was measured, and in which the runtime's results differ from the model's; print it.

    Raises:
        ValueError: a package is missing, with the command that installs it.
        ValueError: an unknown suffix or format, an argument without effect, something of the model that the file cannot hold,
            or results out of tolerance; by name and with the remedy.
        FileExistsError: the folder exists.
    """
    path = Path(path)
    format = _format(path, format)
    given = {"example": example, "tokenizer": tokenizer, "multiply": multiply, "opset": opset, "tolerance": tolerance}
    options = {name: value for name, value in given.items() if value is not None}
    for name in options:
        if name not in _OPTIONS[format]:
            raise ValueError(f"{name}= has no effect on {format}, which takes {', '.join(_OPTIONS[format])}: leave it away")
    if format == "onnx" and example is None:
        raise ValueError("a model is traced by running it: give fqt.export an example, a batch of real data")
    _check_packages(format)
    kind = importlib.import_module(f"fqt.export.{'huggingface' if format in ('transformers', 'bitnet') else format}")
    if kind.__name__.endswith("huggingface"):
        options["format"] = format
    with _written(path, folder="format" in options) as temporary:
        result = kind.export(model, temporary, **options)
    return replace(result, path=path)


def _format(path: Path, format: str | None) -> str:
    by_suffix = path.suffix.removeprefix(".")
    if format is None and by_suffix in ("gguf", "onnx"):
        return by_suffix
    if format is None:
        raise ValueError(
            f"{str(path)!r} does not end in .gguf or .onnx: choose such a name, or for a folder of transformers give "
            f"format='transformers' or format='bitnet'"
        )
    if format not in _PACKAGES or (format in ("gguf", "onnx")) != (by_suffix == format):
        raise ValueError(f"format {format!r} does not go with {str(path)!r}: it is 'transformers' or 'bitnet', of a folder")
    return format


def _check_packages(format: str) -> None:
    missing = [name for name in _PACKAGES[format] if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(
            f"exporting to {format} needs {' and '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} not installed: "
            f"pip install 'fqt[export]'"
        )


@contextmanager
def _written(path: Path, *, folder: bool) -> Iterator[Path]:
    """A path beside `path` to write to, which takes its place when the block ends well, and is removed otherwise.

    Raises:
        FileNotFoundError: the folder that it is to be in does not exist.
        FileExistsError: a folder is to be written, and something is there.
    """
    if not path.parent.is_dir():
        raise FileNotFoundError(f"the folder {str(path.parent)!r} of {path.name!r} does not exist: make it first")
    if folder and path.exists():
        raise FileExistsError(f"{str(path)!r} exists: choose another folder, or remove it first")
    aside = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    made = aside / path.name
    try:
        if folder:
            made.mkdir()
        yield made
        for file in made.rglob("*") if folder else [made]:
            with file.open("rb+") as handle:
                os.fsync(handle.fileno())
        os.replace(made, path)
        sync_folder(path.parent)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
