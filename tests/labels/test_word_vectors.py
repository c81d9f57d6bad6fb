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


def test_words_are_runs_of_letters_and_digits(tmp_path):
    """A hyphenated word is taken whole where it has a vector; marks are no words."""
    text = "t-shirt 1 2\nt 9 9\nshirt 4 4\nvan 0 1\n, 8 8\n( 8 8\n- 8 8\n4x4 2 6\n"
    names = ("T-shirt", "shirt-van", "van, (a 4x4)", "t_shirt", "van - shirt", "shirt's van")
    found = read_word_vectors(write(tmp_path, text), names)
    np.testing.assert_array_equal(
        found, [[1, 2], [2, 2.5], [1, 3.5], [6.5, 6.5], [2, 2.5], [2, 2.5]]
    )


@pytest.mark.parametrize("head", ["", "2\t3\n", " 2  3 \n", "\n"])
def test_blanks_and_tabs_are_alike(tmp_path, head, monkeypatch):
    path = write(tmp_path, f"{head}cat\t1  2 3\ndog \t 4\t5 \t6 \n\nfox 7 8 9")
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in (path, f"~/{path.name}"):
        assert vector_size(name) == 3
        found = read_word_vectors(name, ("cat", "dog", "fox"))
        np.testing.assert_array_equal(found, [[1, 2, 3], [4, 5, 6], [7, 8, 9]])


def test_vectors_of_one_number_are_no_counts(tmp_path):
    path = write(tmp_path, "cat 0.5\n2 3\n")
    assert vector_size(path) == 1
    np.testing.assert_array_equal(read_word_vectors(path, ("cat", "2")), [[0.5], [3]])


@pytest.mark.parametrize(
    ("text", "names", "message"),
    [
        (GLOVE, ("dog",), "has no word of the label 'dog'"),
        (GLOVE + "dog 1 2\n", ("dog",), "line 5: 2 numbers follow 'dog', where other words have 3"),
        (GLOVE + "dog 1 2 x\n", ("dog",), "line 5: no numbers follow 'dog'"),
        (GLOVE + "dog 1 nan 2\n", ("dog",), r"vectors.txt, line 5: the numbers of 'dog' are not"),
        ("\n" + GLOVE + "dog 1 1e999 2\n", ("dog",), "line 6: the numbers of 'dog' are not all"),
        (", 1 2\n", ("?!",), "has no word of the label"),
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
