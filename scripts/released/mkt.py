"""MKT's release: sunanhe/MKT, the image tower and the tuned text tower, a file for each stage.

Together they are a CLIP under OpenAI's names: the first stage's has the image tower without
"visual." and calls its projection `projection_dist`. A stage of which there is no file starts as
the backbone is.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from mlclip_jax.clip.arrays import NamedArrays
from mlclip_jax.clip.layouts import SAME, TRANSPOSE, Row, Transform, row_of
from mlclip_jax.clip.tokenizer import Tokenizer
from mlclip_jax.errors import UserError
from mlclip_jax.labels.space import split_template
from mlclip_jax.methods.mkt import MKT
from mlclip_jax.training.checkpoint import BACKBONE_PREFIX
from released.base import Release, tower_rows

TABLE = "token_embedding.weight"
#: The local head: in every file, and in use only where a config asks for it.
HEAD = tuple(
    Row((f"projection.fc{i}.{theirs}",), f"local_head/linear{i}/{ours}", transform)
    for i in (1, 2)
    for theirs, ours, transform in (("weight", "kernel", TRANSPOSE), ("bias", "bias", SAME))
)


def stage_of(name: str) -> str:
    """The stage that an array is of."""
    return "image" if name.startswith(("visual.", "projection.")) else "prompt"


def openai_name(name: str) -> str:
    """OpenAI's name of an array of the image tower; the local head keeps its own."""
    if name.startswith("projection."):
        return name
    bare = name.removeprefix("visual.")
    return f"visual.{'proj' if bare == 'projection_dist' else bare}"


def rows_of_table(ids: Sequence[int], table: np.ndarray) -> Transform:
    """Between the file's table `[vocab w]` and the rows of some tokens."""

    def save(leaf: np.ndarray) -> list[np.ndarray]:
        whole = table.copy()
        whole[list(ids)] = leaf
        return [whole]

    return Transform(lambda arrays: arrays[0][list(ids)], save)


class MKTRelease(Release):
    """Its two files, and rows that depend on how many blocks train."""

    def join(self, files: Sequence[NamedArrays]) -> NamedArrays:
        """The arrays of both stages under OpenAI's names.

        Raises:
            UserError: two files are of the same stage.
        """
        homes: dict[str, tuple[NamedArrays, str]] = {}
        for file in files:
            prompt = TABLE in file.shapes
            names = {n if prompt else openai_name(n): n for n in file.shapes}
            if homes.keys() & names.keys():
                stage = "prompt" if prompt else "image tower"
                raise UserError(f"two files hold MKT's {stage}: give one file for each stage")
            homes |= {ours: (file, theirs) for ours, theirs in names.items()}
        shapes = {ours: file.shapes[theirs] for ours, (file, theirs) in homes.items()}

        def read(name: str) -> np.ndarray:
            file, theirs = homes[name]
            return file.read(theirs)

        return NamedArrays(shapes, read)

    def starts_as_built(self, names: Sequence[str], held: Collection[str]) -> bool:
        """Whether the arrays are of a stage of which there is no file."""
        return stage_of(names[0]) not in map(stage_of, held)

    def wrong_settings(self, shapes: Mapping[str, tuple[int, ...]], method: MKT) -> dict[str, Any]:
        """As every release's; a tuned table is for a method that tunes the prompt and its ends."""
        needed: dict[str, Any] = {}
        if TABLE in shapes:
            needed = {"tune": "prompt", "tune_ends": True}
        if "image" not in map(stage_of, shapes) and method.own("local_head") == "mlp":
            needed["local_head"] = "shared"
        wrong = {
            key: value for key, value in needed.items() if getattr(method.config, key) != value
        }
        return {**super().wrong_settings(shapes, method), **wrong}

    def rows(
        self, method: MKT, tokenizer: Tokenizer, paths: Collection[str]
    ) -> tuple[list[Row], list[Row]]:
        """The student, the local head and the template's words; and what CLIP has beside them."""
        learned = []
        for path in paths:
            if path.startswith("student/"):
                names, transform = row_of("openai", place_in_clip(path, method.shared))
                learned.append(Row(names, path, transform))
        trained = {row.names for row in learned}
        frozen = [row for row in tower_rows("text", "") if row.names != (TABLE,)]
        for path in paths:
            if path.startswith(f"{BACKBONE_PREFIX}image/"):
                names, transform = row_of("openai", path.removeprefix(BACKBONE_PREFIX))
                if names not in trained:
                    frozen.append(Row(names, path, transform))
        table = np.asarray(method.clip.text.token_embedding[...])
        words = [
            i for part in split_template(method.config.template) for i in tokenizer.encode(part)
        ]
        for path, ids in (("context/vectors", words), ("ends", [tokenizer.sot, tokenizer.eot])):
            learned.append(Row((TABLE,), path, rows_of_table(ids, table)))
        return [*learned, *HEAD], frozen


def place_in_clip(path: str, first: int) -> str:
    """The place in CLIP of a leaf of the student, whose blocks are those from `first` on."""
    place = path.replace("student/", "image/", 1)
    return re.sub(r"(?<=^image/blocks/)\d+", lambda number: str(int(number[0]) + first), place)


RELEASE = MKTRelease(
    method="mkt",
    settings={
        "variant": "released",
        "score": None,
        "template": "There is a {} in the scene",
        "student": "",
    },
    learned=(),
    frozen=(),
    unused=tuple(name for row in HEAD for name in row.names),
    prompts=lambda *_: {},
    remark="the names of labels keep the backbone's embeddings, as in the validation of the "
    "release's second stage; its inference.py takes them from the tuned table. It was trained on "
    "pixels normalised as ImageNet's and with a k of 16, and inference.py has a k of 18: set "
    "backbone.image_norm='imagenet', and method.top_k=18 to evaluate as it does",
    mend="set config.backbone to the CLIP it was trained from, or method.train_blocks to as many "
    "blocks as trained ('all' for the whole tower)",
)
