"""The quantized all-reduce: its codes alone, and three gloo ranks."""

import pytest
import torch

from fqt.distributed import payload_bytes, quantized_allreduce_hook
from tests.ranks import run_ranks

PROGRAM = """
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from fqt.distributed import quantized_allreduce_hook

dist.init_process_group("gloo")
rank, world = dist.get_rank(), dist.get_world_size()
torch.manual_seed(100 + rank)
found = {}
mine = torch.randn(5001)
every = [torch.empty_like(mine) for _ in range(world)]
dist.all_gather(every, mine)
found["exact"] = torch.stack(every).mean(0)
for bits in (1, 2, 4, 8):
    hook = quantized_allreduce_hook(bits, block=256)
    found[bits] = [hook.mean(mine, 0) for _ in range(12)]
    found[bits, "bytes"] = (hook.bytes_sent, hook.bytes_float, hook.calls)
hook = quantized_allreduce_hook(1, block=256, error_feedback=True)
found["feedback"] = torch.stack([hook.mean(mine, 0) for _ in range(30)]).mean(0)
again = quantized_allreduce_hook(1, block=256, error_feedback=True)
again.load_state_dict(hook.state_dict())
found["resumed"] = [torch.equal(hook.mean(mine, 0), again.mean(mine, 0))]
bad = mine.clone()
bad[7] = float("nan") if rank == world - 1 else 0.0
found["nan"] = quantized_allreduce_hook(4, block=256).mean(bad, 0)

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.unused = nn.Linear(64, 10), nn.Linear(64, 10)

    def forward(self, x):
        return self.used(x)

torch.manual_seed(0)
net = Net()
ddp = DistributedDataParallel(net, find_unused_parameters=True)
hook = quantized_allreduce_hook(4)
ddp.register_comm_hook(None, hook)
optimizer = torch.optim.SGD(net.parameters(), lr=0.3)
generator, labels = torch.Generator().manual_seed(rank), torch.arange(32) % 10
centres = 2 * torch.randn(10, 64, generator=torch.Generator().manual_seed(7))
losses = []
for step in range(20):
    with ddp.no_sync():
        nn.functional.cross_entropy(ddp(centres[labels] + torch.randn(32, 64, generator=generator)), labels).backward()
    loss = nn.functional.cross_entropy(ddp(centres[labels] + torch.randn(32, 64, generator=generator)), labels)
    loss.backward()
    nn.utils.clip_grad_norm_(net.parameters(), 5.0)
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
found["weights"], found["losses"], found["sent"] = net.state_dict(), losses, hook.bytes_sent
torch.save(found, f"rank{rank}.pt")
dist.destroy_process_group()
"""


@pytest.fixture(scope="module", params=[3])
def ranks(request, tmp_path_factory):
    """What each of three ranks found."""
    folder = tmp_path_factory.mktemp("ranks")
    run_ranks(PROGRAM, request.param, folder)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(request.param)]


@pytest.mark.parametrize(("bits", "wanted"), [(1, 0.75), (2, 0.19), (4, 0.02), (8, 1e-3)])
def test_all_ranks_get_the_same_mean_near_the_exact_one(ranks, bits, wanted):
    exact = ranks[0]["exact"]
    for index in range(12):
        means = [rank[bits][index] for rank in ranks]
        assert all(torch.equal(mean, means[0]) for mean in means)
        # the error of each rank's part shrinks with their number; that of the mean, encoded once more, is added
        error = ((means[0] - exact).square().sum() / exact.square().sum()).item()
        assert error < 2.5 * wanted
    average = torch.stack(ranks[0][bits]).mean(0)
    assert (average - exact).square().sum() / exact.square().sum() < 2.5 * wanted / 8, "12 draws average out"


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_bytes_on_the_wire_are_those_of_the_formula(ranks, bits):
    world, blocks = len(ranks), -(-5001 // (len(ranks) * 256))
    sent, float_bytes, calls = ranks[0][bits, "bytes"]
    assert calls == 12
    assert sent == 12 * 2 * (world - 1) * payload_bytes(blocks * 256, bits, 256)
    assert float_bytes == 12 * (2 * (world - 1) * 4 * 5001 // world)
    codes_only = sent * bits / (bits + 64 / 256)
    assert float_bytes / codes_only == pytest.approx(32 / bits, rel=0.08), "but for scales and the last block"


def test_error_feedback_and_its_state(ranks):
    exact, fed = ranks[0]["exact"], ranks[0]["feedback"]
    alone = torch.stack(ranks[0][1]).mean(0)
    assert (fed - exact).square().sum() < (alone - exact).square().sum()
    assert all(rank["resumed"] == [True] for rank in ranks)


def test_what_is_not_finite_is_so_on_all_ranks(ranks):
    assert all(rank["nan"].isnan().any() for rank in ranks)
    assert all(torch.equal(rank["nan"].isnan(), ranks[0]["nan"].isnan()) for rank in ranks)


def test_ddp_learns_with_accumulation_clipping_and_unused_parameters(ranks):
    first = ranks[0]
    assert all(torch.equal(value, rank["weights"][name]) for rank in ranks for name, value in first["weights"].items())
    assert sum(first["losses"][-5:]) < 0.3 * sum(first["losses"][:5])
    assert first["sent"] > 0


@pytest.mark.every(2)
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("rotate", [False, True])
def test_the_codes_are_unbiased(bits, rotate):
    """The mean of 400 draws of 32 blocks of normal values. Its error, over that of one draw by 400, is a mean of squares of
    about 8,000 independent normal numbers: 1 with a deviation of 0.02; 6 deviations, so a false alarm in 1e9."""
    torch.manual_seed(1)
    x, hook, draws = torch.randn(32, 256), quantized_allreduce_hook(bits, block=256, rotate=rotate), []
    for hook.calls in range(400):
        signs = hook._signs(256, 0, x)
        draws.append(hook.decode(hook.encode(x, signs), 256, signs))
    values = torch.stack(draws).double()
    noise = (values - x).square().sum((1, 2)).mean()
    assert ((values.mean(0) - x).square().sum() * 400 / noise).item() < 1.12


@pytest.mark.parametrize("bits", [1, 2, 4])
@pytest.mark.parametrize("draw", ["normal", "heavy", "sparse"])
def test_the_rotated_code_errs_less(bits, draw):
    torch.manual_seed(2)
    x = torch.randn(64, 1024)
    x = {"normal": x, "heavy": x / torch.rand(64, 1024), "sparse": x * (torch.rand(64, 1024) < 0.05)}[draw]
    errors = []
    for rotate in (False, True):
        hook = quantized_allreduce_hook(bits, rotate=rotate)
        signs = hook._signs(1024, 0, x)
        errors.append((hook.decode(hook.encode(x, signs), 1024, signs) - x).square().sum().item())
    assert errors[1] < 0.5 * errors[0]


def test_zeros_stay_zero():
    for bits in (1, 2, 4, 8):
        hook = quantized_allreduce_hook(bits)
        x = torch.zeros(2, 1024)
        signs = hook._signs(1024, 0, x)
        assert torch.equal(hook.decode(hook.encode(x, signs), 1024, signs), x)


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({"bits": 3}, "bits is 3: a gradient travels in 1, 2, 4 or 8"),
        ({"bits": 4, "block": 100}, "block is 100, not a power of two"),
    ],
)
def test_mistakes(options, wanted):
    with pytest.raises(ValueError, match=wanted):
        quantized_allreduce_hook(**options)
