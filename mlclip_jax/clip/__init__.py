"""CLIP in Flax NNX: the towers, their weights and the tokenizer. Knows no labels, no losses."""

from mlclip_jax.clip.config import (
    CLIP_MEAN,
    CLIP_STD,
    PRESETS,
    CLIPConfig,
    ResNetConfig,
    TextConfig,
    ViTConfig,
)
from mlclip_jax.clip.model import CLIP
from mlclip_jax.clip.text import PromptTokens, Segment, TextTower, end_of_text
from mlclip_jax.clip.vit import ImageFeatures

__all__ = [
    "CLIP",
    "CLIP_MEAN",
    "CLIP_STD",
    "PRESETS",
    "CLIPConfig",
    "ImageFeatures",
    "PromptTokens",
    "ResNetConfig",
    "Segment",
    "TextConfig",
    "TextTower",
    "ViTConfig",
    "end_of_text",
]
