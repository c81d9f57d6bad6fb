"""Readers of the corpora as their authors publish them: annotations only, no image is opened."""

from __future__ import annotations

from collections.abc import Mapping

_COCO = ("train2014", "val2014", "train2017", "val2017")
_VOC = ("train2012", "val2012", "trainval2012", "trainval2007", "test2007")
#: By corpus the parts that are usually prepared, and a file or folder that each one needs ("*":
#: anything), by which a raw folder is known.
NEEDED: Mapping[str, Mapping[str, str]] = {
    "coco": {part: f"annotations/instances_{part}.json" for part in _COCO},
    "voc": {part: f"VOCdevkit/VOC{part[-4:]}/ImageSets/Main/{part[:-4]}.txt" for part in _VOC},
    "nuswide": {
        "test": "Groundtruth/TrainTestLabels",
        "all": "Groundtruth/AllLabels",
        "train_tags": "NUS_WID_Tags/Train_Tags1k.dat",
        "test_tags": "NUS_WID_Tags/Test_Tags1k.dat",
    },
    "cub": dict.fromkeys(("train", "test"), "CUB_200_2011"),
    "vg": {part: f"{part}_list_500.txt" for part in ("train", "test")},
    "openimages": {part: part for part in ("train", "validation", "test")},
    "imagenet": {"train": "train", "val": "val", "21k_15000x100": "words.txt"},
    "custom": dict.fromkeys(("train", "validation", "test"), "labels.*"),
}
