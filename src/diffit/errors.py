"""The one exception that a user is meant to see."""


class UserError(Exception):
    """A mistake in what the user gave: one line that names the value and the remedy.

    The command line prints the message without a traceback and exits with status 1.
    Broken invariants of our own use ``assert`` or ordinary exceptions instead.
    """
