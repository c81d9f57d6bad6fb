"""Name tables: where each parameter of our CLIP lives in the weight files of others.

A table is a tuple of `Row`s. A row says under which names a file keeps one of our leaves and how
the arrays are transformed; it is read in both directions, so that the same table loads and saves.
`{}` in a name or a path stands for a block number. Our own paths are those of `model.CLIP`.

Layouts:
  hf        Hugging Face, PyTorch arrays (`model.safetensors`)
  hf_flax   Hugging Face, Flax arrays (`flax_model.msgpack`)
  openai    OpenAI's names, as open_clip and timm publish them (`open_clip_model.safetensors`);
            the only one that knows the ModifiedResNet towers
  timm_vit, hf_vit  a ViT of ImageNet alone, in the place of the image tower (see `plain_vit`)
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mlclip_jax.errors import UserError

Arrays = Sequence[np.ndarray]


@dataclass(frozen=True)
class Transform:
    """A pair of inverse array functions: from the file's arrays to our leaf, and back."""

    load: Callable[[Arrays], np.ndarray]
    save: Callable[[np.ndarray], Arrays]


SAME = Transform(lambda arrays: arrays[0], lambda leaf: [leaf])
# PyTorch keeps linear weights as [out in], we keep [in out].
TRANSPOSE = Transform(lambda arrays: arrays[0].T, lambda leaf: [leaf.T])
# PyTorch keeps convolutions as [out in h w], we keep [h w in out].
CONVOLUTION = Transform(
    lambda arrays: arrays[0].transpose(2, 3, 1, 0), lambda leaf: [leaf.transpose(3, 2, 0, 1)]
)
# Three separate projections against our columns q, k, v.
JOIN = Transform(
    lambda arrays: np.concatenate(arrays, axis=-1), lambda leaf: np.split(leaf, 3, axis=-1)
)
JOIN_TRANSPOSED = Transform(
    lambda arrays: np.concatenate([a.T for a in arrays], axis=-1),
    lambda leaf: [a.T for a in np.split(leaf, 3, axis=-1)],
)


@dataclass(frozen=True)
class Row:
    """One leaf: its names in the file, its path in our model (both with `{}`), its transform."""

    names: tuple[str, ...]
    path: str
    transform: Transform

    def names_at(self, path: str) -> tuple[str, ...] | None:
        """The file's names for the leaf at `path`, None where this row is not about it."""
        pattern = re.escape(self.path).replace(r"\{\}", r"(\d+)")
        match = re.fullmatch(pattern, path)
        return tuple(name.format(*match.groups()) for name in self.names) if match else None


# How a kind of module splits into leaves: (suffix in the file, suffix in our path, transform).
Kind = tuple[tuple[str, str, Transform], ...]
BARE: Kind = (("", "", SAME),)
TORCH_NORM: Kind = ((".weight", "/scale", SAME), (".bias", "/bias", SAME))
TORCH_LINEAR: Kind = ((".weight", "/kernel", TRANSPOSE), (".bias", "/bias", SAME))
TORCH_EMBEDDING: Kind = ((".weight", "", SAME),)
TORCH_PROJECTION: Kind = ((".weight", "", TRANSPOSE),)
TORCH_CONVOLUTION: Kind = ((".weight", "/kernel", CONVOLUTION),)
TORCH_BIASED_CONVOLUTION: Kind = (*TORCH_CONVOLUTION, (".bias", "/bias", SAME))
# Class token and positions of one image: [1 1 w] and [1 1+p w] against our [w] and [1+p w].
TORCH_TOKEN: Kind = (
    ("", "", Transform(lambda arrays: arrays[0][0, 0], lambda leaf: [leaf[None, None]])),
)
TORCH_POSITIONS: Kind = (
    ("", "", Transform(lambda arrays: arrays[0][0], lambda leaf: [leaf[None]])),
)
TORCH_QKV: Kind = ((".weight", "/kernel", JOIN_TRANSPOSED), (".bias", "/bias", JOIN))
TORCH_PACKED: Kind = (("_weight", "/kernel", TRANSPOSE), ("_bias", "/bias", SAME))
TORCH_BATCH_NORM: Kind = (
    *TORCH_NORM,
    (".running_mean", "/mean", SAME),
    (".running_var", "/var", SAME),
)
FLAX_NORM: Kind = ((".scale", "/scale", SAME), (".bias", "/bias", SAME))
FLAX_LINEAR: Kind = ((".kernel", "/kernel", SAME), (".bias", "/bias", SAME))
FLAX_EMBEDDING: Kind = ((".embedding", "", SAME),)
FLAX_PROJECTION: Kind = ((".kernel", "", SAME),)
FLAX_CONVOLUTION: Kind = ((".kernel", "/kernel", SAME),)
FLAX_QKV: Kind = ((".kernel", "/kernel", JOIN), (".bias", "/bias", JOIN))


