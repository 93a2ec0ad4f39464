"""A bar for work that turns out to be long; work of less than two seconds stays silent."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress

SILENT_SECONDS = 2.0
PLAIN_INTERVAL = 15.0  # seconds between lines when not on a terminal


class StepBar:
    """`update(done)` as often as you like: a live bar on a terminal, a line now and then elsewhere."""

    def __init__(self, title: str, total: int, unit: str = "steps") -> None:
        self.title, self.total, self.unit = title, total, unit
        self.started = self.last_line = time.perf_counter()
        self.bar: Progress | None = None

    def __enter__(self) -> StepBar:
        return self

    def update(self, done: float) -> None:
        now = time.perf_counter()
        if now - self.started < SILENT_SECONDS:
            return
        if not sys.stderr.isatty():
            if now - self.last_line >= PLAIN_INTERVAL:
                self.last_line = now
                left = (now - self.started) / max(1e-9, done) * (self.total - done)
                print(
                    f"{self.title}: {done:g}/{self.total} {self.unit}, {left:.0f} s left", file=sys.stderr, flush=True
                )
            return
        if self.bar is None:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
            self.bar = Progress(*columns, console=Console(stderr=True), transient=True)
            self.bar.start()
            self.bar.add_task(self.title, total=self.total)
        self.bar.update(self.bar.task_ids[0], completed=done)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self.bar is not None:
            self.bar.stop()


class PhaseBars:
    """One bar after another, for work of several phases: `update(phase, done, total)`."""

    def __init__(self, quiet: bool = False, unit: str = "images") -> None:
        self.quiet, self.unit, self.phase = quiet, unit, ""
        self.bar: StepBar | None = None

    def __enter__(self) -> PhaseBars:
        return self

    def update(self, phase: str, done: float, total: int) -> None:
        if self.quiet:
            return
        if self.bar is None or phase != self.phase:
            self._close()
            self.phase, self.bar = phase, StepBar(phase, total, self.unit)
        self.bar.update(round(done, 1))

    def _close(self) -> None:
        if self.bar is not None:
            self.bar.__exit__(None, None, None)
        self.bar = None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._close()
