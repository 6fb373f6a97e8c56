"""The `ndif-actor-bench` command, which lives beside the packages: in a checkout of the source.

A package with so common a name as `bench` is not installed into other people's environments.
"""

from __future__ import annotations

import importlib
import sys

#: As of any command whose arguments can't be followed.
_USAGE = 2


def main() -> None:
    """Run the command and exit with its status."""
    try:
        cli = importlib.import_module("bench.load.cli")
    except ModuleNotFoundError as error:
        if error.name is None or not error.name.startswith("bench"):
            raise
        print(
            "ndif-actor-bench: the benchmarks are part of the source, not of the installed "
            "packages: in a checkout, pip install -e '.[bench]'",
            file=sys.stderr,
        )
        sys.exit(_USAGE)
    cli.main()
