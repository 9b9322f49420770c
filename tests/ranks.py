"""Programs in processes of their own that do not import torch each time: a fork server has it already."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import runpy
import socket
import traceback
from pathlib import Path

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["torch._dynamo", "torch.distributed.fsdp", "torch.distributed.tensor.parallel", "train.loop"])


def _rank(program: Path, rank: int, world: int, port: int) -> None:
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()}, MASTER_ADDR="127.0.0.1", OMP_NUM_THREADS="1")
    os.chdir(program.parent)
    import torch

    torch.set_num_threads(1)
    with open(f"rank{rank}.txt", "w", buffering=1) as said, contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            runpy.run_path(str(program), run_name="__main__")
        except Exception:
            traceback.print_exc()
            raise


def run_ranks(program: str, world: int, folder: Path) -> str:
    """Run a program's text in `world` processes as torchrun would, in a folder; return what they printed, rank by rank.

    Raises:
        AssertionError: A rank failed; with what all of them printed.
    """
    (folder / "program.py").write_text(program)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = [SERVER.Process(target=_rank, args=(folder / "program.py", rank, world, port)) for rank in range(world)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(300)
        rank.kill()
    printed = "\n".join(place.read_text() for place in sorted(folder.glob("rank*.txt")))
    assert [rank.exitcode for rank in ranks] == [0] * world, printed
    return printed
