"""The commands as a user meets them: output, exit codes, one line for each mistake."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

import mlclip_jax
from mlclip_jax import cli, errors, evaluate, tag
from mlclip_jax.labels import catalog
from mlclip_jax.training import build
from mlclip_jax.training.checkpoint import Checkpoints
from mlclip_jax.training.loop import fit
from mlclip_jax.training.writers import read_rows

sys.path.insert(0, str(Path(__file__).parent / "serving"))
from small_clip import write_clip


@pytest.fixture(scope="module", autouse=True)
def no_compilation_cache(tmp_path_factory):
    """The commands turn the user's compilation cache on; tests keep it in a folder of theirs."""
    jax.config.update("jax_compilation_cache_dir", str(tmp_path_factory.mktemp("cache")))
    yield
    jax.config.update("jax_compilation_cache_dir", None)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return write_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def trained(clip, tmp_path_factory):
    """The folder of a short run that keeps averaged weights."""
    workdir = tmp_path_factory.mktemp("run") / "coop"
    sizes = {"num_train": 32, "num_validation": 17, "num_test": 21}
    config = {
        "backbone": {"name": str(clip)},
        "method": {"name": "coop", "n_ctx": 2},
        "data": {"name": "scenes", **sizes},
        "batch_size": 16,
        "duration": "2 steps",
        "optim": {"learning_rate": 0.1},
        "ema_decay": 0.5,
        "eval": {"every": "1 steps", "batch_size": 16},
        "log_every": "1 steps",
        "compilation_cache": False,
    }
    fit(config, workdir, quiet=True)
    return workdir


@pytest.fixture
def labels(tmp_path):
    path = tmp_path / "my_labels.txt"
    path.write_text("# mine\ncat\nred car\n\nsky\n")
    return path


def picture(path, mode="RGB", size=(40, 30), seed=0, **options):
    rng = np.random.default_rng(seed)
    image = Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), np.uint8))
    if mode == "I;16":
        grey = rng.integers(0, 65536, (size[1], size[0])).astype(np.uint16)
        image = Image.fromarray(grey)
    elif mode != "RGB":
        image = image.convert(mode)
    image.save(path, **options)


KINDS = (
    ("jpg", "RGB"), ("jpeg", "L"), ("JPG", "CMYK"), ("png", "RGB"), ("PNG", "RGBA"), ("png", "P"),
    ("png", "I;16"), ("png", "LA"), ("png", "1"), ("gif", "P"), ("webp", "RGB"), ("Webp", "RGBA"),
    ("bmp", "RGB"), ("BMP", "L"), ("tif", "CMYK"), ("TIFF", "I;16"),
)  # fmt: skip


