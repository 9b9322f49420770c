"""Models whose parameters are spread over three gloo ranks, and over two of them, where the order of a sum does not matter."""

import pytest
import torch

from tests.ranks import run_ranks

PROGRAM = """
import logging
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import distribute_tensor, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
import fqt
from fqt.quantizers import build

dist.init_process_group("gloo")
logging.getLogger("fqt").setLevel(logging.ERROR)
torch.set_num_threads(1)
rank = dist.get_rank()
two, three = DeviceMesh("cpu", [0, 1]), DeviceMesh("cpu", [0, 1, 2])

def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True)),
        nn.Sequential(nn.Conv2d(8, 10, 3, padding=1), nn.ReLU(inplace=True)),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(40, 2),
    )

def shard(model, mesh, layers):
    for module in list(model.modules())[1:]:
        if isinstance(module, (nn.Conv2d, nn.Linear) if layers else (nn.Sequential, nn.Linear)):
            fully_shard(module, mesh=mesh)
    return fully_shard(model, mesh=mesh)

def whole(tensor):
    tensor = tensor.detach()
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).clone()

def steps(model, count=2):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    torch.manual_seed(7 + rank)
    first = None
    for _ in range(count):
        F.cross_entropy(model(torch.randn(4, 3, 8, 8)), torch.randint(0, 2, (4,))).backward()
        first = first or [whole(p.grad) for p in model.parameters()]
        optimizer.step()
        optimizer.zero_grad()
    return first, [whole(p) for p in model.parameters()]

def fsdp2(recipe, mesh, after, layers):
    recipe = fqt.load_recipe(recipe).everywhere()
    replica = DistributedDataParallel(fqt.convert(network(), recipe), process_group=mesh.get_group())
    found = {"ddp": steps(replica), "ddp_summary": str(fqt.summary(replica.module))}
    model = network()
    model = fqt.convert(shard(model, mesh, layers), recipe) if after else shard(fqt.convert(model, recipe), mesh, layers)
    found["parts"] = [p.to_local().shape[0] for p in model.parameters()]
    found["fsdp"], found["summary"] = steps(model), str(fqt.summary(model))
    kept = [whole(p) for p in model.parameters()]
    fqt.revert(model)
    found["reverted"] = [type(module).__name__.removeprefix("FSDP") for module in model.modules()]
    found["plain"] = [type(module).__name__ for module in network().modules()]
    found["sharded"] = [type(module).__name__.startswith("FSDP") for module in model.modules()]
    found["kept"] = all(torch.equal(a, b) for a, b in zip(kept, [whole(p) for p in model.parameters()], strict=True))
    steps(model, 1)
    return found

class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(32, 47), nn.Linear(47, 16)

    def forward(self, x):
        return self.down(F.gelu(self.up(x)))

def tensor_parallel(after):
    torch.manual_seed(0)
    model, alone = Mlp(), Mlp()
    alone.load_state_dict(model.state_dict())
    recipe, styles = fqt.load_recipe("int8").everywhere(), {"up": ColwiseParallel(), "down": RowwiseParallel()}
    if not after:
        fqt.convert(model, recipe)
    parallelize_module(model, three, styles)
    if after:
        fqt.convert(model, recipe)
    torch.manual_seed(1)
    x, g = torch.randn(8, 32), torch.randn(8, 16)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    outputs = [model(inputs[0]), alone(inputs[1])]
    for y in outputs:
        (y * g).sum().backward()
    found = {"output": [y.detach() + 0 for y in outputs], "input": [x.grad for x in inputs]}
    for (name, p), q in zip(model.named_parameters(), alone.parameters(), strict=True):
        found[name] = [whole(p.grad), q.grad]
    found["summary"] = str(fqt.summary(model))
    return found

def refused(act):
    try:
        act()
    except (TypeError, ValueError) as error:
        return str(error)

def refusals():
    learned = fqt.Recipe("learned", fqt.Product(build("lsq", "x"), build("lsq", "w")), *[fqt.Product("float", "saved")] * 2)
    sharded = fully_shard(nn.Sequential(nn.Linear(6, 6)), mesh=three)
    fsdp1 = FullyShardedDataParallel(nn.Sequential(nn.Linear(6, 6)), device_id=torch.device("cpu"))
    found = {"fsdp1": refused(lambda: fqt.convert(fsdp1, "int8")), "learned": refused(lambda: fqt.convert(sharded, learned))}
    found["untouched"] = type(sharded[0]).__name__
    found["example"] = refused(lambda: fqt.convert(sharded, "int8", example=torch.randn(2, 6)))
    int8 = fqt.load_recipe("int8").everywhere()
    policy = fqt.precision.build_policy("static", fqt.convert(sharded, int8))
    found["policy"] = refused(lambda: policy.step(1.0))
    conv = fqt.convert(nn.Sequential(nn.Conv2d(3, 4, 3)), int8)
    x = distribute_tensor(torch.randn(1, 3, 8, 8), three, [Replicate()])
    found["conv"] = refused(lambda: conv(x))
    return found

def fsdp1():
    model = fqt.convert(network(), fqt.load_recipe("int8").everywhere())
    model = FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
    model(torch.randn(4, 3, 8, 8)).sum().backward()
    return [row.packed_bytes for row in fqt.summary(model).rows]

found = {"refusals": refusals(), "fsdp1": fsdp1(), "tensor_parallel": [tensor_parallel(False), tensor_parallel(True)]}
found["three"] = fsdp2("fqt_1bit", three, True, True)
if rank < 2:
    found["two"] = [fsdp2("int8", two, False, True), fsdp2("fqt_1bit", two, True, False)]
torch.save(found, f"rank{rank}.pt")
dist.barrier()
dist.destroy_process_group()
"""


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each of the ranks found."""
    folder = tmp_path_factory.mktemp("sharded")
    run_ranks(PROGRAM, 3, folder)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(3)]


def apart(a, b):
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("case", [0, 1])
@pytest.mark.every(2)
def test_two_ranks_of_fsdp2_train_as_ddp_bit_for_bit(ranks, case):
    for rank in ranks[:2]:
        found = rank["two"][case]
        for ddp, fsdp in zip(found["ddp"], found["fsdp"], strict=True):
            assert all(torch.equal(a, b) for a, b in zip(ddp, fsdp, strict=True))


def test_uneven_and_empty_parts_train_as_ddp_to_rounding(ranks):
    assert [rank["three"]["parts"][2:4] for rank in ranks] == [[3, 3], [3, 3], [2, 2]]
    assert [rank["three"]["parts"][-1] for rank in ranks] == [1, 1, 0]
    for rank in ranks:
        found = rank["three"]
        for ddp, fsdp in zip(found["ddp"][0], found["fsdp"][0], strict=True):
            assert torch.allclose(ddp, fsdp, rtol=1e-5, atol=1e-7)


def test_summary_and_revert_see_through_sharding(ranks):
    for found in [ranks[2]["three"], *ranks[0]["two"]]:
        assert found["summary"] == found["ddp_summary"]
        assert found["reverted"] == found["plain"]
        assert found["sharded"].count(True) >= 4, "still sharded"
        assert found["kept"]


def test_summary_of_fsdp1(ranks):
    assert all(rank["fsdp1"] == [8 * 27 + 8 * 4, 10 * 72 + 10 * 4, 2 * 40 + 2 * 4] for rank in ranks)


@pytest.mark.parametrize("after", [0, 1])
def test_tensor_parallel_linears_compute_by_parts(ranks, after):
    for rank in ranks:
        found = rank["tensor_parallel"][after]
        for name in ("output", "input", "up.weight", "up.bias", "down.weight", "down.bias"):
            mine, exact = found[name]
            assert torch.equal(mine, ranks[0]["tensor_parallel"][after][name][0]), name
            assert 0 < apart(mine, exact) < 0.05 or name == "down.bias", name
        assert "QuantLinear  int8/sample x int8/channel" in found["summary"]


def test_what_cannot_be_is_refused_by_name(ranks):
    for rank in ranks:
        found = rank["refusals"]
        assert found["fsdp1"] == (
            "a FullyShardedDataParallel model holds parts of its weights: convert the model, then wrap it"
        )
        assert found["learned"] == (
            "layer '0': recipe 'learned' adds the parameters quantizers.output_x.lsq.step, quantizers.output_w.lsq.step, which "
            "fully_shard has not seen, so that no rank would get the others' gradients of them: convert before sharding"
        )
        assert found["untouched"] == "Linear"
        assert found["example"] == (
            "example= is run on a copy, and torch cannot copy a model after fully_shard: convert before sharding"
        )
        assert found["policy"] == (
            "layer '0' is sharded, and a precision policy reads whole weights and gradients: train it with DDP"
        )
        assert found["conv"] == (
            "a low-bit product got a DTensor, R: of tensor parallelism fqt knows linear layers as ColwiseParallel and "
            "RowwiseParallel make them; leave this layer whole"
        )
