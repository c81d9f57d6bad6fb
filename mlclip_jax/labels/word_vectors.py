"""Vectors of labels from a file of word vectors, which language-only methods start from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mlclip_jax.errors import UserError
from mlclip_jax.labels.nouns import words_of
from mlclip_jax.labels.space import readable


def vector_size(path: str | Path) -> int:
    """How many numbers a word has in a file of word vectors.

    Raises:
      UserError: the file cannot be read, or its first word has no numbers.
    """
    try:
        with Path(path).open(encoding="utf-8") as lines:
            counts = [len(line.split()) - 1 for _, line in zip(range(2), lines, strict=False)]
    except (OSError, UnicodeDecodeError) as error:
        raise _unreadable(path, error) from None
    if not counts or counts[-1] < 1:
        raise UserError(f"{path}: a word and its numbers are expected on each line")
    return counts[-1]


def _unreadable(path: str | Path, error: Exception) -> UserError:
    return UserError(f"{path}: no text file of word vectors can be read ({error})")


def read_word_vectors(path: str | Path, names: Sequence[str]) -> np.ndarray:
    """The mean vector of the words of each label: float64 [c d].

    Args:
      path: text file in GloVe's form: a word and its d numbers on each line, separated by blanks
        (a first line of two numbers, as word2vec writes it, is passed over).
      names: of the c labels.

    Raises:
      UserError: the file cannot be read, a line is not of that form, or a label has no word in it.
    """
    words = [words_of(readable(name)) for name in names]
    wanted = {word for several in words for word in several}
    found: dict[str, np.ndarray] = {}
    size = None
    try:
        with Path(path).open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                word, *values = line.rstrip().split(" ")
                if number == 1 and len(values) == 1:
                    continue
                size = size or len(values)
                if word not in wanted or word in found:
                    continue
                if len(values) != size:
                    raise UserError(
                        f"{path}, line {number}: {len(values)} numbers follow {word!r}, where "
                        f"other words have {size}"
                    )
                try:
                    found[word] = np.array(values, np.float64)
                except ValueError:
                    raise UserError(f"{path}, line {number}: no numbers follow {word!r}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise _unreadable(path, error) from None
    vectors = []
    for name, several in zip(names, words, strict=True):
        known = [found[word] for word in several if word in found]
        if not known:
            raise UserError(f"{path} has no word of the label {name!r}: add a vector for one")
        vectors.append(np.mean(known, axis=0))
    return np.stack(vectors)