def mixed_folder(folder, count):
    """`count` images of all kinds in three folders, five of them broken."""
    for sub in ("a", "b", "b/c"):
        (folder / sub).mkdir(parents=True)
    for number in range(count - 5):
        suffix, mode = KINDS[number % len(KINDS)]
        sub = ("", "a", "b", "b/c")[number % 4]
        picture(folder / sub / f"{number:04d}.{suffix}", mode, seed=number)
    picture(folder / "whole.jpg")
    whole = (folder / "whole.jpg").read_bytes()
    (folder / "whole.jpg").unlink()
    broken = {
        "a/cut.jpg": whole[: len(whole) // 3],
        "empty.png": b"",
        "b/letter.jpg": b"Dear all,\nthis is no picture.\n",
        "b/c/noise.webp": bytes(range(256)),
        "zz_header.gif": b"GIF89a",
    }
    for name, content in broken.items():
        (folder / name).write_bytes(content)
    for name in ("notes.txt", "a/Thumbs.db", ".hidden.png"):
        (folder / name).write_bytes(b"none of our business")
    return {str(folder / name) for name in broken}


def check_run(folder, clip, labels, capsys, count):
    broken = mixed_folder(folder, count)
    code = cli.main(["tag", str(folder), f"--clip={clip}", f"--labels={labels}"])
    out, err = capsys.readouterr()
    lines = [json.loads(line) for line in out.splitlines()]
    assert code == 1
    assert len(lines) == count
    files = [line["file"] for line in lines]
    assert files == sorted(files, key=lambda name: Path(name).parts)
    assert {line["file"] for line in lines if "error" in line} == broken
    for line in lines:
        if "error" in line:
            assert set(line) == {"file", "error"} and line["file"] in line["error"]
        else:
            assert {tag["label"] for tag in line["labels"]} == {"cat", "red car", "sky"}
    assert f"tagged {count - 5} of {count} images" in err
    assert "passing over 2 files" in err
    assert all(name in err for name in broken)
    assert "Traceback" not in err


def test_annotations_are_not_passed_over(tmp_path, clip, labels, capsys):
    folder = tmp_path / "photos"
    mixed_folder(folder, 6)
    for name in ("labels.csv", "labels.txt", "labels.jsonl"):
        (folder / name).write_text("image,labels")
    (folder / "notes.txt").unlink()
    command = ["tag", str(folder), f"--clip={clip}", f"--labels={labels}"]
    assert cli.main(command) == 1
    assert "passing over 1 file that is no image by its suffix" in capsys.readouterr().err
    (folder / "a/Thumbs.db").unlink()
    cli.main(command)
    assert "passing over" not in capsys.readouterr().err


def test_a_folder_of_mixed_files(tmp_path, clip, labels, capsys):
    check_run(tmp_path / "photos", clip, labels, capsys, 40)


@pytest.mark.slow
def test_a_thousand_mixed_files(tmp_path, clip, labels, capsys):
    check_run(tmp_path / "photos", clip, labels, capsys, 1000)


def test_output_file_and_choice_of_labels(tmp_path, clip, labels, capsys):
    for name in ("b.png", "a.png"):
        picture(tmp_path / name)
    out = tmp_path / "tags.jsonl"
    images = [str(tmp_path / "b.png"), str(tmp_path / "a.png")]
    options = [f"--clip={clip}", f"--labels={labels}", "--top_k=1", "--template=a {}."]
    assert tag.main([*images, *options, f"--output={out}"]) == 0
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["file"] for line in lines] == images  # files in the order they were named
    assert all(len(line["labels"]) == 1 for line in lines)
    assert capsys.readouterr().out == ""
    options[2] = "--threshold=0"  # without --top_k: every label
    assert tag.main([*images, *options, f"--output={out}"]) == 0
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert all(len(line["labels"]) == 3 for line in lines)


