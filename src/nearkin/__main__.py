"""`nearkin` and `python -m nearkin`."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line and exit with its code."""
    from nearkin.cli import run
    from nearkin.cli.streams import prepare_streams

    prepare_streams()
    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
