"""ImageNet-1k and 21k, from folders and from archives."""

from __future__ import annotations

import io
import os
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlclip_jax.data.manifest import Rows
from mlclip_jax.data.raw import imagenet
from mlclip_jax.errors import UserError

sys.path.insert(0, str(Path(__file__).parents[1]))
import raw_folders_more as folders

WORDS = "synset_words.txt"
BIRD = "train/n02012849.tar"


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    """One folder for all tests, which leave it as it was."""
    folder = tmp_path_factory.mktemp("image net")
    folders.imagenet(folder)
    return folder


@pytest.fixture
def own(tmp_path):
    """A folder that the test may change."""
    folders.imagenet(tmp_path)
    return tmp_path


def test_classes_from_folders_and_archives(raw):
    manifest = imagenet.read(raw, "train")
    assert manifest.keys.tolist() == [
        "train/n01440764/n01440764_10026.JPEG",
        "train/n01440764/n01440764_10027.JPEG",
        "train/n01440764/n01440764_10028.JPEG",
        "train/n02012849.tar/n02012849_10026.JPEG",
        "train/n02012849.tar/n02012849_10027.JPEG",
        "train/n03126707/n03126707_10026.JPEG",
        "train/n03126707/n03126707_10027.JPEG",
    ]
    assert manifest.positives == Rows.from_lists([[0]] * 3 + [[1]] * 2 + [[2]] * 2)
    assert len(imagenet.read(raw, "val")) == 3


def test_names_are_the_words_and_differ(raw):
    """A name that two classes share has the id as one more synonym."""
    space = imagenet.read(raw, "train").space
    assert space.ids == ("n01440764", "n02012849", "n03126707")
    assert space.names == ("tench, Tinca tinca", "crane, n02012849", "crane, n03126707")
    assert space.prompt_names == ("tench", "crane", "crane")
    assert imagenet.read(raw, "val").space == space


def test_images_are_read_from_folders_and_archives(raw):
    manifest = imagenet.read(raw, "train")
    contents = [imagenet.open_image(raw, key) for key in manifest.keys.tolist()]
    sizes = ((0, 3), (100, 2), (200, 2))
    assert contents == [folders.jpeg(start + i) for start, n in sizes for i in range(n)]
    with pytest.raises(UserError, match=r"n02012849.tar has no member 'other.JPEG'"):
        imagenet.open_image(raw, "train/n02012849.tar/other.JPEG")


def test_each_archive_is_scanned_once(tmp_path, monkeypatch):
    """However many there are, and in whatever order their images are read; changed ones again."""
    opened = []
    scan = tarfile.open
    synsets = [f"n{i:08d}" for i in range(1, 81)]
    folders.write(tmp_path / WORDS, "".join(f"{s} word {s}\n" for s in synsets))
    for s in synsets:
        members = {f"{s}_{i}.JPEG": f"{s} {i}".encode() for i in (9, 10)}
        folders.tar(tmp_path / f"train/{s}.tar", members)
    monkeypatch.setattr(tarfile, "open", lambda path, mode: opened.append(path) or scan(path, mode))
    keys = imagenet.read(tmp_path, "train").keys.tolist()
    for key in np.random.default_rng(0).permutation(keys).tolist():
        name = key.rpartition("/")[2].removesuffix(".JPEG")
        assert imagenet.open_image(tmp_path, key) == name.replace("_", " ").encode()
    assert len(opened) == len(set(opened)) == 80
    monkeypatch.undo()
    folders.tar(tmp_path / f"train/{synsets[0]}.tar", {f"{synsets[0]}_9.JPEG": b"another"})
    assert imagenet.open_image(tmp_path, keys[1]) == b"another"


def test_kaggles_file_of_words(own):
    (own / WORDS).rename(own / "LOC_synset_mapping.txt")
    assert len(imagenet.read(own, "train").space) == 3
    (own / "LOC_synset_mapping.txt").unlink()
    with pytest.raises(UserError, match=r"has no synset_words.txt or LOC_synset_mapping.txt"):
        imagenet.read(own, "train")


def test_21k_has_the_classes_that_are_there(tmp_path):
    folders.imagenet21k(tmp_path)
    manifest = imagenet.read(tmp_path, "21k")
    assert manifest.space.names == ("organism, being", "benthos")
    assert len(manifest) == 105
    # By name, not by number.
    names = [key.rpartition("/")[2] for key in manifest.keys[:3].tolist()]
    assert names == ["n00004475_10.JPEG", "n00004475_6590.JPEG", "n00004475_9.JPEG"]
    assert imagenet.open_image(tmp_path, str(manifest.keys[2])) == folders.jpeg(0)
    some = imagenet.read(tmp_path, "21k_15000x100")
    assert len(some) == 103 and some.space == manifest.space
    assert some.keys[-1] == "n00005787/n00005787_97.JPEG"


def test_example_line_of_words(tmp_path):
    folders.imagenet21k(tmp_path)
    assert "n00004475\torganism, being\n" in (tmp_path / "words.txt").read_text()


def link(name, kind, target):
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, target
    return member


