"""Writing that another run or a power failure does not spoil."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mlclip_jax.errors import UserError, make_folder


@contextmanager
def alone(lock: Path, busy: str) -> Iterator[None]:
    """Holds a lock, which a killed process loses; its file, made with its folder, stays.

    Args:
      lock: the file.
      busy: the error where another process holds it.

    Raises:
      UserError: another process holds it, or there can be no such folder.
    """
    make_folder(lock.parent)
    with lock.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(busy) from error
        yield


def sync(path: Path) -> None:
    """Waits until a file or folder is on the disk."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def publish(part: Path, path: Path) -> None:
    """Gives a file its name when all of it is on the disk."""
    sync(part)
    part.replace(path)
