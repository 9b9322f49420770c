"""What flows where, by one forward and by torch.fx: the same answers, whatever the model's code looks like."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from fqt.inspect.flow import Flow, flow_of, traced_flow
from tests.fqt.helpers import fingerprint


class Branches(nn.Module):
    """Two layers at the input, a residual, a shared activation, two heads, a layer that is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Linear(6, 6)
        self.head = nn.Linear(6, 2)  # defined before what feeds it
        self.left, self.right = nn.Linear(6, 6), nn.Linear(6, 6, bias=False)
        self.relu = nn.ReLU(inplace=True)
        self.norm = nn.LayerNorm(6)
        self.middle = nn.Linear(6, 6)
        self.other_head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.relu(self.left(x)) + self.right(x)
        y = self.norm(x + self.relu(self.middle(x)))
        return self.head(F.relu(y)), self.other_head(y[:, :6])


def both() -> list[Flow]:
    model = Branches()
    traced = traced_flow(model)
    assert traced is not None
    return [flow_of(model, torch.randn(3, 6)), traced]


def test_sources_readers_and_ends() -> None:
    for flow in both():
        assert {name: reads.sources for name, reads in flow.reads.items()} == {
            "left": set(),
            "right": set(),
            "middle": {"left", "right"},
            "head": {"left", "right", "middle"},
            "other_head": {"left", "right", "middle"},
        }
        assert flow.readers("relu") == ["middle", "head", "other_head"], "once behind left, and once behind middle"
        assert flow.readers("norm") == ["head", "other_head"]
        ends = flow.ends()
        assert (ends.first, ends.last) == ({"left", "right"}, {"head", "other_head"})


def test_functions_on_the_way_and_signs() -> None:
    forward, traced = both()
    assert "ReluBackward0" in forward.reads["head"].operations and "relu" in traced.reads["head"].operations
    assert forward.reads["head"].negative is False and forward.reads["other_head"].negative is True
    assert traced.reads["head"].negative is None


def test_multiply_adds_count_calls_tokens_and_what_no_layer_does() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            y = self.layer(self.layer(x.flatten(0, 1)))
            return y @ y.T

    flow = flow_of(Twice(), torch.randn(4, 5, 6))
    assert flow.madds == {"layer": 2 * 20 * 36} and flow.total == 2 * 20 * 36 + 20 * 20 * 6
    assert flow_of(nn.Conv2d(3, 4, 3, groups=1), torch.randn(2, 3, 5, 5)).madds == {"": 2 * 9 * 4 * 27}


def test_a_weight_that_the_model_multiplies_by_itself_is_a_source() -> None:
    class Borrows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.outer = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.outer(F.linear(x, self.inner.weight))

    for flow in (flow_of(Borrows(), torch.randn(2, 6)), traced_flow(Borrows())):
        assert flow is not None and flow.reads.keys() == {"outer"} and flow.reads["outer"].sources == {"inner"}


def test_a_model_may_do_with_its_input_what_it_does_in_training() -> None:
    class Writes(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            x = x.flatten(1).sub_(1)
            x.requires_grad = True
            return super().forward(x)

    x = torch.zeros(2, 6)
    assert flow_of(nn.Sequential(Writes(6, 2)), x).ends().first == {"0"} and not x.any()


def test_the_model_and_the_generator_stay_as_they_were() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Dropout(0.5))
    model[0].weight.requires_grad_(False)
    before, values = fingerprint(model), copy.deepcopy(model.state_dict())
    state = torch.get_rng_state()
    flow_of(model, torch.randn(2, 3, 6, 6))
    traced_flow(model)
    assert fingerprint(model) == before and not model[0].weight.requires_grad
    assert all(torch.equal(value, values[name]) for name, value in model.state_dict().items())
    state_after = torch.get_rng_state()
    torch.set_rng_state(state)
    torch.randn(2, 3, 6, 6)
    assert torch.equal(state_after, torch.get_rng_state())


def test_on_meta_there_are_no_values() -> None:
    with torch.device("meta"):
        flow = flow_of(nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 2)), torch.empty(3, 6))
    assert [reads.negative for reads in flow.reads.values()] == [None, None] and flow.total == 3 * (36 + 12)


def test_what_cannot_be_traced_has_no_traced_flow() -> None:
    class Asks(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x if x.sum() > 0 else -x)

    assert traced_flow(nn.Sequential(nn.Sequential(nn.Linear(2, 2)), nn.ReLU())) is not None

    class Outer(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    assert traced_flow(Outer()) is None


@pytest.mark.parametrize(
    ("make", "size", "first", "last"),
    [
        (lambda: torchvision.models.resnet18(num_classes=3), 64, {"conv1"}, {"fc"}),
        (lambda: timm.create_model("mobilenetv3_small_050", num_classes=3), 64, {"conv_stem"}, {"classifier"}),
        (
            lambda: timm.create_model("deit_tiny_distilled_patch16_224", img_size=32, depth=1, num_classes=3),
            32, {"patch_embed.proj"}, {"head", "head_dist"},
        ),
        (
            lambda: torchvision.models.segmentation.fcn_resnet50(
                weights=None, weights_backbone=None, aux_loss=True, num_classes=3
            ),
            64, {"backbone.conv1"}, {"classifier.4", "aux_classifier.4"},
        ),
    ],
    ids=["resnet18", "mobilenetv3", "deit", "fcn"],
)  # fmt: skip
def test_the_ends_of_whole_networks(make, size: int, first: set[str], last: set[str]) -> None:
    ends = flow_of(make(), torch.randn(2, 3, size, size)).ends()
    assert (ends.first, ends.last) == (first, last)
