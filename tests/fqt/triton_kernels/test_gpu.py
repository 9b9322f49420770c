"""The Triton kernels on the GPU against the reference on the CPU: `pytest -m gpu`."""

import copy

import numpy as np
import pytest
import torch

from fqt import convert, load_recipe, ops
from fqt.formats import Format
from tests.fqt.random_cases import narrow_recipes

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]


@pytest.mark.parametrize(
    ("family", "count"), [("quantize", 40), ("scales", 40), ("prune", 12), ("products", 40), ("float8", 4), ("norm", 20)]
)  # fmt: skip
def test_the_kernels_equal_the_reference(family: str, count: int, rng: np.random.Generator):
    if family == "float8" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("8-bit floats need compute capability 8.9")
    from tests.fqt.triton_kernels import cases  # imports Triton, which then decides whether it interprets

    cases.FAMILIES[family]("cuda", int(rng.integers(2**31)), count)


def step(name: str, device: str, backend: str, *block: torch.nn.Module) -> list[torch.Tensor]:
    """Gradients of a step by a recipe, x's first, of a convolution or a block of 32 channels, and one more convolution; the
    same codes and draws on every device."""
    torch.manual_seed(0)
    block = tuple(map(copy.deepcopy, block)) or (torch.nn.Conv2d(16, 32, 3, padding=1),)
    model = torch.nn.Sequential(*block, torch.nn.Conv2d(32, 24, 1))
    x = torch.randn(4, 16, 9, 9).to(device).requires_grad_()
    model = convert(model.to(device), load_recipe(name).everywhere(), backend=backend)
    key = torch.tensor(1234567, device=device)
    # devices have generators of their own; a float product that cuDNN rounds to TF32 is off by 2^-11
    with pytest.MonkeyPatch.context() as patch, torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        patch.setattr(torch.ops.fqt, "draw_key", lambda like: key)
        model(x).square().sum().backward()
    assert x.grad is not None
    return [x.grad.cpu(), *(p.grad.cpu() for p in model.parameters() if p.dim() > 1 and p.grad is not None)]


@pytest.mark.parametrize("name", narrow_recipes())
def test_a_step_equals_the_reference(name: str):
    quantizer = load_recipe(name).quantizer("output", "w")
    if quantizer is not None and quantizer.transform:
        pytest.skip("tanh differs by device in its last bit")
    for one, other in zip(step(name, "cpu", "reference"), step(name, "cuda", "triton"), strict=True):
        # a recipe's float products are torch's, and differ by device; what codes make of equal gradients does not
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["fqt_1bit", "fqt_w1a1g4", "fqt_w1a1g6"])
def test_a_fused_step_equals_the_reference(name: str):
    """BatchNorm and pooling between 1-bit layers, on accumulators and signs: every bit has one value on all devices."""
    block = (torch.nn.Conv2d(16, 32, 3, padding=1), torch.nn.BatchNorm2d(32), torch.nn.MaxPool2d(3))
    expected, actual = (step(name, *where, *block) for where in (("cpu", "reference"), ("cuda", "triton")))
    for one, other in zip(expected, actual, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_can_be_captured_in_a_graph(fused: bool):
    """No host synchronization in a step: capturing one would fail."""
    images = [torch.nn.Conv2d(64, 64, 1), torch.nn.BatchNorm2d(64), torch.nn.Conv2d(64, 64, 1)]
    model = torch.nn.Sequential(*images) if fused else torch.nn.Linear(256, 256)
    model = convert(model.to("cuda"), load_recipe("fqt_1bit").everywhere(), backend="triton")
    x = torch.randn(*((16, 64, 8, 8) if fused else (64, 256)), device="cuda", requires_grad=True)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            model(x).sum().backward()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        model(x).sum().backward()
    graph.replay()
    torch.cuda.synchronize()
    assert x.grad is not None and bool(x.grad.isfinite().all())


def test_every_operator_is_served_by_triton():
    sign = Format("sign", 1)
    for operator in ops.OPERATORS:
        if operator not in ("calibrate", "encode"):
            formats = () if operator in ops.NORM else (sign,) if operator in ("quantize", "decode") else (sign, sign)
            assert ops.select(operator, ops.Request("cuda", formats, backend="triton"))[0].backend == "triton"
