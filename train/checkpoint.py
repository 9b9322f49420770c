"""The state of a run, written so that a crash at any moment leaves a whole file, and read without running its code.

A checkpoint is a dict of tensors and plain values (torch.load with weights_only): the model, the optimizer, the
schedule, the precision policy, each rank's random generators and sums, the place in the run, the history and the
configuration. Order of images and augmentation need no state (see data.py), so a resumed run ends with the same weights
as one that never stopped, wherever in an epoch it stopped.

The file is a zip archive, in which a CRC-32 stands beside every record; `load` proves all of them first.
"""

import pickle
import random
import re
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

import fqt
from fqt.files import write_atomically
from train.config import Config
from train.wording import ConfigError, show

FORMAT = 2
NAME, BEST = "last.pt", "best.pt"
"""File names, in a run's folder, of the newest checkpoint and of that with the best accuracy on held-out images."""
FREE = (
    "tracking",
    "checkpoint",
    "output",
    "name",
    "quiet",
    "data.workers",
    "data.check",
    "data.on_error",
    "training.nonfinite",
    "training.nonfinite_limit",
)
"""Configuration that a resumed run may change: it has no influence on the weights."""


def save(path: Path, state: dict[str, Any], *, aside: Path | None = None) -> None:
    """Writes a checkpoint in one step: whoever opens `path` finds the old file or the new one, never a part.

    aside: where the old one goes. Raises OSError where the new one cannot be written; the old file then is as it was.
    """

    def write(file: BinaryIO) -> None:
        try:
            torch.save({"format": FORMAT, **state}, file)
        except RuntimeError as error:  # torch's writer complains on top of what the file said
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise

    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, write, aside=aside)


def save_last(folder: Path, state: dict[str, Any], *, keep: int, previous: int | None) -> None:
    """Writes last.pt. keep: how many of the newest stay. previous: the step of the one there, which becomes step_<step>.pt."""
    save(folder / NAME, state, aside=older(folder, previous) if keep > 1 and previous is not None else None)
    for old in kept(folder)[keep - 1 :]:
        old.unlink(missing_ok=True)


def older(folder: Path, step: int) -> Path:
    """Where the checkpoint after so many steps is kept when a newer one takes its place."""
    return folder / f"step_{step:09}.pt"


def kept(folder: Path) -> list[Path]:
    """The checkpoints before the last one, newest first."""
    return sorted((path for path in folder.glob("step_*.pt") if re.fullmatch(r"step_\d+", path.stem)), reverse=True)


def load(path: Path) -> dict[str, Any]:
    """Reads a checkpoint to the CPU. Raises ConfigError that names the file and what to do about it."""
    prove(path)
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


def find(path: Path) -> tuple[Path | None, list[str]]:
    """The checkpoint that `--resume` means, and what is wrong with the newer ones that cannot be used.

    path: a file, which is taken as it is; a run's folder, or a folder of runs: then the newest checkpoint that is whole.
    The result is None where there is none at all. Raises ConfigError where none is whole.
    """
    if path.is_file():
        return path, []
    runs = [path, *sorted((run for run in path.glob("*/") if run.is_dir()), key=_age, reverse=True)]
    faults: list[str] = []
    for candidate in (file for run in runs for file in (run / NAME, *kept(run), run / BEST) if file.is_file()):
        try:
            prove(candidate)
        except ConfigError as error:
            faults.append(str(error))
        else:
            return candidate, faults
    if faults:
        raise ConfigError(f"--resume {path}: no checkpoint there is whole. {' '.join(faults)}")
    return None, []


def _age(run: Path) -> list[int]:
    """Runs that are named by date and time, in that order: the tenth of a second after the second."""
    return [int(number) for number in re.findall(r"\d+", run.name)]


