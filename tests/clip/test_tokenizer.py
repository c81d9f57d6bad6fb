"""CLIP's byte-pair encoding."""

from __future__ import annotations

import gzip
import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

from mlclip_jax.clip.tokenizer import Tokenizer
from mlclip_jax.errors import UserError

GOLDEN = Path(__file__).parents[1] / "golden" / "tokenizer.npz"
MERGES = ("c a", "ca t</w>", "d o", "do g</w>", "p h")


def bytes_to_letters() -> dict[int, str]:
    """The printable stand-ins of the 256 bytes, in the vocabulary's order."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    letters = [chr(b) for b in printable] + [chr(256 + i) for i in range(len(others))]
    return dict(zip(printable + others, letters, strict=True))


def write_vocabulary(folder: Path, merges: list[str]) -> None:
    """vocab.json and merges.txt as Hugging Face has them, from a list of merges."""
    letters = list(bytes_to_letters().values())
    words = letters + [letter + "</w>" for letter in letters]
    words += ["".join(merge.split()) for merge in merges]
    words += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {word: i for i, word in enumerate(words)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    text = "\n".join(["#version: 0.2", *merges]) + "\n"
    (folder / "merges.txt").write_text(text, encoding="utf-8")


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("small")
    write_vocabulary(folder, list(MERGES))
    return folder


def test_words_are_merged_and_rows_zero_padded(small):
    tokenizer = Tokenizer.from_folder(small, context_length=8)
    cat, dog, ph = 512 + 1, 512 + 3, 512 + 4
    assert (tokenizer.sot, tokenizer.eot, tokenizer.vocab_size) == (517, 518, 519)
    assert tokenizer.encode("Cat  DOG") == [cat, dog]
    assert tokenizer.encode("") == []
    rows = tokenizer(["a cat", "", "ph"])
    assert rows.dtype == np.int32
    a = 256 + ord("a") - ord("!")
    np.testing.assert_array_equal(rows[0], [517, a, cat, 518, 0, 0, 0, 0])
    np.testing.assert_array_equal(rows[1], [517, 518, 0, 0, 0, 0, 0, 0])
    assert ph not in rows[2]  # "h" ends the word here, so the inner merge does not apply
    np.testing.assert_array_equal(tokenizer("a cat"), rows[:1])
    assert tokenizer([]).shape == (0, 8)


def test_single_file_equals_two_files(small, tmp_path):
    from transformers import CLIPTokenizerFast

    backend = CLIPTokenizerFast.from_pretrained(str(small))
    backend.backend_tokenizer.save(str(tmp_path / "tokenizer.json"))
    text = "a photo of a dog, cats & don't"
    one, two = Tokenizer.from_folder(tmp_path), Tokenizer.from_folder(small)
    np.testing.assert_array_equal(one(text), two(text))
    assert (one.sot, one.eot, one.vocab_size) == (two.sot, two.eot, two.vocab_size)


def test_overlong_text_is_an_error_unless_truncated(small):
    tokenizer = Tokenizer.from_folder(small, context_length=6)
    assert tokenizer("cat dog cat dog")[0, -1] == tokenizer.eot
    with pytest.raises(UserError, match=r"'cat dog cat dog cat' has 7 tokens.*reads 6"):
        tokenizer(["cat", "cat dog cat dog cat"])
    rows = tokenizer(["cat", "cat dog cat dog cat"], truncate=True)
    np.testing.assert_array_equal(rows[1], [517, 513, 515, 513, 515, 518])


def test_missing_files_are_named(tmp_path):
    (tmp_path / "vocab.json").write_text("{}")
    with pytest.raises(UserError) as error:
        Tokenizer.from_folder(tmp_path)
    for part in (str(tmp_path), "tokenizer.json", "vocab.json", "merges.txt", "copy them"):
        assert part in str(error.value)


def test_damaged_files_are_named(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{]")
    with pytest.raises(UserError, match="cannot be read") as error:
        Tokenizer.from_folder(tmp_path)
    assert str(tmp_path) in str(error.value)


# --- the full vocabulary, out of open_clip's package ------------------------------------------

# Hugging Face's tokenizer does not run ftfy and html.unescape first, as OpenAI's does.
DIFFERENT = {"a &amp; b   c\n d": "a & amp ; b c d"}


@pytest.fixture(scope="module")
def full(tmp_path_factory) -> Tokenizer:
    package = importlib.util.find_spec("open_clip")
    source = Path(package.submodule_search_locations[0]) / "bpe_simple_vocab_16e6.txt.gz"
    lines = gzip.decompress(source.read_bytes()).decode("utf-8").split("\n")
    folder = tmp_path_factory.mktemp("full")
    write_vocabulary(folder, lines[1 : 49152 - 256 - 2 + 1])
    return Tokenizer.from_folder(folder)


@pytest.mark.parity
def test_equals_openai(full):
    golden = np.load(GOLDEN)
    assert (full.sot, full.eot, full.vocab_size) == (49406, 49407, 49408)
    cases = zip(golden["in/strings"].tolist(), golden["out/tokens"], strict=True)
    different = [text for text, ids in cases if not np.array_equal(full(text)[0], ids)]
    assert different == list(DIFFERENT)


@pytest.mark.parity
def test_differences_from_openai_are_these(full):
    for text, spelt_out in DIFFERENT.items():
        assert full.encode(text) == full.encode(spelt_out)
    # The ligature stays one character; OpenAI's tokenizer reads "find".
    assert full.encode("\ufb01nd") != full.encode("find")
    # Full-width letters stay themselves; OpenAI's reads "dog".
    assert full.encode("\uff44\uff4f\uff47") != full.encode("dog")


@pytest.mark.parity
def test_name_lengths(full):
    golden = np.load(GOLDEN)
    lengths = [len(full.encode(name.replace("_", " "))) for name in golden["in/class_names"]]
    np.testing.assert_array_equal(lengths, golden["out/name_lens_encode_underscore_to_space"])


@pytest.mark.parity
def test_truncation_equals_openai(full):
    golden = np.load(GOLDEN)
    text = golden["in/long_string"].item()
    np.testing.assert_array_equal(
        full(text, truncate=True), golden["out/long_tokens_truncate_true"]
    )
    with pytest.raises(UserError, match="92 tokens"):
        full(text)
