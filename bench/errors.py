"""The one error that a user can correct, and what it prints."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Input that the user can correct: exit code 2.

    The message names the value and the place; `valid` lists the options, `next_command` what to type.
    """

    def __init__(self, message: str, *, valid: Iterable[str] = (), next_command: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.valid = list(valid)
        self.next_command = next_command

    def __str__(self) -> str:
        lines = [self.message]
        if self.valid:
            shown = self.valid[:40]
            more = f" … and {len(self.valid) - 40} more" if len(self.valid) > 40 else ""
            lines.append(f"valid: {', '.join(shown)}{more}")
        if self.next_command:
            lines.append(f"next:  {self.next_command}")
        return "\n".join(lines)


def did_you_mean(value: str, options: Iterable[str]) -> str:
    """` (did you mean 'x'?)`, or nothing."""
    close = difflib.get_close_matches(value, list(options), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
