"""Programs of several ranks, without torchrun."""

from __future__ import annotations

import socket
from pathlib import Path

from benchmarks import warm


def end_of_ranks(program: str, world: int, folder: Path) -> list[tuple[int | None, str]]:
    """Run a program's text in `world` processes as torchrun would, in a folder; return the exit status
    and the output of each."""
    (folder / "program.py").write_text(program)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "OMP_NUM_THREADS": "1"}
    place |= {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
    said = [folder / f"rank{rank}.txt" for rank in range(world)]
    ranks = [
        warm.start(
            folder / "program.py",
            folder=folder,
            out=said[rank],
            err=said[rank],
            environment={**place, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(world)
    ]
    for rank in ranks:
        rank.join(300)
        rank.kill()
        rank.join()
    return [(rank.exitcode, file.read_text()) for rank, file in zip(ranks, said, strict=True)]


def run_ranks(program: str, world: int, folder: Path) -> str:
    """`end_of_ranks` of ranks that succeed: what they printed, one after another.

    Raises:
        AssertionError: A rank failed; with what all of them printed.
    """
    ends = end_of_ranks(program, world, folder)
    printed = "\n".join(text for _, text in ends)
    assert [status for status, _ in ends] == [0] * world, printed
    return printed
