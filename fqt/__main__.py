"""`python -m fqt doctor`: what works on this machine. Exit status 1 when something is broken, else 0."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from fqt.inspect.doctor import examine


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the screen; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m fqt", description=__doc__)
    parser.add_argument("command", choices=["doctor"], help="doctor: what works here, what does not, why, and the remedy")
    parser.parse_args(arguments)
    findings = examine()
    print(*findings, sep="\n")
    return int(any(finding.state == "broken" for finding in findings))


if __name__ == "__main__":
    sys.exit(main())
