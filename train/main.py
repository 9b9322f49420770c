"""The command line: `torchrun train/main.py --config fqt_1bit.yaml`, or `python train/main.py ...` for one process."""

import argparse
import os
import sys
from pathlib import Path
from typing import NoReturn

if __name__ == "__main__" and not __package__:  # run as a script: find `train` and `fqt`, not this folder's modules
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from train import config as configuration
from train.wording import ConfigError, TrainingError


def main(arguments: list[str] | None = None) -> int:
    """Runs the program; returns its exit status: 2 for a mistake in what was asked, 1 where training failed."""
    speaks = os.environ.get("RANK", "0") == "0"
    try:
        options = parser().parse_args(arguments)
        config = configuration.load(options.config, options.set)
        from train import loop  # imports torch: after the configuration is known to be right

        if options.dry_run:
            description = loop.dry_run(config)
            if speaks:
                print(description)
        else:
            newest = f"{config.output}/{config.name}"
            loop.run(config, resume=Path(newest if options.resume is True else options.resume) if options.resume else None)
        return 0
    except ConfigError as error:
        message, status = str(error), 2
    except TrainingError as error:
        message, status = str(error), 1
    except KeyboardInterrupt:
        message, status = "stopped; with checkpoints on, --resume continues after the last whole epoch.", 130
    if speaks:
        print(f"train: {message}", file=sys.stderr)
    return status


class Parser(argparse.ArgumentParser):
    """Complains like the rest of the program."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; --help explains the options (keys of the configuration are set by --set key=value).")


def parser() -> argparse.ArgumentParser:
    """The options, and a help text that explains the configuration."""
    about = "Trains a classifier in low-bit arithmetic, forward and backward."
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
        const=True,
        metavar="PATH",
        help="continues a run: PATH, or the newest of this configuration",
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
            section("models (model.name)", list(configuration.MODELS.items())),
            section("data sets (data.name)", list(configuration.DATASETS.items())),
            section("precision policies (precision.policy)", list(configuration.POLICIES.items())),
            f"recipes (recipe):\n  {', '.join(configuration.recipe_names())}, or the path of a YAML file",
            "example:\n  torchrun train/main.py --config fqt_1bit.yaml --set optimizer.lr=0.003 --set data.limit=6000",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
