"""CLIP weights of others, without PyTorch: find, read, check, load; and save for others.

Three layouts are read (the tables are in `layouts`): Hugging Face `model.safetensors` (one file
or shards), Hugging Face `flax_model.msgpack`, and OpenAI's names in safetensors as open_clip and
timm publish them. Nothing is ever unpickled.

    clip = resolve("ViT-B/16").load()          # or a folder, or "org/name" on the hub
    save_hf(clip, "my_clip", tokenizer_from="folder/with/tokenizer")
"""

from __future__ import annotations

import hashlib
import json
import shutil
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import jax.numpy as jnp
import numpy as np

from mlclip_jax.clip import config_files
from mlclip_jax.clip.arrays import (
    NamedArrays,
    fill,
    from_state_dict,
    open_msgpack,
    open_safetensors,
    to_state_dict,
)
from mlclip_jax.clip.config import CLIPConfig
from mlclip_jax.clip.layouts import detect_layout
from mlclip_jax.clip.model import CLIP
from mlclip_jax.clip.tokenizer import TOKENIZER_FILES, Tokenizer
from mlclip_jax.errors import UserError

if TYPE_CHECKING:
    from numpy.typing import DTypeLike

__all__ = [
    "HUB_IDS",
    "MINIS",
    "Checkpoint",
    "from_state_dict",
    "open_folder",
    "resolve",
    "save_hf",
    "save_openai",
    "to_state_dict",
]

#: Where the small CLIPs that ship with the package live.
PRETRAINED = Path(__file__).parent / "pretrained"
MINIS = ("clip-mini", "clip-mini-rn")

#: Hub folders of the published sizes.
HUB_IDS = {
    "RN50": "timm/resnet50_clip.openai",
    "RN101": "timm/resnet101_clip.openai",
    "RN50x4": "timm/resnet50x4_clip.openai",
    "RN50x16": "timm/resnet50x16_clip.openai",
    "RN50x64": "timm/resnet50x64_clip.openai",
    "ViT-B/32": "openai/clip-vit-base-patch32",
    "ViT-B/16": "openai/clip-vit-base-patch16",
    "ViT-L/14": "openai/clip-vit-large-patch14",
    "ViT-L/14-336": "openai/clip-vit-large-patch14-336",
}

# In order of preference: a timm folder's model.safetensors holds timm's image tower alone, its
# open_clip_model.safetensors the whole CLIP.
_WEIGHT_FILES = ("open_clip_model.safetensors", "model.safetensors", "flax_model.msgpack")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


# --- checkpoints ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Checkpoint:
    """A CLIP on disk: what was asked for, where it is, its configuration and its weight files."""

    source: str
    folder: Path
    config: CLIPConfig
    files: tuple[Path, ...]
    layout: str

    def digest(self) -> str:
        """SHA-256 (hexadecimal) of the weight files' bytes, in the order of their names."""
        digest = hashlib.sha256()
        for path in self.files:
            with path.open("rb") as file:
                while chunk := file.read(1 << 22):
                    digest.update(chunk)
        return digest.hexdigest()

    def load(
        self,
        *,
        dtype: DTypeLike = jnp.float32,
        image_size: int | None = None,
        remat: bool = False,
        class_chunk: int | None = None,
    ) -> CLIP:
        """The model with its weights.

        Args:
            dtype: compute dtype; parameters are float32 whatever the file stores.
            image_size: pixels per side; the image tower's positional embedding is interpolated.
            remat: recompute blocks in the backward pass instead of keeping their activations.
            class_chunk: most prompts that the text tower encodes at a time; None: all at once.

        Raises:
            UserError: weights and configuration do not fit (every difference is listed), or the
                image size is no multiple of the tower's stride.
        """
        wanted = self.config if image_size is None else self.config.at(image_size)
        arrays = _open(self.files, self.layout)
        folder = str(self.folder)
        settings = {"remat": remat, "class_chunk": class_chunk}
        return fill(self.config, self.layout, arrays, dtype, folder, wanted, **settings)

    def tokenizer(self) -> Tokenizer:
        """The tokenizer in the same folder.

        Raises:
            UserError: it is missing, damaged, or has more tokens than the text tower.
        """
        tokenizer = Tokenizer.from_folder(self.folder, self.config.text.context_length)
        if tokenizer.vocab_size > self.config.text.vocab_size:
            raise UserError(
                f"the tokenizer in {self.folder} has {tokenizer.vocab_size} tokens and the text "
                f"tower only {self.config.text.vocab_size}: they do not belong together; fetch "
                "both from the same place"
            )
        return tokenizer


