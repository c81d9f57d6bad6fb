"""The one exception type for what a user can mend, and how commands report it."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path


class UserError(ValueError):
    """Bad input that the user can mend: the message names the thing and the mend.

    Commands print it as a single line without a traceback and exit with code 2.
    """


def exit_code(run: Callable[[], int | None]) -> int:
    """Run a command and give its exit code; what a user can mend is one line on stderr, code 2.

    Args:
        run: the command; it returns its exit code, None meaning 0.

    Returns:
        The command's own code; 2 after a `UserError` or where a file or the disk fails, 130 after
        an interrupt from the keyboard, 141 where the reader of stdout has gone away. Other
        exceptions pass: they are faults of the program and need their traceback.
    """
    try:
        return run() or 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The interpreter flushes stdout on its way out and would complain again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:  # missing, forbidden, of the wrong kind, no space left
        named = f"{error.filename}: {error.strerror}" if error.filename else error
        print(f"error: {' '.join(str(named).split())}", file=sys.stderr)
        return 2


def make_folder(folder: Path) -> None:
    """Makes a folder for output, with its parents, where it is missing.

    Raises:
        UserError: it cannot be made, because a file stands there or writing is forbidden.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"cannot make the folder {folder} ({error.strerror}): choose another place"
        ) from error
