"""Programs in processes of their own that do not import torch each: all are forked from a server that has imported it.

To import torch, its optimizers and the training program takes longer than what many of them do then.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import runpy
import sys
from collections.abc import Mapping, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from subprocess import CompletedProcess

import torch

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(
    [
        "torch._dynamo",
        "torch.distributed.fsdp",
        "torch.distributed.tensor.parallel",
        "torch.utils.tensorboard",
        "sklearn.datasets",
        "train.loop",
    ]
)


def _main(file: Path, arguments: Sequence[str], folder: Path, out: Path, err: Path, environment: Mapping[str, str]) -> None:
    os.environ.update(environment)
    os.chdir(folder)
    for path, stream in ((out, sys.stdout), (err, sys.stderr)):
        opened = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(opened, stream.fileno())
        os.close(opened)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
    sys.argv = [str(file), *arguments]
    runpy.run_path(str(file), run_name="__main__")


def start(
    file: Path, *arguments: str, folder: Path, out: Path, err: Path, environment: Mapping[str, str] | None = None
) -> BaseProcess:
    """Start a Python file as the main program.

    Args:
        file, arguments: The program, and what `sys.argv` has behind it.
        folder: Where it runs.
        out, err: Files to which its standard output and error are appended; also a named pipe.
        environment: Variables to add to the server's, which are those of this process's first start. Its OMP_NUM_THREADS is the
            number of torch's threads.
    """
    process = SERVER.Process(target=_main, args=(file, arguments, folder, out, err, dict(environment or {})))
    process.start()
    # A caller that fails leaves the process behind, and at its exit multiprocessing would wait for the process to end.
    atexit.register(process.kill)
    return process


def run(
    file: Path, *arguments: str, folder: Path, timeout: float = 300.0, environment: Mapping[str, str] | None = None
) -> CompletedProcess[str]:
    """`start`, and wait for its end, `timeout` seconds at most. What it printed is kept in out.txt and err.txt of `folder`."""
    out, err = folder / "out.txt", folder / "err.txt"
    process = start(file, *arguments, folder=folder, out=out, err=err, environment=environment)
    process.join(timeout)
    process.kill()
    process.join()
    assert process.exitcode is not None
    return CompletedProcess([str(file), *arguments], process.exitcode, out.read_text(), err.read_text())