def _open(files: tuple[Path, ...], layout: str) -> NamedArrays:
    return open_msgpack(files[0]) if layout == "hf_flax" else open_safetensors(files)


def resolve(source: str | Path, *, revision: str | None = None) -> Checkpoint:
    """Finds a CLIP: a packaged mini, a folder, a preset's name, or a hub id "org/name".

    Args:
        source: looked up in that order.
        revision: branch, tag or commit, for sources on the hub.

    Raises:
        UserError: nothing is found, or the folder holds no weights that can be read.
    """
    name = str(source)
    if name in MINIS:
        return open_folder(PRETRAINED / name, name)
    if Path(name).is_dir():
        return open_folder(Path(name), name)
    hub_id = HUB_IDS.get(name, name)
    if hub_id.count("/") != 1 or hub_id.startswith((".", "/", "~")):
        raise UserError(
            f"{name!r} is no folder, no preset ({', '.join((*MINIS, *HUB_IDS))}) "
            "and no hub id of the form 'org/name'"
        )
    return open_folder(_download(hub_id, revision), name)


def open_folder(folder: Path, source: str | None = None) -> Checkpoint:
    """The CLIP in a folder; reads the configuration and the names, not the weights."""
    source = source or str(folder)
    if not folder.is_dir():
        raise UserError(f"the folder {folder} of {source!r} does not exist")
    files = _find_weights(folder)
    if not files:
        raise UserError(_no_weights(folder))
    if files[0].suffix == ".msgpack":
        layout, shapes = "hf_flax", {}
    else:
        shapes = open_safetensors(files).shapes
        layout = detect_layout(shapes)
    if layout is None:
        raise UserError(
            f"{files[0]} holds no CLIP with Hugging Face's or OpenAI's names "
            f"(its keys begin with {', '.join(sorted(shapes)[:3])})"
        )
    if layout == "openai":
        path = folder / "open_clip_config.json"
        config = (
            config_files.open_clip_config(path)
            if path.is_file()
            else config_files.infer_config(shapes)
        )
    elif (folder / "config.json").is_file():
        config = config_files.hugging_face_config(folder)
    else:
        raise UserError(f"{folder} has weights but no config.json; fetch it from the same place")
    return Checkpoint(source, folder, config, files, layout)


def _find_weights(folder: Path) -> tuple[Path, ...]:
    for name in _WEIGHT_FILES:
        if (folder / name).is_file():
            return (folder / name,)
        index = folder / f"{name}.index.json"
        if name.endswith(".safetensors") and index.is_file():
            shards = sorted(set(config_files.read_json(index).get("weight_map", {}).values()))
            absent = [shard for shard in shards if not (folder / shard).is_file()]
            if absent or not shards:
                raise UserError(
                    f"{index} names {len(shards)} weight files, of which these are missing: "
                    f"{', '.join(absent) or 'all'}; fetch the whole folder again"
                )
            return tuple(folder / shard for shard in shards)
    others = sorted(folder.glob("*.safetensors"))
    return (others[0],) if len(others) == 1 else ()


