"""A run whose images are larger than the tower's, from training to tags, maps and a report."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest

from mlclip_jax import evaluate, tag
from mlclip_jax.data.scenes import Scenes
from mlclip_jax.errors import UserError
from mlclip_jax.serving.tagger import Tagger
from mlclip_jax.training.build import load_trained
from mlclip_jax.training.config import parse_config
from mlclip_jax.training.loop import fit
from mlclip_jax.training.mesh import make_mesh

METHOD = {"name": "adds", "layers": 2, "heads": 2, "hidden": 64, "image_size": 128}


def config(**fields):
    return {
        "method": METHOD,
        "data": {"name": "scenes", "num_train": 16, "num_validation": 8, "num_test": 8,
                 "object_scale": 0.5},
        "batch_size": 8,
        "duration": "4 steps",
        "optim": {"name": "adam", "learning_rate": 1e-3},
        "eval": {"every": "2 steps", "batch_size": 8},
        "checkpoint": {"every": "1 steps"},
        "compilation_cache": False,
        **fields,
    }  # fmt: skip


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pyramid")
    fit(config(), folder / "run", mesh=make_mesh(jax.devices()[:2]), quiet=True)
    return folder / "run"


@pytest.fixture(scope="module")
def scenes():
    return Scenes("test", 8, image_size=128, object_scale=0.5)


def test_a_trained_run_takes_large_images(workdir, scenes):
    trained = load_trained(workdir)
    assert trained.method.image_size == trained.preprocess.size == 128
    tagger = Tagger.from_workdir(workdir, batch_size=4)
    images = [scenes.image(i) for i in range(3)]
    assert tagger.score_kind == "sigmoid"
    (first, *_) = tagger.tag(images, top_k=3)
    assert len(first) == 3 and all(0 < found["score"] < 1 for found in first)
    direct = tagger.logits(images)
    tokens = trained.method.encode_images(np.stack(images))
    assert tokens.tokens.shape == (3, 5 * 65 - 1, 64)
    labels = trained.method.label_inputs(trained.space, trained.backbone.tokenizer)
    expected = trained.method.logits(tokens, labels.features, labels)
    np.testing.assert_allclose(direct, expected, atol=1e-4)
    for kind in ("contrast", "patches"):
        (explained, *_) = tagger.explain(images, ["red", "two"], kind=kind)
        assert explained.pixels.shape == (128, 128, 3) and explained.maps.shape == (2, 16, 16)
    with pytest.raises(UserError, match="take the map 'contrast' or 'patches'"):
        tagger.explain(images, ["red"], kind="grad_cam")


def test_the_report_has_zero_shot_clip_beside_it(workdir, tmp_path, capsys):
    assert evaluate.main([f"--workdir={workdir}", f"--output={tmp_path}", "--batch_size=8"]) == 0
    numbers = json.loads((tmp_path / "report.json").read_text())
    assert "zero-shot" in numbers["results"] and len(numbers["results"]) >= 2
    assert "adds" in capsys.readouterr().out


def test_other_labels_from_the_command_line(workdir, scenes, tmp_path, capsys):
    from PIL import Image

    for i in range(2):
        Image.fromarray(scenes.image(i)).save(tmp_path / f"{i}.png")
    (tmp_path / "labels.txt").write_text("blue\nred star\nnine\n")
    arguments = [str(tmp_path / "0.png"), str(tmp_path / "1.png"), f"--workdir={workdir}"]
    arguments += [f"--labels={tmp_path / 'labels.txt'}", "--top_k=2"]
    assert tag.main(arguments) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [len(line["labels"]) for line in lines] == [2, 2]


def test_from_cached_tokens_it_is_the_same_run(workdir, tmp_path):
    """Without dropout and crops left out, tokens computed once give what images do."""
    steps = {"method": METHOD | {"dropout": 0.0}, "duration": "2 steps"}
    mesh = make_mesh(jax.devices()[:2])
    plain = fit(config(**steps), tmp_path / "plain", mesh=mesh, quiet=True)
    cache = {"folder": str(tmp_path / "features")}
    cached = fit(config(**steps, cache=cache), tmp_path / "cached", mesh=mesh, quiet=True)
    for split, found in plain.metrics.items():
        assert found["raw"]["mAP"] == pytest.approx(cached.metrics[split]["raw"]["mAP"], abs=1e-5)
    # Another decoder reads the same tokens, another pyramid has its own.
    count = len(list((tmp_path / "features").iterdir()))
    smaller = {"method": METHOD | {"layers": 1, "dropout": 0.0}, "duration": "1 steps"}
    fit(config(**smaller, cache=cache), tmp_path / "smaller", mesh=mesh, quiet=True)
    assert len(list((tmp_path / "features").iterdir())) == count
    other = {"method": METHOD | {"levels": (1,), "dropout": 0.0}, "duration": "1 steps"}
    fit(config(**other, cache=cache), tmp_path / "other", mesh=mesh, quiet=True)
    assert len(list((tmp_path / "features").iterdir())) == 2 * count
    dropping = {"method": METHOD | {"drop_crops": 0.5}, "cache": cache}
    with pytest.raises(UserError, match="they change with the step or epoch"):
        fit(config(**dropping), tmp_path / "dropping", mesh=mesh, quiet=True)


def test_interrupted_it_goes_on_with_the_same_random_numbers(workdir, tmp_path):
    """Dropout, crops and labels of a step are the step's own."""
    method = METHOD | {"drop_crops": 0.5, "selected_labels": 12}
    mesh = make_mesh(jax.devices()[:2])

    def last(folder, *steps):
        for duration in steps:
            fields = {"method": method, "duration": f"{duration} steps"}
            optim = {"schedule": "constant", "learning_rate": 1e-3}
            result = fit(config(**fields, optim=optim), folder, mesh=mesh, quiet=True)
        return result.metrics

    assert last(tmp_path / "a", 3) == last(tmp_path / "b", 1, 3)


def test_stages_of_different_sizes_are_refused(tmp_path):
    stages = ({"name": "a", "duration": "1 steps"},
              {"name": "b", "duration": "1 steps", "method": {"image_size": 64}})  # fmt: skip
    with pytest.raises(UserError, match="stages take images of different sizes: 'a' 128, 'b' 64"):
        fit(parse_config(config(stages=stages)), tmp_path, quiet=True)
