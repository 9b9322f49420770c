"""What does each gradient quantizer do to the gradients of a real run?

    python -m benchmarks.gradients [--quick] [--json F]

Trains the main job's network for some steps with a 1-bit forward and float gradients (`xnor`) on Fashion-MNIST, takes the
output gradients of one batch at every converted layer, and quantizes each with many keys. Per quantizer, median over layers:

    error      E||Q(g) - g||^2 / ||g||^2
    bias       ||E Q(g) - g||^2 / ||g||^2, the error of the mean of K draws less what K draws leave of the noise: 0 if unbiased
    product    the same error of the gradient that the layer passes on (grad_input) or applies (grad_weight), on the same codes
    time       of quantizing and packing, over that of copying g, in the same run (median; the backend is said)
"""

from __future__ import annotations

import argparse
import logging
import statistics
import time
from pathlib import Path

import torch
from torch import Tensor

import fqt
from benchmarks.common import table, write_json
from fqt import ops
from fqt.geometry import Geometry
from fqt.multiply import multiply_grad_input, multiply_grad_weight
from fqt.quantizers import build
from train import data, models
from train.config import parse

QUANTIZERS = {
    "grad_input": [
        ("psq", {"bits": 1}),
        ("psq", {"bits": 2}),
        ("psq", {"bits": 4}),
        ("psq", {"bits": 6}),
        ("psq", {"bits": 8}),
        ("agp", {"bits": 2}),
        ("agp", {"bits": 4}),
        ("agp", {"bits": 8}),
        ("agp", {"bits": 4, "mode": "topk"}),
        ("dorefa_gradient", {"bits": 6}),
        ("uniform", {"bits": 8, "granularity": "sample", "stochastic": True}),
    ],
    "grad_weight": [
        ("psq", {"bits": 4, "granularity": "sample"}),
        ("psq", {"bits": 1, "granularity": "channel"}),
        ("psq", {"bits": 4, "granularity": "channel"}),
        ("psq", {"bits": 6, "granularity": "channel"}),
        ("psq", {"bits": 4, "granularity": "sample_channel"}),
        ("agp", {"bits": 4, "granularity": "channel"}),
        ("agp", {"bits": 4, "granularity": "channel", "mode": "topk"}),
        ("dorefa_gradient", {"bits": 6}),
        ("uniform", {"bits": 8, "granularity": "channel", "stochastic": True}),
    ],
}


def real_gradients(data_name: str, steps: int) -> list[tuple[str, Tensor, Tensor, Tensor, Geometry]]:
    """Layer name, g_NPO, x_NPC and w_OKI as the forward saw them, geometry: of one batch after `steps` steps."""
    torch.manual_seed(0)
    images = data.load(parse({"model": {"name": "vgg_small"}, "data": {"name": data_name}}).data)
    model = models.build("vgg_small", images.shape, images.classes).to(memory_format=torch.channels_last)
    fqt.convert(model, "xnor")
    optimizer = torch.optim.Adam(model.parameters(), lr=6e-3, fused=True)
    whole = len(images.train) // 128
    batches = images.train.batches([list(range(i % whole * 128, i % whole * 128 + 128)) for i in range(steps + 1)])
    for step, (x, y) in enumerate(batches):
        found: dict[str, dict[str, Tensor]] = {}
        if step == steps:
            for name, layer in fqt.quantized_layers(model):
                found[name] = {}
                layer.register_forward_hook(_keep(found[name]))
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x.to(memory_format=torch.channels_last)), y).backward()
        optimizer.step()
    gradients = []
    for name, layer in fqt.quantized_layers(model):
        x, g = found[name]["x"], found[name]["g"]
        geometry = Geometry(x.shape[2], x.shape[3], (3, 3), (1, 1), (1, 1, 1, 1), (1, 1), 1)
        signs = torch.where(x.flatten(2).transpose(1, 2) >= 0, 1.0, -1.0)
        weight = layer.quantized_weight()
        assert weight is not None
        gradients.append((name, g.flatten(2).transpose(1, 2), signs, weight.decode(), geometry))
    return gradients


def _keep(found: dict[str, Tensor]):
    def hook(_module, inputs, output) -> None:
        found["x"] = inputs[0].detach()
        output.register_hook(lambda g: found.__setitem__("g", g.detach()))

    return hook


def measure(product: str, name: str, options: dict, layers: list, draws: int) -> dict[str, object]:
    quantizer = build(name, "g", **options)
    assert quantizer is not None
    errors, biases, products, times = [], [], [], []
    for _, g, x, w, geometry in layers:
        power = float(g.double().square().sum())
        exact = _multiply(product, g, x, w, geometry)
        mean, error, error_product = torch.zeros_like(g).double(), 0.0, 0.0
        for draw in range(draws):
            key = torch.tensor(draw + 1)
            value = fqt.quantize(g, quantizer, "g", key=key)[0].decode()
            mean += value.double() / draws
            error += float((value - g).double().square().sum()) / draws / power
            got = _multiply(product, value, x, w, geometry)
            error_product += float((got - exact).double().square().sum() / exact.double().square().sum()) / draws
        of_mean = float((mean - g).square().sum()) / power
        # E||mean - g||^2 = bias + variance / K, and error = bias + variance
        biases.append((of_mean - error / draws) / (1 - 1 / draws))
        errors.append(error)
        products.append(error_product)
        times.append(_time(lambda g=g: fqt.quantize(g, quantizer, "g", key=torch.tensor(1))) / _time(g.clone))
    return {
        "product": product,
        "quantizer": str(quantizer),
        "name": name,
        "error": statistics.median(errors),
        "bias": statistics.median(biases),
        "product_error": statistics.median(products),
        "time_over_copy": statistics.median(times),
    }


def _multiply(product: str, g: Tensor, x: Tensor, w: Tensor, geometry) -> Tensor:
    if product == "grad_input":
        return multiply_grad_input(g, w, x.shape[2], geometry)
    return multiply_grad_weight(g, x, geometry)


def _time(function, repeats: int = 5) -> float:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few steps and draws")
    parser.add_argument("--data", default="fashion_mnist", help="a data set of the training program")
    parser.add_argument("--json", type=Path, help="write the rows here")
    args = parser.parse_args()
    logging.getLogger("fqt").setLevel(logging.ERROR)
    steps, draws = (5, 4) if args.quick else (200, 64)
    layers = real_gradients(args.data, steps)
    rows = [
        measure(product, name, options, layers, draws) for product, wanted in QUANTIZERS.items() for name, options in wanted
    ]
    head = ["product", "quantizer", "error of g", "bias", "error of the product", "time / copy"]
    print(f"{len(layers)} layers, after {steps} steps, {draws} draws; backend {ops.KERNELS[0].backend}")
    print(
        table(
            head,
            [
                [row["product"], f"{row['name']} {row['quantizer']}", f"{row['error']:.4f}", f"{row['bias']:.5f}",
                 f"{row['product_error']:.4f}", f"{row['time_over_copy']:.0f}"]
                for row in rows
            ],
        )
    )  # fmt: skip
    if args.json:
        write_json(args.json, rows)


if __name__ == "__main__":
    main()
