"""The command `mlclip prepare`: what it says, its exit codes, and that mistakes take one line."""

from __future__ import annotations

import importlib
import time

import pytest
import raw_folders
import raw_folders_more

from mlclip_jax import cli, prepare
from mlclip_jax.data import benchmarks, builders, foreign, registry
from mlclip_jax.data.raw import NEEDED
from mlclip_jax.errors import UserError


@pytest.fixture
def run(tmp_path, capsys):
    """Runs the command with data_dir "out"; exit code, lines of output and of errors."""

    def run(corpus, *args):
        code = cli.main(["prepare", corpus, f"--data_dir={tmp_path / 'out'}", *map(str, args)])
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return code, out.splitlines(), [x for x in err.splitlines() if x.startswith("error: ")]

    return run


def parts(tmp_path, corpus):
    return {path.name.split(".")[0] for path in (tmp_path / "out" / corpus).glob("*.npz")}


def test_from_the_download_to_a_benchmark(tmp_path, run):
    raw = raw_folders.coco(tmp_path / "raw")
    code, out, errors = run("coco", f"--raw={raw}")
    assert code == 0 and not errors
    assert out[0] == "coco/train2017: not there (no annotations/instances_train2017.json)"
    assert "coco/train2014: 5 images, 80 labels" in out
    assert "note: coco2014/train: 5 images, but 82,783 are published" in out
    assert f"coco/val2014: 3 images in {tmp_path / 'out/coco/val2014/1.0.0'}" in out
    assert out[-1] == f"ready: set data.data_dir={tmp_path / 'out'}"
    config = {"name": "coco", "data_dir": str(tmp_path / "out"), "check_sizes": False}
    data = registry.load(config, image_size=8, splits=["test"])
    assert len(data.train) == 4 and data.train[0]["image"].shape == (8, 8, 3)
    code, out, errors = run("coco", f"--raw={raw}")
    assert code == 0 and "coco/train2014: prepared before, nothing to do: 5 images in " in str(out)


@pytest.mark.parametrize(
    ("corpus", "name", "expected"),
    [
        ("voc", "voc2007", {"trainval2007", "test2007"}),
        ("nuswide", "nuswide", {"test", "all", "train_tags", "test_tags"}),
        ("cub", "cub", {"train", "test"}),
        ("vg", "vg", {"train", "test"}),
        ("openimages", "openimages", {"train", "validation", "test"}),
        ("imagenet", "imagenet", {"train", "val"}),
        ("imagenet21k", "imagenet21k", {"21k_15000x100"}),
        ("custom", "custom", {"train", "validation", "test"}),
    ],
)
def test_the_parts_that_are_there(tmp_path, run, corpus, name, expected):
    make = getattr(raw_folders, corpus, None) or getattr(raw_folders_more, corpus)
    make(tmp_path / "raw")
    code, _, errors = run(name, f"--raw={tmp_path / 'raw'}")
    assert code == 0, errors
    assert parts(tmp_path, corpus.removesuffix("21k")) == expected


def test_named_parts_only(tmp_path, run):
    raw_folders.voc(tmp_path / "raw")
    code, _, _ = run("voc", f"--raw={tmp_path / 'raw'}", "--parts=val2007, test2007")
    assert code == 0 and parts(tmp_path, "voc") == {"val2007", "test2007"}
    raw_folders.custom(tmp_path / "own", splits=())
    code, out, _ = run("custom", f"--raw={tmp_path / 'own'}")
    assert code == 0 and parts(tmp_path, "custom") == {"train"}
    assert "custom/validation: not there" in out
    assert not any("labels." in line for line in out)


