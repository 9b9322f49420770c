"""Two gloo processes: what the ranks share, what is each rank's own, and which of them speaks."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from tests.ranks import run_ranks
from tests.train.helpers import assert_same

DIGITS = ["data.name=digits", "data.limit=256", "data.batch_size=64", "device=cpu", "training.epochs=1"]
TRAINED = [*DIGITS, "training.accumulate=2", "tracking.baseline_steps=1", "tracking.every=1"]
DECIDED = [*DIGITS, "model.name=lenet5", "precision.lookback=[1, 2]", "precision.initializer=tnvs"]
DECIDED += ["tracking.enabled=false", "quiet=true"]
PROGRAM = f"""
import torch
import fqt
from fqt.quantizers import build
from train import checkpoint, config, loop, ranks, stop
from train.wording import TrainingError

PRODUCTS = ("output", "grad_input", "grad_weight")

def trained(place):
    trainer = loop.Trainer(config.load("fqt_1bit", {TRAINED!r}), place)
    result = trainer.train()
    images = [y.tolist() for part in trainer.feed.batches(0) for _, y in part]
    return {{"model": trainer.model.state_dict(), "noise": torch.rand(4), "accuracy": result.test,
            "folder": str(result.folder), "chunks": trainer.feed.chunks(0), "history": [row["loss"] for row in result.history]}}

def decided(place):
    trainer = loop.Trainer(config.load("adapt_int8", {DECIDED!r}), place)
    log = []
    decide = trainer.policy.step
    def step(loss, *, epoch=0.0):
        decisions = decide(loss, epoch=epoch)
        log.append([loss, [decision.row() for decision in decisions]])
        return decisions
    trainer.policy.step = step
    trainer.train()
    return {{"log": log, "policy": trainer.policy.state_dict(), "model": trainer.model.state_dict()}}

def staged(place):
    # each rank's batch is of another size, so that whatever the ranks do not share shows
    model = torch.nn.Sequential(torch.nn.Linear(12, 8), torch.nn.Linear(8, 4))
    x = build("uniform", "x", calibrate="moving_average")
    saved = fqt.Product("float", "saved")
    averaged = fqt.Recipe("averaged", fqt.Product(x, build("uniform", "w")), saved, saved)
    learned = fqt.Recipe("learned", fqt.Product(build("lsq", "x"), build("lsq", "w")), saved, saved)
    fqt.convert(model, fqt.Recipe("both", *[getattr(averaged, p) for p in PRODUCTS], rules=(fqt.Rule("1", learned),)))
    replicas = torch.nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        replicas((1 + place.rank) * torch.randn(16, 12)).square().mean().backward()
        optimizer.step()
    return model.state_dict()

def agreed(place):
    def fail():
        raise TrainingError(f"rank {{place.rank}} failed")

    found = {{"value": place.from_main(lambda: place.rank + 40), "any": place.any(place.rank == 1, False)}}
    found["all"] = [place.all(place.rank == 0), place.all(True)]
    try:
        place.from_main(fail)
    except TrainingError as error:
        found["error"] = str(error)
    asked = stop.Stop()
    asked.number = 15 if place.rank == 1 else None
    try:
        loop.Trainer(config.load("fp32", [*{DIGITS!r}, "quiet=true", "name=stopped"]), place, stop=asked).train()
    except stop.Stopped as end:
        found["stopped"] = str(end)
    return found

ENGINES = {{
    "ddp": [],
    "fsdp2": ["distributed.engine=fsdp2"],
    "bits": ["distributed.gradient_bits=4", "distributed.error_feedback=true", "training.clip_norm=1.0"],
}}

def untimed(state):
    ranks = [{{key: rank[key] for key in ("generators", "parallel")}} for rank in state["ranks"]]
    return {{**{{key: state[key] for key in ("model", "optimizer", "schedule")}}, "ranks": ranks}}

def engines(place):
    # each trained through, and again from the checkpoint that is tried after the first step
    found = {{}}
    for name, keys in ENGINES.items():
        keys = [*{DIGITS!r}, "training.accumulate=2", "model.name=mlp_small", "tracking.enabled=false", "quiet=true", *keys]
        wanted = config.load("int8", [*keys, f"name={{name}}"])
        result = loop.Trainer(wanted, place).train()
        through = checkpoint.load(result.folder / checkpoint.NAME)
        place.any(False)  # The ranks wait for each other: the resumed run overwrites the checkpoint that they have just read.
        resumed = loop.Trainer(wanted, place, result.folder / "step_000000001.pt")
        began = resumed.done.steps
        resumed.train()
        again = checkpoint.load(result.folder / checkpoint.NAME)
        found[name] = {{"through": untimed(through), "again": untimed(again), "began": began,
                        "sent": resumed.parallel.scalars()}}
    return found

def drifted(place):
    keys = [*{DIGITS!r}, "model.name=mlp_small", "tracking.enabled=false", "quiet=true", "distributed.compare_every=2"]
    trainer = loop.Trainer(config.load("int8", [*keys, "name=drifted"]), place)
    step = trainer.step
    def drifting(*args, **named):
        outcome = step(*args, **named)
        if trainer.done.steps == 1:
            with torch.no_grad():
                trainer.model[4].weight[3, 5] += 1e-6 * place.rank
        return outcome
    trainer.step = drifting
    drifting.optimizer = step.optimizer
    try:
        trainer.train()
    except TrainingError as error:
        return str(error)

with ranks.join("cpu") as place:
    parts = (trained(place), decided(place), staged(place), agreed(place), engines(place), drifted(place))
    torch.save(parts, f"rank{{place.rank}}.pt")
