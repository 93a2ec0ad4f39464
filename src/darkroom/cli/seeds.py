"""`--seed 7`, `--seed 1 2 5`, `--seed 0..15`."""

from __future__ import annotations

import re
from collections.abc import Sequence

import click

from darkroom.errors import DarkroomError

MAX_SEEDS = 100_000
_NUMBER = r"\d{1,20}"  # 2**64 has 20 digits
_SEED_WORD = re.compile(rf"{_NUMBER}(\.\.{_NUMBER})?(,{_NUMBER}(\.\.{_NUMBER})?)*")


def parse_seeds(words: Sequence[str]) -> list[int]:
    """("1", "4,7", "0..3") -> [1, 4, 7, 0, 1, 2, 3]."""
    seeds: list[int] = []
    for word in words:
        if not _SEED_WORD.fullmatch(word):
            raise DarkroomError(
                f"--seed {word}: give whole numbers or a range, for example --seed 1 2 5 or --seed 0..15"
            )
        for part in word.split(","):
            first, _, last = part.partition("..")
            if last and int(last) < int(first):
                raise DarkroomError(f"--seed {word}: the range ends before it begins")
            if int(last or first) - int(first) >= MAX_SEEDS:
                raise DarkroomError(f"--seed {word}: more than {MAX_SEEDS} seeds at once")
            seeds += range(int(first), int(last or first) + 1)
    return seeds


class SeedsCommand(click.Command):
    """Lets `--seed 1 2 3` take several words: numbers after --seed are seeds, up to the next word that is none."""

    def parse_args(self, context: click.Context, args: list[str]) -> list[str]:
        spread: list[str] = []
        after_seed = False
        for i, word in enumerate(args):
            if word == "--":
                spread += args[i:]
                break
            if after_seed and _SEED_WORD.fullmatch(word) and spread[-1] != "--seed":
                spread.append("--seed")
            elif after_seed and spread[-1] != "--seed":
                after_seed = False
            after_seed = after_seed or word == "--seed"
            spread.append(word)
        return super().parse_args(context, spread)
