"""What MKT and CLIP-FT share: the recipe of MKT's first stage, in which a ViT's last blocks train.

AdamW at 1e-3 with decay 0.005 for 20 epochs (4 on Open Images) in batches of 128; where the text is
silent, the release's: layer-wise rates, cosine after two epochs of warm-up, random crops with
RandAugment. Tests on the inner 224 of 256 pixels.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from mlclip_jax.clip import PRESETS, ViTConfig

_DECAY = 0.65  # of the rate from layer to layer, from the top down


def recipe(config: ConfigDict) -> None:
    """Data, length and optimizer of a run, all but the rates of its blocks."""
    config.data.update(resize="resize256", augment="randaugment")
    config.batch_size = 128
    config.duration = "4 epochs" if config.data.name.startswith("openimages") else "20 epochs"
    config.optim = {
        "name": "adamw",
        "learning_rate": 1e-3,
        "min_learning_rate": 1e-6,
        "weight_decay": 0.005,
        "warmup": "2 epochs",
    }


def layers(backbone: str) -> int | None:
    """Blocks of a ViT that is a preset; None: it is none."""
    sizes = getattr(PRESETS.get(backbone), "image", None)
    return sizes.layers if isinstance(sizes, ViTConfig) else None


def groups(first: int, end: int, *, within: str = "", before: bool = False) -> dict[str, float]:
    """Factors of the rate for the blocks from `first` on, of `end`, by what their paths hold.

    Args:
      first, end: blocks that train, as they are numbered.
      within: what paths hold before "blocks/".
      before: for what is before the blocks too.
    """
    rates = {f"{within}blocks/{i}/": _DECAY ** (end - i) for i in range(first, end)}
    lowest = {f"{within}(patch_|class_|position_|norm_pre)": _DECAY ** (end + 1)} if before else {}
    return lowest | rates
