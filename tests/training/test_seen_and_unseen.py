"""Runs that train on other labels than they are evaluated on: resumed, reported, serving."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import toys
from test_loop import arrays, assert_same, one_device, rows, run
from toys import toy_world  # noqa: F401  (a fixture)

from mlclip_jax import cli
from mlclip_jax.errors import UserError
from mlclip_jax.labels import catalog
from mlclip_jax.methods.mkt import MKT
from mlclip_jax.serving.tagger import Tagger
from mlclip_jax.training import scoring
from mlclip_jax.training.build import load_trained
from mlclip_jax.training.checkpoint import Checkpoints

sys.path.append(str(Path(__file__).parents[1] / "data"))
import raw_folders_more

pytestmark = pytest.mark.usefixtures("toy_world")

UNSEEN = catalog.nus().names
SEEN = ("nature", "blue", "red")  # of the tiny folder's tags, those that are no concepts


COOP = {"name": "coop", "n_ctx": 2, "logit_bias": True}


def config(raw, name="nus_zsl", method=COOP, **fields):
    return toys.config(
        method=method,
        data={"name": name, "data_dir": str(raw), "augment": "flip_rrc", "check_sizes": False},
        batch_size=2,
        duration="6 steps",
        eval={"splits": ("test",), "batch_size": 2, "every": "2 steps"},
        log_every="1 steps",
        ema_decay=0.5,
        **fields,
    )


def test_resumed_reported_and_tagging(tmp_path, monkeypatch, capsys):
    raw, whole, broken = (tmp_path / name for name in ("raw", "whole", "broken"))
    raw_folders_more.nuswide(raw)
    settings = config(raw)
    expected = run(whole, settings)
    with pytest.raises(KeyboardInterrupt):
        run(broken, settings, stop_at=4)
    with Checkpoints(broken) as checkpoints:
        last = checkpoints.meta(checkpoints.steps()[-1])
    assert 0 < last["step"] < 6
    assert tuple(last["train_space"]["names"]) == SEEN
    assert tuple(last["label_space"]["names"]) == (*SEEN, *UNSEEN)
    result = run(broken, settings)
    assert result.step == expected.step == 6 and result.metrics == expected.metrics
    assert rows(broken) == rows(whole)
    assert_same(arrays(broken), arrays(whole))

    # ---- Evaluation gives what training reported -------------------------------------------------
    monkeypatch.setattr(scoring, "make_mesh", one_device)
    evaluate = ["evaluate", f"--workdir={broken}", "--checkpoint=latest", "--no-baseline"]
    assert cli.main(evaluate) == 0
    capsys.readouterr()
    report = json.loads((broken / "report/test/report.json").read_text())
    assert f"{result.metrics['test']['ema']['mAP']}" in json.dumps(report)

    # ---- Tags are of the labels of evaluation, with the scores of evaluation ---------------------
    trained = load_trained(broken, which="latest")
    scorer = scoring.Scorer(trained, ("test",), 2)
    scores = scorer.score({"it": trained.method}, "test")["it"].scores
    source = scorer.data.evals["test"]
    images = [raw / key for key in source.keys]
    tagger = Tagger.from_workdir(broken, checkpoint="latest")
    np.testing.assert_allclose(tagger.logits(images), scores, rtol=1e-5, atol=1e-5)
    tag = ["tag", *map(str, images), f"--workdir={broken}", "--checkpoint=latest", "--top_k=84"]
    assert cli.main(tag) == 0
    for line, row in zip(capsys.readouterr().out.splitlines(), scores, strict=True):
        found = {tag["label"]: tag["score"] for tag in json.loads(line)["labels"]}
        expected = 1 / (1 + np.exp(-row.astype(np.float64)))
        assert list(map(found.get, (*SEEN, *UNSEEN))) == pytest.approx(expected, abs=2e-5)


def test_a_method_that_compares_labels(tmp_path, monkeypatch):
    """Trains among the seen labels; unseen ones are scored by themselves, as tags of them are."""
    monkeypatch.setitem(toys.METHODS, "mkt", MKT)
    raw, workdir = tmp_path / "raw", tmp_path / "run"
    raw_folders_more.nuswide(raw)
    method = {"name": "mkt", "top_k": 2, "train_blocks": 1, "template": "a {}"}
    stages = ({"name": "image"}, {"name": "prompt", "method": {"tune": "prompt"}})
    result = run(workdir, config(raw, method=method, stages=stages))
    assert result.step == 12
    monkeypatch.setattr(scoring, "make_mesh", one_device)
    trained = load_trained(workdir, which="latest")
    assert tuple(trained.meta["train_space"]["names"]) == SEEN
    scorer = scoring.Scorer(trained, ("test",), 2)
    found = scorer.score({"it": trained.method}, "test", subsets=("unseen",))["it"]
    images = [raw / key for key in scorer.data.evals["test"].keys]
    for labels, scores in (
        (None, found.scores),
        (UNSEEN, found.task_scores["unseen"]),
    ):
        tagger = Tagger.from_workdir(workdir, labels=labels, checkpoint="latest")
        np.testing.assert_allclose(tagger.logits(images), scores, rtol=1e-4, atol=1e-5)
    assert scores.shape == (len(images), len(UNSEEN))
    assert np.abs(found.scores[:, len(SEEN) :] - scores).max() > 1e-4


def test_other_labels_of_training_are_refused(tmp_path):
    raw_folders_more.nuswide(tmp_path / "raw")
    run(tmp_path / "run", config(tmp_path / "raw"))
    tags = tmp_path / "raw/NUS_WID_Tags/TagList1k.txt"
    tags.write_bytes(tags.read_bytes().replace(b"blue", b"bleu"))
    with pytest.raises(UserError, match="trained on other labels or groups"):
        run(tmp_path / "run", {**config(tmp_path / "raw"), "duration": "8 steps"})
