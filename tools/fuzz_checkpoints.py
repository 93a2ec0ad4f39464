"""Reads changed checkpoint files, thousands of them, in one process: each must be refused with one clear line.

    python tools/fuzz_checkpoints.py [--files 10000] [--first 0] [--only NAME] [--case NAME:NUMBER] [--keep FOLDER]

The seeds (`tests/fuzz_seeds.tar.xz`, made by `fuzz_seeds.py`) are small files and folders of every kind that is read:
official layouts as safetensors and as pickles, diffusers folders, model folders of ours, adapters. A changed one must
end in a `DarkroomError` of one line, or be read as what it still is (a changed number of a weight is no damage that
anyone could see): such files are counted apart, and `--files` counts the refused ones. It is a failure when

- another exception leaves a reader, or the message is not one line of reasonable length;
- reading takes more than 2 seconds of the processor (the clock also counts what other programs take), or more than 20
  seconds by the clock;
- the memory of the process grows by more than 200 MB, at its peak during one file or over all of them;
- anything runs: a new process, an import, `exec`, a pickle's own machinery, a changed file, a name in the network.

The last is watched by Python's audit events, and by functions that only a pickle calls. `--case` repeats one file.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import resource
import shutil
import signal
import sys
import tarfile
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from fuzz_mutations import MARK, make_case

SEEDS = Path(__file__).parent.parent / "tests" / "fuzz_seeds.tar.xz"
SECONDS = 2.0  # of the processor
PATIENCE = 20.0  # by the clock
GROWTH = 200 * 2**20
ADDRESS_SPACE = 2 * 2**30  # more than memory in use: what is asked for and never touched counts too
LONGEST_MESSAGE = 2500
# What no reading does. "import" and "exec" are seen once everything that reading needs is loaded.
EVENTS = {
    *("os.system", "os.exec", "os.fork", "os.forkpty", "os.posix_spawn", "os.spawn", "subprocess.Popen", "pty.spawn"),
    *(
        "os.remove",
        "os.rename",
        "os.mkdir",
        "os.rmdir",
        "os.chmod",
        "os.link",
        "os.symlink",
        "os.truncate",
        "os.putenv",
    ),
    *("shutil.rmtree", "shutil.move", "shutil.copyfile", "socket.connect", "socket.bind", "socket.getaddrinfo"),
    *("urllib.Request", "pickle.find_class", "ctypes.dlopen", "import", "exec", "compile", "code.__new__"),
}


def ran(*arguments: Any) -> None:
    """Called by nobody but a pickle that was executed."""
    raise AssertionError("code in a file was executed")


class Ran:
    """The same as a class."""

    def __init__(self, *arguments: Any) -> None:
        ran()

    __setstate__ = ran


class TooSlow(BaseException):
    """Not an Exception, so that nothing takes it for one of its own."""


@dataclass
class Watch:
    """The audit events while a file is read."""

    active: bool = False
    seen: list[str] = field(default_factory=list)

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.active:
            return
        if event in EVENTS:
            self.seen.append(f"{event} {arguments[:1]!r}"[:200])
        elif event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+"):
            self.seen.append(f"open for writing {arguments[0]!r}"[:200])


@dataclass(frozen=True)
class Outcome:
    """What one reader did with one file. `problem` is None where all was well."""

    refused: bool
    message: str
    seconds: float
    grown: int
    problem: str | None


def read(function: Callable[[Path], object], path: Path, watch: Watch) -> Outcome:
    """Run one reader under the limits."""
    from darkroom.errors import DarkroomError

    def too_slow(*_: object) -> None:
        raise TooSlow

    refused, message, problem = False, "", None
    before = memory("VmRSS")
    reset_peak()
    timers = {signal.SIGPROF: (signal.ITIMER_PROF, SECONDS), signal.SIGALRM: (signal.ITIMER_REAL, PATIENCE)}
    old = {number: signal.signal(number, too_slow) for number in timers}
    watch.seen.clear()
    for timer, limit in timers.values():
        signal.setitimer(timer, limit)
    begun = time.process_time()
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            watch.active = True
            function(path)
    except DarkroomError as error:
        refused, message = True, str(error)
    except TooSlow:
        problem = f"not done after {SECONDS:g} s of the processor, or {PATIENCE:g} s"
    except BaseException as error:
        problem = f"{type(error).__name__}: {str(error)[:300]}"
        if isinstance(error, KeyboardInterrupt):
            raise
    finally:
        watch.active = False
        for number, (timer, _) in timers.items():
            signal.setitimer(timer, 0)
            signal.signal(number, old[number])
    seconds, grown = time.process_time() - begun, memory("VmHWM") - before
    if problem is None:
        problem = _judge(message, refused, seconds, grown, watch)
    return Outcome(refused, message, seconds, grown, problem)


def _judge(message: str, refused: bool, seconds: float, grown: int, watch: Watch) -> str | None:
    if watch.seen:
        return f"it did something: {watch.seen[0]}"
    if Path("/tmp", MARK).exists():
        return "code in it was executed"
    if refused and (not message or not message.isprintable() or len(message) > LONGEST_MESSAGE):
        return f"the message is not one clear line: {message[:200]!r}"
    if seconds > SECONDS:
        return f"not done after {SECONDS:g} s ({seconds:.1f} s)"
    if "allocate" in message:  # refused, but by the allocator
        return f"memory was asked for: {message[:200]}"
    return f"memory grew by {grown >> 20} MB" if grown > GROWTH else None


def memory(entry: str) -> int:
    """Bytes: "VmRSS" now, "VmHWM" at the peak since `reset_peak`, "VmSize" of address space."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(f"{entry}:"))


