"""ImageNet-1k and 21k (Deng et al., 2009; Russakovsky et al., 2015), one label an image.

    train/n01440764/n01440764_10026.JPEG, val/...   1k; each class a folder, or an n01440764.tar
    synset_words.txt or LOC_synset_mapping.txt      n01440764 tench, Tinca tinca
    n00004475/n00004475_6590.JPEG                   21k, the same at the top of the raw folder
    words.txt                                       n00004475<tab>organism, being

Classes are in the order of their ids, images in that of their names. A folder goes before an
archive of the same class. Archives are read where they are, never unpacked; a key in one is the
path of the archive and the name inside it ("n00004475.tar/n00004475_6590.JPEG").
"""

from __future__ import annotations

import functools
import re
import tarfile
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mlclip_jax.data.manifest import Manifest, Rows
from mlclip_jax.data.raw.common import check_part, image_key, is_text, lines, malformed
from mlclip_jax.errors import UserError
from mlclip_jax.labels.space import LabelSpace

# The last: ADDS's 100 images, or all where there are fewer, of each of the first 15,000 classes.
PARTS: tuple[str, ...] = ("train", "val", "21k", "21k_15000x100")
EXPECTED: Mapping[str, Mapping[str, int]] = {
    "train": {"images": 1_281_167},
    "val": {"images": 50_000},
    "21k": {"images": 14_197_122},
    "21k_15000x100": {},
}

_WORDS_1K = ("synset_words.txt", "LOC_synset_mapping.txt")
_SYNSET = re.compile(r"n\d{8}")
_SUFFIXES = {".jpeg", ".jpg", ".png"}
_TAR = ".tar/"


def read(raw: Path, part: str) -> Manifest:
    """The images of a part, each with the one class that its folder or archive stands for.

    The labels of 1k are all of its file of words; those of 21k are the classes that are there.

    Args:
      raw: folder of train/ and val/, or of the classes of 21k, and of the file of words.
      part: of `PARTS`.

    Returns:
      A manifest over a space whose names are the whole lists of synonyms ("tench, Tinca tinca"),
      with the id as one more where several classes have the same ("crane, n03126707"), whose
      prompt names are the first synonyms and whose ids are the WordNet ids.

    Raises:
      UserError: no words of a class, a class missing (1k) or without an image, or an archive that
        is damaged, has members that are no plain files or point outside.
    """
    check_part("imagenet", part, PARTS)
    raw = Path(raw)
    large = part.startswith("21k")
    folder = raw if large else raw / part
    words_path = raw / "words.txt" if large else _first_file(raw, _WORDS_1K)
    words, places = _words(words_path), _places(folder)
    for synset, place in places.items():
        if synset not in words:
            raise UserError(f"{place}: no words for {synset} in {words_path}")
    synsets = sorted(places if large else words)
    most = None
    if part == "21k_15000x100":
        synsets, most = synsets[:15_000], 100
    keys, counts = [], []
    for synset in synsets:
        if synset not in places:
            raise UserError(
                f"{folder} has neither a folder {synset} nor a {synset}.tar, but {words_path.name} "
                "has that class: each class needs its images in one of these"
            )
        names = sorted(_images(places[synset]))[:most]
        if not names:
            raise UserError(f"{places[synset]} holds no images: unpack or download it again")
        prefix = places[synset].relative_to(raw).as_posix()
        keys.append(np.array([f"{prefix}/{name}" for name in names], np.str_))
        counts.append(len(names))
    classes = np.repeat(np.arange(len(synsets), dtype=np.int32), counts)
    return Manifest(
        name=f"imagenet/{part}",
        space=_space(synsets, words),
        keys=np.concatenate(keys),
        positives=Rows(np.arange(len(classes) + 1), classes),
    )


def label_space(raw: Path) -> LabelSpace:
    """The classes of 1k, from the file of words alone, as `read` has them.

    Raises:
      UserError: there is no such file, or a line of it is malformed.
    """
    words = _words(_first_file(Path(raw), _WORDS_1K))
    return _space(sorted(words), words)


def open_image(raw: Path, key: str) -> bytes:
    """The bytes of an image file, from its folder or archive.

    Raises:
      UserError: the archive is damaged or lacks the image.
      OSError: the file cannot be read.
    """
    if _TAR not in key:
        return (Path(raw) / key).read_bytes()
    archive, _, name = key.partition(_TAR)
    path = Path(raw) / f"{archive}.tar"
    if (place := _index(path).find(name)) is None:
        raise UserError(f"{path} has no member {name!r}: prepare the data again")
    with path.open("rb") as file:
        file.seek(place[0])
        return file.read(place[1])


