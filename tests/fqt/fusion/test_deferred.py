"""Deferred activations: a model computes the same with and without them, whoever else looks at what stands between."""

import copy
import itertools
import pickle
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fqt
from fqt import notes, ops, reference
from fqt.cpu import norm as cpu_norm
from fqt.formats import Format
from fqt.fusion import deferred
from fqt.fusion.deferred import Deferred
from fqt.fusion.modules import FusedBatchNorm2d, FusedMaxPool2d
from fqt.ops import NORM
from fqt.testing import assert_same_codes
from tests.fqt.helpers import case_seeds, random_case

RECIPES = ("xnor", "fqt_1bit", "fqt_w1a1g4", "fqt_1bit_topk")


class Block(nn.Module):
    """A residual block, as torchvision writes it: one activation module for both, added in place."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        y += x
        return self.relu(y)


def network(recipe: str, *, fuse: bool = True, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(3, 10, 3, padding=1),
        nn.BatchNorm2d(10),
        nn.ReLU(inplace=True),
        nn.Conv2d(10, 20, 3, padding=1),
        nn.BatchNorm2d(20),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2, ceil_mode=True),
        Block(20),
        nn.Conv2d(20, 9, 3, stride=2),
        nn.BatchNorm2d(9),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(9 * 4, 33),
        nn.BatchNorm1d(33),
        nn.ReLU(),
        nn.Linear(33, 17, bias=False),
        nn.BatchNorm1d(17),
        nn.ReLU(),
        nn.Linear(17, 5),
    )
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
    return fqt.convert(model, recipe, fuse=fuse)  # type: ignore[return-value]


def images(n: int = 6) -> Tensor:
    return torch.randn(n, 3, 9, 9, generator=torch.Generator().manual_seed(4))


def step(model: nn.Module, x: Tensor, run: Callable[[Tensor], Tensor] | None = None) -> list[Tensor]:
    """Output, gradients of input and parameters, running statistics. Gradients of convolutions' biases, zero behind a
    BatchNorm but for rounding, are left out: torch sums them in an order that depends on strides."""
    x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    torch.manual_seed(7)
    y = (run or model)(x)
    (y * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    biases = {id(m.bias) for m in model.modules() if isinstance(m, nn.Conv2d)}
    grads = [p.grad.clone() for p in model.parameters() if p.grad is not None and id(p) not in biases]
    assert x.grad is not None
    model.zero_grad()
    statistics = [buffer.clone() for buffer in model.buffers() if buffer.is_floating_point()]
    return [y.detach() * 1, x.grad, *grads, *statistics]


def assert_same(one: list[Tensor], other: list[Tensor]) -> None:
    assert len(one) == len(other)
    for i, (a, b) in enumerate(zip(one, other, strict=True)):
        assert torch.equal(a, b), i


@pytest.fixture
def floats(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Call it to have every deferred activation computed at once, by the same arithmetic."""

    def compute() -> None:
        batch_norm = deferred.batch_norm

        def at_once(x: Tensor, norm: nn.Module, backend: str) -> Tensor | None:
            found = batch_norm(x, norm, backend)  # type: ignore[arg-type]
            return found.value() if isinstance(found, Deferred) else found

        monkeypatch.setattr(deferred, "batch_norm", at_once)
        monkeypatch.setattr(deferred.Between, "gives", lambda x, recipe: False)

    return compute


