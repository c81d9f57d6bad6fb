r"""Tiny corpora in the raw formats of their authors, with the oddities that the real ones have.

Each function fills a folder that the reader of the same name in `mlclip_jax.data.raw` takes, images
included: at least four for training and two for testing.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from hypothesis import strategies as st
from PIL import Image

from mlclip_jax.data.manifest import Manifest
from mlclip_jax.errors import UserError
from mlclip_jax.labels import catalog

NUS_TRAIN = (
    r"actor\0001_2124494179.jpg",
    r"baby\0002_2124494180.jpg",
    r"castle\0003_2124494181.jpg",
    r"dog\0004_2124494182.jpg",
)
# One photo under two paths.
NUS_TEST = (r"bus\0018_702409954.jpg", r"man\0215_702409954.jpg", r"zoo\0007_11.jpg")
NUS_TAGS = ("nature", "sky", "blue", "water", "clouds", "red")
CUB_IMAGES = (
    "001.Black_footed_Albatross/Black_Footed_Albatross_0046_18.jpg",
    "001.Black_footed_Albatross/Black_Footed_Albatross_0009_34.jpg",
    "002.Laysan_Albatross/Laysan_Albatross_0002_1027.jpg",
    "002.Laysan_Albatross/Laysan_Albatross_0003_1033.jpg",
    "003.Sooty_Albatross/Sooty_Albatross_0040_796375.jpg",
    "003.Sooty_Albatross/Sooty_Albatross_0050_796350.jpg",
)
CUB_SPLIT = (0, 1, 1, 0, 1, 1)
VG_CLASSES = {
    "2360596.jpg": [3, 17, 421],
    "1.jpg": [0],
    "2.jpg": [199, 200],
    "3.jpg": [499],
    "4.jpg": [5, 6],
    "5.jpg": [3, 5],
}
OPEN_IMAGES_CLASSES = {
    "/m/0100nhbf": "Sprenger's tulip",
    "/m/04hgtk": "Head",
    "/m/01bqvp": "Sky",
    "/m/0rare": "Rare, and with a comma",
    "/m/0sky2": "Sky",
    "/m/0unused": "Unused",
}
OPEN_IMAGES_SEEN = ("/m/04hgtk", "/m/01bqvp", "/m/0unused")


def write(path: Path, text: str | bytes) -> None:
    """Writes a file, folders included, with the line ends that `text` has."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode() if isinstance(text, str) else text)


def jpeg(seed: int) -> bytes:
    """A small JPEG file, another one for each seed."""
    pixels = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).resize((40, 30)).save(file, "JPEG")
    return file.getvalue()


def tar(path: Path, members: Mapping[str, bytes]) -> None:
    """Writes an archive of plain files."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def nus_concepts(row: int) -> tuple[int, ...]:
    """Concepts of an image by its row in Imagelist.txt; one image has none."""
    return () if row == 1 else tuple(sorted({row, (7 * row + 3) % 81, 80 - row}))


def nuswide(
    raw: Path,
    *,
    train: Sequence[str] = NUS_TRAIN,
    test: Sequence[str] = NUS_TEST,
    end: str = "\r\n",
) -> None:
    """NUS-WIDE: backslashes, CRLF, tags that end in a tab, and lists of both splits mixed."""
    everything = sorted([*train, *test])
    lists = {"Train": train, "Test": test, "": everything}
    for split, images in lists.items():
        write(raw / f"ImageList/{split}Imagelist.txt", end.join(images) + end)
        labels = [nus_concepts(everything.index(image)) for image in images]
        for c, name in enumerate(catalog.nus().names):
            kind = f"TrainTestLabels/Labels_{name}_{split}" if split else f"AllLabels/Labels_{name}"
            text = "".join(f"{int(c in row)}\n" for row in labels)
            write(raw / f"Groundtruth/{kind}.txt", text)
        if split:
            rows = [[(i + t) % 3 == 0 for t in range(len(NUS_TAGS))] for i in range(len(images))]
            text = "".join("".join(f"{int(bit)}\t" for bit in row) + "\n" for row in rows)
            write(raw / f"NUS_WID_Tags/{split}_Tags1k.dat", text)
            # Tags, not what people judged: nothing may read them as labels.
            write(raw / f"NUS_WID_Tags/{split}_Tags81.txt", ("1 " * 81 + "\n") * len(images))
    write(raw / "NUS_WID_Tags/TagList1k.txt", end.join(NUS_TAGS) + end)
    for seed, image in enumerate(everything):
        write(raw / "Flickr" / image.replace("\\", "/"), jpeg(seed))


def mldecoder(raw: Path) -> None:
    """ML-Decoder's lists of NUS-WIDE: a split of its own, paths of either kind of download."""
    classes = {"train class": ["nature", "blue"], "test class": ["sky", "zebra"]}
    write(raw / "benchmark_81_v0.json", json.dumps(classes))
    rows = (
        "actor/0001_2124494179.jpg,\"['nature', 'sky']\",train",
        "castle/0003_2124494181.jpg,\"['nature', 'blue']\",train",
        "baby/0002_2124494180.jpg,['zebra'],train",
        "images/4_2124494182_02a15f03aa_m.jpg,\"['blue', 'sky']\",val",
        "bus/0018_702409954.jpg,['nature'],val",
        "man/0215_702409954.jpg,[],val",
        "zoo/0007_11.jpg,['zebra'],val",
    )
    write(raw / "data.csv", "\n".join(["filepath,label,split_name", *rows]))


