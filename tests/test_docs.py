"""The commands and tables of the README and of docs/: every command parses, sizes are true."""

from __future__ import annotations

import importlib
import re
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest

from mlclip_jax import cli, evaluate, export, prepare, tag, train
from mlclip_jax.data import benchmarks
from mlclip_jax.data.raw import NEEDED
from mlclip_jax.training import loop, scoring
from mlclip_jax.training.build import check_settings
from mlclip_jax.training.config import parse_config

ROOT = Path(__file__).parents[1]
DATA = ROOT / "docs" / "data.md"
MARK = "<!-- benchmarks: tests/test_docs.py compares this table with"
sys.path.insert(0, str(ROOT / "tests/data"))


def commands(path):
    """The commands in a page's blocks of shell, each as its arguments, from "mlclip" on."""
    found = []
    for block in re.findall(r"```bash\n(.*?)```", path.read_text(encoding="utf-8"), re.S):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words[:2] == ["python", "-m"] and words[2].startswith("mlclip_jax."):
                words = ["mlclip", words[2].removeprefix("mlclip_jax."), *words[3:]]
            if words and words[0] == "mlclip":
                found.append(words[1:])
    return found


def check_train(args):
    config, _ = train.parse_arguments(args)
    check_settings(parse_config(config))


def check_prepare(args):
    options = prepare._arguments(args)
    corpus, usual = prepare._corpus(options.corpus)
    module = importlib.import_module(f"mlclip_jax.data.raw.{corpus}")
    assert set(options.parts.split(",") if options.parts else usual) <= set(module.PARTS)
    assert options.raw or options.tfds


CHECKS = {
    "train": check_train,
    "prepare": check_prepare,
    "evaluate": evaluate._arguments,
    "export": export._arguments,
    "tag": tag._arguments,
}
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize(
    "words",
    [words for page in PAGES for words in commands(page)],
    ids=lambda words: " ".join(words)[:70],
)
def test_every_command_parses(words, monkeypatch):
    monkeypatch.chdir(ROOT)
    CHECKS[words[0]](words[1:])


def test_every_corpus_is_shown():
    shown = {prepare._corpus(words[1])[0] for words in commands(DATA) if words[0] == "prepare"}
    assert shown == set(NEEDED)


@pytest.mark.parametrize("page", [*PAGES, ROOT / "configs" / "README.md"], ids=str)
def test_files_and_sections_that_are_pointed_to(page):
    text = page.read_text(encoding="utf-8")
    heads = {re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings(text)}
    for target in re.findall(r"\]\(([^)]+)\)", text):
        file, _, section = target.partition("#")
        assert not file or (page.parent / file).exists(), target
        assert file or section in heads, target


def headings(text):
    return re.findall(r"^#+ (.*)$", text, re.M)


def table():
    """The benchmarks as rows of Markdown."""
    rows = [
        "| name | train | validation | test | labels | lists |",
        "|---|---:|---:|---:|---:|---|",
    ]
    for name in benchmarks.NAMES:
        shown = f"{name}(0.3)" if "partial" in name else name
        one = benchmarks.resolve(shown)
        sizes = [number(n) for n in (one.num_train, one.num_validation, one.num_test)]
        labels = number(len(one.space()))
        if one.train_space is not None:
            labels = f"{number(len(one.train_space()))} → {labels}"
        lists = [name for s in (one.train, *one.splits.values()) for name in s.list_files]
        lists += [f"{one.train.captions} (optional)"] * bool(one.train.captions)
        cells = [f"`{shown}`", *sizes, labels, ", ".join(dict.fromkeys(lists))]
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows)


def number(n):
    return "" if n is None else f"{n:,}"


def test_the_table_of_benchmarks():
    text = DATA.read_text(encoding="utf-8")
    shown = text[text.index(MARK) :].split("-->", 1)[1].split("\n## ", 1)[0].strip()
    assert shown == table(), f"docs/data.md should have:\n{table()}"


@pytest.mark.parametrize("corpus", ["voc", "nuswide"])
def test_the_parts_of_each_benchmark(corpus):
    needed = {}
    for name in benchmarks.NAMES:
        one = benchmarks.resolve(f"{name}(0.3)" if "partial" in name else name)
        splits = (one.train, *one.splits.values())
        parts = dict.fromkeys(split.part for split in splits if split.corpus == corpus)
        if parts:
            needed.setdefault(f"`{','.join(parts)}`", []).append(f"`{name}`")
    rows = [f"| {parts} | {', '.join(names)} |" for parts, names in needed.items()]
    table = "\n".join(["| `--parts=` | benchmarks |", "|---|---|", *rows])
    assert f"\n\n{table}\n\n" in DATA.read_text(encoding="utf-8"), table


