"""MKT with a student from ImageNet: its file is needed where training starts, and never again."""

from __future__ import annotations

import numpy as np
import pytest
from references.plain_vit import timm_state

from mlclip_jax.clip import PRESETS
from mlclip_jax.errors import UserError
from mlclip_jax.training.build import load_trained
from mlclip_jax.training.loop import fit


def config_of(path, stages: int) -> dict:
    both = (
        {"name": "image", "method": {"tune": "image"}},
        {"name": "prompt", "method": {"tune": "prompt"}},
    )
    method = {"name": "mkt", "student": str(path), "train_blocks": 1, "top_k": 4}
    return {
        "method": method,
        "data": {"name": "scenes", "num_train": 16, "num_validation": 8, "num_test": 8},
        "batch_size": 8,
        "duration": "1 steps",
        "stages": both[:stages],
        "eval": {"splits": ("validation",)},
        "compilation_cache": False,
    }


@pytest.mark.slow
def test_the_file_may_be_gone_after_training_has_started(tmp_path) -> None:
    path, workdir = tmp_path / "vit.npz", tmp_path / "run"
    with pytest.raises(UserError, match="there is no file"):
        fit(config_of(path, 1), workdir, quiet=True)
    state = timm_state(PRESETS["clip-mini"].image)
    np.savez(path, **state)
    fit(config_of(path, 1), workdir, quiet=True)
    path.unlink()

    first = load_trained(workdir).method.student
    for leaf, name in (
        (first.class_embedding[...], "cls_token"),
        (first.patch_embed.bias[...], "patch_embed.proj.bias"),
        (first.blocks[0].mlp.up.bias[...], "blocks.0.mlp.fc1.bias"),
    ):
        np.testing.assert_array_equal(leaf, state[name].reshape(-1))
    moved = np.abs(first.blocks[3].mlp.up.bias[...] - state["blocks.3.mlp.fc1.bias"]).max()
    assert 0 < moved < 0.1

    # The stage of the prompt goes on with the student of the first.
    np.savez(path, **state)
    fit(config_of(path, 2), tmp_path / "both", quiet=True)
    path.unlink()
    second = load_trained(tmp_path / "both").method.student
    np.testing.assert_array_equal(second.class_embedding[...], first.class_embedding[...])
    np.testing.assert_array_equal(second.projection[...], first.projection[...])
