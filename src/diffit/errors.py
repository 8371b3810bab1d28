"""The one exception that a user is meant to see, and what it says of packages that are not installed."""

import re

DISTRIBUTION = "diffit-torch"  # the name to install by; `diffit` on the public index is another project
MESSAGE_LIMIT = 1500  # characters: nobody reads more, and a value from a hostile file may have millions

# What moves a cursor, begins a line, turns the direction of writing, or no terminal takes: control characters, line
# separators, bidirectional overrides and lone surrogates. Joiners stay: Persian and emoji need them.
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufeff]")


def printable(text: str, limit: int = 200) -> str:
    """``text`` on one line that is safe on a terminal: for names and values that come from files.

    Characters that a terminal obeys become escapes, and the middle of what is longer than ``limit`` is left out.
    """
    if len(text) > limit:
        head, tail = limit * 2 // 3, limit // 3
        text = f"{text[:head]}…({len(text) - head - tail} characters)…{text[-tail:]}"
    return _UNPRINTABLE.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


class UserError(Exception):
    """A mistake in what the user gave: one line that names the value and the remedy.

    The command line prints the message without a traceback and exits with status 1.
    Whatever it quotes is :func:`printable`. Broken invariants of our own use ``assert`` or ordinary exceptions instead.
    """

    def __init__(self, message: str) -> None:
        super().__init__(printable(message, MESSAGE_LIMIT))


def install_hint(extra: str) -> str:
    """The command that installs an optional part, such as ``latent`` or ``metrics`` (see pyproject.toml)."""
    return f"pip install '{DISTRIBUTION}[{extra}]'"