def cub_attributes(image: int) -> set[int]:
    """Attributes, from 1, of an image by its number, from 1."""
    return {image, 5, 312 - image, 100 + 7 * image}


def cub(raw: Path) -> None:
    """CUB: attributes.txt outside of the folder, lines of six and seven fields."""
    folder = raw / "CUB_200_2011"
    numbered = list(enumerate(CUB_IMAGES, start=1))
    write(folder / "images.txt", "".join(f"{i} {name}\n" for i, name in numbered))
    split = zip(numbered, CUB_SPLIT, strict=True)
    write(folder / "train_test_split.txt", "".join(f"{i} {part}\n" for (i, _), part in split))
    rows = []
    for image, _ in numbered:
        for attribute in range(1, 313):
            present = int(attribute in cub_attributes(image))
            more = {7: " 0 0", 9: " 0"}.get(attribute, "")
            rows.append(f"{image} {attribute} {present} 3{more} 27.7080\n")
    write(folder / "attributes/image_attribute_labels.txt", "".join(rows))
    write(raw / "attributes.txt", cub_attribute_list())
    for seed, name in numbered:
        write(folder / "images" / name, jpeg(seed))


def cub_attribute_list() -> str:
    """attributes.txt, put together from the names of the catalog's own table."""
    kinds = catalog._CUB_ATTRIBUTES.items()
    names = [f"{kind}::{value}" for kind, values in kinds for value in values.split(", ")]
    return "".join(f"{i} has_{name}\n" for i, name in enumerate(names, start=1))


def vg(raw: Path) -> None:
    """VG-200: images in two folders, classes beyond 200, a list without a last line end."""
    train, test = list(VG_CLASSES)[:4], list(VG_CLASSES)[4:]
    write(raw / "train_list_500.txt", "\n".join(train))
    write(raw / "test_list_500.txt", "\n".join(test) + "\n")
    index = ",".join(f'"{name}":{classes}' for name, classes in VG_CLASSES.items())
    write(raw / "vg_category_500_labels_index.json", f"{{{index}}}")
    for seed, name in enumerate(VG_CLASSES):
        write(raw / ("VG_100K", "VG_100K_2")[seed % 2] / name, jpeg(seed))


