"""What a CLIP is made of, and the published sizes by name.

Sizes from Radford et al., 2021 (Tables 19 and 20) and the released checkpoints.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from mlclip_jax.errors import UserError

Activation = Literal["quick_gelu", "gelu"]

#: Per-channel statistics of CLIP's training images, for pixels in [0, 1].
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

#: Statistics that pixels are normalised with, by name: (mean, std) for pixels in [0, 1].
IMAGE_NORMS = {
    "clip": (CLIP_MEAN, CLIP_STD),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}


@dataclass(frozen=True)
class ViTConfig:
    """Vision transformer: `image_size` and `patch_size` in pixels, `width` = w.

    CLIP's have a norm before the blocks (`pre_norm`) and no bias of patches (`patch_bias`); those
    of ImageNet the other way round (see `plain_vit`).
    """

    image_size: int = 224
    patch_size: int = 32
    width: int = 768
    layers: int = 12
    heads: int = 12
    mlp_width: int = 3072
    activation: Activation = "quick_gelu"
    norm_eps: float = 1e-5
    patch_bias: bool = False
    pre_norm: bool = True

    @property
    def grid(self) -> int:
        """Patches along one side."""
        return self.image_size // self.patch_size


@dataclass(frozen=True)
class ResNetConfig:
    """ModifiedResNet: three-convolution stem, anti-aliased strides, attention pooling."""

    image_size: int = 224
    width: int = 64
    layers: tuple[int, int, int, int] = (3, 4, 6, 3)
    heads: int = 32

    @property
    def grid(self) -> int:
        """Cells along one side of the final map (total stride 32)."""
        return self.image_size // 32

    @property
    def output_width(self) -> int:
        """Channels of the final map."""
        return self.width * 32


@dataclass(frozen=True)
class TextConfig:
    """Text transformer. `eot_id` None: the end of text is the largest id (OpenAI's rule)."""

    vocab_size: int = 49408
    context_length: int = 77
    width: int = 512
    layers: int = 12
    heads: int = 8
    mlp_width: int = 2048
    activation: Activation = "quick_gelu"
    norm_eps: float = 1e-5
    eot_id: int | None = None


@dataclass(frozen=True)
class CLIPConfig:
    """Both towers, the joint width d = `embed_dim` and the pixel statistics."""

    embed_dim: int
    image: ViTConfig | ResNetConfig
    text: TextConfig
    image_mean: tuple[float, float, float] = CLIP_MEAN
    image_std: tuple[float, float, float] = CLIP_STD

    def at(self, image_size: int) -> CLIPConfig:
        """The same model for images of `image_size` x `image_size` pixels.

        Raises:
            UserError: where the size is no multiple of the tower's stride.
        """
        stride = self.image.patch_size if isinstance(self.image, ViTConfig) else 32
        if image_size <= 0 or image_size % stride:
            raise UserError(
                f"image_size={image_size} is no multiple of the image tower's stride {stride}; "
                f"try {max(1, round(image_size / stride)) * stride}"
            )
        return replace(self, image=replace(self.image, image_size=image_size))

    def normalized_as(self, name: Literal["clip", "imagenet"]) -> CLIPConfig:
        """The same model on pixels normalised with other statistics, of `IMAGE_NORMS`."""
        mean, std = IMAGE_NORMS[name]
        return replace(self, image_mean=mean, image_std=std)


def _text(width: int) -> TextConfig:
    return TextConfig(width=width, heads=width // 64, mlp_width=4 * width)


def _vit(embed_dim: int, size: int, patch: int, width: int, layers: int, text: int) -> CLIPConfig:
    image = ViTConfig(size, patch, width, layers, heads=width // 64, mlp_width=4 * width)
    return CLIPConfig(embed_dim, image, _text(text))


def _resnet(
    embed_dim: int, size: int, width: int, layers: tuple[int, int, int, int], text: int
) -> CLIPConfig:
    image = ResNetConfig(size, width, layers, heads=width * 32 // 64)
    return CLIPConfig(embed_dim, image, _text(text))


PRESETS: dict[str, CLIPConfig] = {
    "RN50": _resnet(1024, 224, 64, (3, 4, 6, 3), 512),
    "RN101": _resnet(512, 224, 64, (3, 4, 23, 3), 512),
    "RN50x4": _resnet(640, 288, 80, (4, 6, 10, 6), 640),
    "RN50x16": _resnet(768, 384, 96, (6, 8, 18, 8), 768),
    "RN50x64": _resnet(1024, 448, 128, (3, 15, 36, 10), 1024),
    "ViT-B/32": _vit(512, 224, 32, 768, 12, 512),
    "ViT-B/16": _vit(512, 224, 16, 768, 12, 512),
    "ViT-L/14": _vit(768, 224, 14, 1024, 24, 768),
    "ViT-L/14-336": _vit(768, 336, 14, 1024, 24, 768),
    # The two small CLIPs that ship with the package (scripts/make_mini_clip.py).
    "clip-mini": CLIPConfig(
        64,
        ViTConfig(64, 8, width=128, layers=4, heads=2, mlp_width=512),
        TextConfig(1020, 77, width=128, layers=3, heads=2, mlp_width=512),
    ),
    "clip-mini-rn": CLIPConfig(
        64,
        ResNetConfig(64, width=16, layers=(1, 2, 2, 1), heads=8),
        TextConfig(1020, 77, width=64, layers=3, heads=1, mlp_width=256),
    ),
}