def reset_peak() -> None:
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")


def readers(seeds: dict[str, Path]) -> dict[str, Callable[[Path], object]]:
    """What a person can do with a file that somebody gave them."""
    from darkroom.adapters import apply_adapters, remove_adapters
    from darkroom.cli.info import info
    from darkroom.interop.text_towers import find_towers
    from darkroom.model_io import load, load_first_stage

    model = adapted_model(seeds)

    def adapt(path: Path) -> None:
        try:
            apply_adapters(model, [path])
        finally:
            remove_adapters(model)

    return {
        "load": lambda path: load(path, device="cpu"),
        "load_first_stage": lambda path: load_first_stage(path, device="cpu"),
        "info": lambda path: info.callback(source=str(path), as_json=False),  # type: ignore[misc]
        "find_towers": find_towers,
        "adapt": adapt,
    }


def adapted_model(seeds: dict[str, Path]) -> Any:
    """The model that the seeds of adapters fit."""
    from darkroom.model_io import load

    return load(seeds["model-clip"], device="cpu")


Readers = dict[str, Callable[[Path], object]]


def check_case(
    name: str, number: int, seed: Path, place: Path, watch: Watch, using: Readers
) -> tuple[bool, str, dict[str, Outcome]]:
    """Make the case and give it to every reader: (refused by the one that it is for, what was changed, outcomes)."""
    change = make_case(seed, place, Random(f"{name}:{number}"))
    outcomes = {reader: read(function, place, watch) for reader, function in using.items()}
    decides = "adapt" if name.startswith("adapter-") else "find_towers" if name.startswith("text-") else "load"
    return outcomes[decides].refused, change, outcomes


@contextlib.contextmanager
def unpacked_seeds() -> Iterator[dict[str, Path]]:
    """The seeds by name, in a temporary folder."""
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        with tarfile.open(SEEDS) as archive:
            archive.extractall(folder, filter="data")
        yield {path.name: path for path in sorted(Path(folder).iterdir())}


def warm_up(seeds: dict[str, Path]) -> Readers:
    """Load everything that reading needs, so that a later import is one that a file asked for."""
    importlib.import_module("encodings.cp437")  # of names in archives
    using = readers(seeds)
    for path in seeds.values():
        for function in using.values():
            with contextlib.suppress(Exception), contextlib.redirect_stdout(io.StringIO()):
                function(path)
    return using


