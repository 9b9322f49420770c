"""One linear layer in low bits, by fqt and by the runtimes that people have: how fast, and how exact?

    python -m benchmarks.rivals [--rows 2048 1] [--inputs 768] [--outputs 3072] [--threads 1] [--seconds 2] [--json F] [--quick]

Every side takes float32 activations and gives float32 results, so it pays for quantizing its activations, if it does, in every
call; its weights are prepared before. All are timed in turns. Speed is in 1e9 multiply-adds a second and thread; the error is
the distance of the result from that of the float weights, over the latter's length, for normal weights and activations.

fqt's rows are frozen layers of its recipes. onnxruntime: its float32 MatMul, its dynamically quantized 8-bit one, and
MatMulNBits with weights of 8, 4 and 2 bits in blocks of 128 and with 8-bit activations ("accuracy level 4"). llama.cpp: the
types of GGUF, whose activations ggml quantizes to 8 bits by blocks. torchao: 8-bit weights and dynamic 8-bit activations.
What is not installed is named and left out.
"""

from __future__ import annotations

import argparse
import importlib.util
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

import fqt
from benchmarks.common import table, write_json
from fqt.inspect.timing import in_turns

RECIPES = ("int8", "int6", "int4", "bitnet", "fqt_1bit")
TYPES = ("Q8_0", "Q4_0", "TQ2_0", "Q1_0")
NBITS = (8, 4, 2)
BLOCK = 128


@dataclass(frozen=True)
class Side:
    """A product: whose, what it multiplies, and a function of nothing that gives (rows, outputs)."""

    package: str
    multiplies: str
    run: Callable[[], Tensor]


def ours(w_OI: Tensor, x_MI: Tensor) -> Iterator[Side]:
    """Frozen layers of the recipes."""
    for name in RECIPES:
        layer = nn.Linear(w_OI.shape[1], w_OI.shape[0], bias=False)
        layer.weight.data.copy_(w_OI)
        frozen = fqt.freeze(fqt.convert(layer, fqt.load_recipe(name).everywhere()))
        recipe = fqt.load_recipe(name)
        operands = [recipe.quantizer("output", letter) for letter in "xw"]
        bits = [quantizer.bits if quantizer else 32 for quantizer in operands]
        yield Side("fqt", f"{name}: {bits[0]}-bit x, {bits[1]}-bit w", lambda frozen=frozen: frozen(x_MI))


def onnxruntime(w_OI: Tensor, x_MI: Tensor, threads: int) -> Iterator[Side]:
    """Graphs of one product each."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper
    from onnxruntime import InferenceSession, SessionOptions

    outputs, inputs = w_OI.shape
    options = SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    feed = {"x": x_MI.numpy()}

    def side(name: str, nodes: list, **tensors: Tensor) -> Side:
        ends = [
            helper.make_tensor_value_info(end, TensorProto.FLOAT, [None, size]) for end, size in (("x", inputs), ("y", outputs))
        ]
        held = [numpy_helper.from_array(tensor.numpy(), key) for key, tensor in tensors.items()]
        graph = helper.make_graph(nodes, "product", ends[:1], ends[1:], held)
        opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=min(onnx.IR_VERSION, 10))
        session = InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        return Side("onnxruntime", name, lambda: torch.from_numpy(session.run(None, feed)[0]))

    yield side("float32", [helper.make_node("MatMul", ["x", "w"], ["y"])], w=w_OI.t().contiguous())
    scale = w_OI.abs().amax() / 127
    nodes = [
        helper.make_node("DynamicQuantizeLinear", ["x"], ["codes", "step", "zero"]),
        helper.make_node("MatMulInteger", ["codes", "w", "zero"], ["sums"]),
        helper.make_node("Cast", ["sums"], ["floats"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["step", "scale"], ["steps"]),
        helper.make_node("Mul", ["floats", "steps"], ["y"]),
    ]
    codes = (w_OI / scale).round().to(torch.int8).t().contiguous()
    yield side("8-bit x, 8-bit w", nodes, w=codes, scale=scale.view(1))
    for bits in NBITS:
        middle = 1 << bits >> 1
        blocks = w_OI.unflatten(1, (-1, BLOCK))
        scales = blocks.abs().amax(2) / max(middle - 1, 1)
        codes = (blocks / scales.unsqueeze(2)).round().clamp(-middle, middle - 1).int() + middle
        lanes = codes.unflatten(2, (-1, 8 // bits)) << torch.arange(0, 8, bits)
        attributes = {"K": inputs, "N": outputs, "bits": bits, "block_size": BLOCK, "accuracy_level": 4}
        node = helper.make_node("MatMulNBits", ["x", "w", "scales"], ["y"], domain="com.microsoft", **attributes)
        yield side(f"MatMulNBits: 8-bit x, {bits}-bit w", [node], w=lanes.sum(3).to(torch.uint8), scales=scales.flatten())


def llama_cpp(w_OI: Tensor, x_MI: Tensor, threads: int) -> Iterator[Side]:
    """The types of GGUF."""
    from benchmarks import ggml

    for kind in TYPES:
        yield Side("llama.cpp", f"{kind}: 8-bit x", ggml.linear(w_OI, kind, x_MI, threads))


def torchao(w_OI: Tensor, x_MI: Tensor, threads: int) -> Iterator[Side]:
    """torchao's own quantization of a layer."""
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    layer = nn.Sequential(nn.Linear(w_OI.shape[1], w_OI.shape[0], bias=False)).requires_grad_(False)
    layer[0].weight.copy_(w_OI)
    quantize_(layer, Int8DynamicActivationInt8WeightConfig())
    yield Side("torchao", "8-bit x, 8-bit w", lambda: layer(x_MI))


