"""A matrix product by ggml, the library of llama.cpp, which the package llama-cpp-python brings; by its C interface."""

from __future__ import annotations

import ctypes
import importlib.util
import weakref
from collections.abc import Callable
from pathlib import Path

import gguf
import torch
from torch import Tensor

_FLOAT32 = int(gguf.GGMLQuantizationType.F32)


class _Memory(ctypes.Structure):
    """ggml_init_params"""

    _fields_ = (("size", ctypes.c_size_t), ("buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool))


def available() -> bool:
    """Whether llama-cpp-python is installed."""
    return importlib.util.find_spec("llama_cpp") is not None


def linear(w_OI: Tensor, kind: str, x_MI: Tensor, threads: int) -> Callable[[], Tensor]:
    """A function of nothing that multiplies x by the weight's transpose.

    Args:
        w_OI: float32 (O, I), stored as `kind` by ggml's own quantizer.
        kind: a name of gguf.GGMLQuantizationType, such as "Q8_0". ggml quantizes x to 8 bits, by blocks, in every call.
        x_MI: float32 (M, I).

    Returns:
        The function; its result, float32 (M, O), is overwritten by the next call.

    Raises:
        ValueError: I is no multiple of the type's block.
    """
    number = int(gguf.GGMLQuantizationType[kind])
    (outputs, inputs), rows = w_OI.shape, len(x_MI)
    block, _ = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    if inputs % block:
        raise ValueError(f"{kind} has blocks of {block} weights, and {inputs} is no multiple of that")
    base, cpu = _libraries()
    room = 4 * (w_OI.numel() + x_MI.numel() + 4 * rows * outputs) + (64 << 20)
    context = ctypes.c_void_p(base.ggml_init(_Memory(room, None, False)))
    w = ctypes.c_void_p(base.ggml_new_tensor_2d(context, number, ctypes.c_int64(inputs), ctypes.c_int64(outputs)))
    x = ctypes.c_void_p(base.ggml_new_tensor_2d(context, _FLOAT32, ctypes.c_int64(inputs), ctypes.c_int64(rows)))
    y = ctypes.c_void_p(base.ggml_mul_mat(context, w, x))
    graph = ctypes.c_void_p(base.ggml_new_graph(context))
    base.ggml_build_forward_expand(graph, y)
    place = ctypes.c_void_p(base.ggml_get_data(w))
    source, sizes = w_OI.contiguous(), (ctypes.c_int64(0), ctypes.c_int64(outputs), ctypes.c_int64(inputs))
    base.ggml_quantize_chunk(number, ctypes.c_void_p(source.data_ptr()), place, *sizes, None)
    ctypes.memmove(base.ggml_get_data(x), x_MI.contiguous().data_ptr(), 4 * x_MI.numel())
    result = torch.frombuffer((ctypes.c_float * (rows * outputs)).from_address(base.ggml_get_data(y)), dtype=torch.float32)

    def run() -> Tensor:
        if cpu.ggml_graph_compute_with_ctx(context, graph, threads):
            raise RuntimeError(f"ggml could not compute a product of {kind}")
        return result.view(rows, outputs)

    weakref.finalize(run, base.ggml_free, context)
    return run


def _libraries() -> tuple[ctypes.CDLL, ctypes.CDLL]:
    spec = importlib.util.find_spec("llama_cpp")
    assert spec is not None and spec.origin is not None
    folder = Path(spec.origin).parent / "lib"
    base = ctypes.CDLL(str(folder / "libggml-base.so"), mode=ctypes.RTLD_GLOBAL)
    cpu = ctypes.CDLL(str(folder / "libggml-cpu.so"), mode=ctypes.RTLD_GLOBAL)
    for name in ("ggml_init", "ggml_new_tensor_2d", "ggml_mul_mat", "ggml_new_graph", "ggml_get_data"):
        getattr(base, name).restype = ctypes.c_void_p
    base.ggml_init.argtypes = [_Memory]
    base.ggml_quantize_chunk.restype = ctypes.c_size_t
    cpu.ggml_cpu_init()
    return base, cpu
