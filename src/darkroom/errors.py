"""The one error that users see as a single line.

Everything a person can cause (a missing file, a misspelt key, an impossible size) raises `DarkroomError`.
The command line prints its text and leaves with status 2; a stack trace means a defect of ours.
"""

from __future__ import annotations

import warnings

LONGEST = 2000  # characters; names inside damaged files may have millions


class DarkroomError(Exception):
    """Bad input. The text is one line that names the input, the problem and the cure."""

    def __init__(self, text: object = "") -> None:
        super().__init__(printable(_cut(str(text))))


class DarkroomWarning(UserWarning):
    """What a person should know and nothing failed for: one line, which the command line prints as a note."""


def warn(text: str) -> None:
    """Tell it, once for the same text."""
    warnings.warn(printable(_cut(text)), DarkroomWarning, stacklevel=3)


def _cut(text: str) -> str:
    half = LONGEST // 2
    return text if len(text) <= LONGEST else f"{text[:half]} ... {text[-half:]}"


def printable(text: str) -> str:
    """Without line breaks and control characters, which names and notes inside files may hold."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
