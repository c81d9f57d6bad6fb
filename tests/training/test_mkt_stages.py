"""MKT's two stages in one run: interrupted in either, any labels served, features cached."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from test_loop import arrays, assert_same, rows, run

from mlclip_jax.errors import UserError
from mlclip_jax.serving.tagger import Tagger
from mlclip_jax.training.build import load_trained

pytestmark = pytest.mark.slow


def config(**prompt):
    data = {"name": "scenes", "train_view": "seen", "num_train": 40, "num_test": 8}
    stages = (
        {"name": "image", "method": {"tune": "image"}},
        {"name": "prompt", "method": {"tune": "prompt"}, "batch_size": 4, **prompt},
    )
    return {
        "method": {"name": "mkt", "top_k": 6},
        "data": data,
        "batch_size": 8,
        "duration": "3 steps",
        "optim": {"name": "adamw", "learning_rate": 1e-3, "weight_decay": 0.005},
        "eval": {"splits": ("test",), "batch_size": 8, "every": "2 steps"},
        "checkpoint": {"every": "1 steps"},
        "log_every": "1 steps",
        "stages": stages,
        "compilation_cache": False,
    }


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return folder, run(folder, config())


@pytest.mark.parametrize("stop_at", [1, 4])
def test_a_run_that_goes_on_equals_one_that_never_stopped(tmp_path, whole, stop_at):
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, config(), stop_at=stop_at)
    result = run(tmp_path, config())
    assert result.step == 6 and result.metrics == whole[1].metrics
    assert rows(tmp_path) == rows(whole[0])
    assert_same(arrays(tmp_path), arrays(whole[0]))


def test_what_each_stage_leaves(whole):
    folder, _ = whole
    trained = load_trained(folder, which="latest")
    method, clip = trained.method, trained.backbone.clip
    first = list(clip.image.blocks)[-2]
    moved = method.student.blocks[0].mlp.up.kernel[...] - first.mlp.up.kernel[...]
    assert np.abs(moved).max() > 1e-4  # by the first stage, and still there after the second
    ids = trained.backbone.tokenizer.encode("There is a in the scene")
    start = clip.text.token_embedding[...][np.array(ids)]
    assert np.abs(method.context.vectors[...] - start).max() > 1e-4
    assert rows(folder)[0]["stage"] == "image" and rows(folder)[-1]["stage"] == "prompt"
    # CLIP is as it was: the student is a copy, and the text tower is frozen.
    own = {path: leaf for path, leaf in arrays(folder).items() if "clip/" in path}
    assert not own


def test_any_labels_are_tagged_without_training(whole):
    tagger = Tagger.from_workdir(
        whole[0], labels=("a red seven", "sunset", "dog"), checkpoint="latest"
    )
    image = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    (tags,) = tagger.tag([image])
    assert {tag["label"] for tag in tags} == {"a red seven", "sunset", "dog"}
    logits = tagger.logits([image])
    assert tagger.score_kind == "relative"
    np.testing.assert_allclose([tag["score"] for tag in tags], sorted(logits[0])[::-1], atol=1e-6)
    assert logits.shape == (1, 3) and np.isfinite(logits).all()
    assert (jax.numpy.linalg.norm(logits) <= 1.0001).all()  # the mean of two of unit length


def test_the_prompt_trains_from_cached_features(tmp_path, whole):
    cache = {"folder": str(tmp_path / "cache")}
    cached = run(tmp_path / "run", config(cache=cache))
    values, theirs = arrays(tmp_path / "run"), arrays(whole[0])
    for path, value in theirs.items():
        np.testing.assert_allclose(values[path], value, atol=2e-4, err_msg=path)
    assert cached.step == 6
    with pytest.raises(UserError, match=r"in stage 'image' image features of method 'mkt'"):
        run(tmp_path / "other", {**config(), "cache": cache})
