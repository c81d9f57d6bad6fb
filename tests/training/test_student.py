"""MKT's files: a student's is needed where training starts; word vectors wherever labels are."""

from __future__ import annotations

import numpy as np
import pytest
from references.plain_vit import timm_state

from mlclip_jax.clip import PRESETS
from mlclip_jax.errors import UserError
from mlclip_jax.labels import catalog
from mlclip_jax.serving.tagger import Tagger
from mlclip_jax.training.build import load_trained, with_absolute_paths
from mlclip_jax.training.config import parse_config
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


def test_paths_of_files_are_kept_in_full(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/me")
    config = with_absolute_paths(parse_config(config_of("vit.npz", 2)))
    for stage in config.stages:
        assert stage.method["student"] == str(tmp_path / "vit.npz")
    again = parse_config(config.source)
    assert again == config == with_absolute_paths(again)
    own = config_of("", 2)
    own["stages"][0]["method"]["word_vectors"] = "~/glove.txt"
    first, second = with_absolute_paths(parse_config(own)).stages
    assert first.method["word_vectors"] == "/home/me/glove.txt"
    assert "word_vectors" not in second.method and first.method["student"] == ""


@pytest.mark.slow
def test_word_vectors_are_found_from_another_folder(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = " ".join(catalog.scenes().prompt_names).split()
    words = sorted({*names, "boat", "sunset"})
    (tmp_path / "vectors.txt").write_text(
        "".join(f"{w} {len(w)} {i}\n" for i, w in enumerate(words))
    )
    config = config_of("", 1)
    config["method"] |= {"word_vectors": "vectors.txt", "distillation_weight": 0.0}
    fit(config, tmp_path / "run", quiet=True)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    tagger = Tagger.from_workdir(tmp_path / "run", labels=("boat", "sunset"))
    assert tagger.logits([np.zeros((64, 64, 3), np.uint8)]).shape == (1, 2)
