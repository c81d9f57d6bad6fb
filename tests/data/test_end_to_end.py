"""From the original download of every corpus to a report, by the commands alone."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import raw_folders
import raw_folders_more

from mlclip_jax import cli
from mlclip_jax.training import loop, scoring
from mlclip_jax.training.mesh import make_mesh

CONFIGS = Path(__file__).parents[2] / "configs"
SMALL = {
    "backbone.name": "clip-mini",
    "batch_size": 2,
    "duration": "2 steps",
    "compilation_cache": False,
}
AT_64 = {"backbone.image_size": 64}  # of 448


@pytest.fixture
def mlclip(tmp_path, monkeypatch, capsys):
    """Runs a command, which has to succeed, on one device: there are fewer images than eight."""
    one = make_mesh(jax.devices()[:1])
    for module in (loop, scoring):
        monkeypatch.setattr(module, "make_mesh", lambda: one)

    def run(*args):
        code = cli.main([*map(str, args)])
        out, err = capsys.readouterr()
        assert code == 0, err
        return out

    return run


def download(raw, corpus, named):
    """Makes the tiny raw folder of a corpus; texts of the lists that go with it, by name."""
    if corpus == "voc":
        for year in (2007, 2012):
            raw_folders.voc(raw, year=year)
    elif named == "imagenet21k":
        raw_folders_more.imagenet21k(raw)
    else:
        (getattr(raw_folders, corpus, None) or getattr(raw_folders_more, corpus))(raw)
    if corpus == "nuswide":
        raw_folders_more.mldecoder(raw)
    nus = "0_2124494179_02a15f03aa_m.jpg,7 8\n1_2124494180_02a15f03aa_m.jpg,1\n"
    coco = "COCO_train2014_000000000057.jpg,0\nCOCO_train2014_000000480023.jpg, 51\n"
    texts = {
        "coco": {"coco_train_singlelabel.txt": coco},
        "voc": {"voc_lt_captions.txt": "VOCdevkit/VOC2012/JPEGImages/000012.jpg a horse.\n"},
        "nuswide": {"nus_train_singlelabel.txt": nus, "nus_val.txt": nus},
        "vg": {"names.txt": "".join(f"thing {i}\n" for i in range(200))},
    }
    return texts.get(corpus, {})


# Benchmark; a config file; corpora with their years; further settings.
RUNS = [
    ("coco_spml_splc", "hspnet/coco.py", {"coco": "coco2014"}, {}),
    ("custom", "coop/benchmark.py:data=custom", {"custom": "custom"}, {}),
    ("nus_gzsl", "coop/benchmark.py:data=nus_gzsl", {"nuswide": "nuswide"}, {}),
    (
        "nus_zsl_mldecoder",
        "coop/benchmark.py:data=nus_zsl_mldecoder",
        {"nuswide": "nuswide"},
        {},
    ),
    ("voc_spml_largeloss", "hspnet/voc.py:setup=largeloss", {"voc": "voc2012"}, {}),
    ("voc_lt", "coop/benchmark.py:data=voc_lt", {"voc": "voc"}, {}),
    ("coco_partial(0.9)", "hspnet/coco.py:setup=partial(0.9)", {"coco": "coco2014"}, AT_64),
    ("nus_spml_splc", "hspnet/nus.py", {"nuswide": "nuswide"}, {}),
    ("cub_spml_largeloss", "hspnet/cub.py:setup=largeloss", {"cub": "cub"}, {}),
    ("vg200_partial(0.9)", "hspnet/vg200.py:setup=partial(0.9)", {"vg": "vg"}, AT_64),
    ("openimages_gzsl", "coop/benchmark.py:data=openimages_gzsl", {"openimages": "openimages"}, {}),
    (
        "imagenet_to_coco",
        "coop/benchmark.py:data=imagenet_to_coco",
        {"imagenet": "imagenet", "coco": "coco2014"},
        {},
    ),
    (
        "imagenet21k_to_nus",
        "coop/benchmark.py:data=imagenet21k_to_nus",
        {"imagenet": "imagenet21k", "nuswide": "nuswide"},
        {},
    ),
]
QUICK = {"coco_spml_splc", "custom", "nus_gzsl"}


@pytest.mark.parametrize(
    ("name", "file", "corpora", "settings"),
    [pytest.param(*run, marks=() if run[0] in QUICK else pytest.mark.slow) for run in RUNS],
    ids=[run[0] for run in RUNS],
)
def test_from_the_download_to_a_report(tmp_path, mlclip, name, file, corpora, settings):
    prepared, workdir = tmp_path / "data", tmp_path / "run"
    for corpus, named in corpora.items():
        raw = tmp_path / "raw" / corpus
        lists = download(raw, corpus, named)
        for path, text in lists.items():
            raw_folders.write_text(raw / path, text)
        mlclip("prepare", named, f"--raw={raw}", f"--data_dir={prepared}")

    settings = {**SMALL, "data.data_dir": prepared, **settings}
    if name != "custom":
        settings["data.check_sizes"] = False
    if "vg" in corpora:
        settings["data.names_file"] = names = tmp_path / "raw/vg/names.txt"
    more = [f"--config.{key}={value}" for key, value in settings.items()]
    out = mlclip("train", f"--config={CONFIGS / file}", f"--workdir={workdir}", *more)
    assert f"trained 2 steps; checkpoints and metrics are in {workdir}" in out
    said = (workdir / "data.txt").read_text()
    assert said.startswith("train: ") and said.splitlines()[0][: -(64 - 12)] in out
    assert ("labels of" in said) == ("labels of" in out) == ("_to_" in name)
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert all(np.isfinite(row["mAP"]) for row in rows if row["split"] == "test")

    if "vg" in corpora:
        names.unlink()  # the run has them
    out = mlclip("evaluate", f"--workdir={workdir}", "--no-baseline", "--checkpoint=latest")
    report = json.loads((workdir / "report/test/report.json").read_text())
    assert report and "report.html" in out
    assert "tensorflow" not in sys.modules