def _rows(modules: Iterable[tuple[str | tuple[str, ...], str, Kind]]) -> tuple[Row, ...]:
    rows = []
    for names, path, kind in modules:
        names = (names,) if isinstance(names, str) else names
        for suffix, leaf, transform in kind:
            rows.append(Row(tuple(name + suffix for name in names), path + leaf, transform))
    return tuple(rows)


def _hugging_face(
    norm: Kind, linear: Kind, embedding: Kind, projection: Kind, convolution: Kind, qkv: Kind
) -> tuple[Row, ...]:
    modules = [
        ("logit_scale", "logit_scale", BARE),
        ("text_model.embeddings.token_embedding", "text/token_embedding", embedding),
        ("text_model.embeddings.position_embedding", "text/position_embedding", embedding),
        ("text_model.final_layer_norm", "text/norm_final", norm),
        ("text_projection", "text/projection", projection),
        ("vision_model.embeddings.patch_embedding", "image/patch_embed", convolution),
        ("vision_model.embeddings.class_embedding", "image/class_embedding", BARE),
        ("vision_model.embeddings.position_embedding", "image/position_embedding", embedding),
        ("vision_model.pre_layrnorm", "image/norm_pre", norm),  # Hugging Face's own spelling
        ("vision_model.post_layernorm", "image/norm_post", norm),
        ("visual_projection", "image/projection", projection),
    ]
    for theirs, ours in (("text_model", "text"), ("vision_model", "image")):
        layer, block = f"{theirs}.encoder.layers.{{}}", f"{ours}/blocks/{{}}"
        packed = tuple(f"{layer}.self_attn.{letter}_proj" for letter in "qkv")
        modules += [
            (f"{layer}.layer_norm1", f"{block}/norm1", norm),
            (packed, f"{block}/attention/qkv", qkv),
            (f"{layer}.self_attn.out_proj", f"{block}/attention/out", linear),
            (f"{layer}.layer_norm2", f"{block}/norm2", norm),
            (f"{layer}.mlp.fc1", f"{block}/mlp/up", linear),
            (f"{layer}.mlp.fc2", f"{block}/mlp/down", linear),
        ]
    return _rows(modules)


def _openai() -> tuple[Row, ...]:
    modules = [
        ("logit_scale", "logit_scale", BARE),
        ("token_embedding", "text/token_embedding", TORCH_EMBEDDING),
        ("positional_embedding", "text/position_embedding", BARE),
        ("ln_final", "text/norm_final", TORCH_NORM),
        ("text_projection", "text/projection", BARE),
        ("visual.conv1", "image/patch_embed", TORCH_CONVOLUTION),
        ("visual.class_embedding", "image/class_embedding", BARE),
        ("visual.positional_embedding", "image/position_embedding", BARE),
        ("visual.ln_pre", "image/norm_pre", TORCH_NORM),
        ("visual.ln_post", "image/norm_post", TORCH_NORM),
        ("visual.proj", "image/projection", BARE),
    ]
    for theirs, ours in (("transformer", "text"), ("visual.transformer", "image")):
        layer, block = f"{theirs}.resblocks.{{}}", f"{ours}/blocks/{{}}"
        modules += [
            (f"{layer}.ln_1", f"{block}/norm1", TORCH_NORM),
            (f"{layer}.attn.in_proj", f"{block}/attention/qkv", TORCH_PACKED),
            (f"{layer}.attn.out_proj", f"{block}/attention/out", TORCH_LINEAR),
            (f"{layer}.ln_2", f"{block}/norm2", TORCH_NORM),
            (f"{layer}.mlp.c_fc", f"{block}/mlp/up", TORCH_LINEAR),
            (f"{layer}.mlp.c_proj", f"{block}/mlp/down", TORCH_LINEAR),
        ]
    for number in "123":
        for theirs, ours in (("visual", "image"), ("visual.layer{}.{}", "image/layer{}/{}")):
            modules += [
                (f"{theirs}.conv{number}", f"{ours}/conv{number}", TORCH_CONVOLUTION),
                (f"{theirs}.bn{number}", f"{ours}/bn{number}", TORCH_BATCH_NORM),
            ]
    shortcut = "visual.layer{}.{}.downsample"
    pool, ours = "visual.attnpool", "image/attention_pool"
    modules += [
        (f"{shortcut}.0", "image/layer{}/{}/downsample_conv", TORCH_CONVOLUTION),
        (f"{shortcut}.1", "image/layer{}/{}/downsample_bn", TORCH_BATCH_NORM),
        (f"{pool}.positional_embedding", f"{ours}/position_embedding", BARE),
        (f"{pool}.q_proj", f"{ours}/q", TORCH_LINEAR),
        (f"{pool}.k_proj", f"{ours}/k", TORCH_LINEAR),
        (f"{pool}.v_proj", f"{ours}/v", TORCH_LINEAR),
        (f"{pool}.c_proj", f"{ours}/out", TORCH_LINEAR),
    ]
    return _rows(modules)