def test_published_lists_come_along(tmp_path, run):
    raw = raw_folders.coco(tmp_path / "raw")
    listed = "coco_train_singlelabel.txt"
    config = {"name": "coco_spml_splc", "data_dir": str(tmp_path / "out"), "check_sizes": False}
    run("coco2014", f"--raw={raw}")
    with pytest.raises(UserError, match=rf"no .*out/coco/{listed}: put it there, or among the raw"):
        registry.load(config, image_size=8, splits=["test"])
    for text, images in (("57.jpg,0\n", 1), ("57.jpg,0\n8.jpg,2\n", 2)):  # a newer one goes first
        lines = (f"COCO_train2014_{line.zfill(18)}\n" for line in text.split())
        raw_folders.write_text(raw / listed, "".join(lines))
        code, out, _ = run("coco2014", f"--raw={raw}", "--parts=train2014")
        assert code == 0 and f"coco: copied the list {listed}" in out
        assert len(registry.load(config, image_size=8, splits=["test"]).train) == images
    assert not list((tmp_path / "out/coco").glob("*.part"))


def test_all_lists_of_a_corpus():
    arrays = [
        f"formatted_{p}_{what}.npy" for p in ("train", "val") for what in ("images", "labels")
    ]
    texts = ["nus_train_singlelabel.txt", "nus_val.txt"]
    zero_shot = ["benchmark_81_v0.json", "data.csv"]
    assert benchmarks.list_files("nuswide") == [*zero_shot, *arrays, *texts]
    assert benchmarks.list_files("voc") == ["voc_lt_captions.txt", "voc_train.txt"]
    assert benchmarks.list_files("custom") == []
    assert (
        "formatted_val_labels.npy"
        in benchmarks.needs(benchmarks.resolve("nus_spml_largeloss"))["nuswide"]
    )


def test_missing_images(tmp_path, run):
    raw = raw_folders.coco(tmp_path / "raw")
    gone = sorted((raw / "val2014").iterdir())[0]
    gone.unlink()
    code, _, (error,) = run("coco2014", f"--raw={raw}", "--parts=val2014")
    assert code == 2 and "1 of 3 images" in error and gone.name in error
    listed = tmp_path / "out/coco/val2014.unreadable.txt"
    assert str(listed) in error and listed.read_text().startswith(f"val2014/{gone.name}\t")
    assert parts(tmp_path, "coco") == set()
    code, out, _ = run("coco2014", f"--raw={raw}", "--parts=val2014", "--allow_missing")
    assert code == 0 and "2 images without 1 missing or unreadable ones in" in out[-2]
    code, out, _ = run("coco2014", f"--raw={raw}", "--parts=val2014")
    assert code == 0 and "remove that folder to try these again" in out[-2]


def test_no_bar_where_there_is_nothing_to_do(tmp_path, capsys, monkeypatch):
    raw = raw_folders.coco(tmp_path / "raw")
    args = ["coco2014", f"--raw={raw}", f"--data_dir={tmp_path / 'out'}", "--parts=val2014"]
    original = builders._write

    def slow(*args):
        time.sleep(0.6)
        return original(*args)

    monkeypatch.setattr(builders, "_write", slow)
    monkeypatch.setattr(prepare.sys.stderr, "isatty", lambda: True)
    for bar in (True, False):
        assert prepare.main(args) == 0
        assert ("coco/val2014: 100%" in capsys.readouterr().err) == bar


def test_lists_of_images_of_which_some_are_missing(tmp_path, run):
    """SPLC's lists of NUS-WIDE go by rows of all images."""
    raw = tmp_path / "raw"
    raw_folders_more.nuswide(raw)
    # actor, baby, bus, castle, dog, man, zoo: a row of Imagelist.txt, the photo and its secret.
    rows = {1: "2124494180", 2: "702409954", 3: "2124494181", 4: "2124494182", 5: "702409954"}
    listed = [f"{row}_{photo}_02a15f03aa_m.jpg,{row}\n" for row, photo in rows.items()]
    raw_folders.write_text(raw / "nus_train_singlelabel.txt", "".join(listed[:3]))
    raw_folders.write_text(raw / "nus_val.txt", "".join(listed[3:]))
    for key in ("actor/0001_2124494179.jpg", "bus/0018_702409954.jpg"):
        (raw / "Flickr" / key).unlink()
    code, _, errors = run("nuswide", f"--raw={raw}", "--parts=all", "--allow_missing")
    assert code == 0, errors
    config = {"name": "nus_spml_splc", "data_dir": str(tmp_path / "out")}
    with pytest.raises(UserError, match=r"nus_spml_splc: train has 2 .*\(1 left out when it"):
        registry.load(config, image_size=8, splits=["test"])
    data = registry.load(config | {"check_sizes": False}, image_size=8, splits=["test"])
    for source, expected in (
        (
            data.train,
            {"Flickr/baby/0002_2124494180.jpg": 1, "Flickr/castle/0003_2124494181.jpg": 3},
        ),
        (
            data.evals["test"],
            {"Flickr/dog/0004_2124494182.jpg": 4, "Flickr/man/0215_702409954.jpg": 5},
        ),
    ):
        labels = [int(source[i]["targets"].argmax()) for i in range(len(source))]
        assert dict(zip(source.keys.tolist(), labels, strict=True)) == expected
    train, test = data.report(short=True).splitlines()
    assert train.startswith("train: 2 images without 1 missing or unreadable ones, 81 labels, sha")
    assert test.startswith("test: 2 images, 81 labels, sha256 ")


