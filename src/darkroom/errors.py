"""The one error that users see as a single line.

Everything a person can cause (a missing file, a misspelt key, an impossible size) raises `DarkroomError`.
The command line prints its text and leaves with status 2; a stack trace means a defect of ours.
"""

from __future__ import annotations


class DarkroomError(Exception):
    """Bad input. The text is one line that names the input, the problem and the cure."""
