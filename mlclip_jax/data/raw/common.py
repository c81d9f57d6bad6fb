"""What the readers of raw corpora share: text files read line by line, and errors that say where.

A reader module has `PARTS`, `read(raw, part) -> Manifest` and `EXPECTED`, by part the published
`counts`; where an image is not simply at raw/key it has `image_path` or `open_image` too.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from mlclip_jax.data.manifest import Manifest
from mlclip_jax.errors import UserError
from mlclip_jax.spec import hint, unknown


def malformed(path: Path, place: int | str, problem: str) -> UserError:
    """The error for what is wrong in a file at a line (a number) or at a place in its JSON."""
    return UserError(f"{path}, {spot(place)}: {problem}")


def spot(place: int | str) -> str:
    """A place in a file in words: "line 3", "annotations[2].image_id"."""
    return f"line {place}" if isinstance(place, int) else place


def unreadable(path: Path, error: Exception) -> UserError:
    """The error for a file that cannot be opened, or is not UTF-8 text."""
    if isinstance(error, OSError):
        return UserError(
            f"cannot read {path} ({error.strerror}): check that the raw folder is the right one "
            "and that everything is unpacked"
        )
    return UserError(f"{path} is not UTF-8 text ({error}): download it again, or save it as UTF-8")


def check_part(corpus: str, part: str, parts: Collection[str]) -> None:
    """Raises UserError unless `part` is one of `parts`."""
    if part not in parts:
        raise unknown(f"part of {corpus}", part, parts)


def lines(path: Path) -> Iterator[tuple[int, str]]:
    """Number (from 1) and text of each line, without its end; blank lines too, no BOM.

    Lines end in LF, CRLF or CR; the last one need not.

    Raises:
      UserError: the file cannot be read or is not UTF-8.
    """
    try:
        with path.open(encoding="utf-8-sig") as file:
            for number, line in enumerate(file, start=1):
                yield number, line.removesuffix("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise unreadable(path, error) from error


def csv_rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Number of the (last) line and the fields of each record of a CSV; blank lines are skipped.

    Errors name the first line of a record: what is wrong in its quoting may reach to the last.

    Raises:
      UserError: the file cannot be read, is not UTF-8, or its quoting is broken.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader, start = csv.reader(file, strict=True), 1
            try:
                for fields in reader:
                    start = reader.line_num + 1
                    if fields:
                        yield reader.line_num, fields
            except csv.Error as error:
                mend = "text in double quotes must end with one, and one inside be doubled"
                raise malformed(path, start, f"not CSV ({error}): {mend}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise unreadable(path, error) from error


def read_json(path: Path, *, hook: Callable[[dict[str, Any]], Any] | None = None) -> Any:
    """The value in a JSON file.

    Args:
      path: the file.
      hook: as `object_hook` of `json.loads`: may drop what is not needed while parsing.

    Raises:
      UserError: the file cannot be read, is not JSON (the message names line and column), or has a
        key twice in an object.
    """

    def whole(pairs: list[tuple[str, Any]]) -> Any:
        entry = json_object(path, "an object", pairs)
        return entry if hook is None else hook(entry)

    try:
        return json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=whole)
    except json.JSONDecodeError as error:
        raise malformed(
            path,
            error.lineno,
            f"not JSON ({error.msg}, column {error.colno}): the file is cut off or damaged",
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise unreadable(path, error) from error
    except UserError:
        raise
    except (RecursionError, ValueError) as error:  # too deep, or a number too long
        raise UserError(f"{path} is no annotation file ({error})") from error


def json_object(path: Path, place: int | str, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of these keys and values, for `object_pairs_hook` of `json.loads`.

    Raises:
      UserError: a key is there twice, of which JSON readers keep one value without a word.
    """
    entry = dict(pairs)
    if len(entry) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise malformed(path, place, f"the key {twice[:200]!r} is there twice: remove one")
    return entry


def is_text(text: str) -> bool:
    """Whether UTF-8 can write it: JSON and names of files may hold halves of characters."""
    return text.isascii() or not any("\ud800" <= c <= "\udfff" for c in text)


def field(path: Path, place: str, entry: Any, name: str, kind: type) -> Any:
    """`entry[name]` of a JSON object, which must be of type `kind` (a bool is no int).

    Raises:
      UserError: `entry` is no object, has no such field, or one of another type.
    """
    if not isinstance(entry, dict) or name not in entry:
        raise malformed(path, place, f"an object with the field {name!r} is needed")
    value = entry[name]
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        dot = f"{place}.{name}" if place else name
        raise malformed(path, dot, f"{str(value)[:80]!r} is no {kind.__name__}")
    return value


def integer(path: Path, line: int, text: str, below: int, what: str = "label number") -> int:
    """The number 0 <= i < below that `text` writes in plain digits.

    Raises:
      UserError: anything else.
    """
    if not (text.isascii() and text.isdigit()) or len(text) > 18 or int(text) >= below:
        raise malformed(path, line, f"{text[:80]!r} is no {what} from 0 to {below - 1}")
    return int(text)


def image_key(path: Path, line: int | str, text: str) -> str:
    r"""The relative path of an image as a manifest's key: `actor\1.jpg` is "actor/1.jpg".

    Raises:
      UserError: an empty or absolute path, one that leaves the folder, control characters or
        what is no Unicode text.
    """
    posix = PurePosixPath(text.replace("\\", "/"))
    outside = posix.is_absolute() or ".." in posix.parts or text[1:2] == ":"
    if outside or not posix.parts or any(c < " " for c in text) or not is_text(text):
        raise malformed(
            path, line, f"{text[:200]!r} is no path of an image relative to the raw folder"
        )
    return str(posix)


def unknown_label(path: Path, place: int | str, label: str, known: Collection[str]) -> UserError:
    """The error for a label that is not among the known ones, with a close one or their number."""
    mend = hint(label, known) if len(known) <= 100 else f"there are {len(known)} labels"
    return malformed(path, place, f"unknown label {label[:80]!r}; {mend}")


def counts(manifest: Manifest) -> dict[str, int]:
    """Sizes to compare with published ones.

    Returns:
      "images"; "labelled", those with a positive (difficult ones count); "positives", all of them.
    """
    numbers = np.diff(manifest.positives.offsets)
    if manifest.difficult is not None:
        numbers = numbers + np.diff(manifest.difficult.offsets)
    return {
        "images": len(manifest),
        "labelled": int((numbers > 0).sum()),
        "positives": int(numbers.sum()),
    }


def differences(manifest: Manifest, expected: Mapping[str, int]) -> list[str]:
    """A sentence for each published size (some of `counts`) that the manifest does not have."""
    found = counts(manifest)
    return [
        f"{manifest.name}: {found[name]:,} {name}, but {size:,} are published"
        for name, size in expected.items()
        if found[name] != size
    ]