def test_what_prepare_prints(tmp_path, monkeypatch, capsys):
    """The page's lines are those of a whole download, whose counts differ from these."""
    import raw_folders

    monkeypatch.chdir(tmp_path)
    raw_folders.coco(Path("downloads/coco"))
    raw_folders.write_text(Path("downloads/coco/coco_train_singlelabel.txt"), "9.jpg,0\n")
    assert cli.main(["prepare", "coco2014", "--raw=downloads/coco", "--data_dir=data"]) == 0
    said = [x for x in capsys.readouterr().out.splitlines() if not x.startswith("note: ")]
    block = re.search(r"prints\n\n```text\n(.*?)```", DATA.read_text(encoding="utf-8"), re.S)[1]
    counts = re.compile(r"[\d,]+ images")
    assert [counts.sub("n images", x) for x in said] == [
        counts.sub("n images", x) for x in block.splitlines()
    ]


def downloads():
    """The tiny raw folders of all corpora, lists included, where the page says."""
    import raw_folders as few
    import raw_folders_more as more

    few.custom(Path("photos"))
    folder = Path("downloads")
    for year in (2014, 2017):
        few.coco(folder / "coco", year=year)
    for year in (2007, 2012):
        few.voc(folder / "voc", year=year)
    for corpus in ("nuswide", "cub", "vg", "openimages", "imagenet"):
        getattr(more, corpus)(folder / corpus)
    more.imagenet21k(folder / "imagenet")
    more.mldecoder(folder / "nuswide")
    # The aliases are the page's own; these tiny classes have none of the labels.
    for path, text in {
        "coco/coco_train_singlelabel.txt": "COCO_train2014_000000000057.jpg,0\n"
        "COCO_train2014_000000480023.jpg, 51\n",
        "coco/coco_lt_train.txt": "train2017/000000000057.jpg 0 79\ntrain2017/000000000009.jpg 0\n",
        "voc/voc_train.txt": "000012.jpg,12\n000017.jpg,14\n",
        "cub/cub_train.txt": "".join(f"{name}, 4\n" for name in more.CUB_IMAGES[1:3]),
        "vg/names.txt": "".join(f"thing {i}\n" for i in range(200)),
    }.items():
        few.write_text(folder / path, text)
    few.write_text(Path("aliases.yaml"), "airplane: [airliner, warplane]\ncrane: []\n")
    nus = "0_2124494179_02a15f03aa_m.jpg,7 8\n1_2124494180_02a15f03aa_m.jpg,1\n"
    for name in ("nus_train_singlelabel.txt", "nus_val.txt"):
        few.write_text(folder / "nuswide" / name, nus)
    images = np.array(sorted(name.replace("\\", "/") for name in more.NUS_TRAIN))
    for part in ("train", "val"):
        np.save(folder / f"nuswide/formatted_{part}_images.npy", images)
        np.save(folder / f"nuswide/formatted_{part}_labels.npy", np.eye(81)[:4])


@pytest.mark.slow
def test_the_page_command_by_command(tmp_path, monkeypatch, capsys):
    """All commands of the page but those for TFDS, in order, with small towers and few steps."""
    import jax

    from mlclip_jax.training.mesh import make_mesh

    one = make_mesh(jax.devices()[:1])
    for module in (loop, scoring):
        monkeypatch.setattr(module, "make_mesh", lambda: one)
    monkeypatch.chdir(tmp_path)
    Path("configs").symlink_to(ROOT / "configs")
    downloads()
    small = ["--config.backbone.name=clip-mini", "--config.backbone.image_size=64"]
    small += ["--config.batch_size=1", "--config.compilation_cache=False"]
    for words in commands(DATA):
        if any(word.startswith("--tfds") for word in words):
            continue
        more = []
        if words[0] == "train":
            more = list(small)
            more += ["--config.duration=1 steps"] * (not any("zero_shot" in w for w in words))
            more += ["--config.data.check_sizes=False"] * (not any("custom" in w for w in words))
        code = cli.main([*words, *more])
        assert code == 0, (words, capsys.readouterr().err)
    assert (tmp_path / "runs/photos/report/test/report.html").is_file()
