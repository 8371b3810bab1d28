"""The one exception that a user is meant to see, and what it says of packages that are not installed."""

DISTRIBUTION = "diffit-torch"  # the name to install by; `diffit` on the public index is another project


class UserError(Exception):
    """A mistake in what the user gave: one line that names the value and the remedy.

    The command line prints the message without a traceback and exits with status 1.
    Broken invariants of our own use ``assert`` or ordinary exceptions instead.
    """


def install_hint(extra: str) -> str:
    """The command that installs an optional part, such as ``latent`` or ``metrics`` (see pyproject.toml)."""
    return f"pip install '{DISTRIBUTION}[{extra}]'"