def test_mistakes_take_one_line(tmp_path, run):
    raw = raw_folders.coco(tmp_path / "raw")
    for args, words in (
        (("coco",), ["--raw is needed"]),
        (("coco", f"--raw={tmp_path / 'none'}"), ["there is no folder", "none"]),
        (("cocoa", f"--raw={raw}"), ["unknown corpus 'cocoa'", "coco"]),
        (("coco2015", f"--raw={raw}"), ["unknown corpus 'coco2015'"]),
        (("coco", f"--raw={raw}", "--parts=train2041"), ["unknown part of coco", "train2017"]),
        (("coco", f"--raw={raw}", "--parts=val2017"), ["instances_val2017.json"]),
        (("voc2012", f"--raw={raw}"), ["VOC2012/ImageSets/Main/train.txt", "folder of voc"]),
        (("custom", f"--raw={raw}"), ["neither labels.csv nor labels.jsonl"]),
        (("coco", f"--tfds={raw}"), ["--tfds needs --parts"]),
        (("coco", f"--tfds={raw}", "--parts=val2014"), ["is no data set that TFDS can read"]),
    ):
        code, _, errors = run(*args)
        assert code == 2 and len(errors) == 1
        assert all(word in errors[0] for word in words), errors
    code = prepare.main(["raw", f"--raw={raw}", f"--data_dir={tmp_path}"])
    assert code == 2
    (tmp_path / "coco").symlink_to(raw)
    code = prepare.main(["coco", f"--raw={raw}", f"--data_dir={tmp_path}"])
    assert code == 2 and not list(raw.glob("*.npz"))


def test_two_rows_of_one_image(tmp_path, run):
    raw = raw_folders.custom(tmp_path / "raw")
    lines = (raw / "labels.csv").read_text(encoding="utf-8")
    (raw / "labels.csv").write_text(lines + lines.splitlines()[1] + "\n", encoding="utf-8")
    code, _, errors = run("custom", f"--raw={raw}")
    assert code == 2 and "line 9: image 'beach/1.jpg' stands on line 2 too" in errors[0]


def test_data_of_tfds(tmp_path, run, monkeypatch):
    asked = []

    def link(*args, **options):
        asked.append((args, options["raw"]))
        return builders.Prepared(args[2], 7, 0, written=True)

    monkeypatch.setattr(foreign, "link", link)
    code, out, _ = run("voc", "--tfds=a/voc", "--parts=train2012,val2012")
    assert code == 0 and out[0] == "voc/train2012: 7 images in a/voc"
    assert [args[1] for args, _ in asked] == ["train2012", "val2012"] and asked[0][1] is None


def test_every_usual_part_is_one_of_its_reader():
    for corpus, usual in NEEDED.items():
        module = importlib.import_module(f"mlclip_jax.data.raw.{corpus}")
        assert set(usual) <= set(module.PARTS)
    for name in benchmarks.NAMES:
        benchmark = benchmarks.resolve(f"{name}(0.5)" if "partial" in name else name)
        for split in (benchmark.train, benchmark.test):
            assert split.part in NEEDED[split.corpus]
