"""What tests of freezing and of saving share: models of every kind of layer, and what is the same."""

from __future__ import annotations

import timm.layers
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import fqt
from fqt.quantizers import build
from fqt.recipe import Product, Recipe

RECIPES = [name for name in fqt.recipes() if name != "fp32"]


def everywhere(name: str) -> Recipe:
    return fqt.load_recipe(name).everywhere()


def forward(x: dict | None, w: dict | None, transform: object = None) -> Recipe:
    """A recipe whose output has these operands, and whose gradients are float."""
    operands = [
        "float" if written is None else build(written.pop("quantizer"), letter, **written)
        for letter, written in (("x", x and dict(x)), ("w", w and dict(w)))
    ]
    x_back, w_back = ("float" if operand == "float" or transform else "saved" for operand in operands)
    return Recipe("forward", Product(*operands, transform), Product("float", w_back), Product("float", x_back))


INT8 = {"quantizer": "uniform", "bits": 8}


FORWARDS = {
    "lsq": lambda: forward({"quantizer": "lsq"}, {"quantizer": "lsq", "bits": 3}),
    "pact": lambda: forward({"quantizer": "pact"}, {"quantizer": "ternary_weight"}),
    "percentile": lambda: forward(INT8 | {"calibrate": {"percentile": {"percent": 90}}}, INT8 | {"calibrate": "percentile"}),
    "moving_average": lambda: forward(INT8 | {"calibrate": "moving_average"}, INT8 | {"calibrate": "moving_average"}),
    "hadamard": lambda: forward(INT8, INT8, {"hadamard": {"size": 4}}),
    "blocks": lambda: forward({"quantizer": "mx"}, {"quantizer": "mx"}),
    "float8": lambda: forward({"quantizer": "float8"}, {"quantizer": "float8"}),
    "weights alone": lambda: forward(None, {"quantizer": "ternary_weight"}),
    "activations alone": lambda: forward(INT8, None),
    "gradients alone": lambda: Recipe(
        "gradients",
        Product("float", "float"),
        Product(build("psq", "g", bits=4), "float"),
        Product(build("psq", "g", bits=4), "float"),
    ),
}


class Convolutions(nn.Module):
    """Every kind of convolution, one behind the other."""

    def __init__(self) -> None:
        super().__init__()
        self.two = nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2, padding_mode="reflect")
        self.standardized = timm.layers.ScaledStdConv2dSame(6, 6, 3, stride=2)
        self.norm = nn.BatchNorm2d(6)
        self.pool = nn.MaxPool2d(2)
        self.again = nn.Conv2d(6, 8, (3, 2), padding="same")
        self.up = nn.ConvTranspose2d(8, 6, 3, stride=2, groups=2)
        self.one = nn.Conv1d(6, 6, 3, padding=2, dilation=2)
        self.up_one = nn.ConvTranspose1d(6, 4, 2, stride=3, output_padding=1)
        self.three = nn.Conv3d(2, 4, (2, 3, 1), padding=(1, 1, 0))

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(self.again(self.pool(self.norm(self.standardized(self.two(x))))))
        x = self.up_one(self.one(x.flatten(2)))
        return self.three(x.unflatten(1, (2, 2)).unflatten(3, (-1, 3))).flatten(1)


class Linears(nn.Module):
    """Attention, a tied head, a transposed linear layer, one whose weight is computed by its module, one that is pruned."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.norm, self.flat = nn.LayerNorm(8), nn.Linear(8, 8)
        self.twin = nn.Linear(8, 8)
        self.twin.weight = self.flat.weight
        self.normed = parametrizations.weight_norm(nn.Linear(8, 8))
        self.lent = nn.Linear(8, 8)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        x = self.norm(x + self.attention(x, x, x, need_weights=False)[0])
        x = self.normed(torch.tanh(self.twin(torch.tanh(self.flat(x)))))
        return self.head(x + F.linear(x, self.lent.weight, self.lent.bias))


def same(one: Tensor, other: Tensor) -> bool:
    """Bit for bit, NaN included."""
    kind = {2: torch.int16, 4: torch.int32, 8: torch.int64}[one.element_size()]
    return one.dtype == other.dtype and torch.equal(one.contiguous().view(kind), other.contiguous().view(kind))


def trained(model: nn.Module, x: Tensor) -> nn.Module:
    """After a step, so that running statistics, learned steps and BatchNorms are no longer what they began with."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    model(x).float().square().mean().backward()
    optimizer.step()
    return model.eval()


class Mixed(nn.Module):
    """A convolution by groups, one of several products, a linear layer, attention."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.up = nn.Conv2d(4, 6, 3, groups=2), nn.ConvTranspose2d(6, 4, 3, stride=2, padding=1)
        self.linear, self.attention = nn.Linear(25, 8), nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(self.up(torch.relu(self.conv(x))).flatten(2))
        return self.attention(x, x, x)[0]


def chain() -> nn.Sequential:
    """1-bit convolutions with what stands between them."""
    first = [nn.Conv2d(3, 12, 3), nn.BatchNorm2d(12), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(12, 12, 3), nn.BatchNorm2d(12)]
    return nn.Sequential(*first, nn.ReLU(), nn.Conv2d(12, 9, 3), nn.BatchNorm2d(9), nn.Flatten(), nn.Linear(9, 5))