def test_tagging_with_a_trained_method(tmp_path, trained, labels, capsys):
    picture(tmp_path / "one.png")
    picture(tmp_path / "two.png", seed=1)
    arguments = ["tag", str(tmp_path / "one.png"), str(tmp_path / "two.png")]
    arguments += [f"--workdir={trained}"]
    assert cli.main([*arguments, "--top_k=22"]) == 0
    out, err = capsys.readouterr()
    lines = [json.loads(line) for line in out.splitlines()]
    for line in lines:
        assert {tag["label"] for tag in line["labels"]} == set(catalog.scenes().names)
        assert all(set(tag) == {"label", "score"} for tag in line["labels"])
    assert "sigmoid" in err
    assert cli.main([*arguments, f"--labels={labels}", "--checkpoint=latest"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {tag["label"] for tag in lines[0]["labels"]} == {"cat", "red car", "sky"}


def test_evaluating_gives_the_figures_of_the_run(trained, capsys, monkeypatch):
    original, loads = build.load_backbone, []
    monkeypatch.setattr(
        build, "load_backbone", lambda *a, **k: loads.append(a) or original(*a, **k)
    )
    assert cli.main(["evaluate", f"--workdir={trained}", "--checkpoint=latest"]) == 0
    assert len(loads) == 1  # raw, averaged and zero-shot share it
    out = capsys.readouterr().out
    folder = trained / "report" / "test"
    assert "zero-shot" in out and "coop (EMA)" in out and str(folder / "report.html") in out
    found = json.loads((folder / "report.json").read_text())
    assert found["protocol"] == "scenes" and "OF1/top-3" in found["conventions"]
    rows = read_rows(trained / "metrics.jsonl")
    last = {
        row["weights"]: row["mAP"] for row in rows if (row["split"], row["step"]) == ("test", 2)
    }
    for title, weights in (("coop", "raw"), ("coop (EMA)", "ema")):
        assert found["results"][title]["metrics"]["mAP"] == pytest.approx(last[weights], abs=1e-5)
        assert found["results"][title]["step"] == 2
        assert found["results"][title]["checkpoint"] == "last"
    assert found["num_images"] == 21
    assert sorted(path.name for path in folder.iterdir()) == ["report.html", "report.json"]
    page = (folder / "report.html").read_text()
    assert all(f"<h2>{name}</h2>" in page for name in ("Training", "Examples", "Worst mistakes"))


def test_last_and_best_checkpoints(clip, tmp_path, capsys, monkeypatch):
    sizes = {"num_train": 32, "num_validation": 17, "num_test": 21}
    config = {
        "backbone": {"name": str(clip)},
        "method": {"name": "coop", "n_ctx": 2},
        "data": {"name": "scenes", **sizes},
        "batch_size": 16,
        "duration": "3 steps",
        "optim": {"learning_rate": 0.1},
        "ema_decay": 0.5,
        "eval": {"every": "1 steps", "batch_size": 16},
        "checkpoint": {"every": "1 steps", "keep": 3},
        "compilation_cache": False,
        "paper": {"mAP": 12.5},
    }
    fit(config, tmp_path / "run", quiet=True)
    best = {"raw": 1, "ema": 3}
    monkeypatch.setattr(Checkpoints, "best_step", lambda self, weights: best[weights])
    assert cli.main(["evaluate", f"--workdir={tmp_path / 'run'}", "--batch_size=16"]) == 0
    assert "12.5" in capsys.readouterr().out
    folder = tmp_path / "run" / "report" / "test"
    found = json.loads((folder / "report.json").read_text())
    assert found["paper"] == {"mAP": 12.5}
    columns = {
        title: (column["weights"], column["checkpoint"], column["step"])
        for title, column in found["results"].items()
    }
    assert columns == {
        "zero-shot": (None, None, None),
        "coop (last)": ("raw", "last", 3),
        "coop (best)": ("raw", "best", 1),
        "coop (EMA, last and best)": ("ema", "last and best", 3),
    }
    rows = read_rows(tmp_path / "run" / "metrics.jsonl")
    figures = {(row["weights"], row["step"]): row["mAP"] for row in rows if row["split"] == "test"}
    for title, (weights, _, step) in list(columns.items())[1:]:
        expected = pytest.approx(figures[weights, step], abs=1e-5)
        assert found["results"][title]["metrics"]["mAP"] == expected
    assert "last and best checkpoint" in (folder / "report.html").read_text()
    # The paper's number is of the dataset's own protocol.
    options = [f"--workdir={tmp_path / 'run'}", "--protocol=asl", "--checkpoint=best"]
    assert evaluate.main([*options, "--weights=ema", f"--output={tmp_path / 'asl'}"]) == 0
    found = json.loads((tmp_path / "asl" / "report.json").read_text())
    assert found["protocol"] == "asl" and found["paper"] == {}
    assert list(found["results"]) == ["zero-shot", "coop (EMA)"]


def test_a_relative_backbone_is_found_from_any_directory(trained, clip, tmp_path, monkeypatch):
    with Checkpoints(trained) as checkpoints:
        config = checkpoints.meta(2)["config"]
    config = {**config, "backbone": {"name": clip.name}, "duration": "1 steps"}
    monkeypatch.chdir(clip.parent)
    fit(config, tmp_path / "run", quiet=True)
    monkeypatch.chdir(tmp_path)
    assert build.load_trained("run").config.backbone.name == str(clip)


def test_evaluating_one_set_of_weights(trained, tmp_path, capsys):
    options = [f"--workdir={trained}", "--weights=raw", "--no-baseline", "--split=validation"]
    assert evaluate.main([*options, f"--output={tmp_path / 'out'}"]) == 0
    found = json.loads((tmp_path / "out" / "report.json").read_text())
    assert list(found["results"]) == ["coop"] and found["num_images"] == 17


def one_error_line(capsys, code, *words):
    err = capsys.readouterr().err
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert code == 2 and len(lines) == 1 and "Traceback" not in err
    for word in words:
        assert word in lines[0]


def test_mistakes_take_one_line(tmp_path, clip, labels, capsys):
    picture(tmp_path / "good.png")
    good, zero_shot = str(tmp_path / "good.png"), [f"--clip={clip}", f"--labels={labels}"]
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"no picture")

    def run(*args):
        return cli.main(["tag", *args])

    one_error_line(capsys, run(str(broken), *zero_shot), "broken.jpg")
    one_error_line(capsys, run(str(tmp_path / "no.png"), *zero_shot), "no.png")
    (tmp_path / "empty").mkdir()
    one_error_line(capsys, run(str(tmp_path / "empty"), *zero_shot), "empty", ".jpg")
    args = [good, f"--clip={clip}", f"--labels={tmp_path / 'none.txt'}"]
    one_error_line(capsys, run(*args), "none.txt")
    args = [good, f"--clip={tmp_path / 'noclip'}", f"--labels={labels}"]
    one_error_line(capsys, run(*args), "noclip")
    one_error_line(capsys, run(good, *zero_shot, "--top_k=0"), "top_k")
    one_error_line(capsys, run(good, *zero_shot, "--template=no slot"), "no slot")
    args = [good, *zero_shot, f"--output={tmp_path / 'nodir' / 'x.jsonl'}"]
    one_error_line(capsys, run(*args), "nodir")
    one_error_line(capsys, run(good, f"--workdir={tmp_path / 'norun'}"), "norun")
    one_error_line(capsys, cli.main(["evaluate", f"--workdir={tmp_path / 'norun'}"]), "norun")


def test_mistakes_of_evaluate_take_one_line(trained, capsys, monkeypatch):
    def run(*args):
        return cli.main(["evaluate", f"--workdir={trained}", *args])

    one_error_line(capsys, run("--split=tset"), "tset", "test")
    one_error_line(capsys, run("--batch_size=0"), "batch_size")
    one_error_line(capsys, run("--protocol=sceens"), "sceens", "scenes")
    file = trained / "metrics.jsonl"
    one_error_line(capsys, run(f"--output={file}"), "metrics.jsonl", "choose another place")
    one_error_line(capsys, run("--word_vectors=none.txt"), "none.txt", "no text file")
    monkeypatch.setattr(catalog, "grouped", lambda space: None)
    one_error_line(capsys, run("--word_vectors=none.txt"), "groups", "have none: leave it out")


def test_impossible_combinations_of_options(labels, capsys):
    for args in (["x.png"], ["x.png", "--clip=a"], ["x.png", "--workdir=a", "--template=a {}"]):
        with pytest.raises(SystemExit) as stop:
            tag.main(args)
        assert stop.value.code == 2
        assert "--" in capsys.readouterr().err


def test_help_version_and_unknown_commands(capsys):
    assert cli.main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in ("train", "evaluate", "tag"))
    assert cli.main(["--version"]) == 0
    assert mlclip_jax.__version__ in capsys.readouterr().out
    assert cli.main([]) == 2
    capsys.readouterr()
    one_error_line(capsys, cli.main(["tga"]), "tga", "tag")


def test_exit_codes(capsys, monkeypatch):
    def raiser(error):
        def run():
            raise error

        return run

    assert errors.exit_code(lambda: None) == 0
    assert errors.exit_code(lambda: 1) == 1
    one_error_line(capsys, errors.exit_code(raiser(errors.UserError("mend it"))), "mend it")
    missing = FileNotFoundError(2, "No such file or directory", "gone.txt")
    one_error_line(capsys, errors.exit_code(raiser(missing)), "gone.txt")
    full = OSError(28, "No space left on device", "run/checkpoints")
    one_error_line(capsys, errors.exit_code(raiser(full)), "run/checkpoints: No space left")
    assert errors.exit_code(raiser(KeyboardInterrupt())) == 130
    with pytest.raises(ZeroDivisionError):  # a fault of the program keeps its traceback
        errors.exit_code(raiser(ZeroDivisionError()))


def test_file_names_that_are_no_text(monkeypatch):
    line = tag._json({"file": "caf\udce9.png", "label": "é"})
    assert io.BytesIO().write(line.encode()) and json.loads(line)["file"] == "caf\udce9.png"
    assert "é" in tag._json({"label": "é"})
