"""The one exception type for what a user can mend."""

from __future__ import annotations


class UserError(ValueError):
    """Bad input that the user can mend: the message names the thing and the mend.

    Commands print it as a single line without a traceback and exit with code 2.
    """