"""


@dataclass(frozen=True)
class TwoRanks:
    """What each rank ended with: of a plain run, of one with a precision policy, of layers with a learned step and a running
    range; what they agreed on; runs of each engine, through and resumed; why a run ended whose weights drifted apart; what they
    printed, where they ran."""

    trained: list[dict]
    decided: list[dict]
    staged: list[dict]
    agreed: list[dict]
    engines: list[dict]
    drifted: list[str]
    printed: str
    folder: Path


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """All runs in one pair of processes."""
    folder = tmp_path_factory.mktemp("ranks")
    printed = run_ranks(PROGRAM, 2, folder)
    saved = [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(2)]
    return TwoRanks(*map(list, zip(*saved, strict=True)), printed, folder)


def test_ranks_end_with_equal_models(two_ranks):
    first, second = two_ranks.trained
    assert first["model"].keys() == second["model"].keys()
    assert all(torch.equal(value, second["model"][name]) for name, value in first["model"].items())


def test_learned_steps_and_running_ranges_are_equal_on_all_ranks(two_ranks):
    first, second = two_ranks.staged
    names = [name for name in first if "quantizers" in name]
    assert names == [
        "0.quantizers.output_x.moving_average.average",
        "1.quantizers.output_x.lsq.step",
        "1.quantizers.output_w.lsq.step",
    ]
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert all(first[name].item() > 0 for name in names)


def test_ranks_draw_different_noise_and_images(two_ranks):
    first, second = two_ranks.trained
    assert not torch.equal(first["noise"], second["noise"])
    seen = [index for rank in (first, second) for chunk in rank["chunks"] for index in chunk]
    assert sorted(seen) == list(range(256))
    assert [len(chunk) for chunk in first["chunks"]] == [32] * 4


def test_ranks_agree_on_the_result(two_ranks):
    first, second = two_ranks.trained
    assert first["accuracy"] == second["accuracy"]
    assert first["history"] == second["history"]
    assert first["accuracy"] * 297 == pytest.approx(round(first["accuracy"] * 297))


def test_one_rank_speaks_and_writes(two_ranks):
    first, second = two_ranks.trained
    printed, folder = two_ranks.printed, two_ranks.folder
    assert printed.count("test accuracy") == 1
    assert "2 processes" in printed
    assert first["folder"] == second["folder"]
    assert len(list(folder.glob("runs/fqt_1bit/*/events*"))) == 2, "one of the curves, one of the hyperparameters"
    state = torch.load(next(folder.glob("runs/fqt_1bit/*/last.pt")), weights_only=True)
    assert len(state["ranks"]) == state["world"] == 2


def test_ranks_decide_alike(two_ranks):
    first, second = two_ranks.decided
    decided = [[rows for _, rows in rank["log"]] for rank in (first, second)]
    assert decided[0] == decided[1] and sum(map(len, decided[0])) >= 10
    assert [loss for loss, _ in first["log"]] != [loss for loss, _ in second["log"]], "each rank has images of its own"
    assert_same(first["policy"], second["policy"])
    assert_same(first["model"], second["model"])


def test_what_one_rank_knows_all_know(two_ranks):
    first, second = two_ranks.agreed
    assert first == second
    assert (first["value"], first["any"], first["all"], first["error"]) == (40, [True, False], [False, True], "rank 0 failed")


def test_a_signal_to_one_rank_stops_all_with_one_checkpoint(two_ranks):
    (said,) = {rank["stopped"] for rank in two_ranks.agreed}
    assert said.startswith("stopped by SIGTERM after step 1 of 4; the same command with --resume runs/stopped/")
    (run,) = (two_ranks.folder / "runs" / "stopped").iterdir()
    assert torch.load(run / "last.pt", weights_only=True)["position"] == 1


@pytest.mark.parametrize("engine", ["ddp", "fsdp2", "bits"])
def test_a_resumed_run_of_each_engine_ends_like_one_that_never_stopped(two_ranks, engine):
    for rank in two_ranks.engines:
        found = rank[engine]
        assert found["began"] == 1
        assert_same(found["through"], found["again"])


def test_fsdp2_ends_like_ddp(two_ranks):
    """With the same whole tensors in its checkpoint, but for how the fused Adam rounds the last elements of a tensor."""
    ddp, fsdp2 = (two_ranks.engines[0][engine]["through"] for engine in ("ddp", "fsdp2"))
    assert ddp["model"].keys() == fsdp2["model"].keys()
    assert all(torch.allclose(value, fsdp2["model"][name], rtol=1e-5) for name, value in ddp["model"].items())
    for index, moments in ddp["optimizer"]["state"].items():
        found = fsdp2["optimizer"]["state"][index]
        assert all(torch.allclose(value, found[name], rtol=1e-4, atol=1e-12) for name, value in moments.items())


def test_gradients_in_few_bits_send_less_and_keep_their_residual(two_ranks):
    first, second = (rank["bits"] for rank in two_ranks.engines)
    assert 7 < first["sent"]["distributed/times_fewer"] < 8
    lost = [state["parallel"]["residuals"] for state in first["through"]["ranks"]]
    assert lost[0].keys() == lost[1].keys() and all(float(part.abs().sum()) > 0 for rank in lost for part in rank.values())
    assert not torch.equal(lost[0][0], lost[1][0]), "each rank has its own"
    assert_same(first["through"]["model"], second["through"]["model"])


def test_weights_that_drift_apart_end_the_run_with_their_name(two_ranks):
    (said,) = set(two_ranks.drifted)
    assert said.startswith(
        "The processes' weights are not the same any more after step 2: 4.weight on rank 1 differs from rank 0's. runs/drifted/"
    )
    assert said.endswith("last.pt holds the state after step 1.")
