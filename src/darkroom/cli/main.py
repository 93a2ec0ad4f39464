"""The command `darkroom`: finds the subcommand, and turns every error a person can cause into one line and status 2.

A subcommand's module is imported when it is run or asked for help; none of them imports torch at its top.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from typing import Any

import click

from darkroom import __version__
from darkroom.errors import DarkroomError, DarkroomWarning

# name: (module, function, what `darkroom --help` says about it)
COMMANDS = {
    "generate": ("darkroom.cli.generate", "generate", "Make images from prompts, classes, or the settings in a PNG."),
    "edit": ("darkroom.cli.edit", "edit", "Repaint a part of a photo, add a border, vary it."),
    "upscale": ("darkroom.cli.upscale", "upscale", "Enlarge or sharpen photos of any size."),
    "train": ("darkroom.cli.train", "train", "Train a model on a folder, a tar file, or by a recipe."),
    "eval": ("darkroom.cli.evaluate", "evaluate", "Score a model, a folder of samples, or a first stage."),
    "study": ("darkroom.cli.study", "study", "Train and compare many models under one protocol."),
    "data": ("darkroom.cli.data", "data", "Look at a data set, or build the procedural one."),
    "reconstruct": ("darkroom.cli.reconstruct", "reconstruct", "Push an image through a first stage and back."),
    "convert": ("darkroom.cli.convert", "convert", "Write a model in another library's layout, or read one."),
    "measure": ("darkroom.cli.measure", "measure", "Measure a first stage's latents again, from a cache."),
    "info": ("darkroom.cli.info", "info", "Tell what a model, a weight file or an image holds."),
    "doctor": ("darkroom.cli.doctor", "doctor", "Check this machine and this installation."),
}

MACHINE_REFUSALS = (
    *(errno.EACCES, errno.EPERM, errno.EROFS),  # not allowed
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG),  # full
    *(errno.EIO, errno.EMFILE, errno.ENFILE, errno.ENAMETOOLONG, errno.ELOOP),
)


class LazyGroup(click.Group):
    """A group whose commands are imported on use: `--help` stays within a few hundredths of a second."""

    def __init__(self, *args: Any, table: Mapping[str, tuple[str, str, str]], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.table = table

    def list_commands(self, context: click.Context) -> list[str]:
        return list(self.table)

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        if name not in self.table:
            return None
        module, function, _ = self.table[name]
        command: click.Command = getattr(import_module(module), function)
        return command

    def resolve_command(
        self, context: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in self.table and not args[0].startswith("-"):
            from difflib import get_close_matches

            close = get_close_matches(args[0], self.table, n=1)
            hint = f'did you mean "{close[0]}"?' if close else f"there are: {', '.join(self.table)}"
            raise click.UsageError(f"no such command: {args[0]} ({hint})", context)
        return super().resolve_command(context, args)

    def format_commands(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, _, text) in self.table.items()])


@click.group(
    cls=LazyGroup,
    table=COMMANDS,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    epilog="Start with:  darkroom generate --help",
)
@click.version_option(__version__, prog_name="darkroom", message="%(prog)s %(version)s")
def cli() -> None:
    """Latent diffusion models, end to end: train on your own images, generate, look inside."""


class Terminated(KeyboardInterrupt):
    """SIGTERM, which ends a command as Ctrl-C does: what is half written is removed."""


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM raises `Terminated`, once: a second one, which `timeout` may send, must not cut the clean-up short."""
    process = os.getpid()

    def terminate(signum: int, _: object) -> None:
        if os.getpid() != process:  # a forked child dies as it would without us
            signal.signal(signum, signal.SIG_DFL)
            os.kill(os.getpid(), signum)
            return
        signal.signal(signum, signal.SIG_IGN)
        raise Terminated

    # Whoever set another handler, or ignores the signal, keeps that; outside the main thread none can be set.
    ours = threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    if ours:
        signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        if ours:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


@contextlib.contextmanager
def _notes() -> Iterator[None]:
    """Warnings of ours as one line each, as errors are; those of others as Python shows them."""
    with warnings.catch_warnings():
        warnings.simplefilter("default", DarkroomWarning)
        theirs = warnings.showwarning

        def show(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
            if issubclass(category, DarkroomWarning):
                print(f"darkroom: note: {message}", file=sys.stderr)
            else:
                theirs(message, category, *place, **more)

        warnings.showwarning = show
        yield


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the result is the exit status (0 done, 2 bad input, 130 interrupted, 143 terminated)."""
    try:
        with _terminable(), _notes():
            result = cli.main(
                args=None if arguments is None else list(arguments), prog_name="darkroom", standalone_mode=False
            )
        sys.stdout.flush()
        return result if isinstance(result, int) else 0
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.ctx.get_help() if error.ctx else str(error), err=True)
        return 2
    except click.UsageError as error:
        where = error.ctx.command_path if error.ctx else "darkroom"
        return _fail(f"{error.format_message().rstrip('.')}; see `{where} --help`")
    except click.ClickException as error:
        return _fail(error.format_message())
    except DarkroomError as error:
        return _fail(str(error))
    except (KeyboardInterrupt, click.Abort) as error:
        # click turns the first into the second.
        if isinstance(error, Terminated) or isinstance(error.__cause__, Terminated):
            print("\ndarkroom: terminated", file=sys.stderr)
            return 128 + signal.SIGTERM
        print("\ndarkroom: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of our output (`| head`) has gone; Python would complain once more when it closes stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        # What the machine refused is no defect of ours; any other OSError keeps its trace.
        if error.errno not in MACHINE_REFUSALS:
            raise
        return _fail(f"{error.filename or 'a file'}: {error.strerror}")
    except MemoryError:
        return _fail("out of memory; use a smaller size or batch, or close other programs")
    except RuntimeError as error:
        # torch reports both kinds of memory as RuntimeError; anything else is a defect of ours and keeps its trace.
        if "out of memory" in str(error) or "can't allocate memory" in str(error):
            return _fail("out of memory; use a smaller size or batch, or close other programs")
        raise


def _fail(message: str) -> int:
    print("darkroom: " + " ".join(message.split()), file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
