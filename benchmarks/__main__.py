"""`python -m benchmarks`: every table with its ratios and targets; exit 1 when a target is missed."""

from __future__ import annotations

import argparse
import importlib
import sys

import torch

from benchmarks.bench import output, save

# In this order: from `bank` on the process keeps freed memory, which helps whole matrices and other loaders as well.
TABLES = (
    *("pairwise", "data", "look", "doctor", "bank", "step"),
    *("startup", "evaluation", "predict"),
)
# Only where it is asked for: it needs data sets that are not part of the project, and hours.
LONG = ("photos",)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks")
    parser.add_argument("tables", nargs="*", metavar="TABLE", help=f"of {', '.join(TABLES + LONG)}")
    parser.add_argument("--json", type=output, help="also write the numbers here")
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    unknown = sorted(set(given.tables) - {*TABLES, *LONG})
    if unknown:
        parser.error(f"no table {', '.join(unknown)}; there are {', '.join(TABLES + LONG)}")
    torch.set_num_threads(given.threads)
    tables = []
    for name in sorted(set(given.tables) or TABLES, key=(TABLES + LONG).index):
        tables.append(importlib.import_module(f"benchmarks.{name}").table())
        print(tables[-1].show(), flush=True)
    if given.json:
        save(tables, given.json)
    missed = [row.what for table in tables for row in table.rows if row.missed]
    if missed:
        print(f"\nmissed: {'; '.join(missed)}")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
