"""From a configuration to what a stage runs: backbone, method, optimizer and step.

The same functions build a run with weights (`training.loop`), a trained method for evaluation and
serving (`load_trained`), and a dry run of a full-size configuration without any
(`training.dry_run`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh

from mlclip_jax import methods
from mlclip_jax.clip import CLIP, PRESETS, CLIPConfig
from mlclip_jax.clip import weights as clip_weights
from mlclip_jax.clip.tokenizer import Tokenizer
from mlclip_jax.data import features, registry
from mlclip_jax.data.pipeline import steps_per_epoch
from mlclip_jax.data.transforms import Preprocess
from mlclip_jax.errors import UserError
from mlclip_jax.fields import from_mapping
from mlclip_jax.labels.space import LabelSpace
from mlclip_jax.labels.taxonomies import NameFeatures
from mlclip_jax.methods.base import Batch, LabelInputs, Method
from mlclip_jax.modules.prompts import template_features
from mlclip_jax.spec import unknown
from mlclip_jax.training.checkpoint import restore_model
from mlclip_jax.training.config import (
    BackboneConfig,
    StageConfig,
    TrainConfig,
    parse_config,
    to_steps,
)
from mlclip_jax.training.mesh import check_batch_size, split_over_data
from mlclip_jax.training.optim import make_optimizer
from mlclip_jax.training.step import (
    Leaves,
    Parts,
    find_moving,
    make_train_step,
    take_apart,
)

# Settings of data that say where files are; the fingerprints and label spaces say what is in them.
_PATHS = ("data_dir", "train_list", "test_list", "captions_list", "names_file", "aliases")


@dataclass(frozen=True)
class Backbone:
    """A CLIP with its tokenizer; `digest` names the very weights."""

    clip: CLIP
    tokenizer: Tokenizer
    digest: str


def name_features(backbone: Backbone) -> NameFeatures:
    """What labels are clustered by: text features of "a photo of a {}.", float32 [n d]."""
    return lambda names: np.asarray(template_features(backbone.clip, names, backbone.tokenizer))


def check_settings(config: TrainConfig, *, paths: bool = True) -> dict[str, Any]:
    """Checks the settings of methods and data, before weights are fetched or images opened.

    Args:
      config: of the run.
      paths: whether the places of the data are settings too, or the data are known by content.

    Returns:
      What decides which examples a run sees and what trains, defaults filled in.

    Raises:
      UserError: unknown method, dataset or setting.
    """
    name, data = registry.settings(config.data)
    data = {"name": name, **asdict(data)}
    unimportant = ("num_workers", "max_unreadable")  # change nothing that training sees
    for key in unimportant if paths else (*unimportant, *_PATHS):
        data.pop(key, None)
    stages = []
    for stage in config.stages:
        fields = {key: value for key, value in stage.method.items() if key != "name"}
        chosen = from_mapping(methods.load(stage.method["name"]).Config, fields, "method")
        method = {"name": stage.method["name"], **asdict(chosen)}
        cache = features.settings(stage.cache)
        fields = {"name": stage.name, "batch_size": stage.batch_size, "sampling": stage.sampling}
        stages.append({**fields, "cache": cache, "method": method})
    backbone = {key: getattr(config.backbone, key) for key in ("image_size", "image_norm")}
    several = config.source.get("stages")
    run = {"seed": config.seed, "backbone": backbone, "data": data}
    return run | ({"stages": stages} if several else stages[0])


def preset(config: BackboneConfig) -> CLIPConfig:
    """The preset that `config` names, at its image size and with its pixel statistics.

    Raises:
      UserError: no such preset.
    """
    if config.name not in PRESETS:
        raise unknown("backbone preset", config.name, PRESETS)
    sizes = PRESETS[config.name]
    sizes = sizes if config.image_size is None else sizes.at(config.image_size)
    return sizes if config.image_norm is None else sizes.normalized_as(config.image_norm)


def packaged_tokenizer(context_length: int) -> Tokenizer:
    """The small vocabulary that ships with the package, for backbones without weights."""
    return Tokenizer.from_folder(clip_weights.PRETRAINED / "clip-mini", context_length)


def _compute(config: BackboneConfig) -> dict[str, Any]:
    """How a CLIP is to compute, as its constructor and loader take it."""
    return {
        "dtype": jnp.dtype(config.dtype),
        "remat": config.remat,
        "class_chunk": config.class_chunk,
    }


def random_clip(config: BackboneConfig, *, seed: int = 0) -> CLIP:
    """A preset with fresh values.

    Raises:
      UserError: there is no preset of this name.
    """
    return CLIP(preset(config), **_compute(config), rngs=nnx.Rngs(seed))


def load_backbone(config: BackboneConfig, *, seed: int = 0) -> Backbone:
    """The CLIP that a configuration names.

    Args:
      config: which CLIP; with `weights="random"` a preset with fresh values and the packaged
        vocabulary.
      seed: of random weights.

    Raises:
      UserError: it is not found or does not fit.
    """
    if config.weights == "random":
        clip = random_clip(config, seed=seed)
        return Backbone(clip, packaged_tokenizer(clip.config.text.context_length), f"random-{seed}")
    found = clip_weights.resolve(config.name, revision=config.revision)
    clip = found.load(image_size=config.image_size, **_compute(config))
    if config.image_norm is not None:
        clip.config = clip.config.normalized_as(config.image_norm)
    return Backbone(clip, found.tokenizer(), found.digest())


def with_absolute_paths(config: TrainConfig) -> TrainConfig:
    """`config` with the full paths of a backbone that is a folder and of the methods' files.

    So they are found from anywhere.
    """
    source, name = dict(config.source), config.backbone.name
    packaged = config.backbone.weights == "random" or name in clip_weights.MINIS
    if not packaged and Path(name).is_dir():
        source["backbone"] = {**source["backbone"], "name": _absolute(name)}
    files = {key for s in config.stages for key in methods.load(s.method["name"]).files}

    def placed(part: Mapping[str, Any]) -> dict[str, Any]:
        method = part.get("method") or {}
        paths = {key: _absolute(method[key]) for key in files if method.get(key)}
        return {**part, "method": {**method, **paths}} if paths else dict(part)

    source = placed(source)
    if source.get("stages"):
        source["stages"] = tuple(map(placed, source["stages"]))
    return parse_config(source)


def _absolute(path: str) -> str:
    return str(Path(path).expanduser().absolute())


def image_size(config: TrainConfig, clip: CLIPConfig) -> int:
    """Pixels of a side of a run's images.

    Raises:
      UserError: its stages take images of different sizes.
    """
    sizes = {stage.name: methods.image_size(stage.method, clip) for stage in config.stages}
    if len(set(sizes.values())) > 1:
        found = ", ".join(f"'{name}' {size}" for name, size in sizes.items())
        raise UserError(f"stages take images of different sizes: {found} pixels; give all the same")
    return next(iter(sizes.values()))


def build_method(stage: StageConfig, backbone: Backbone, space: LabelSpace, *, seed: int) -> Method:
    """The method of a stage with its own parameters at their starting values."""
    return methods.build(
        stage.method, backbone.clip, space=space, encoder=backbone.tokenizer, rngs=nnx.Rngs(seed)
    )


def with_leaves(parts: Parts, leaves: Mapping[str, Any], *, strict: bool = True) -> Parts:
    """`parts` with the values of `leaves` put in by path.

    Args:
      parts: a method taken apart.
      leaves: values by path.
      strict: every leaf has to fit; otherwise those that do not (a method of another stage had
        them) are passed over.

    Raises:
      UserError: a leaf has no place or another shape.
    """
    current = {**parts.trainable, **parts.frozen, **parts.moving}
    fitting = {
        path: leaf
        for path, leaf in leaves.items()
        if path in current and tuple(current[path].shape) == tuple(leaf.shape)
    }
    if strict and len(fitting) < len(leaves):
        wrong = ", ".join(sorted(leaves.keys() - fitting.keys()))
        raise UserError(f"the checkpoint's leaves do not fit the method: {wrong}")

    def filled(old: Leaves) -> Leaves:
        return {path: fitting.get(path, leaf) for path, leaf in old.items()}

    return replace(
        parts,
        trainable=filled(parts.trainable),
        frozen=filled(parts.frozen),
        moving=filled(parts.moving),
    )


@dataclass(frozen=True)
class Plan:
    """A stage ready to run.

    Attributes:
      parts: the method taken apart, with starting values.
      optimizer: of the stage.
      step: the jitted training step.
      steps: length of the stage.
      epoch_steps: steps in an epoch.
    """

    parts: Parts
    optimizer: optax.GradientTransformation
    step: Callable[..., Any]
    steps: int
    epoch_steps: int


def batch_shape(method: Method, batch_size: int, classes: int, mesh: Mesh) -> Batch:
    """Shapes of a training batch on the devices; captions as long as the text tower takes."""
    clip, captions = method.clip, method.captions()
    read = captions and captions.read
    size, t = method.image_size, clip.config.text.context_length
    d = clip.config.embed_dim

    def leaf(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((batch_size, *shape), dtype, sharding=split_over_data(mesh))

    images = leaf((size, size, 3), jnp.uint8)
    if read == "images":
        shapes = {"pooled": ((d,), clip.dtype), "tokens": ((t, d), clip.dtype)}
        images = {name: leaf(*of) for name, of in (shapes | {"mask": ((t,), jnp.bool_)}).items()}
    return Batch(
        images=images,
        targets=leaf((classes,), jnp.int8),
        index=leaf((), jnp.int32),
        mask=leaf((), jnp.bool_),
        caption_tokens=leaf((t,), jnp.int32) if read == "tokens" else None,
        caption_features=leaf((d,), clip.dtype) if read == "features" else None,
    )


def plan_stage(
    stage: StageConfig,
    method: Method,
    labels: LabelInputs,
    *,
    classes: int,
    mesh: Mesh,
    num_examples: int,
    first_step: int = 0,
    augment_flip: bool = False,
) -> Plan:
    """Optimizer and step of a stage; `method` may be abstract (from `nnx.eval_shape`).

    Args:
      stage: its configuration.
      method: built for the stage.
      labels: the method's label inputs, classes padded to the mesh.
      classes: labels in the data, without padding.
      mesh: devices.
      num_examples: training examples.
      first_step: global step at which the stage starts.
      augment_flip: mirror images at random.

    Raises:
      UserError: the batch or a chunk of classes does not divide, nothing trains, or a
        learning-rate group is idle.
    """
    check_batch_size(stage.batch_size, mesh)
    if method.clip.text.class_chunk is not None:
        check_batch_size(method.clip.text.class_chunk, mesh, "backbone.class_chunk")
    sizes = {"batch_size": stage.batch_size, "num_examples": num_examples}
    epoch = steps_per_epoch(**sizes)
    steps = to_steps(stage.duration, **sizes)
    layout = stage.optim.schedule_duration or stage.duration
    batch = batch_shape(method, stage.batch_size, classes, mesh)
    parts = find_moving(take_apart(method), batch, labels)
    if steps and not parts.trainable:
        raise UserError(
            f"stage '{stage.name}': nothing trains in method '{stage.method['name']}'; "
            "give it duration='0 steps' to evaluate it only"
        )
    optimizer, schedule = make_optimizer(
        stage.optim,
        parts.trainable,
        total_steps=to_steps(layout, **sizes),
        warmup_steps=to_steps(stage.optim.warmup, **sizes),
        steps_per_epoch=epoch,
    )
    step = make_train_step(
        parts,
        optimizer,
        schedule,
        mesh=mesh,
        ema_decay=stage.ema_decay,
        steps_per_epoch=epoch,
        first_step=first_step,
        augment_flip=augment_flip,
    )
    return Plan(parts, optimizer, step, steps, epoch)


@dataclass(frozen=True)
class Trained:
    """A trained method as evaluation and serving take it.

    Attributes:
      method: with its trained values.
      space: labels it was evaluated on.
      backbone: what it was built on.
      config: of the run.
      meta: description in the checkpoint; "weights" says which were taken.
      step: of the checkpoint.
    """

    method: Method
    space: LabelSpace
    backbone: Backbone
    config: TrainConfig
    meta: Mapping[str, Any]
    step: int

    @property
    def preprocess(self) -> Preprocess:
        """How the run's evaluations bring images to the size of the backbone."""
        _, data = registry.settings(self.config.data)
        return data.preprocess(self.method.image_size)


