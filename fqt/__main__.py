"""`python -m fqt`: see `fqt.cli`."""

from __future__ import annotations

import sys

from fqt.cli import main

if __name__ == "__main__":
    sys.exit(main())
