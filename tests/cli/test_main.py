"""The command as a whole: help, errors, interrupts, pipes."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest

from darkroom import __version__
from darkroom.cli.main import COMMANDS, cli


def all_commands(command: click.Command, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    if not isinstance(command, click.Group):
        return [path]
    context = click.Context(command)
    subcommands = [(name, command.get_command(context, name)) for name in command.list_commands(context)]
    return [path, *(found for name, sub in subcommands if sub for found in all_commands(sub, (*path, name)))]


def test_help_of_every_command(run: Any) -> None:
    commands = all_commands(cli)
    assert ("data", "build", "shapes") in commands and len(commands) >= len(COMMANDS) + 4
    for path in commands:
        status, out, error = run(*path, "--help")
        assert status == 0 and error == "" and "Usage: darkroom" in out
        assert run(*path, "-h")[1] == out


def test_help_names_no_command_that_is_missing(run: Any) -> None:
    out = run("--help")[1]
    for name, (_, _, text) in COMMANDS.items():
        assert name in out and text in out
    assert run("--version")[1] == f"darkroom {__version__}\n"


def test_without_arguments_help_is_shown(run: Any) -> None:
    for path in ((), ("data",)):
        status, out, error = run(*path)
        assert status == 2 and out == "" and "Commands:" in error


def test_usage_errors_are_one_line(refused: Callable[..., str]) -> None:
    assert 'did you mean "train"?' in refused("trian")
    assert "there are: generate" in refused("xyzzy")
    assert "'--foo'" in refused("generate", "--foo")
    assert "darkroom train --help" in refused("train", "a", "b")
    assert "--steps" in refused("generate", "--steps", "many")


def subprocess_run(code: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, **options)


def raising(statement: str) -> str:
    """A program whose command `info` runs `statement`."""
    return f"""
import sys, darkroom.cli.info as info, darkroom.cli.main as main
def fail(source, as_json): {statement}
info.info.callback = fail
sys.exit(main.main(["info", "x"]))
"""


def test_interrupt_and_other_endings() -> None:
    ended = subprocess_run(raising("raise KeyboardInterrupt"))
    assert ended.returncode == 130 and "Traceback" not in ended.stderr and "interrupted" in ended.stderr
    for statement, words in (
        ("raise MemoryError", "out of memory"),
        ("raise RuntimeError('[enforce fail] DefaultCPUAllocator: can\\'t allocate memory')", "out of memory"),
        (
            f"raise OSError({errno.ENOSPC}, 'No space left on device', 'run/metrics.jsonl')",
            "run/metrics.jsonl: No space",
        ),
    ):
        ended = subprocess_run(raising(statement))
        assert ended.returncode == 2 and ended.stderr.startswith("darkroom: ") and words in ended.stderr
        assert ended.stderr.count("\n") == 1
    assert "Traceback" in subprocess_run(raising("raise RuntimeError('a defect')")).stderr
    assert "Traceback" in subprocess_run(raising("raise FileNotFoundError(2, 'a defect')")).stderr


@pytest.mark.skipif(os.name != "posix", reason="POSIX signals")
def test_ctrl_c_while_torch_is_at_work() -> None:
    before = signal.getsignal(signal.SIGINT)  # a shell in the background may ignore it
    heard = (
        "import os, signal; signal.signal(signal.SIGINT, signal.default_int_handler)"  # a background shell ignores it
    )
    code = raising(heard + "; os.kill(os.getpid(), signal.SIGINT); import time; time.sleep(60)")
    assert subprocess_run(code).returncode == 130
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.skipif(os.name != "posix", reason="POSIX signals")
def test_sigterm_leaves_no_half_written_folder(tmp_path: Path) -> None:
    code = """
import os, signal, sys, time
from darkroom.safe_files import new_folder
def stop():
    with new_folder(sys.argv[1]) as temporary:
        (temporary / "half").write_text("x")
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)  # the second one does not stop the clean-up
"""
    ended = subprocess.run(
        [sys.executable, "-c", code + raising("stop()"), str(tmp_path / "model")],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ended.returncode == 143 and "Traceback" not in ended.stderr and "darkroom: terminated" in ended.stderr
    assert not list(tmp_path.iterdir())
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_closed_pipe_is_no_stack_trace(tmp_path: Path) -> None:
    command = f"{sys.executable} -m darkroom --help | (exec 0<&-; sleep 1)"
    ended = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert "Traceback" not in ended.stderr and "Exception ignored" not in ended.stderr


def test_module_form(tmp_path: Path) -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "darkroom", "--version"], capture_output=True, text=True, cwd=tmp_path
    )
    assert ended.stdout == f"darkroom {__version__}\n"
