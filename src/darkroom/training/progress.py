"""One live line on a terminal; plain lines, a few a minute, anywhere else."""

from __future__ import annotations

import sys
import time
from types import TracebackType


def memory_gib() -> float:
    """Resident memory of this process in GiB; 0 where the system does not tell."""
    try:
        with open("/proc/self/statm") as file:
            import resource

            return int(file.read().split()[1]) * resource.getpagesize() / 2**30
    except (OSError, ImportError):
        return 0.0


def duration(seconds: float) -> str:
    """93 -> "1:33", 3725 -> "1:02:05"."""
    seconds = int(max(0.0, seconds))
    hours, rest = divmod(seconds, 3600)
    minutes, secs = divmod(rest, 60)
    return f"{hours}:{minutes:02d}:{secs:02d}" if hours else f"{minutes}:{secs:02d}"


class Progress:
    """`update(step, images_per_second, loss)` as often as you like."""

    PLAIN_INTERVAL = 15.0  # seconds between lines when not on a terminal

    def __init__(self, title: str, total: int, done: int = 0, *, quiet: bool = False) -> None:
        self.title, self.total, self.first, self.quiet = title.replace("_", " "), total, done, quiet
        self.live = not quiet and sys.stderr.isatty()
        self.started = time.perf_counter()
        self.last_line = self.started
        self.loss: float | None = None
        self._bar: object | None = None

    def __enter__(self) -> Progress:
        if self.live:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
            from rich.progress import Progress as RichProgress

            self._bar = RichProgress(
                TextColumn("[bold]{task.description}"),
                BarColumn(bar_width=None),
                MofNCompleteColumn(),
                TextColumn("{task.fields[note]}"),
                console=Console(stderr=True),
            )
            self._bar.start()
            self._task = self._bar.add_task(self.title, total=self.total, completed=self.first, note="")
        return self

    def update(self, step: int, images_per_second: float, loss: float | None = None) -> None:
        if loss is not None:
            self.loss = loss if self.loss is None or loss != loss else 0.95 * self.loss + 0.05 * loss
        if self.quiet:
            return
        now = time.perf_counter()
        remaining = (now - self.started) / max(1, step - self.first) * (self.total - step)
        loss_text = "" if self.loss is None else f"loss {self.loss:.4f}  "
        note = f"{images_per_second:.0f} images/s  {loss_text}{duration(remaining)} left  {memory_gib():.1f} GiB"
        if self._bar is not None:
            self._bar.update(self._task, completed=step, note=note)  # type: ignore[attr-defined]
        elif now - self.last_line >= self.PLAIN_INTERVAL or step == self.total:
            self.last_line = now
            print(f"{self.title}: step {step}/{self.total}  {note}", file=sys.stderr, flush=True)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()  # type: ignore[attr-defined]