@pytest.mark.every(2)
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["NCHW", "NHWC"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_bit_identical_to_the_same_arithmetic_on_floats(recipe, memory_format, training, floats) -> None:
    x = images().to(memory_format=memory_format)
    model = network(recipe).train(training)
    lazy = step(copy.deepcopy(model), x)
    floats()
    assert_same(lazy, step(model, x))


@pytest.mark.parametrize("recipe", ["xnor", "fqt_w1a1g4"])
def test_without_it_only_the_rounding_of_the_statistics_differs(recipe: str) -> None:
    """One BatchNorm of integers, whose sums any order finds exactly: no sign differs, and floats by their last bits alone."""

    def block(fuse: bool) -> list[Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1, bias=False), nn.BatchNorm2d(8), nn.MaxPool2d(2), nn.Conv2d(8, 4, 3),
            nn.Flatten(), nn.Linear(16, 2),
        )  # fmt: skip
        with torch.no_grad():
            model[1].weight.sign_()  # accumulators are integers and their mean of 256 has no rounding
        fqt.convert(model, recipe, fuse=fuse)
        torch.manual_seed(1)
        with torch.no_grad():
            return [model[:5](images(4)[:, :, :8, :8]), *model.buffers()]

    fused, plain = block(True), block(False)
    for a, b in zip(fused, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("recipe", ["xnor", "fqt_1bit"])
def test_a_named_backend_serves_batch_norm_too(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = network(recipe), images()
    plain = fqt.revert(copy.deepcopy(model))
    expected = step(model, x)
    for name in NORM:  # whoever calls one of these has not asked for the reference

        def refuse(*args: object, name: str = name) -> None:
            raise AssertionError(name)

        monkeypatch.setattr(cpu_norm, name, refuse)
    ops.load.cache_clear()
    try:
        assert_same(expected, step(fqt.convert(plain, recipe, backend="reference"), x))
        assert "backend" not in fqt.revert(plain)[1].__dict__
    finally:
        monkeypatch.undo()
        ops.load.cache_clear()


def test_no_float_activation_is_kept_between_one_bit_layers() -> None:
    model = network("fqt_1bit")
    with fqt.count_saved_bytes() as saved:
        y = model[:6](images(32))
    assert isinstance(y, Deferred)
    pixels = 32 * 81
    # the float image and the first convolution's output; of the 1-bit one the scales; then accumulators in 2 bytes, and bits
    assert saved.by_dtype["float32"] == 4 * (pixels * (3 + 10) + 4 * (10 + 20) + 3 * 20 + 1)
    assert saved.by_dtype["int16"] == 2 * pixels * 20


def test_anyone_who_looks_sees_floats() -> None:
    model, plain = network("xnor").eval(), network("xnor", fuse=False).eval()
    x = images()
    for end in range(1, len(model)):
        seen, expected = model[:end](x), plain[:end](x)
        assert seen.shape == expected.shape
        assert seen.requires_grad == expected.requires_grad
        torch.testing.assert_close(seen * 1, expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(seen.detach().clone(), expected.detach(), rtol=1e-4, atol=1e-4)
        assert "nan" not in repr(seen)
        assert len(seen.tolist()) == len(x)
        torch.testing.assert_close(torch.cat([seen, seen])[: len(x)], expected, rtol=1e-4, atol=1e-4)


def test_hooks_see_floats() -> None:
    model, seen = network("fqt_w1a1g4"), []
    expected = step(copy.deepcopy(model), images())
    for module in model:
        module.register_forward_hook(lambda module, args, y: seen.append(y.isnan().any() | args[0].isnan().any()))
    assert_same(expected, step(model, images()))
    assert len(seen) == len(model)
    assert not any(seen)


def test_a_hook_may_replace_the_output() -> None:
    model = network("xnor")
    before = step(copy.deepcopy(model), images())
    for module in model:
        module.register_forward_hook(lambda module, args, y: y.clone())
    assert_same(before, step(model, images()))


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("cuts", [(0, 4, 7, 19), (0, 2, 5, 6, 9, 14, 19)])
def test_checkpointing_is_bit_identical(reentrant: bool, cuts: tuple[int, ...]) -> None:
    model = network("fqt_1bit")

    def run(x: Tensor) -> Tensor:
        for begin, end in itertools.pairwise(cuts):
            x = checkpoint(model[begin:end], x, use_reentrant=reentrant)  # type: ignore[assignment]
        return x

    for module in model.modules():  # the recomputation moves the averages once more, as torch's does
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.momentum = 0.0
    assert_same(step(model, images()), step(model, images(), run))


def test_changed_in_place_and_used_again() -> None:
    model = network("xnor")
    y = model[:2](images())
    y.mul_(2.0)
    z = y + 0
    torch.testing.assert_close(z, model[:2](images()) * 2)
    later = model[3](y)
    assert torch.equal(later.value(), model[3](z).value())  # type: ignore[attr-defined]
    y = model[:2](images())
    y.retain_grad()
    (y * y).sum().backward()
    assert y.grad is not None
    torch.testing.assert_close(y.grad, 2 * (y + 0).detach())


def test_inference_mode() -> None:
    """Its tensors count no versions; what is written in place is read all the same."""
    model = network("xnor").eval()
    with torch.no_grad():
        expected = model(images())
    with torch.inference_mode():
        assert torch.equal(model(images()), expected)
        y = model[:2](images())
        y.mul_(-1.0)
        assert torch.equal(model[3](y).value(), model[3](y + 0).value())


def test_two_readers() -> None:
    """One takes the signs, one the floats; the gradient is the sum."""
    model = network("xnor")
    x = images().requires_grad_()
    grads = []
    for weights in ((1, 0), (0, 1), (1, 1)):
        y = model[:5](x)
        loss = weights[0] * model[7].conv1(y).square().sum() + weights[1] * y.square().sum()
        grads.append(torch.autograd.grad(loss, x)[0])
    torch.testing.assert_close(grads[0] + grads[1], grads[2], rtol=1e-4, atol=1e-3)


def test_two_layers_read_the_signs() -> None:
    model = network("xnor")
    x = images(16).requires_grad_()
    other = copy.deepcopy(model[7].conv1)
    grads = []
    for weights in ((1, 0), (0, 1), (1, 1)):
        torch.manual_seed(3)
        y = model[:5](x)
        loss = weights[0] * model[7].conv1(y).square().sum() + weights[1] * other(y).square().sum()
        grads.append(torch.autograd.grad(loss, x)[0])
    torch.testing.assert_close(grads[0] + grads[1], grads[2], rtol=1e-4, atol=1e-3)


def test_a_second_derivative_is_refused() -> None:
    model = network("xnor")
    x = images().requires_grad_()
    (grad,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        grad.square().sum().backward()


def test_not_a_number_shows() -> None:
    model = network("xnor")
    x = images()
    x[0, 0, 0, 0] = torch.nan
    assert model(x).isnan().all()
    assert model.eval()(x)[0].isnan().all()


def test_frozen_parts() -> None:
    model = network("xnor")
    for p in model[1].parameters():
        p.requires_grad = False
    for p in model[3].parameters():
        p.requires_grad = False
    model(images()).sum().backward()
    assert model[1].weight.grad is None
    assert model[3].weight.grad is None
    assert model[0].weight.grad is not None
    assert model[4].weight.grad is not None


def test_running_statistics_are_those_of_torch() -> None:
    fused, plain = nn.Sequential(nn.BatchNorm2d(5, momentum=0.3)), nn.BatchNorm2d(5, momentum=0.3)
    fused[0].__class__ = FusedBatchNorm2d
    for _ in range(3):
        x = torch.randn(4, 5, 6, 7) * 3 + 10
        torch.testing.assert_close(fused(x) * 1, plain(x), rtol=1e-5, atol=1e-5)
    for a, b in zip(fused.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    "norm",
    [
        nn.BatchNorm2d(5, affine=False),
        nn.BatchNorm2d(5, track_running_stats=False),
        nn.BatchNorm2d(5, momentum=None),
        nn.BatchNorm2d(5).double(),
    ],
    ids=["affine", "track", "momentum", "double"],
)
def test_what_is_not_deferred_is_torchs(norm: nn.BatchNorm2d) -> None:
    plain = copy.deepcopy(norm)
    x = torch.randn(2, 5, 4, 4, dtype=norm.weight.dtype if norm.affine else torch.float32)
    norm.__class__ = FusedBatchNorm2d
    for _ in range(2):
        y = norm(x)
        assert type(y) is Tensor
        assert torch.equal(y, plain(x))


def test_one_value_a_channel_is_refused_as_torch_refuses_it() -> None:
    model = network("xnor")
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        model(images(1))
    assert model.eval()(images(1)).shape == (1, 5)


@pytest.mark.parametrize(
    ("pool", "deferred_"),
    [
        (nn.MaxPool2d(3), True),
        (nn.MaxPool2d(2), False),
        (nn.MaxPool2d(2, ceil_mode=True), True),
        (nn.MaxPool2d((1, 3)), True),
        (nn.MaxPool2d(3, stride=2), False),
        (nn.MaxPool2d(3, padding=1), False),
        (nn.MaxPool2d(2, dilation=2), False),
    ],
    ids=str,
)
def test_pooling(pool: nn.MaxPool2d, deferred_: bool) -> None:
    model = network("xnor")
    y = model[:2](images())
    expected = pool(y * 1)
    pool.__class__ = FusedMaxPool2d
    actual = pool(y)
    assert isinstance(actual, Deferred) == deferred_
    assert torch.equal(actual * 1, expected)
    g = torch.randn(expected.shape)
    a, b = (torch.autograd.grad((z * g).sum(), model[1].weight, retain_graph=True)[0] for z in (actual, expected))
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-4)


def test_revert_and_state_dict() -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.MaxPool2d(2), nn.Conv2d(4, 4, 2), nn.Conv2d(4, 2, 1))
    keys, kinds = list(plain.state_dict()), [type(m) for m in plain]
    model = fqt.convert(copy.deepcopy(plain), "xnor")
    assert isinstance(model[1], FusedBatchNorm2d)
    assert list(model.state_dict()) == keys
    assert isinstance(pickle.loads(pickle.dumps(model))[1], FusedBatchNorm2d)
    fqt.revert(model)
    assert [type(m) for m in model] == kinds
    assert torch.equal(model(images()), plain(images()))


@pytest.mark.parametrize("recipe", ["int8", "dorefa_w1a2g6"])
def test_nothing_is_fused_where_nothing_reads_signs(recipe: str) -> None:
    assert not any(isinstance(m, FusedBatchNorm2d) for m in network(recipe).modules())


def test_fuse_off() -> None:
    model = network("xnor", fuse=False)
    assert not any(isinstance(m, FusedBatchNorm2d) for m in model.modules())
    assert type(model[:6](images())) is Tensor


@pytest.mark.parametrize("where", ["autocast", "double", "bfloat16"])
def test_elsewhere_nothing_is_deferred(where: str) -> None:
    model, x = network("xnor"), images()
    if where == "autocast":
        with torch.autocast("cpu", torch.bfloat16):
            y = model[:6](x)
    else:
        dtype = {"double": torch.float64, "bfloat16": torch.bfloat16}[where]
        y = model.to(dtype)[:6](x.to(dtype))
    assert type(y) is Tensor


def test_activations_are_deferred_where_kernels_of_norm_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    for reason, cuda in ((None, True), ("Triton is not installed", False)):
        monkeypatch.setattr(deferred.triton, "refuses", lambda reason=reason: reason)
        assert [deferred.serves(device) for device in ("cpu", "meta", "cuda", "mps")] == [True, True, cuda, False]


@pytest.mark.every(2)
@pytest.mark.parametrize("fold_shape", [(1, 1, 9), (5, 1, 1), (5, 1, 9), (5, 6, 1)], ids=str)
@pytest.mark.parametrize("axes", ["", "N", "C", "NC"])
def test_ranges_of_a_folded_gradient_follow_from_its_own(
    axes: str, fold_shape: tuple[int, int, int], rng: np.random.Generator
) -> None:
    """Whatever is folded in: scales of either sign, 0, values that are not finite, products that overflow or vanish.
    50 random cases; a fold by position is not followed."""
    special = torch.tensor([0.0, -0.0, 1e-38, 1e38, torch.inf, -torch.inf, torch.nan, -3.0])
    format = Format("uint", 4, axes, True)
    for seed in case_seeds(rng, 50):
        with random_case(seed) as (draw, generator):
            g, fold = torch.randn(5, 6, 9, generator=generator), torch.randn(fold_shape, generator=generator)
            for tensor, share in ((g, 0.02), (fold, draw.choice((0.0, 0.2, 0.4)))):
                chosen = torch.rand(tensor.shape, generator=generator) < share
                tensor[chosen] = special[torch.randint(len(special), (int(chosen.sum()),), generator=generator)]
            notes.note_ranges(g, *torch.aminmax(g, dim=1))
            found = notes.ranges_of(g, axes, fold)
            assert (found is None) == (fold_shape[1] != 1)
            if found is None:
                continue
            expected = reference.group_range(reference.group_rows(g * fold, format))
            key = torch.tensor(seed)
            codes = [
                reference.quantize(g, format, calibrate="minmax", stochastic=True, key=key, fold=fold, ranges=ranges)[0]
                for ranges in (found, expected)
            ]
            assert_same_codes(*codes)


def test_gradients_in_blocks_between_fused_layers_find_their_own_ranges(monkeypatch: pytest.MonkeyPatch) -> None:
    """What BatchNorm's backward knows is the range of whole channels, not of blocks: the same bits where it says nothing."""
    block = fqt.Quantizer("int", 8, "block", block=16)
    products = {name: fqt.Product(block, "saved") for name in ("grad_input", "grad_weight")}
    model = network(replace(fqt.load_recipe("fqt_1bit"), name="blocks", **products))
    asked = copy.deepcopy(model)
    known = step(model, images())
    monkeypatch.setattr("fqt.products.ranges_of", lambda *_: None)
    assert_same(known, step(asked, images()))
