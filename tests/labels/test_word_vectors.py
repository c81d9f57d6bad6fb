"""Label vectors from a file of word vectors."""

from __future__ import annotations

import numpy as np
import pytest

from mlclip_jax.errors import UserError
from mlclip_jax.labels.word_vectors import read_word_vectors, vector_size

GLOVE = "the 0.1 0.2 0.3\ntraffic 1 2 3\nlight 3 2 1\ncat -1 0.5 2e-1\n"


def write(folder, text):
    path = folder / "vectors.txt"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("head", ["", "4 3\n"])
def test_labels_are_the_mean_of_their_words(tmp_path, head):
    path = write(tmp_path, head + GLOVE)
    found = read_word_vectors(path, ("traffic_light", "Cat", "the unknowable cat"))
    assert vector_size(path) == 3
    np.testing.assert_allclose(found, [[2, 2, 2], [-1, 0.5, 0.2], [-0.45, 0.35, 0.25]])


@pytest.mark.parametrize(
    ("text", "names", "message"),
    [
        (GLOVE, ("dog",), "has no word of the label 'dog'"),
        (GLOVE + "dog 1 2\n", ("dog",), "line 5: 2 numbers follow 'dog', where other words have 3"),
        (GLOVE + "dog 1 2 x\n", ("dog",), "line 5: no numbers follow 'dog'"),
    ],
)
def test_wrong_files_are_named(tmp_path, text, names, message):
    with pytest.raises(UserError, match=message):
        read_word_vectors(write(tmp_path, text), names)


def test_no_text_file(tmp_path):
    with pytest.raises(UserError, match="no text file of word vectors"):
        read_word_vectors(tmp_path / "none.txt", ("cat",))
    with pytest.raises(UserError, match="no text file of word vectors"):
        vector_size(tmp_path / "none.txt")
    with pytest.raises(UserError, match="a word and its numbers"):
        vector_size(write(tmp_path, "word\n"))
    (tmp_path / "odd.bin").write_bytes(bytes(range(128, 256)))
    with pytest.raises(UserError, match="no text file of word vectors"):
        read_word_vectors(tmp_path / "odd.bin", ("cat",))