def _no_weights(folder: Path) -> str:
    looked_for = ", ".join(_WEIGHT_FILES)
    pickles = sorted(p.name for p in folder.iterdir() if p.suffix in _PICKLES)
    if pickles:
        return (
            f"{folder} holds {', '.join(pickles)}, which are pickles and are never opened here "
            f"(looked for {looked_for}); convert them where PyTorch is installed: "
            "transformers.CLIPModel.from_pretrained(folder).save_pretrained(folder, "
            "safe_serialization=True), or safetensors.torch.save_file(state_dict, "
            "'model.safetensors') for OpenAI's names"
        )
    return f"{folder} holds no CLIP weights; looked for {looked_for} (single or with .index.json)"


def _download(hub_id: str, revision: str | None) -> Path:
    """The folder of a hub id in the local cache, downloading what is missing."""
    from huggingface_hub import snapshot_download

    small = ["*.json", "*.txt"]
    folder = None
    # One kind of weights at a time, so that no file is fetched only to be passed over.
    for name in _WEIGHT_FILES:
        patterns = [*small, f"{Path(name).stem}*{Path(name).suffix}"]
        try:
            found = snapshot_download(hub_id, revision=revision, allow_patterns=patterns)
        except Exception as error:  # the hub client's network errors share no base class
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            at = f" at revision {revision!r}" if revision else ""
            raise UserError(
                f"{hub_id!r}{at} is no folder here and could not be fetched from the Hugging "
                f"Face hub ({reason}); download the folder elsewhere and pass its path"
            ) from error
        folder = Path(found)
        if _find_weights(folder):
            break
    return folder


# --- saving -----------------------------------------------------------------------------------


def save_hf(
    clip: CLIP,
    folder: str | Path,
    *,
    tokenizer_from: str | Path | None,
    dtype: DTypeLike = np.float32,
) -> None:
    """Writes a folder that transformers' CLIPModel opens. ViT towers only.

    Args:
        clip: the model.
        folder: made if missing; files of the same names are replaced.
        tokenizer_from: folder whose tokenizer files are copied along, None for none.
        dtype: storage dtype of the weights (float32, float16 or bfloat16).

    Raises:
        UserError: the image tower is a ResNet (use `save_openai`).
    """
    files = config_files.hugging_face_files(clip.config)
    _save(clip, Path(folder), "hf", "model.safetensors", files, tokenizer_from, dtype)


def save_openai(
    clip: CLIP,
    folder: str | Path,
    *,
    tokenizer_from: str | Path | None,
    dtype: DTypeLike = np.float32,
) -> None:
    """Writes a folder that open_clip opens (`open_clip_model.safetensors`): ViT or ResNet.

    Arguments as `save_hf`.
    """
    files = config_files.open_clip_files(clip.config)
    name = "open_clip_model.safetensors"
    _save(clip, Path(folder), "openai", name, files, tokenizer_from, dtype)


def _save(
    clip: CLIP,
    folder: Path,
    layout: str,
    weights_name: str,
    configs: Mapping[str, dict],
    tokenizer_from: str | Path | None,
    dtype: DTypeLike,
) -> None:
    from safetensors.numpy import save_file

    folder.mkdir(parents=True, exist_ok=True)
    tensors = {n: a.astype(dtype) for n, a in to_state_dict(clip, layout).items()}
    # transformers refuses files that do not say whose axis orders they follow.
    metadata = {"format": "pt"}
    _write(folder / weights_name, lambda path: save_file(tensors, str(path), metadata))
    for name, content in configs.items():
        text = json.dumps(content, indent=2) + "\n"
        _write(folder / name, lambda path, text=text: path.write_text(text, encoding="utf-8"))
    if tokenizer_from is not None:
        origin = Path(tokenizer_from)
        Tokenizer.check_folder(origin)
        for name in TOKENIZER_FILES:
            if (origin / name).is_file() and origin.resolve() != folder.resolve():
                _write(folder / name, lambda path, name=name: shutil.copyfile(origin / name, path))


def _write(path: Path, write: Callable[[Path], object]) -> None:
    """Writes beside the target and renames, so that no half-written file bears its name."""
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        write(part)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