@dataclass
class Tally:
    refused: int = 0
    read: Counter[str] = field(default_factory=Counter)
    by_seed: Counter[str] = field(default_factory=Counter)
    slowest: float = 0.0
    largest: int = 0
    problems: list[str] = field(default_factory=list)


def run(
    seeds: dict[str, Path],
    using: Readers,
    files: int,
    first: int,
    watch: Watch,
    keep: Path | None,
    show: Callable[[str], None],
) -> Tally:
    """Cases of all seeds in turn until so many were refused."""
    tally, started = Tally(), memory("VmRSS")
    number = first
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        while tally.refused < files:
            for name, seed in seeds.items():
                place = Path(folder) / seed.name
                refused, change, outcomes = check_case(name, number, seed, place, watch, using)
                tally.by_seed[name] += 1
                tally.refused += refused
                if refused and tally.refused % 1000 == 0:
                    show(f"{tally.refused} refused of {sum(tally.by_seed.values())}")
                tally.read[name] += not refused
                tally.slowest = max(tally.slowest, *(o.seconds for o in outcomes.values()))
                tally.largest = max(tally.largest, *(o.grown for o in outcomes.values()))
                for reader, outcome in outcomes.items():
                    if outcome.problem is not None:
                        tally.problems.append(f"{name}:{number} ({change}), {reader}: {outcome.problem}")
                        show(tally.problems[-1])
                if keep is not None and any(o.problem for o in outcomes.values()):
                    shutil.copytree(place, keep / f"{name}-{number}") if place.is_dir() else shutil.copy(place, keep)
                shutil.rmtree(place) if place.is_dir() else place.unlink()
            number += 1
            if memory("VmRSS") - started > GROWTH:
                tally.problems.append(f"the process grew by {(memory('VmRSS') - started) >> 20} MB over all files")
                show(tally.problems[-1])
                break
    return tally


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=10_000, help="so many that are refused")
    parser.add_argument("--first", type=int, default=0, help="the number of the first case of each seed")
    parser.add_argument("--only", help="one seed")
    parser.add_argument("--case", help="NAME:NUMBER: one case, with its messages")
    parser.add_argument("--keep", type=Path, help="a folder for the files that were not refused well")
    given = parser.parse_args()
    if given.keep is not None:
        given.keep.mkdir(parents=True, exist_ok=True)
    sys.modules.setdefault("fuzz_checkpoints", sys.modules[__name__])
    watch = Watch()
    with unpacked_seeds() as seeds:
        using = warm_up(seeds)
        sys.addaudithook(watch)
        limit = memory("VmSize") + ADDRESS_SPACE
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        if given.case:
            name, number = given.case.rsplit(":", 1)
            with tempfile.TemporaryDirectory() as folder:
                place = (given.keep or Path(folder)) / seeds[name].name
                _, change, outcomes = check_case(name, int(number), seeds[name], place, watch, using)
            print(change)
            for reader, o in outcomes.items():
                said = f"refused: {o.message}" if o.refused else "read"
                print(f"  {reader}: {o.problem or said} ({o.seconds:.2f} s, {o.grown / 1e6:.0f} MB)")
            return any(o.problem for o in outcomes.values())
        seeds = {name: path for name, path in seeds.items() if given.only in (None, name)}
        begun = time.perf_counter()
        tally = run(seeds, using, given.files, given.first, watch, given.keep, lambda text: print(text, flush=True))
    total, refused, seconds = sum(tally.by_seed.values()), tally.refused, time.perf_counter() - begun
    print(f"{total} changed files of {len(seeds)} seeds in {seconds:.0f} s: {len(tally.problems)} problems")
    print(f"  {refused} refused with one clear line, {total - refused} read as what they still are")
    print(f"  the slowest took {tally.slowest:.2f} s, the largest {tally.largest / 1e6:.0f} MB")
    print(
        "read nonetheless:",
        ", ".join(f"{name} {n}/{tally.by_seed[name]}" for name, n in tally.read.items() if n) or "none",
    )
    return 1 if tally.problems else 0


if __name__ == "__main__":
    sys.exit(main())
