"""Small stand-ins for the trainer's tests: a CLIP of a few thousand values and its methods."""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mlclip_jax import methods
from mlclip_jax.clip import CLIP, CLIPConfig, ImageFeatures, TextConfig, ViTConfig
from mlclip_jax.clip.resnet import BatchNorm, Conv
from mlclip_jax.data import registry
from mlclip_jax.data.registry import DataConfig, DataSplits
from mlclip_jax.labels.space import LabelSpace, Taxonomy
from mlclip_jax.methods.base import Batch, path_string
from mlclip_jax.methods.coop import CoOp
from mlclip_jax.methods.hspnet import HSPNet
from mlclip_jax.methods.zero_shot import ZeroShot, ZeroShotConfig
from mlclip_jax.training import build, loop
from mlclip_jax.training.build import Backbone

TEXT = TextConfig(vocab_size=64, context_length=16, width=16, layers=1, heads=2, mlp_width=32)
VIT = CLIPConfig(
    embed_dim=16,
    image=ViTConfig(image_size=16, patch_size=8, width=16, layers=1, heads=2, mlp_width=32),
    text=TEXT,
)
SPACE = LabelSpace(
    names=("red", "green", "blue", "one", "two", "three"),
    taxonomy=Taxonomy(group_names=("colour", "number"), group_of=(0, 0, 0, 1, 1, 1)),
    name="toys",
)


class Letters:
    """A tokenizer of one id per letter."""

    sot, eot, context_length, vocab_size = 62, 63, 16, 64

    def encode(self, text):
        return [1 + (ord(letter) % 60) for letter in text if letter.isalnum()][:8]


def clip(seed=0):
    return CLIP(VIT, rngs=nnx.Rngs(seed))


def batch(size=8, *, seed=0):
    rng = np.random.default_rng(seed)
    return Batch(
        images=rng.integers(0, 256, (size, 16, 16, 3), dtype=np.uint8),
        targets=rng.integers(-1, 2, (size, len(SPACE))).astype(np.int8),
        index=np.arange(size, dtype=np.int32),
        mask=np.ones(size, bool),
    )


class SmallTower(nnx.Module):
    """One convolution, BatchNorm and a projection in place of an image tower: quick to compile."""

    def __init__(self, rngs):
        self.conv = Conv(3, 8, 3, stride=2, rngs=rngs)
        self.bn = BatchNorm(8)
        self.projection = nnx.Param(nnx.initializers.normal(0.5)(rngs.params(), (8, 16)))


@dataclass(frozen=True)
class TowerConfig(ZeroShotConfig):
    """part: prefix of the paths that train, beside the bias; train_bn: BatchNorm's mode."""

    logit_scale: float | None = 4.0
    part: str = "clip/image/"
    train_bn: bool = False


class Tower(ZeroShot):
    """Labels are means of token embeddings; a part of a small image tower trains."""

    Config = TowerConfig

    def __init__(self, config, clip, *, space, encoder, rngs):
        super().__init__(config, clip, space=space, encoder=encoder, rngs=rngs)
        if not isinstance(clip.image, SmallTower):
            clip.image = SmallTower(nnx.Rngs(0))
        self.bias = nnx.Param(jnp.zeros(()))

    def encode_images(self, images, *, progress=None):
        tower, pixels = self.clip.image, self.clip.normalize(images)
        train = progress is not None and self.config.train_bn
        x = jnp.tanh(tower.bn(tower.conv(pixels), train=train))
        return ImageFeatures(x.mean((1, 2)) @ tower.projection[...], None)

    def encode_labels(self, labels, *, image_features=None, progress=None):
        table = self.clip.text.token_embedding[...]  # [v w], and w == d here
        return table[jnp.maximum(labels.prompts[0].own, 0)].mean(1)

    def logits(self, image_features, label_features, labels, *, progress=None):
        return super().logits(image_features, label_features, labels) + self.bias[...]

    def trainable(self, path, variable):
        name = path_string(path)
        return isinstance(variable, nnx.Param) and name.startswith((self.config.part, "bias"))


METHODS = {"tower": Tower, "coop": CoOp, "hspnet": HSPNet, "zero_shot": ZeroShot}


def method(name="tower", **fields):
    """A toy method with its label inputs for eight devices."""
    cls = METHODS[name]
    built = cls(cls.Config(**fields), clip(), space=SPACE, encoder=Letters(), rngs=nnx.Rngs(1))
    return built, built.label_inputs(SPACE, Letters(), multiple_of=8)


class Blocks:
    """A source of random images whose colours decide their labels."""

    def __init__(self, size, seed=0):
        self.size, self.seed = size, seed

    def __len__(self):
        return self.size

    def class_counts(self):
        return sum(self[i]["targets"] > 0 for i in range(self.size))

    def positives(self):
        return np.nonzero(np.stack([self[i]["targets"] for i in range(self.size)]) > 0)

    def __getitem__(self, i):
        rng = np.random.default_rng((self.seed, i))
        targets = np.where(rng.random(len(SPACE)) < 0.5, 1, -1).astype(np.int8)
        image = rng.integers(0, 60, (16, 16, 3))
        image[..., :] += 150 * (targets[:3] > 0)
        return {"image": image.astype(np.uint8), "targets": targets, "index": i}


@dataclass(frozen=True)
class BlocksConfig(DataConfig):
    """Number of examples, and whether training mirrors them."""

    num_train: int = 40
    num_eval: int = 12
    mirrored: bool = False

    @property
    def flip(self):
        return self.mirrored


def load_blocks(config, image_size, splits):
    assert image_size == 16
    evals = {split: Blocks(config.num_eval, seed=1 + k) for k, split in enumerate(splits)}
    return DataSplits(Blocks(config.num_train), evals, SPACE, config)


def config(**fields):
    """A small run: 5 steps an epoch, two epochs."""
    base = {
        "backbone": {"name": "toy"},
        "method": {"name": "tower"},
        "data": {"name": "blocks"},
        "batch_size": 8,
        "duration": "2 epochs",
        "optim": {"name": "adam", "learning_rate": 0.01, "weight_decay": 1e-3},
        "eval": {"batch_size": 6, "splits": ("validation",)},
        "log_every": "2 steps",
        "compilation_cache": False,
    }
    return {**base, **fields}


@pytest.fixture
def toy_world(monkeypatch):
    """Makes the toy backbone, methods and data known to the trainer."""

    def load_backbone(config, *, seed=0):
        return Backbone(clip(), Letters(), f"digest-of-{config.name}")

    for module in (loop, build):
        monkeypatch.setattr(module, "load_backbone", load_backbone)
    monkeypatch.setattr(methods, "load", METHODS.__getitem__)
    monkeypatch.setitem(registry._DATASETS, "blocks", (BlocksConfig, load_blocks, lambda: SPACE))
