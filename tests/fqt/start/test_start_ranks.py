"""Two ranks with batches of their own get the same ranges and the same weights."""

from __future__ import annotations

import torch

from tests.ranks import run_ranks

PROGRAM = """
import torch
import torch.distributed as dist
from torch import nn
import fqt

dist.init_process_group("gloo")
rank = dist.get_rank()
torch.manual_seed(0)
model = fqt.convert(nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 8)), fqt.load_recipe("int4").everywhere())
torch.manual_seed(rank + 1)
batches = [torch.randn(8, 12) * (1 + rank) for _ in range(3)]
found = {"largest": max(float(x.abs().max()) for x in batches)}
for method in ("max", "mse"):
    fqt.calibrate(model, batches, method=method)
    found[method] = {name: value.clone() for name, value in model.state_dict().items()}
fqt.reconstruct(model, batches, steps=5, method="adaquant")
found["moved"] = model.state_dict()
torch.save(found, f"rank{rank}.pt")
dist.destroy_process_group()
"""


def test_ranks_agree(tmp_path):
    run_ranks(PROGRAM, 2, tmp_path)
    one, other = (torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2))
    for stage in ("max", "mse", "moved"):
        assert all(torch.equal(value, other[stage][name]) for name, value in one[stage].items()), stage
    widest = one["max"]["0.quantizers.output_x.stored.high"]
    assert float(widest) == max(one["largest"], other["largest"]) > min(one["largest"], other["largest"])
    assert float(one["mse"]["0.quantizers.output_x.stored.high"]) < float(widest)
    assert not torch.equal(one["moved"]["0.weight"], one["mse"]["0.weight"])
