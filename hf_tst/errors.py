"""Turning what went wrong into one sentence."""

from __future__ import annotations


def one_line(error: BaseException) -> str:
    """What an error says, as the end of a sentence: of the cause it was raised from, if there is one, on one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[-1] if lines else type(error).__name__).rstrip(".:")
