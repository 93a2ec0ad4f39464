"""What the command line costs before it does anything: milliseconds over a bare interpreter.

    python benchmarks/cold_start.py [--rounds 15]

Runs are interleaved (one of each per round), so that a busy machine slows all of them alike; medians are compared.
Every row must stay under its limit and must not have loaded torch; the exit status says so.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

BARE = "pass"
IMPORT_LIMIT, HELP_LIMIT = 0.15, 0.3  # seconds over a bare interpreter
# Leaves with status 3 when torch was loaded, whatever the code before it did.
GUARD = "import sys; sys.exit(3 if 'torch' in sys.modules else 0)"


@dataclass(frozen=True)
class Row:
    name: str
    seconds: float  # median
    over: float  # median of the differences from the bare interpreter of the same round
    limit: float | None
    loads_torch: bool

    @property
    def ok(self) -> bool:
        return not self.loads_torch and (self.limit is None or self.over <= self.limit)


def subcommands() -> list[list[str]]:
    """Every command as its words, groups before what they hold: [["generate"], ["data"], ["data", "inspect"], ...]."""
    import click

    from darkroom.cli.main import cli

    def walk(group: click.Group, words: list[str]) -> Iterator[list[str]]:
        context = click.Context(group)
        for name in group.list_commands(context):
            yield [*words, name]
            command = group.get_command(context, name)
            if isinstance(command, click.Group):
                yield from walk(command, [*words, name])

    return list(walk(cli, []))


def programs() -> dict[str, tuple[str, float | None]]:
    """name: (Python code, limit in seconds over the bare interpreter)."""
    rows: dict[str, tuple[str, float | None]] = {
        "bare interpreter": (BARE, None),
        "import darkroom": (f"import darkroom; {GUARD}", IMPORT_LIMIT),
    }
    for arguments in ([], *subcommands()):
        shown = [*arguments, "--help"]
        code = f"from darkroom.cli.main import main; status = main({shown!r}); assert not status, status; {GUARD}"
        rows[" ".join(["darkroom", *shown])] = (code, HELP_LIMIT)
    return rows


def run(code: str) -> tuple[float, int]:
    """(seconds, exit status) of a fresh interpreter."""
    # Bytecode is written on the first run, as in an installed package; -I would hide an editable install's path.
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": ""}
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL, env=environment, check=False)
    return time.perf_counter() - start, done.returncode


def measure(rows: Mapping[str, tuple[str, float | None]], rounds: int) -> list[Row]:
    """Interleaved runs. The first round warms caches and is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in rows}
    statuses: dict[str, int] = dict.fromkeys(rows, 0)
    for number in range(rounds + 1):
        for name, (code, _) in rows.items():
            elapsed, status = run(code)
            if status not in (0, 3):
                raise SystemExit(f"{name}: failed with status {status}")
            statuses[name] = max(statuses[name], status)
            if number:
                seconds[name].append(elapsed)
    bare = seconds[next(iter(rows))]
    return [
        Row(
            name,
            statistics.median(seconds[name]),
            statistics.median(a - b for a, b in zip(seconds[name], bare, strict=True)),
            limit,
            statuses[name] == 3,
        )
        for name, (_, limit) in rows.items()
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15, help="runs of each row (default: 15)")
    table = measure(programs(), parser.parse_args(arguments).rounds)
    width = max(len(row.name) for row in table)
    print(f"{'':{width}}  median ms  over bare  limit")
    for row in table:
        limit = "" if row.limit is None else f"{1000 * row.limit:5.0f}"
        verdict = "" if row.ok else "  LOADS TORCH" if row.loads_torch else "  TOO SLOW"
        print(f"{row.name:{width}}  {1000 * row.seconds:9.1f}  {1000 * row.over:9.1f}  {limit}{verdict}")
    return 0 if all(row.ok for row in table) else 1


if __name__ == "__main__":
    sys.exit(main())
