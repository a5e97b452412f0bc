"""Errors that a user can mend: shown as one line, never as a traceback."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Iterable


class FmdError(Exception):
    """Bad input, said in one line that ends in what to do."""

    def _render_traceback_(self) -> list[str]:  # IPython shows these lines instead of a traceback
        return [f"FmdError: {self}"]


class OutOfTime(FmdError):
    """The time budget is used up; the checkpoint is written and the next call goes on from it."""


def first_line(error: Exception) -> str:
    """What a library's error says first; its type's name if it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def nearest(word: str, known: Iterable[str]) -> str:
    """' (did you mean …? known: …)' for a message about an unknown name."""
    known = list(known)
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    hint = f"did you mean '{close[0]}'?" if close else ""
    listing = f"known: {', '.join(known)}" if len(known) <= 30 else ""
    both = "; ".join(part for part in (hint, listing) if part)
    return f" ({both})" if both else ""


def run_main(main) -> None:
    """Run a command-line entry point; a :class:`FmdError` becomes one line and exit status 1."""
    try:
        main()
    except FmdError as error:
        sys.exit("error: " + " ".join(str(error).split()))
    except KeyboardInterrupt:
        sys.exit("interrupted; a training run goes on from its last checkpoint")
