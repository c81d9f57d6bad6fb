"""Every method on Scenes: a step of the trainer on eight devices equals that on one."""

from __future__ import annotations

import functools

import jax
import numpy as np
import pytest
from flax import nnx

from mlclip_jax import methods
from mlclip_jax.clip import CLIP, CLIPConfig, TextConfig, ViTConfig
from mlclip_jax.clip.config import ResNetConfig
from mlclip_jax.data import registry
from mlclip_jax.data.pipeline import train_batches
from mlclip_jax.methods.base import Batch
from mlclip_jax.training.build import (
    Backbone,
    build_method,
    image_size,
    packaged_tokenizer,
    plan_stage,
)
from mlclip_jax.training.captions import with_captions
from mlclip_jax.training.config import parse_config
from mlclip_jax.training.mesh import make_mesh, replicate, shard_batch, shard_labels
from mlclip_jax.training.step import init_state

# A small form of each method; `test_step` has CoOp and HSPNet on narrower towers already.
SMALL = {
    "adds": {
        "layers": 2,
        "hidden": 32,
        "image_size": 64,
        "drop_crops": 0.25,
        "selected_labels": 20,
    },
    "clip_ft": {"train_blocks": 1},
    "coop": {"n_ctx": 2, "class_specific": True},
    "dual_coop": {"n_ctx": 2},
    "linear_probe": {"start": "text"},
    "ml_decoder": {"groups": 6, "hidden": 32},
    # Without distillation: a student that is its teacher still gets signs of rounding errors.
    "mkt": {"train_blocks": 1, "top_k": 2, "distillation_weight": 0.0},
    "tai_dpt": {"n_ctx": 2},
}
# In the whole suite only.
LATER = ("clip_ft", "coop", "fine_tune", "hspnet", "linear_probe", "ml_decoder", "query2label")
# Other ways to the loss.
FURTHER = [
    ("vit", {"name": "adds", "layers": 2, "hidden": 32, "label_embedding": "random"}),
    ("vit", {"name": "ml_decoder", "queries": "labels", "hidden": 32}),
    ("vit", {"name": "coop", "n_ctx": 2, "logit_bias": True, "label_graph": True}),
    ("vit", {"name": "dual_coop", "n_ctx": 2, "class_specific": False}),
    ("vit", {"name": "hspnet", "variant": "paper"}),
    ("vit", {"name": "lmpt", "variant": "released", "class_specific": False}),
    ("vit", {"name": "mkt", "tune": "prompt", "top_k": 2, "train_blocks": 1, "tune_ends": True}),
    ("vit", {"name": "tai_dpt", "n_ctx": 2, "local": False}),
    ("resnet", {"name": "dual_coop", "n_ctx": 2, "train_image_encoder": True}),
    ("resnet", {"name": "adds", "layers": 2, "hidden": 32, "image_size": 128, "levels": (1,)}),
    (
        "vit",
        {"name": "adds", "layers": 2, "hidden": 32, "selected_labels": 23, "negative_ratio": 0.05},
    ),
    ("resnet", {"name": "fine_tune", "batch_norm": "train"}),
    ("resnet", {"name": "clip_ft", "train_blocks": "all"}),
]


def case(kind: str, method: dict, *, slow: bool):
    marks = (pytest.mark.slow,) if slow else ()
    return pytest.param(
        kind, method, id="-".join([kind, method["name"], *[*method][1:]]), marks=marks
    )


CASES = [
    *(
        case("vit", {"name": name, **SMALL.get(name, {})}, slow=name in LATER)
        for name in methods.names()
        if name != "zero_shot"  # nothing trains
    ),
    *(case(*further, slow=True) for further in FURTHER),
]


