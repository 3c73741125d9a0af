"""What is wrong, as the page says it."""

from __future__ import annotations

from html import escape


def line_of(error: BaseException) -> str:
    """What an error says, in one line."""
    return " ".join(str(error).split())


def fault(line: str) -> str:
    """As HTML that is read aloud at once."""
    return f"<p class='fault' role='alert'>{escape(line)}</p>"