@pytest.mark.parametrize(
    ("member", "message"),
    [
        (tarfile.TarInfo("../n02012849_1.JPEG"), "member '../n02.* no path of an image"),
        (tarfile.TarInfo("/etc/n02012849_1.JPEG"), "member '/etc/n02.* no path of an image"),
        (tarfile.TarInfo("a/../../b.JPEG"), "no path of an image"),
        (tarfile.TarInfo("..\\b.JPEG"), "no path of an image"),
        (link("a.JPEG", tarfile.SYMTYPE, "/etc/passwd"), "member 'a.JPEG': a link or device"),
        (link("a.JPEG", tarfile.LNKTYPE, "../b.JPEG"), "member 'a.JPEG': a link or device"),
        (tarfile.TarInfo("n02012849_10026.JPEG"), "'n02012849_10026.JPEG': .* a second time"),
    ],
)
def test_members_that_no_archive_should_have(own, member, message):
    with tarfile.open(own / BIRD, "a") as archive:
        archive.addfile(member, io.BytesIO())
    with pytest.raises(UserError, match=f"n02012849.tar, .*{message}"):
        imagenet.read(own, "train")


@pytest.mark.parametrize("kept", [0, 100, 512, 700, 1100])
def test_an_archive_that_is_cut_off(own, kept):
    """At the start, in a header, after one, in an image, and in the header of the second."""
    content = (own / BIRD).read_bytes()
    (own / BIRD).write_bytes(content[: kept if kept < 1100 else content.index(b"10027") + 20])
    with pytest.raises(UserError, match=r"n02012849.tar is no whole tar archive .* download"):
        imagenet.read(own, "train")


def test_an_archive_with_a_damaged_header(own):
    content = (own / BIRD).read_bytes()
    (own / BIRD).write_bytes(content.replace(b"_10027.JPEG", b"_1?027.JPEG"))
    with pytest.raises(UserError, match=r"n02012849.tar is no whole tar archive"):
        imagenet.read(own, "train")


def test_an_archive_with_a_wild_number(own):
    """The size of a member as a number that no file can be sought to."""
    with tarfile.open(own / BIRD) as archive:
        header = bytearray(archive.getmembers()[1].tobuf(tarfile.GNU_FORMAT))
    header[124:136] = b"\x80" + b"\x7f" * 11
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    (own / BIRD).write_bytes(bytes(header) + bytes(1024))
    with pytest.raises(UserError, match=r"n02012849.tar is no whole tar archive"):
        imagenet.read(own, "train")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("tench\n", f"{WORDS}, line 1: 'tench' should be like"),
        ("n01440764 tench\nn01440764 x\n", f"{WORDS}, line 2: class n01440764 .* a second time"),
        ("n01440764 tench\n\nn0144076 x\n", f"{WORDS}, line 3: 'n0144076 x' should be like"),
        ("n01440764 \n", f"{WORDS}, line 1: "),
        ("\n", f"{WORDS} holds no classes"),
        ("n01440764 tench\n", f"n02012849.tar: no words for n02012849 in .*{WORDS}"),
    ],
)
def test_words_that_are_malformed_are_named(own, content, message):
    folders.write(own / WORDS, content)
    with pytest.raises(UserError, match=message):
        imagenet.read(own, "train")


def test_a_name_that_is_no_text(own):
    (own / "train/n03126707" / os.fsdecode(b"\xff.JPEG")).touch()
    with pytest.raises(UserError, match=r"train/n03126707: the name .* rename the file") as caught:
        imagenet.read(own, "train")
    str(caught.value).encode()  # can be printed


def test_a_class_without_images(own):
    for path in (own / "train/n03126707").iterdir():
        path.unlink()
    with pytest.raises(UserError, match=r"train/n03126707 holds no images"):
        imagenet.read(own, "train")
    (own / "train/n03126707").rmdir()
    with pytest.raises(UserError, match=r"neither a folder n03126707 nor a n03126707.tar"):
        imagenet.read(own, "train")


def test_images_that_are_not_sorted_into_classes(tmp_path):
    folders.write(tmp_path / WORDS, "n01440764 tench, Tinca tinca\n")
    with pytest.raises(UserError, match=r"no folder .*val"):
        imagenet.read(tmp_path, "val")
    folders.write(tmp_path / "val/ILSVRC2012_val_00000001.JPEG", b"")
    with pytest.raises(UserError, match=r"val has no class.* have to be sorted into such folders"):
        imagenet.read(tmp_path, "val")


@settings(max_examples=60)
@given(file=st.sampled_from([BIRD, WORDS]), data=st.data())
def test_any_damage_is_read_or_named(raw, file, data):
    folders.check_damage(data, raw / file, lambda: imagenet.read(raw, "train"))


@settings(max_examples=25)
@given(
    names=st.sets(
        st.text(st.characters(codec="utf-8", categories=["L", "N"]), min_size=1, max_size=120),
        min_size=1,
        max_size=5,
    )
)
def test_round_trip_of_an_archive(raw, names):
    """Any names, long ones and other scripts included."""
    path = raw / BIRD
    good = path.read_bytes()
    images = {f"a b/{name}.jpg": name.encode() for name in names}
    try:
        folders.tar(path, images)
        manifest = imagenet.read(raw, "train")
        keys = [key for key in manifest.keys.tolist() if ".tar/" in key]
        assert keys == sorted(f"{BIRD}/{name}" for name in images)
        for name, content in images.items():
            assert imagenet.open_image(raw, f"{BIRD}/{name}") == content
    finally:
        path.write_bytes(good)