def check_backbone(meta: Mapping[str, Any], backbone: Backbone, name: str) -> None:
    """Raises unless `backbone` holds the weights that a checkpoint was trained on.

    Raises:
      UserError: the digests differ.
    """
    if meta["backbone"]["digest"] != backbone.digest:
        raise UserError(
            f"the checkpoint was trained on other weights of '{name}' (SHA-256 "
            f"{meta['backbone']['digest'][:12]}..., found {backbone.digest[:12]}...): put back the "
            "weights of that time, or train anew in another workdir"
        )


def load_trained(
    workdir: str | Path,
    *,
    which: str = "best",
    weights: str = "auto",
    backbone: Backbone | None = None,
) -> Trained:
    """The trained method in a working directory.

    Args:
      workdir: of the run.
      which: "best" or "latest" checkpoint.
      weights: "raw", "ema", or "auto" (averaged where there are any).
      backbone: of the run, where an earlier call has loaded it.

    Raises:
      UserError: no checkpoint, or the backbone has other weights now.
    """
    restored = restore_model(workdir, which=which, weights=weights)
    config = parse_config(restored.meta["config"])
    space = LabelSpace.from_json(restored.meta["label_space"])
    backbone = backbone or load_backbone(config.backbone, seed=config.seed)
    check_backbone(restored.meta, backbone, config.backbone.name)
    stage = config.stages[restored.meta["stage"]]
    trained = restored.meta.get("train_space")
    built_for = LabelSpace.from_json(trained) if trained else space
    parts = take_apart(build_method(stage, backbone, built_for, seed=config.seed))
    parts = with_leaves(parts, {p: jnp.asarray(leaf) for p, leaf in restored.leaves.items()})
    method = parts.merge({**parts.trainable, **parts.frozen})
    return Trained(method, space, backbone, config, restored.meta, restored.step)
