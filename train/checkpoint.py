"""The state of a run, written so that a crash at any moment leaves a whole file, and read without running its code.

A checkpoint is a dict of tensors and plain values (torch.load with weights_only): the model, the optimizer, the
schedule, the precision policy, every rank's random generators, the epochs done, their history and the configuration.
Order of images and augmentation need no state (see data.py), so a resumed run ends with the same weights as one that
never stopped.
"""

import os
import pickle
import random
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from train.config import Config
from train.wording import ConfigError, show

FORMAT = 1
NAME = "last.pt"
"""File name of the checkpoint in a run's folder."""
FREE = ("tracking", "checkpoint", "output", "name", "quiet")
"""Configuration that a resumed run may change: it has no influence on the weights."""


def save(path: Path, state: dict[str, Any]) -> None:
    """Writes a checkpoint in one step: whoever opens `path` finds the old file or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            torch.save({"format": FORMAT, **state}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def load(path: Path) -> dict[str, Any]:
    """Reads a checkpoint to the CPU. Raises ConfigError that names the file and what to do about it."""
    state = _read(path)
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        found = state.get("format") if isinstance(state, dict) else type(state).__name__
        raise ConfigError(
            f"{path} is no checkpoint of this version of the program (format {found}, not {FORMAT}). To start from "
            "weights alone, set model.weights to it."
        )
    return state


def load_weights(path: Path) -> dict[str, torch.Tensor]:
    """The model's state dict in a checkpoint of ours, or in a file that holds a state dict or `state_dict`.

    A leading `module.` in every name, which DataParallel leaves behind, is dropped. Raises ConfigError.
    """
    state = _read(path)
    for key in ("model", "state_dict"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not state or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise ConfigError(f"model.weights = {show(str(path))}: it should hold a state dict: names and tensors.")
    return {name.removeprefix("module."): value for name, value in state.items()}


def find(path: Path) -> Path:
    """The checkpoint that `--resume` means: a file, a run's folder, or the newest run in a folder of runs."""
    if path.is_file():
        return path
    found = [path / "last.pt"] if (path / NAME).is_file() else sorted(path.glob(f"*/{NAME}"))
    if not found:
        raise ConfigError(f"--resume {path}: there is no {NAME}; give the path of a checkpoint or of a run's folder.")
    return found[-1]


def check(state: dict[str, Any], config: Config, world: int, path: Path) -> None:
    """Refuses to continue another run than the checkpoint's. Raises ConfigError with every key that differs."""
    if state["world"] != world:
        raise ConfigError(
            f"{path} was written by {state['world']} processes and this run has {world}: start it with torchrun "
            f"--nproc_per_node={state['world']}."
        )
    then, now = flat(state["config"]), flat(config.model_dump(mode="json"))
    differ = [
        f"{key} was {show(then.get(key))} and is {show(now.get(key))}"
        for key in sorted(then.keys() | now.keys())
        if then.get(key) != now.get(key) and key.split(".")[0] not in FREE
    ]
    if differ:
        raise ConfigError(
            f"{path} belongs to another configuration: {'; '.join(differ)}. Resume with the same one, or set "
            "model.weights to that file to start a new run from its weights."
        )


def generators() -> dict[str, Any]:
    """State of this process's random generators: torch on the CPU and the GPU, Python's and numpy's."""
    kind, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)  # noqa: NPY002 (what libraries draw from)
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "python": random.getstate(),
        "numpy": (kind, [int(key) for key in keys], int(position), int(has_gauss), float(gauss)),
    }


def restore_generators(state: dict[str, Any]) -> None:
    """Puts back what `generators` took."""
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])  # noqa: NPY002


def _read(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist; check the path.") from None
    except (OSError, EOFError, RuntimeError, ValueError, KeyError, pickle.UnpicklingError) as error:
        why = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigError(
            f"{path} cannot be read as a checkpoint ({why}). It is damaged or no checkpoint: delete it and start "
            "again, or give another."
        ) from None


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """A tree of dicts as one dict with dotted names."""
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        leaves.update(flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value})
    return leaves


def _sync_folder(folder: Path) -> None:
    """Makes the renaming itself survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
