"""The part of `gpu_check` that times whole steps, each side compiled by torch.compile and captured in a CUDA graph.

Two settings: float32, where BatchNorm between 1-bit layers is fused, and bf16 autocast. Every ratio is to bf16 autocast.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

import fqt
from benchmarks.gpu_machine import Machine
from benchmarks.gpu_models import MODELS, gpt2_stack
from benchmarks.gpu_parts import Row, Task

STEPS = ("resnet50", "gpt2_small", "vit_b_16")
RECIPES = (("int8", "bf16"), ("fqt_1bit", "float32"), ("int8", "float32"), ("fqt_1bit", "bf16"))
"""Recipe and setting."""
BASELINE = "none, bf16"


def steps(machine: Machine) -> Iterator[Task]:
    """Forward and backward of whole models without fqt, by each recipe, and by torchao where it is installed."""
    models = {"small": lambda: gpt2_stack(32, 2, 1, 2, 8)} if machine.small else {name: MODELS[name] for name in STEPS}
    for name, make in models.items():
        for recipe, setting in (("none", "bf16"), *RECIPES[:2], ("none", "float32"), *RECIPES[2:]):
            yield f"{name} {recipe} {setting}", functools.partial(_timed, machine, name, make, recipe, setting)
    for name, make in models.items():
        for peer in ("int8", "float8"):
            yield f"{name} torchao {peer}", functools.partial(_peer, machine, name, make, peer)


def _timed(machine: Machine, name: str, make: Callable, recipe: str, setting: str) -> Iterator[Row]:
    row: Row = {"name": name, "recipe": f"{recipe}, {setting}"}
    try:
        model, make_batch, loss = make()
    except ImportError as error:
        yield row | {"absent": str(error)}
        return
    torch.set_float32_matmul_precision("high")  # TF32, which is what float32 training takes
    model, batch = model.to(machine.device), make_batch(machine.device)
    if recipe != "none":
        model = fqt.convert(model, recipe)
        row |= {"backend": " ".join(sorted({r.backend for r in fqt.summary(model).rows} - {"torch"}))}
    plain = _step(model, batch, loss, setting == "bf16", machine.device)
    row |= {"uncompiled_ms": machine.bench(plain)} if recipe != "none" else {}
    if machine.small:
        yield row | {"ms": machine.bench(plain)}
        return
    compiled = _step(torch.compile(model), batch, loss, setting == "bf16", machine.device)
    try:
        ms = machine.bench(compiled)
    except Exception as error:
        if recipe == "none":
            raise
        yield row | {"ms": row["uncompiled_ms"], "uncompiled": " ".join(str(error).split())[:200]}
        return
    yield row | {"ms": ms}


def _peer(machine: Machine, name: str, make: Callable, peer: str) -> Iterator[Row]:
    row: Row = {"name": name, "recipe": f"torchao {peer}"}
    try:
        model, make_batch, loss = make()
        convert = _torchao(peer)
    except ImportError as error:
        yield row | {"absent": str(error)}
        return
    model = convert(model.to(machine.device).bfloat16())
    step = _step(torch.compile(model), make_batch(machine.device), loss, True, machine.device)
    yield row | {"ms": machine.bench(step)}


def _step(model: nn.Module, batch: tuple[Tensor, ...], loss: Callable, bf16: bool, device: str) -> Callable[[], object]:
    def step() -> None:
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.grad.zero_()
        with torch.autocast(device, torch.bfloat16, enabled=bf16):
            value = loss(model, *batch)
        value.backward()

    return step


def _torchao(peer: str) -> Callable[[nn.Module], nn.Module]:
    """A training of torchao's. Raises ImportError where it is not installed."""
    from torchao.float8 import convert_to_float8_training  # type: ignore[import-not-found]
    from torchao.prototype.quantized_training import int8_mixed_precision_training  # type: ignore[import-not-found]
    from torchao.quantization import quantize_  # type: ignore[import-not-found]

    def int8(model: nn.Module) -> nn.Module:
        quantize_(model, int8_mixed_precision_training())
        return model

    return int8 if peer == "int8" else convert_to_float8_training