def _plain_vit(names: Mapping[str, str | tuple[str, ...]], qkv: Kind) -> tuple[Row, ...]:
    """A ViT without projection, from the names of its modules by our paths in the image tower."""
    kinds = {
        "class_embedding": TORCH_TOKEN,
        "position_embedding": TORCH_POSITIONS,
        "patch_embed": TORCH_BIASED_CONVOLUTION,
        "norm_post": TORCH_NORM,
        "blocks/{}/norm1": TORCH_NORM,
        "blocks/{}/attention/qkv": qkv,
        "blocks/{}/attention/out": TORCH_LINEAR,
        "blocks/{}/norm2": TORCH_NORM,
        "blocks/{}/mlp/up": TORCH_LINEAR,
        "blocks/{}/mlp/down": TORCH_LINEAR,
    }
    return _rows((names[path], f"image/{path}", kind) for path, kind in kinds.items())


_TIMM_VIT = {
    "class_embedding": "cls_token",
    "position_embedding": "pos_embed",
    "patch_embed": "patch_embed.proj",
    "norm_post": "norm",
    "blocks/{}/norm1": "blocks.{}.norm1",
    "blocks/{}/attention/qkv": "blocks.{}.attn.qkv",
    "blocks/{}/attention/out": "blocks.{}.attn.proj",
    "blocks/{}/norm2": "blocks.{}.norm2",
    "blocks/{}/mlp/up": "blocks.{}.mlp.fc1",
    "blocks/{}/mlp/down": "blocks.{}.mlp.fc2",
}
_HF_LAYER = "encoder.layer.{}"
_HF_VIT = {
    "class_embedding": "embeddings.cls_token",
    "position_embedding": "embeddings.position_embeddings",
    "patch_embed": "embeddings.patch_embeddings.projection",
    "norm_post": "layernorm",
    "blocks/{}/norm1": f"{_HF_LAYER}.layernorm_before",
    "blocks/{}/attention/qkv": tuple(
        f"{_HF_LAYER}.attention.attention.{name}" for name in ("query", "key", "value")
    ),
    "blocks/{}/attention/out": f"{_HF_LAYER}.attention.output.dense",
    "blocks/{}/norm2": f"{_HF_LAYER}.layernorm_after",
    "blocks/{}/mlp/up": f"{_HF_LAYER}.intermediate.dense",
    "blocks/{}/mlp/down": f"{_HF_LAYER}.output.dense",
}

LAYOUTS: dict[str, tuple[Row, ...]] = {
    "hf": _hugging_face(
        TORCH_NORM,
        TORCH_LINEAR,
        TORCH_EMBEDDING,
        TORCH_PROJECTION,
        TORCH_CONVOLUTION,
        TORCH_QKV,
    ),
    "hf_flax": _hugging_face(
        FLAX_NORM,
        FLAX_LINEAR,
        FLAX_EMBEDDING,
        FLAX_PROJECTION,
        FLAX_CONVOLUTION,
        FLAX_QKV,
    ),
    "openai": _openai(),
    "timm_vit": _plain_vit(_TIMM_VIT, TORCH_LINEAR),
    "hf_vit": _plain_vit(_HF_VIT, TORCH_QKV),
}

# Keys that carry no weights: buffers, counters, and the sizes OpenAI stored beside the weights.
_IGNORED = re.compile(
    r"(.*\.)?(position_ids|num_batches_tracked)"
    r"|attn_mask|input_resolution|context_length|vocab_size"
)


def ignored(name: str) -> bool:
    """Whether a file's key is knowingly skipped."""
    return _IGNORED.fullmatch(name) is not None


def detect_layout(names: Iterable[str]) -> str | None:
    """The layout a safetensors file's keys belong to; None where they are no CLIP we know."""
    names = set(names)
    if "text_model.embeddings.token_embedding.weight" in names:
        return "hf"
    if "token_embedding.weight" in names and "visual.conv1.weight" in names:
        return "openai"
    return None


def row_of(layout: str, path: str) -> tuple[tuple[str, ...], Transform]:
    """File names and transform of the leaf at `path` in a layout.

    Raises:
        UserError: the layout has no place for it.
    """
    found = [
        (names, row.transform)
        for row in LAYOUTS[layout]
        if (names := row.names_at(path)) is not None
    ]
    if not found:
        raise UserError(
            f"the {layout} layout has no place for {path}: Hugging Face's CLIP has ViT towers "
            "only, OpenAI's names have both"
        )
    if len(found) > 1:
        raise ValueError(f"two rows of the {layout} table match {path}")
    return found[0]
