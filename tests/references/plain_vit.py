"""A ViT of ImageNet (Dosovitskiy et al., 2021, Eqs. 1-4) on arrays under timm's names."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import erf

from mlclip_jax.clip import ViTConfig


def timm_state(sizes: ViTConfig, seed: int = 0) -> dict[str, np.ndarray]:
    """Random arrays of every part, float32, the classifier's too."""
    w, m, p = sizes.width, sizes.mlp_width, sizes.patch_size
    shapes = {
        "cls_token": (1, 1, w),
        "pos_embed": (1, 1 + sizes.grid**2, w),
        "patch_embed.proj.weight": (w, 3, p, p),
        "patch_embed.proj.bias": (w,),
        "norm.weight": (w,),
        "norm.bias": (w,),
        "head.weight": (10, w),
        "head.bias": (10,),
    }
    for i in range(sizes.layers):
        for name, shape in (
            ("norm1.weight", (w,)),
            ("norm1.bias", (w,)),
            ("attn.qkv.weight", (3 * w, w)),
            ("attn.qkv.bias", (3 * w,)),
            ("attn.proj.weight", (w, w)),
            ("attn.proj.bias", (w,)),
            ("norm2.weight", (w,)),
            ("norm2.bias", (w,)),
            ("mlp.fc1.weight", (m, w)),
            ("mlp.fc1.bias", (m,)),
            ("mlp.fc2.weight", (w, m)),
            ("mlp.fc2.bias", (w,)),
        ):
            shapes[f"blocks.{i}.{name}"] = shape
    rng = np.random.default_rng(seed)
    return {
        name: ((len(shape) == 1) + rng.normal(0, 0.2, shape)).astype(np.float32)
        for name, shape in shapes.items()
    }


def hf_state(state: dict[str, np.ndarray], prefix: str = "") -> dict[str, np.ndarray]:
    """The same under the names of Hugging Face's ViTModel."""
    renamed = {
        "cls_token": "embeddings.cls_token",
        "pos_embed": "embeddings.position_embeddings",
        "patch_embed.proj": "embeddings.patch_embeddings.projection",
        "norm": "layernorm",
        "head": "pooler.dense",
    }
    parts = {
        "norm1": "layernorm_before",
        "attn.proj": "attention.output.dense",
        "norm2": "layernorm_after",
        "mlp.fc1": "intermediate.dense",
        "mlp.fc2": "output.dense",
    }
    found = {}
    for name, array in state.items():
        stem, _, kind = name.rpartition(".")
        if not name.startswith("blocks."):
            known = renamed.get(name) or f"{renamed[stem]}.{kind}"
            found[prefix + known] = array
            continue
        _, number, part = stem.split(".", 2)
        layer = f"{prefix}encoder.layer.{number}"
        if part == "attn.qkv":
            for which, piece in zip(("query", "key", "value"), np.split(array, 3), strict=True):
                found[f"{layer}.attention.attention.{which}.{kind}"] = piece
        else:
            found[f"{layer}.{parts[part]}.{kind}"] = array
    return found


def norm(x: jax.Array, scale: jax.Array, bias: jax.Array) -> jax.Array:
    x = x - x.mean(-1, keepdims=True)
    return x / jnp.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * scale + bias


def states(state: dict[str, jax.Array], images: jax.Array, sizes: ViTConfig) -> jax.Array:
    """Final states, class token first: images [b h w 3] -> [b 1+p w]."""

    def linear(x: jax.Array, name: str) -> jax.Array:
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    kernel = state["patch_embed.proj.weight"]
    x = jax.lax.conv_general_dilated(
        images.transpose(0, 3, 1, 2), kernel, kernel.shape[2:], "VALID"
    ) + state["patch_embed.proj.bias"].reshape(1, -1, 1, 1)
    x = x.reshape(*x.shape[:2], -1).transpose(0, 2, 1)
    token = jnp.broadcast_to(state["cls_token"], (len(x), 1, x.shape[-1]))
    x = jnp.concatenate([token, x], axis=1) + state["pos_embed"]
    for i in range(sizes.layers):
        block = f"blocks.{i}"
        y = norm(x, state[f"{block}.norm1.weight"], state[f"{block}.norm1.bias"])
        qkv = linear(y, f"{block}.attn.qkv").reshape(*y.shape[:2], 3, sizes.heads, -1)
        q, k, v = (qkv[:, :, j].transpose(0, 2, 1, 3) for j in range(3))  # [b h t e]
        scores = q @ k.transpose(0, 1, 3, 2) / np.sqrt(q.shape[-1])
        weights = jnp.exp(scores - scores.max(-1, keepdims=True))
        y = (weights / weights.sum(-1, keepdims=True)) @ v
        x = x + linear(y.transpose(0, 2, 1, 3).reshape(x.shape), f"{block}.attn.proj")
        y = norm(x, state[f"{block}.norm2.weight"], state[f"{block}.norm2.bias"])
        y = linear(y, f"{block}.mlp.fc1")
        x = x + linear(y * (1 + erf(y / np.sqrt(2))) / 2, f"{block}.mlp.fc2")
    return norm(x, state["norm.weight"], state["norm.bias"])
