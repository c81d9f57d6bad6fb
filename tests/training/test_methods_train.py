"""Every method on Scenes with the packaged CLIP: no dead parameters, and a run of two steps."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mlclip_jax import methods
from mlclip_jax.data import registry
from mlclip_jax.data.pipeline import train_batches
from mlclip_jax.errors import UserError
from mlclip_jax.methods.base import Batch, Progress
from mlclip_jax.training.build import build_method, load_backbone, load_trained
from mlclip_jax.training.captions import with_captions
from mlclip_jax.training.config import parse_config
from mlclip_jax.training.dry_run import abstract_step
from mlclip_jax.training.loop import fit
from mlclip_jax.training.mesh import make_mesh
from mlclip_jax.training.step import forward, take_apart

# Settings that add parameters, beside each method's defaults.
VARIANTS = {
    "adds": (
        {"image_size": 128, "selected_labels": 16, "layers": 2},
        {"decoder": "ml_decoder", "label_embedding": "random", "layers": 2},
        {"decoder": "standard", "layers": 2, "train_image_encoder": True},
    ),
    "coop": (
        {"class_specific": True, "ctx_init": "a photo of a"},
        {"logit_bias": True, "class_position": "middle", "n_ctx": 4},
        {"train_image_encoder": True, "label_graph": True},
    ),
    "clip_ft": ({"train_blocks": "all"},),
    "dual_coop": ({"class_specific": False, "train_image_encoder": True},),
    "hspnet": (
        {"variant": "paper"},
        {"prompt": "concat", "label_graph": False},
        {"prompt": "add", "group_graph": False, "variant": "paper"},
        {"prompt": "shared"},
    ),
    "linear_probe": ({"normalize": True, "start": "text"},),
    "lmpt": (
        {"variant": "released", "ctx_init": "", "class_position": "middle"},
        {"class_specific": False, "class_aware_margin": False, "reweight": False},
        {"classification_weight": 1.0},
    ),
    "ml_decoder": ({"queries": "labels"}, {"groups": 5}),
    "mkt": ({"tune": "prompt", "tune_ends": True}, {"variant": "paper", "train_blocks": "all"}),
    "tai_dpt": ({"local": False}, {"caption_labels": "images", "templates": ()}),
}
CASES = [
    pytest.param(
        {"name": name, **fields},
        id="-".join([name, *fields]),
        marks=[pytest.mark.slow] if fields and name not in ("coop", "hspnet", "lmpt") else [],
    )
    for name in methods.names()
    for fields in ({}, *VARIANTS.get(name, ()))
]


def run_config(method, **fields):
    data = {"name": "scenes", "num_train": 16, "num_validation": 8, "num_test": 8}
    base = {"method": method, "data": data, "batch_size": 8, "compilation_cache": False}
    return {**base, **fields}


@pytest.fixture(scope="module")
def world():
    config = parse_config(run_config({"name": "zero_shot"}))
    backbone = load_backbone(config.backbone)
    data = registry.load(config.data, image_size=64, splits=())
    return backbone, data


@pytest.mark.parametrize("weights", ["pretrained", "random"])
def test_the_backbone_is_as_its_settings_say(weights):
    settings = {"weights": weights, "dtype": "bfloat16", "remat": True, "image_size": 96}
    settings["class_chunk"] = 64
    config = parse_config(run_config({"name": "coop"}, backbone=settings))
    clip = load_backbone(config.backbone).clip
    assert clip.image.remat and clip.text.remat and clip.text.class_chunk == 64
    assert (clip.dtype, clip.config.image.image_size) == (jnp.bfloat16, 96)
    assert clip.image.position_embedding.shape == (1 + 12**2, 128)


@pytest.mark.parametrize("weights", ["pretrained", "random"])
def test_pixels_are_normalised_as_the_settings_say(weights):
    pixels = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), np.uint8)
    statistics = {
        None: ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
        "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    }
    for norm, (mean, std) in statistics.items():
        settings = {"weights": weights, "image_norm": norm}
        config = parse_config(run_config({"name": "coop"}, backbone=settings))
        clip = load_backbone(config.backbone).clip
        expected = (pixels / 255.0 - mean) / std
        np.testing.assert_allclose(clip.normalize(jnp.asarray(pixels)), expected, atol=1e-5)
    with pytest.raises(UserError, match=r"backbone\.image_norm"):
        parse_config(run_config({"name": "coop"}, backbone={"image_norm": "imagnet"}))


@pytest.mark.parametrize("method", CASES)
def test_every_trained_parameter_gets_a_gradient(world, method):
    backbone, data = world
    (stage,) = parse_config(run_config(method)).stages
    built = build_method(stage, backbone, data.space, seed=0)
    if built.image_size != 64:
        settings = run_config(method)["data"]
        data = registry.load(settings, image_size=built.image_size, splits=())
    data = with_captions(data, built, backbone.tokenizer)
    batch = Batch(**next(train_batches(data.train, 8, seed=0)))
    labels = built.label_inputs(data.space, backbone.tokenizer, multiple_of=8)
    labels = labels.with_counts(data.train.class_counts(), len(data.train))
    parts = take_apart(built)
    zero = jnp.zeros((), jnp.int32)
    progress = Progress(step=zero, epoch=zero, key=jax.random.key(0))

    def loss(trainable):
        return forward(parts.merge({**parts.frozen, **trainable}), batch, labels, progress)[0]

    value, grads = jax.jit(jax.value_and_grad(loss))(parts.trainable)
    assert np.isfinite(value)
    dead = [path for path, grad in grads.items() if not np.any(grad)]
    assert not dead
    assert bool(grads) == (method["name"] != "zero_shot")
    assert not any(path.startswith("clip/text/") for path in grads)


def test_two_steps_and_back(tmp_path):
    config = run_config({"name": "coop", "n_ctx": 2}, duration="2 steps", ema_decay=0.5)
    result = fit(config, tmp_path, mesh=make_mesh(jax.devices()[:2]), quiet=True)
    assert result.step == 2
    assert set(result.metrics) == {"validation", "test"}
    trained = load_trained(tmp_path)
    assert trained.method.context.vectors.shape == (2, 128)
    # 2 of 1.6 million values changed hands: the frozen towers are not in the checkpoint.
    size = sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())
    assert size < 300_000


@pytest.mark.parametrize("method", [{"name": "hspnet"}, {"name": "coop", "label_graph": True}])
def test_graphs_compute_in_float32(world, method):
    config = parse_config(run_config(method, backbone={"dtype": "bfloat16"}))
    backbone = load_backbone(config.backbone)
    built = build_method(config.stages[0], backbone, world[1].space, seed=0)
    labels = built.label_inputs(world[1].space, backbone.tokenizer)
    assert labels.label_graph.dtype == jnp.float32
    assert jax.eval_shape(built.encode_labels, labels).dtype == jnp.float32


@pytest.mark.slow
def test_hspnet_resumes_across_its_first_epoch(tmp_path):
    """BatchNorm and SPLC change after the first epoch (2 steps); the average goes on too."""

    def last(folder, *steps):
        for duration in steps:
            config = run_config(
                {"name": "hspnet"},
                backbone={"name": "clip-mini-rn"},
                duration=f"{duration} steps",
                optim={"schedule": "onecycle", "schedule_duration": "4 steps"},
                ema_decay=0.5,
                eval={"every": "1 epochs", "splits": ("validation",)},
                checkpoint={"every": "1 steps"},
            )
            result = fit(config, folder, mesh=make_mesh(jax.devices()[:1]), quiet=True)
        return result.metrics, [
            nnx.to_pure_dict(nnx.state(load_trained(folder, which="latest", weights=w).method))
            for w in ("raw", "ema")
        ]

    (metrics, whole), (again, resumed) = last(tmp_path / "a", 4), last(tmp_path / "b", 1, 3, 4)
    assert metrics == again
    jax.tree.map(np.testing.assert_array_equal, whole, resumed)


def test_losses_get_the_class_counts_they_ask_for(tmp_path):
    method = {"name": "coop", "n_ctx": 2, "loss": "distribution_balanced"}
    config = run_config(method, duration="1 steps", eval={"splits": ("validation",)})
    mesh = make_mesh(jax.devices()[:4])
    ((_, arguments, (_, metrics)),) = abstract_step(config, mesh=mesh)
    assert arguments[-1].class_counts.shape == (24,)  # 22 classes, padded
    assert metrics["loss"].shape == ()
    assert fit(config, tmp_path, mesh=mesh, quiet=True).step == 1


def test_images_and_classes_are_shared_out_among_the_devices():
    # Were the classes encoded on every device, the text tower's part would not shrink at all.
    config = run_config({"name": "coop", "class_specific": True})

    def flops(devices):
        ((plan, arguments, _),) = abstract_step(config, mesh=make_mesh(jax.devices()[:devices]))
        return plan.step.lower(*arguments).compile().cost_analysis()["flops"]

    assert flops(8) < 0.15 * flops(1)  # 22 classes are padded to 24


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("ViT-B/16", {"name": "coop"}),
        ("RN50", {"name": "coop", "class_specific": True, "train_image_encoder": True}),
    ],
    ids=["vit", "resnet"],
)
def test_full_size_dry_run(name, method):
    config = run_config(method, backbone={"name": name, "dtype": "bfloat16"}, ema_decay=0.99)
    ((plan, arguments, (state, metrics)),) = abstract_step(config)
    before = arguments[0]
    shapes = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), state)
    assert shapes == jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), before)
    assert metrics["loss"].shape == () and metrics["loss"].dtype == jnp.float32
    assert arguments[3].mask.shape == (24,)  # 22 classes for eight devices
    assert all(leaf.dtype == jnp.float32 for leaf in plan.parts.trainable.values())
    assert bool(plan.parts.trainable) and "context/vectors" in state["trainable"]
