"""Vectors of labels from a file of word vectors, which language-only methods start from."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from mlclip_jax.errors import UserError
from mlclip_jax.labels.nouns import without_possessives
from mlclip_jax.labels.space import readable

# Letters and digits, and hyphens between them.
_WORD = re.compile(r"[^\W_]+(?:-[^\W_]+)*")


def vector_size(path: str | Path) -> int:
    """How many numbers a word has in a file of word vectors.

    Raises:
      UserError: the file cannot be read, or its first word has no numbers.
    """
    _, _, numbers = next(_lines(path), (0, "", ""))
    if not numbers:
        raise UserError(f"{path}: a word and its numbers are expected on each line")
    return len(numbers.split())


def read_word_vectors(path: str | Path, names: Sequence[str]) -> np.ndarray:
    """The mean vector of the words of each label: float64 [c d].

    Words are runs of letters and digits; one with hyphens is looked for as a whole, and where there
    is none, by its parts. Words without a vector are left out.

    Args:
      path: text file in GloVe's form: a word and its d numbers on each line, separated by blanks or
        tabs (a first line of two whole numbers, as word2vec writes it, is passed over).
      names: of the c labels.

    Raises:
      UserError: the file cannot be read, a line is not of that form, or a label has no word in it.
    """
    words = [_WORD.findall(without_possessives(readable(name))) for name in names]
    wanted = {part for several in words for word in several for part in (word, *word.split("-"))}
    found: dict[str, np.ndarray] = {}
    size = None
    for line, word, numbers in _lines(path):
        size = size or len(numbers.split())
        if word in wanted and word not in found:
            found[word] = _vector(f"{path}, line {line}", word, numbers, size)
    vectors = []
    for name, several in zip(names, words, strict=True):
        known = [
            found[part]
            for word in several
            for part in ((word,) if word in found else word.split("-"))
            if part in found
        ]
        if not known:
            raise UserError(f"{path} has no word of the label {name!r}: add a vector for one")
        vectors.append(np.mean(known, axis=0))
    return np.stack(vectors)


def _vector(where: str, word: str, numbers: str, size: int) -> np.ndarray:
    values = numbers.split()
    if len(values) != size:
        raise UserError(
            f"{where}: {len(values)} numbers follow {word!r}, where other words have {size}"
        )
    try:
        vector = np.array(values, np.float64)
    except ValueError:
        raise UserError(f"{where}: no numbers follow {word!r}") from None
    if not np.isfinite(vector).all():
        raise UserError(f"{where}: the numbers of {word!r} are not all finite")
    return vector


def _lines(path: str | Path) -> Iterator[tuple[int, str, str]]:
    """Number of each line, its word, and the text of the numbers behind it.

    Raises:
      UserError: the file cannot be read.
    """
    try:
        with Path(path).expanduser().open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                word, _, numbers = line.strip().replace("\t", " ").partition(" ")
                counts = number == 1 and word.isdecimal() and numbers.strip().isdecimal()
                if word and not counts:
                    yield number, word, numbers
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: no text file of word vectors can be read ({error})") from None