@functools.cache
def backbone(kind: str) -> Backbone:
    """A random CLIP of two narrow towers, and the packaged tokenizer."""
    size = {"width": 16, "layers": 1, "heads": 2, "mlp_width": 32}
    image = (
        ViTConfig(image_size=32, patch_size=16, **size)
        if kind == "vit"
        else ResNetConfig(image_size=64, layers=(1, 1, 1, 1), width=4, heads=2)
    )
    tokenizer = packaged_tokenizer(48)
    text = TextConfig(
        vocab_size=tokenizer.vocab_size, context_length=48, eot_id=tokenizer.eot, **size
    )
    return Backbone(CLIP(CLIPConfig(16, image, text), rngs=nnx.Rngs(0)), tokenizer, "random")


def first_step(
    kind: str, method: dict, devices: int, *, moved: bool = False
) -> tuple[dict, dict, dict]:
    """Trained values before and after a step with plain SGD, and the metrics, all on the host.

    At a rate of 1 the values change by the gradients themselves.

    Args:
        kind: of the backbone.
        method: its settings.
        devices: number of them.
        moved: start from other values than the method's own, the same whatever the devices.
    """
    config = parse_config(
        {
            "method": method,
            "data": {"name": "scenes", "num_train": 16},
            "batch_size": 16,
            "optim": {"name": "sgd", "momentum": 0.0, "learning_rate": 1.0, "weight_decay": 0.0,
                      "schedule": "constant"},
        }
    )  # fmt: skip
    (stage,) = config.stages
    clip, tokenizer = backbone(kind).clip, backbone(kind).tokenizer
    data = registry.load(config.data, image_size=image_size(config, clip.config), splits=())
    mesh = make_mesh(jax.devices()[:devices])
    built = build_method(stage, backbone(kind), data.space, seed=0)
    data = with_captions(data, built, tokenizer)
    labels = built.label_inputs(data.space, tokenizer, multiple_of=mesh.size)
    labels = labels.with_counts(data.train.class_counts(), len(data.train))
    plan = plan_stage(
        stage, built, labels, classes=len(data.space), mesh=mesh, num_examples=len(data.train)
    )
    state = init_state(plan.parts, plan.optimizer, seed=0, ema=False)
    if moved:
        values = state["trainable"]
        state["trainable"] = {
            path: x + 0.05 * np.cos(np.arange(x.size)).reshape(x.shape).astype(x.dtype)
            for path, x in values.items()
        }
    before = jax.device_get(state["trainable"])
    batch = shard_batch(Batch(**next(train_batches(data.train, 16, seed=0))), mesh)
    frozen = replicate(plan.parts.frozen, mesh)
    state, metrics = plan.step(replicate(state, mesh), frozen, batch, shard_labels(labels, mesh))
    after = jax.device_get({**state["trainable"], **state["batch_stats"]})
    return before, after, jax.device_get(metrics)


@pytest.mark.parametrize(("kind", "method"), CASES)
def test_eight_devices_equal_one(kind, method):
    check(kind, method)


def test_eight_devices_equal_one_in_distillation():
    """A student away from its teacher: at the start the distance is rounding, its slope a sign."""
    method = {"name": "mkt", **SMALL["mkt"], "distillation_weight": 3.0}
    metrics = check("vit", method, moved=True)
    assert metrics["distillation_loss"] > 1e-3


def check(kind: str, method: dict, **start: bool) -> dict:
    """Compares a step on eight devices with one on one, and returns its metrics."""
    before, one, metrics = first_step(kind, method, 1, **start)
    _, eight, theirs = first_step(kind, method, 8, **start)
    assert metrics["finite"] and metrics["grad_norm"] > 1e-4
    assert metrics.keys() == theirs.keys()
    for name in metrics:
        np.testing.assert_allclose(theirs[name], metrics[name], rtol=1e-5, err_msg=name)
    assert one.keys() == eight.keys()
    scale = max(np.abs(one[path] - before[path]).max() for path in before)
    for path in one:
        unit = scale if path in before else np.abs(one[path]).max()
        assert np.abs(eight[path] - one[path]).max() <= 1e-5 * unit, path
    return metrics
