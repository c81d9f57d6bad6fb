"""Full fine-tuning: the whole image tower trains under a classifier that starts as zero-shot CLIP.

    image -> image tower -> unit length [b d];  logits = v W^T + bias,  W from scale * text features

Source: the usual baseline; the start from text features is that of Wortsman et al., CVPR 2022
(WiSE-FT). Nothing of the text tower is left in training. BatchNorm statistics stay fixed unless
`batch_norm` says otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mlclip_jax.methods.linear_probe import LinearProbe, LinearProbeConfig


@dataclass(frozen=True)
class FineTuneConfig(LinearProbeConfig):
    """The linear probe's settings, with the image tower trained from zero-shot CLIP."""

    train_image_encoder: bool = True
    normalize: bool = True
    start: Literal["zero", "text"] = "text"


class FineTune(LinearProbe):
    """A linear layer and the image tower below it."""

    Config = FineTuneConfig
    config: FineTuneConfig
