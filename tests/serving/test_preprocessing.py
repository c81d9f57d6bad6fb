"""Images are brought to size for serving as they were for the run's evaluations."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from mlclip_jax import cli, export
from mlclip_jax.data.transforms import Preprocess
from mlclip_jax.serving.tagger import Tagger
from mlclip_jax.training import scoring
from mlclip_jax.training.build import load_trained
from mlclip_jax.training.loop import fit
from mlclip_jax.training.mesh import make_mesh

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "data"))
import raw_folders
from small_clip import write_clip

MEANS = {"imagenet": (0.485, 0.456, 0.406), "clip": (0.48145466, 0.4578275, 0.40821073)}


@pytest.fixture(scope="module")
def one():
    """One device: there are fewer images than eight."""
    return make_mesh(jax.devices()[:1])


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return write_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(
    params=[("squash", "bilinear", "imagenet"), ("resize256", "bicubic", "clip")],
    ids=lambda param: param[0],
)
def settings(request):
    return request.param


@pytest.fixture
def workdir(tmp_path, settings, clip, one, monkeypatch):
    """A short run with settings of a paper, on images that are twice as wide as high."""
    monkeypatch.setattr(scoring, "make_mesh", lambda: one)
    raw = raw_folders.custom(tmp_path / "raw")
    y, x = np.mgrid[:48, :96]
    for i, record in enumerate(raw_folders.CUSTOM):
        pixels = np.stack([(i + 2) * x, 5 * y + i, x * y // (i + 3)], -1) % 256
        Image.fromarray(pixels.astype(np.uint8)).save(raw / record["image"], quality=95)
    mode, interpolation, norm = settings
    config = {
        "backbone": {"name": str(clip), "image_norm": norm},
        "method": {"name": "coop", "n_ctx": 2, "logit_bias": True},
        "data": {
            "name": "custom",
            "data_dir": str(raw),
            "resize": mode,
            "interpolation": interpolation,
            "augment": "flip_rrc",
        },
        "batch_size": 2,
        "duration": "2 steps",
        "eval": {"splits": ("test",)},
        "compilation_cache": False,
    }
    fit(config, tmp_path / "run", mesh=one, quiet=True)
    return tmp_path / "run"


def test_serving_sees_what_evaluation_sees(workdir, tmp_path, settings, capsys):
    mode, interpolation, norm = settings
    trained = load_trained(workdir)
    scorer = scoring.Scorer(trained, ("test",), 2)
    expected = scorer.score({"it": trained.method}, "test")["it"].scores
    keys = scorer.data.evals["test"].keys.tolist()
    images = [tmp_path / "raw" / key for key in keys]
    model = tmp_path / "model"
    assert export.main([f"--workdir={workdir}", f"--output={model}"]) == 0
    capsys.readouterr()

    # ---- What is written down --------------------------------------------------------------------
    described = json.loads((model / "classifier.json").read_text())["config"]
    assert described["preprocess"] == asdict(Preprocess(32, mode, interpolation))
    assert described["image_mean"] == pytest.approx(MEANS[norm])
    data = trained.meta["config"]["data"]
    assert (data["resize"], data["interpolation"]) == (mode, interpolation)

    # ---- Logits of both, and scores of the command -----------------------------------------------
    taggers = [Tagger.from_workdir(workdir), Tagger.from_classifier(model)]
    for tagger in taggers:
        np.testing.assert_allclose(tagger.logits(images), expected, rtol=1e-4, atol=1e-4)
    for source in (f"--workdir={workdir}", f"--classifier={model}"):
        assert cli.main(["tag", *map(str, images), source, "--top_k=3"]) == 0
        for line, row in zip(capsys.readouterr().out.splitlines(), expected, strict=True):
            found = {tag["label"]: tag["score"] for tag in json.loads(line)["labels"]}
            scores = 1 / (1 + np.exp(-row.astype(np.float64)))
            assert list(map(found.get, trained.space.names)) == pytest.approx(scores, abs=2e-5)

    # ---- Any other setting would be seen ---------------------------------------------------------
    others = [Preprocess(32), Preprocess(32, mode, "bilinear"), Preprocess(32, mode, "bicubic")]
    for other in others:
        if other != taggers[0].preprocess:
            taggers[0].preprocess = other
            assert np.abs(taggers[0].logits(images) - expected).max() > 1e-2
            taggers[0].preprocess = trained.preprocess