def openimages(raw: Path, *, top: str | None = "\ufeff1\r\n0\r\n") -> None:
    """Open Images: verified by people and by the crowd, a BOM, two classes of one name.

    Args:
      raw: the folder.
      top: text of top_400_unseen.csv; None leaves it out.
    """
    descriptions = (f'{mid},"{name}"\n' for mid, name in OPEN_IMAGES_CLASSES.items())
    write(
        raw / "class-descriptions.csv",
        "".join(d if d.count(",") > 1 else d.replace('"', "") for d in descriptions),
    )
    write(raw / "classes-trainable.txt", "".join(f"{mid}\n" for mid in OPEN_IMAGES_SEEN))
    if top is not None:
        write(raw / "top_400_unseen.csv", top)
    rows = {
        "train": [
            "000026e7ee790996,verification,/m/04hgtk,0",
            "000026e7ee790996,crowdsource-verification,/m/01bqvp,1",
            "fffe000000000001,verification,/m/04hgtk,1",
            "0000000000000002,verification,/m/01bqvp,1.0",
            "0000000000000003,verification,/m/0100nhbf,1",
            "0000000000000003,verification,/m/04hgtk,1",
        ],
        "validation": ["00000000000000aa,verification,/m/04hgtk,1"],
        "test": [
            "00000000000000b1,verification,/m/0rare,1",
            "00000000000000b1,verification,/m/01bqvp,0",
            "00000000000000b2,verification,/m/0sky2,0",
            "00000000000000b2,verification,/m/0rare,0.0",
            "00000000000000b3,verification,/m/01bqvp,1",
            "00000000000000b3,verification,/m/0100nhbf,1",
        ],
    }
    seed = 0
    for part, body in rows.items():
        text = "".join(f"{row}\n" for row in ["ImageID,Source,LabelName,Confidence", *body])
        write(raw / f"{part}-annotations-human-imagelabels.csv", text)
        for image in dict.fromkeys(row.split(",")[0] for row in body):
            write(raw / part / f"{image}.jpg", jpeg(seed := seed + 1))


def imagenet(raw: Path) -> None:
    """ImageNet-1k with three classes: a folder, an archive, and an archive left after unpacking."""
    write(
        raw / "synset_words.txt",
        "n01440764 tench, Tinca tinca\nn02012849 crane\nn03126707 crane\n",
    )
    for part, sizes in {"train": (3, 2, 2), "val": (1, 1, 1)}.items():
        tench, bird, machine = (
            {f"{s}_{10026 + i}.JPEG": jpeg(100 * k + i) for i in range(size)}
            for k, (s, size) in enumerate(
                zip(("n01440764", "n02012849", "n03126707"), sizes, strict=True)
            )
        )
        for name, content in tench.items():
            write(raw / part / "n01440764" / name, content)
        tar(raw / part / "n01440764.tar", {"old.JPEG": b"not read"})
        tar(raw / part / "n02012849.tar", {f"./{name}": c for name, c in bird.items()})
        for name, content in machine.items():
            write(raw / part / "n03126707" / name, content)
        write(raw / part / "n03126707" / "Thumbs.db", b"")


def imagenet21k(raw: Path) -> None:
    """ImageNet-21k with two classes, of more words than that; one has 102 images."""
    write(
        raw / "words.txt",
        "n00001740\tentity\nn00004475\torganism, being\nn00005787\tbenthos\n",
    )
    tar(raw / "n00004475.tar", {f"n00004475_{i}.JPEG": jpeg(i % 3) for i in (9, 10, 6590)})
    for i in range(102):
        write(raw / "n00005787" / f"n00005787_{i}.JPEG", jpeg(i % 3))


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """`content` with a piece cut out, put in, put in twice, or everything after it cut off."""
    start = draw(st.integers(0, len(content)))
    stop = draw(st.integers(start, min(len(content), start + 60)))
    new = draw(
        st.one_of(
            st.binary(max_size=8),
            st.text(max_size=8).map(str.encode),
            st.sampled_from([b"", b"\n", b"\r\n", b" 1", b",1", b"-1", b"1e3", b"[", b"\xff"]),
            st.just(content[start:stop] * 2),
        )
    )
    return content[:start] + new + draw(st.sampled_from([content[stop:], b""]))


def check_damage(data: st.DataObject, path: Path, read: Callable[[], Manifest]) -> None:
    """Damages the file at `path`: reading either still works or raises what a user can mend."""
    good = path.read_bytes()
    path.write_bytes(data.draw(damaged(good)))
    try:
        manifest = read()
    except UserError as error:
        assert len(str(error)) < 1000 and "\n" not in str(error)
    else:
        assert len(manifest) == len(set(manifest.keys.tolist()))
    finally:
        path.write_bytes(good)
