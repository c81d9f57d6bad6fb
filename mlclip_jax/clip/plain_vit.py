"""ViTs trained on ImageNet (Dosovitskiy et al., 2021) in the form of CLIP's image tower.

Such a ViT has a bias of patches, the exact GELU, an epsilon of 1e-6 in its norms, no norm before
its blocks, and no projection. It is read from safetensors or .npz under timm's names or those of
Hugging Face's ViTModel (tables in `layouts`); classifiers and poolers are left out, and nothing is
ever unpickled.
"""

from __future__ import annotations

import math
import zipfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
from flax import nnx

from mlclip_jax.clip.arrays import NamedArrays, check_shapes, open_safetensors, path_string
from mlclip_jax.clip.config import ViTConfig
from mlclip_jax.clip.layouts import row_of
from mlclip_jax.clip.positions import interpolate_positions
from mlclip_jax.clip.vit import VisionTransformer
from mlclip_jax.errors import UserError

SUFFIXES = (".safetensors", ".npz")
#: By layout: the class token's name, and what other parts' names begin with.
_LAYOUTS = {
    "timm_vit": ("cls_token", ("head.",)),
    "hf_vit": ("embeddings.cls_token", ("pooler.", "classifier.")),
}


def plain_config(sizes: ViTConfig) -> ViTConfig:
    """A ViT of ImageNet with the sizes of a CLIP's image tower.

    Hugging Face's ViTs have an epsilon of 1e-12; of states that vary the norms are the same.
    """
    return replace(sizes, activation="gelu", norm_eps=1e-6, patch_bias=True, pre_norm=False)


def read_plain(source: str | Path, tower: VisionTransformer) -> dict[str, np.ndarray]:
    """Weights for `tower`, all but its projection's: float32 by path, positions interpolated.

    Args:
        source: a file, or a folder with `model.safetensors` or with one file.
        tower: of the sizes that the file must have.

    Raises:
        UserError: there is no such file, it is no ViT, or of other sizes (all differences are
            listed).
    """
    path = _find(Path(source).expanduser())
    arrays, layout = _named(_open(path), path)
    leaves = {path_string(p): v.get_value() for p, v in nnx.to_flat_state(nnx.state(tower))}
    del leaves["projection"]
    places = {leaf: row_of(layout, f"image/{leaf}") for leaf in leaves}
    expected = {
        name: part.shape
        for leaf, (names, transform) in places.items()
        for name, part in zip(
            names, transform.save(np.broadcast_to(np.float32(0), leaves[leaf].shape)), strict=True
        )
    }
    (positions,), _ = places["position_embedding"]
    stored = arrays.shapes.get(positions, (0, 0, 0))
    if len(stored) == 3 and stored[1] > 1 and math.isqrt(stored[1] - 1) ** 2 == stored[1] - 1:
        expected[positions] = (1, stored[1], expected[positions][2])  # of another image size
    check_shapes(expected, arrays.shapes, f"{path}, read as a ViT of the backbone's sizes,")
    found = {
        leaf: transform.load([np.asarray(arrays.read(name), np.float32) for name in names])
        for leaf, (names, transform) in places.items()
    }
    side = math.isqrt(leaves["position_embedding"].shape[0] - 1)
    found["position_embedding"] = interpolate_positions(found["position_embedding"], (side, side))
    return found


def _find(path: Path) -> Path:
    """The file of weights that is meant."""
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix in SUFFIXES)
        files = [file for file in files if file.name == "model.safetensors"] or files
        if len(files) != 1:
            names = ", ".join(file.name for file in files) or "none"
            raise UserError(
                f"the folder {path} of a ViT's weights should hold model.safetensors or one file "
                f"({' or '.join(SUFFIXES)}), and holds {names}: give the file's path"
            )
        return files[0]
    if not path.is_file():
        raise UserError(f"there is no file {path} of a ViT's weights: give the path of one")
    if path.suffix not in SUFFIXES:
        raise UserError(
            f"{path} is neither of {', '.join(SUFFIXES)}, and other files are never opened here: "
            "save the state dict with safetensors.torch.save_file"
        )
    return path


def _open(path: Path) -> NamedArrays:
    if path.suffix == ".safetensors":
        return open_safetensors((path,))
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays: Mapping[str, np.ndarray] = {name: file[name] for name in file.files}
    except (AttributeError, EOFError, OSError, ValueError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} cannot be read as .npz ({error}); fetch it again") from error
    return NamedArrays({name: a.shape for name, a in arrays.items()}, arrays.__getitem__)


def _named(arrays: NamedArrays, path: Path) -> tuple[NamedArrays, str]:
    """The arrays of the tower without the prefix of Hugging Face's classifiers, and the layout."""
    names = {name.removeprefix("vit."): name for name in arrays.shapes}
    for layout, (token, others) in _LAYOUTS.items():
        if token in names:
            shapes = {
                short: arrays.shapes[name]
                for short, name in names.items()
                if not short.startswith(others)
            }
            return NamedArrays(shapes, lambda short: arrays.read(names[short])), layout
    raise UserError(
        f"{path} holds no ViT with timm's or Hugging Face's names (its keys begin with "
        f"{', '.join(sorted(arrays.shapes)[:3]) or 'nothing'})"
    )
