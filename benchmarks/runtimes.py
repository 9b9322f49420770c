"""The other runtimes that `benchmarks.inference` times: the same float model in onnxruntime, the same codes in llama.cpp.

Each function gives runners by name, functions of nothing that run the input once, or raises `Missing` with the reason. They
leave their threads idle between two runs, so that they do not take the cores of whoever is measured next.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import logging
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import fqt

Runner = Callable[[], object]


class Missing(Exception):
    """A runtime is not there, or cannot run this model."""


def onnxruntime(model: nn.Module, x: Tensor, *, int8: tuple[str, ...], threads: int) -> dict[str, Runner]:
    """The float model by onnxruntime, in float32 and in each of the `int8` ways of onnxruntime.quantization.

    Args:
        int8: "dynamic", activations' ranges found in every run (linear layers alone are quantized); "static", QDQ with ranges
            from x, and weights by channel.
    """
    for package in ("onnx", "onnxscript", "onnxruntime"):
        if importlib.util.find_spec(package) is None:
            raise Missing(f"{package} is not installed: pip install 'fqt[export]'")
    from onnxruntime.quantization import quantize_dynamic, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Batch:
        """x once, as what ranges are found on."""

        def __init__(self) -> None:
            self.left = [{"x": x.numpy()}]

        def get_next(self) -> dict[str, np.ndarray] | None:
            return self.left.pop() if self.left else None

    logging.getLogger().setLevel(logging.ERROR)  # onnxruntime.quantization advises on the root logger
    with tempfile.TemporaryDirectory() as name, contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        folder = Path(name)
        whole, ready = folder / "fp32.onnx", folder / "ready.onnx"
        torch.onnx.export(model, (x,), whole, input_names=["x"], dynamo=True, external_data=False, verbose=False)
        made = {"fp32": whole}
        if int8:
            quant_pre_process(whole, ready, skip_symbolic_shape=True)
        for way in int8:
            made[f"int8 {way}"] = folder / f"{way}.onnx"
            if way == "dynamic":
                quantize_dynamic(ready, made[f"int8 {way}"], op_types_to_quantize=["MatMul", "Gemm"], per_channel=True)
            else:
                quantize_static(ready, made[f"int8 {way}"], Batch(), per_channel=True)  # type: ignore[arg-type]
        return {f"onnxruntime {way}": _session(path, x, threads) for way, path in made.items()}


def _session(path: Path, x: Tensor, threads: int) -> Runner:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 4
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = onnxruntime.InferenceSession(path.read_bytes(), options, providers=["CPUExecutionProvider"])
    feed = {"x": x.numpy()}
    return lambda: session.run(None, feed)


def llama_cpp(frozen: Any, tokens_NT: Tensor, threads: int) -> Runner:
    """A frozen LlamaForCausalLM by llama.cpp, from a GGUF file of fqt's: the tokens of one sample from an empty cache."""
    for package in ("gguf", "llama_cpp"):
        if importlib.util.find_spec(package) is None:
            raise Missing(f"{package} is not installed: pip install gguf llama-cpp-python")
    if len(tokens_NT) != 1:
        raise Missing("timed at batch 1 alone")
    from llama_cpp import Llama

    tokens = tokens_NT[0].tolist()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "m.gguf"
        fqt.export(frozen, path)
        runtime = Llama(
            str(path), n_ctx=512, n_batch=512, n_threads=threads, n_threads_batch=threads, verbose=False, use_mmap=False
        )

    def run() -> None:
        runtime.reset()
        runtime.eval(tokens)

    return run