def prove(path: Path) -> None:
    """Raises ConfigError where the file is not one that `save` wrote, bit for bit."""
    try:
        with zipfile.ZipFile(path) as archive:
            if (record := archive.testzip()) is not None:
                raise zipfile.BadZipFile(f"the checksum of its record {record} is wrong")
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist; check the path.") from None
    except (OSError, EOFError, ValueError, NotImplementedError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        raise _unreadable(path, error) from None


def check(state: dict[str, Any], config: Config, recipe: fqt.Recipe, world: int, path: Path) -> None:
    """Refuses to continue another run than the checkpoint's. Raises ConfigError with every key that differs."""
    if not isinstance(state.get("config"), dict) or not isinstance(state.get("recipe"), dict) or "world" not in state:
        raise ConfigError(f"{path} does not say which configuration wrote it; give another checkpoint.")
    if state["world"] != world:
        raise ConfigError(
            f"{path} was written by {state['world']} processes and this run has {world}: start it with torchrun "
            f"--nproc_per_node={state['world']}."
        )
    then, now = flat(state["config"]), flat(config.model_dump(mode="json"))
    differ = [
        f"{key} was {show(then.get(key))} and is {show(now.get(key))}"
        for key in sorted(then.keys() | now.keys())
        if then.get(key) != now.get(key) and key not in FREE and key.split(".")[0] not in FREE
    ]
    if not differ:  # a recipe's file may have been edited
        then, now = state["recipe"], described(recipe)
        differ = [f"{key} was {then.get(key)} and is {now[key]}" for key in now if then.get(key) != now[key]]
    if differ:
        raise ConfigError(
            f"{path} belongs to another configuration: {'; '.join(differ)}. Resume with the same one, or set "
            "model.weights to that file to start a new run from its weights."
        )


def check_fit(state: dict[str, Any], expected: dict[str, Any], shapes: Sequence[torch.Size], path: Path) -> None:
    """Proves that a checkpoint is built like what this run would write now, before anything is taken from it.

    torch's fused optimizers believe the sizes of their state, and read beyond it where those are wrong. shapes: of the
    optimized parameters. Raises ConfigError with the first thing that is of another kind or size.
    """
    found = misfit(state, {**expected, "history": state.get("history")}, OPEN)
    if found is None and not _are_moments(state["optimizer"]["state"], shapes):
        found = "optimizer.state does not belong to the model's parameters"
    rows = state.get("history")
    if found is None and not (isinstance(rows, list) and all(isinstance(row, dict) and row.keys() == ROW for row in rows)):
        found = "history is no list of epochs"
    if found is not None:
        raise ConfigError(
            f"{path} does not fit this run: {found}. Resume with the model, the optimizer and the program that wrote it, or "
            "set model.weights to that file to start a new run from its weights."
        )


def _are_moments(moments: Any, shapes: Sequence[torch.Size]) -> bool:
    """Whether an optimizer's state has the same entries for all parameters that it knows, each of its parameter's size."""
    if not isinstance(moments, dict) or not all(isinstance(values, dict) for values in moments.values()):
        return False
    if any(type(index) is not int or not 0 <= index < len(shapes) for index in moments):
        return False
    kinds = [{name: type(value) for name, value in values.items()} for values in moments.values()]
    tensors = [
        (value.shape, torch.Size([]) if name == "step" else shapes[index])
        for index, values in moments.items()
        for name, value in values.items()
        if isinstance(value, torch.Tensor)
    ]
    return all(kind == kinds[0] for kind in kinds) and all(shape == wanted for shape, wanted in tensors)


ROW = {"epoch", "loss", "train_accuracy", "images_per_second", "valid_accuracy", "test_accuracy", "seconds"}
"""What the history says of an epoch."""
OPEN = ("format", "config", "recipe", "history", "optimizer.state", "precision", "images", "world")
"""What `misfit` does not compare: other checks are for it, or it grows during a run."""
SUMS = ("epoch_sums", "recent_sums")


def misfit(value: Any, expected: Any, open: Sequence[str], path: str = "") -> str | None:
    """The first place at which a nested value is of another kind, or a tensor of another size, than what is expected there."""
    if path in open:
        return None
    if path.endswith(SUMS):
        plain = isinstance(value, dict) and all(isinstance(number, int | float) for number in value.values())
        return None if plain else f"{path} holds no sums"
    inner = f"{path}." if path else ""
    if isinstance(expected, dict):
        if not isinstance(value, dict):
            return f"{path} is {type(value).__name__} and not a section"
        if missing := [key for key in expected if key not in value and f"{inner}{key}" not in open]:
            return f"{inner}{missing[0]} is missing"
        if extra := [key for key in value if key not in expected and f"{inner}{key}" not in open]:
            return f"{inner}{extra[0]} is not in this run"
        return next(
            filter(None, (misfit(value[key], expected[key], open, f"{inner}{key}") for key in expected if key in value)), None
        )
    if isinstance(expected, list | tuple):
        if not isinstance(value, list | tuple) or len(value) != len(expected):
            return f"{path} is no list of {len(expected)}"
        pairs = enumerate(zip(value, expected, strict=True))
        return next(filter(None, (misfit(*pair, open, f"{inner}{index}") for index, pair in pairs)), None)
    if isinstance(expected, torch.Tensor):
        same = isinstance(value, torch.Tensor) and (value.dtype, value.shape) == (expected.dtype, expected.shape)
        return None if same else f"{path} is no {expected.dtype} of shape {list(expected.shape)}"
    kinds = (int, float) if type(expected) in (int, float) else type(expected)
    option = path.startswith("optimizer.param_groups.") and type(expected) is not float  # decides what else is expected
    if option or isinstance(expected, str) or bool in (type(value), type(expected)):
        return (
            None
            if (type(value), value) == (type(expected), expected)
            else f"{path} is {show(value)}, and {show(expected)} here"
        )
    return None if isinstance(value, kinds) else f"{path} is {show(value)}, and {show(expected)} here"


def described(recipe: fqt.Recipe) -> dict[str, str]:
    """What a recipe says, by field, in a form that a checkpoint can hold and compare."""
    return {
        f"recipe.{field.name}": repr(getattr(recipe, field.name))
        for field in fields(recipe)
        if field.repr and field.name != "name"
    }


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
        raise _unreadable(path, error) from None


def _unreadable(path: Path, error: Exception) -> ConfigError:
    why = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return ConfigError(
        f"{path} cannot be read as a checkpoint ({why}). It is damaged or no checkpoint: delete it and start again, or give "
        "another."
    )


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """A tree of dicts as one dict with dotted names."""
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        leaves.update(flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value})
    return leaves
