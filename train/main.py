"""The command line: `torchrun train/main.py --config fqt_1bit.yaml`, or `python train/main.py ...` for one process."""

import argparse
import os
import signal
import sys
from pathlib import Path
from typing import Any, NoReturn

if __name__ == "__main__" and not __package__:  # run as a script: find `train` and `fqt`, not this folder's modules
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from train import catalogue, faults
from train import config as configuration
from train.sections import home
from train.stop import Interrupted, Stop, Stopped
from train.wording import ConfigError, RankError, TrainingError


def main(arguments: list[str] | None = None) -> int:
    """Runs the program; returns its exit status.

    0: done, or stopped by a signal with a checkpoint to go on from. 1: the training failed. 2: a mistake in what was asked.
    130 (SIGINT), 143 (SIGTERM), 129 (SIGHUP): stopped by that signal, and nothing was kept.
    """
    stop = Stop()
    with stop.listening():
        return _told(arguments, stop)


def _told(arguments: list[str] | None, stop: Stop) -> int:
    """Runs the program, and prints how it ended where that is not the end of the training."""
    speaks = os.environ.get("RANK", "0") == "0"
    try:
        _run(parser().parse_args(arguments), stop, speaks)
        return 0
    except ConfigError as error:
        message, status = str(error), 2
    except TrainingError as error:
        message, status = str(error), 1
        speaks |= isinstance(error, RankError)
    except Stopped as end:
        message, status = str(end), end.status
    except KeyboardInterrupt as end:
        status = end.status if isinstance(end, Interrupted) else 130
        message = f"ended by {signal.Signals(status - 128).name}; --resume continues from a checkpoint, if there is one."
    if speaks:
        print(f"train: {message}", file=sys.stderr)
    return status


def _run(options: argparse.Namespace, stop: Stop, speaks: bool) -> None:
    config = configuration.load(options.config, options.set)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:  # else DDP's C++ part warns on each rank of what train/parallel.py wants
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    from train import loop  # imports torch: after the configuration is known to be right

    if options.dry_run:
        description = loop.dry_run(config)
        if speaks:
            faults.print_on(description)
        return
    newest, resume = f"{config.output}/{config.name}", options.resume
    if resume is not None:
        resume = Path(newest if resume in (NEWEST, AUTO) else home("--resume", resume))
    loop.run(config, resume=resume, anew=options.resume == AUTO, stop=stop)


NEWEST, AUTO = "newest", "auto"


class Parser(argparse.ArgumentParser):
    """Complains like the rest of the program."""

    def print_help(self, file: Any = None) -> None:
        faults.print_on(self.format_help().rstrip())

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; --help explains the options (keys of the configuration are set by --set key=value).")


def parser() -> argparse.ArgumentParser:
    """The options, and a help text that explains the configuration."""
    about = "Trains a classifier of images or texts, or a language model, in low-bit arithmetic, forward and backward."
    made = Parser(
        "train",
        description=about,
        epilog=_epilog(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    made.add_argument("--config", required=True, metavar="FILE", help="a YAML file; a bare name is looked up in configs/")
    made.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="overrides a key; may be repeated")
    made.add_argument(
        "--resume",
        nargs="?",
        const=NEWEST,
        metavar="PATH",
        help="continues a run from its newest whole checkpoint: PATH (a run's folder, or one checkpoint), or the newest run of "
        "this configuration; auto: that one too, or a new run where there is none",
    )
    made.add_argument("--dry-run", action="store_true", help="prints the whole configuration and the model, and stops")
    return made


def _epilog() -> str:
    def section(title: str, rows: list[tuple[str, str]]) -> str:
        width = max(len(name) for name, _ in rows)
        return "\n".join([f"{title}:", *(f"  {name:{width}}  {text}" for name, text in rows)])

    files = [
        (path.stem, path.read_text(encoding="utf-8").splitlines()[0].lstrip("# "))
        for path in sorted(configuration.CONFIGS.glob("*.yaml"))
    ]
    keys = [(path, f"{text} [{default}]") for path, default, text in configuration.key_table()]
    return "\n\n".join(
        [
            section("configurations (--config)", files),
            section("keys (--set), with their default", keys),
            section("tasks (task)", list(catalogue.TASKS.items())),
            section("models (model.name)", list(catalogue.MODELS.items())),
            section("data sets (data.name)", list(catalogue.DATASETS.items())),
            section("precision policies (precision.policy)", list(catalogue.POLICIES.items())),
            f"recipes (recipe):\n  {', '.join(catalogue.recipe_names())}, or the path of a YAML file",
            "example:\n  torchrun train/main.py --config fqt_1bit.yaml --set optimizer.lr=0.003 --set data.limit=6000",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
