import torch

from fqt.quantizers import build, quantize


def test_alpha_is_the_mean_of_each_output_channel():
    w_OKI = torch.tensor([[[1.0, -3.0], [0.0, -0.0]], [[-8.0, 8.0], [8.0, -8.0]], [[0.0, 0.0], [0.0, 0.0]]])
    q, mask = quantize(w_OKI, build("xnor_weight", "w"), "w")
    assert q.scale.tolist() == [1.0, 8.0, 0.0]
    assert q.decode().tolist() == [[[1, -1], [1, 1]], [[-8, 8], [8, -8]], [[0, 0], [0, 0]]]
    assert mask.numel() == 0, "the gradient of the weights passes unchanged"


def test_activations_are_signs_and_pass_the_gradient_within_one():
    x = torch.tensor([-2.0, -1.0, -1e-30, -0.0, 0.0, 1.0, 1.5]).view(1, 1, 7)
    q, mask = quantize(x, build("xnor_activation", "x"), "x")
    assert q.scale.tolist() == [1.0]
    assert q.decode().flatten().tolist() == [-1, -1, -1, 1, 1, 1, 1]
    assert mask.tolist() == [[[0b0111110]]]
    assert q.codes.tolist() == [[[0b1111000]]]


def test_infinite_activations_are_signs():
    x = torch.tensor([torch.inf, -torch.inf]).view(1, 1, 2)
    assert quantize(x, build("xnor_activation", "x"), "x")[0].decode().flatten().tolist() == [1, -1]
