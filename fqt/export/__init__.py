"""export: a trained model in the files of other runtimes. One module a kind of file, each imported when it is asked for."""

from __future__ import annotations

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

__all__ = ["Exported", "export"]

_NEEDS = {".gguf": ("gguf",)}
"""Kind of file -> the packages that write it."""


def export(model: nn.Module, path: str | Path, *, tokenizer: object | None = None) -> Exported:
    """Write a model for another runtime. The suffix of `path` says for which.

    `.gguf`: for llama.cpp. transformers' LlamaForCausalLM, and Mistral's, Qwen2's and Qwen3's, with metadata and tokenizer; any
    other module as bare tensors. Quantized weights keep their codes, ternary ones in 2 bits, those of signs in 1.

    Args:
        model: converted by `fqt.convert`; it is not changed.
        path: what is there is replaced when the new file is whole, and stays if writing fails.
        tokenizer: of a language model for GGUF: transformers' fast tokenizer. None writes a file that speaks numbers of tokens.

    Returns:
        What was written, and in which the runtime's results differ from the model's; print it.

    Raises:
        ModuleNotFoundError: a package is missing, with the command that installs it.
        ValueError: an unknown suffix, or something of the model that the file cannot hold, by name and with the remedy.
    """
    path = Path(path)
    kind = path.suffix
    if kind not in _NEEDS:
        raise ValueError(f"{str(path)!r} has the suffix {kind!r}, and exports have one of {', '.join(_NEEDS)}")
    _check_packages(kind)
    with written(path) as temporary:
        from fqt.export import gguf

        result = gguf.export(model, temporary, tokenizer)
    return replace(result, path=path)


def _check_packages(kind: str) -> None:
    missing = [name for name in _NEEDS[kind] if importlib.util.find_spec(name) is None]
    if missing:
        raise ModuleNotFoundError(
            f"exporting {kind} needs {' and '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} not installed: "
            f"pip install 'fqt[export]'"
        )


@contextmanager
def written(path: Path) -> Iterator[Path]:
    """A path beside `path` to write a file to, which takes its place when the block ends well, and is removed otherwise.

    Raises:
        FileNotFoundError: the folder does not exist.
    """
    if not path.parent.is_dir():
        raise FileNotFoundError(f"the folder {str(path.parent)!r} of {path.name!r} does not exist: make it first")
    folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        yield folder / path.name
        with (folder / path.name).open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(folder / path.name, path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