@dataclass(frozen=True)
class _Index:
    """Where the m files of an uncompressed archive are.

    Attributes:
      names: UTF-8 [m], ascending.
      places: int64 [m 2], offset and size.
    """

    names: np.ndarray
    places: np.ndarray

    def find(self, name: str) -> tuple[int, int] | None:
        """Offset and size of a file; None where there is no such file."""
        wanted = name.encode()
        row = int(np.searchsorted(self.names, wanted))
        if row == len(self.names) or self.names[row] != wanted:
            return None
        offset, size = self.places[row].tolist()
        return offset, size


def _first_file(raw: Path, names: tuple[str, ...]) -> Path:
    for name in names:
        if (raw / name).is_file():
            return raw / name
    raise UserError(f"{raw} has no {' or '.join(names)}, which names the classes: put it there")


def _words(path: Path) -> dict[str, str]:
    """The synonyms of each class by id, from lines of id, tab or space, synonyms."""
    words: dict[str, str] = {}
    for line, text in lines(path):
        if not text.strip():
            continue
        synset, _, names = text.strip().replace("\t", " ", 1).partition(" ")
        if not _SYNSET.fullmatch(synset) or not names.strip(" ,"):
            raise malformed(path, line, f"{text[:80]!r} should be like 'n01440764 tench'")
        if synset in words:
            raise malformed(path, line, f"class {synset} stands there a second time")
        words[synset] = names.strip()
    if not words:
        raise UserError(f"{path} holds no classes")
    return words


def _places(folder: Path) -> dict[str, Path]:
    """The folder, or else the archive, of each class by id."""
    if not folder.is_dir():
        raise UserError(f"no folder {folder}: unpack the images there, a folder for each class")
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.is_dir() and _SYNSET.fullmatch(path.name):
            found[path.name] = path
        elif path.suffix == ".tar" and _SYNSET.fullmatch(path.stem):
            found.setdefault(path.stem, path)
    if not found:
        raise UserError(
            f"{folder} has no class, neither folders like n01440764 nor archives like "
            "n01440764.tar: images without them have to be sorted into such folders"
        )
    return found


def _images(place: Path) -> Iterator[str]:
    """Names of the images in a folder or archive, relative to it."""
    archived = place.is_file()
    names = map(bytes.decode, _index(place).names.tolist()) if archived else _names(place)
    return (name for name in names if Path(name).suffix.lower() in _SUFFIXES)


def _names(folder: Path) -> Iterator[str]:
    """What is in a folder, by name."""
    for path in folder.iterdir():
        if not is_text(path.name):
            raise UserError(f"{folder}: the name {path.name!r} is no Unicode text, rename the file")
        yield path.name


def _index(path: Path) -> _Index:
    """The files of an archive, scanned once a process: training shuffles them (1k: 47 MiB)."""
    status = path.stat()
    return _read_index(path, status.st_mtime_ns, status.st_size)


@functools.cache
def _read_index(path: Path, changed: int, size: int) -> _Index:
    """`_index` of the archive in the state that `changed` and `size` are from."""
    found: dict[str, tuple[int, int]] = {}
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                where = f"member {member.name[:80]!r}"
                if member.isdir():
                    continue
                if not member.isreg() or member.issparse():
                    raise malformed(path, where, "a link or device, not a plain file")
                name = image_key(path, where, member.name)
                if name in found:
                    raise malformed(path, where, "it is there a second time")
                found[name] = member.offset_data, member.size
            # tarfile takes a damaged header for the end, which should be a block of zeros.
            archive.fileobj.seek(archive.offset)
            if archive.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise tarfile.ReadError("it ends without an end mark")
    except UserError:
        raise
    except (tarfile.TarError, ValueError, OverflowError) as error:  # the latter from wild numbers
        raise UserError(f"{path} is no whole tar archive ({error}): download it again") from error
    names = sorted(found)  # as their UTF-8 is
    places = np.array([found[name] for name in names], np.int64).reshape(-1, 2)
    return _Index(np.array([name.encode() for name in names], np.bytes_), places)


def _space(synsets: list[str], words: Mapping[str, str]) -> LabelSpace:
    """The classes in the order given."""
    times = Counter(words[synset] for synset in synsets)
    return LabelSpace(
        names=tuple(f"{words[s]}, {s}" if times[words[s]] > 1 else words[s] for s in synsets),
        prompt_names=tuple(words[s].split(",")[0].strip() for s in synsets),
        ids=tuple(synsets),
        name="imagenet",
    )