RIVALS = {"onnxruntime": onnxruntime, "llama_cpp": llama_cpp, "torchao": torchao}
"""Package -> its sides."""


def measure(rows: int, inputs: int, outputs: int, threads: int, seconds: float) -> list[dict[str, object]]:
    """A row of results for each side that is installed, torch's float32 first."""
    torch.manual_seed(0)
    w_OI, x_MI = 0.05 * torch.randn(outputs, inputs), torch.randn(rows, inputs)
    sides = [Side("torch", "float32", lambda: linear(x_MI, w_OI)), *ours(w_OI, x_MI)]
    for package, make in RIVALS.items():
        if importlib.util.find_spec(package) is None:
            print(f"{package} is not installed: left out")
            continue
        sides += make(w_OI, x_MI, threads)
    exact = x_MI.double() @ w_OI.double().t()
    with torch.no_grad():
        errors = [float((side.run().double() - exact).norm() / exact.norm()) for side in sides]
        times = in_turns([side.run for side in sides], torch.device("cpu"), seconds * len(sides))
    work = rows * inputs * outputs / threads
    shape = {"rows": rows, "inputs": inputs, "outputs": outputs, "threads": threads}
    return [
        {**shape, "package": side.package, "multiplies": side.multiplies, "ms": ms, "gmadds": work / ms / 1e6,
         "times_float32": times[0] / ms, "error": error}
        for side, ms, error in zip(sides, times, errors, strict=True)
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[2048, 1], help="activations: tokens of a batch")
    parser.add_argument("--inputs", type=int, default=768, help="a multiple of 256, which TQ2_0 asks for")
    parser.add_argument("--outputs", type=int, default=3072)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=2.0, help="of measuring, for each side")
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument("--quick", action="store_true", help="a small layer, a moment: a smoke test, not evidence")
    args = parser.parse_args()
    if args.quick:
        args.rows, args.inputs, args.outputs, args.seconds = [3], 256, 32, 0.0
    logging.getLogger("fqt").setLevel(logging.ERROR)
    torch.set_num_threads(args.threads)
    found = [row for m in args.rows for row in measure(m, args.inputs, args.outputs, args.threads, args.seconds)]
    head = ["rows", "package", "multiplies", "ms", "1e9 madds/s a thread", "times torch", "error"]
    print(
        table(
            head,
            [
                [row["rows"], row["package"], row["multiplies"], f"{row['ms']:.3g}", f"{row['gmadds']:.1f}",
                 f"{row['times_float32']:.2f}", f"{row['error']:.1%}"]
                for row in found
            ],
        )
    )  # fmt: skip
    if args.json:
        write_json(args.json, found)


if __name__ == "__main__":
    main()
