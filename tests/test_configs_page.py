"""configs/README.md: it is what its script writes, each of its commands is one that can be run."""

from __future__ import annotations

import functools
import importlib
import runpy
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from mlclip_jax import losses
from mlclip_jax.data import protocols
from mlclip_jax.training.build import check_settings
from mlclip_jax.training.config import parse_config

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "scripts"))
configs_page = importlib.import_module("configs_page")

TABLES = {paper: tables for (paper, _), tables in configs_page.read().items()}
EACH = [(paper, table) for paper, tables in TABLES.items() for table in tables]
FILES = sorted(path.relative_to(ROOT) for path in (ROOT / "configs").rglob("[!_]*.py"))


def test_it_is_what_the_script_writes():
    text = configs_page.PAGE.read_text(encoding="utf-8")
    assert text == configs_page.page(), "run python scripts/configs_page.py"


@pytest.mark.parametrize(("paper", "count"), [("HSPNet", 9), ("MKT", 4), ("ADDS", 9), ("LMPT", 3)])
def test_all_tables_are_there(paper, count):
    names = [table.table for table in TABLES[paper] if table.table.startswith("Table")]
    assert names == [f"Table {number}" for number in range(1, count + 1)]


@pytest.mark.parametrize(
    ("paper", "table"), EACH, ids=[f"{paper}, {table.table}" for paper, table in EACH]
)
def test_rows(paper, table):
    for row in table.rows:
        assert row.run or row.why or table.why, f"{row.row}: why does it not run?"
        assert table.word in row.run or not row.run, f"{row.row}: {table.word} is not in its run"
        assert bool(row.run) == bool(row.scenes), f"{row.row}: what runs has a stand-in"
        for command in filter(None, table.each(row.run)):
            assert "data_dir" in check(command)
        for command in filter(None, table.each(row.scenes)):
            assert check(command)["name"] == "scenes"


@functools.cache
def check(command):
    """The data of a run, after all that can be known without data or weights is checked."""
    config = parse_config(configs_page.settings(command))
    check_settings(config)
    protocols.parse(config.data.get("train_view", "full"))
    for stage in config.stages:
        if "loss" in stage.method:
            losses.get(stage.method["loss"])
    return config.data


@pytest.mark.parametrize("path", FILES, ids=str)
def test_published_numbers_of_configs(path, monkeypatch):
    """Each number that a config file has is one of its rows' on the page."""
    monkeypatch.chdir(ROOT)
    shown = set()
    for _, table in EACH:
        for row in table.rows:
            for command in table.each(row.run):
                if command.removeprefix("--config=").strip('"').startswith(str(path)):
                    shown |= set(configs_page.published(command).values())
    module = runpy.run_path(str(path))
    known = set(numbers(module.get("PAPER", {})))
    known |= set(numbers(dict(module["get_config"]().get("paper", {}))))
    assert known <= shown, f"configs/tables.yaml lacks rows of {path}: {known - shown}"


def numbers(found):
    """The numbers of nested mappings and tuples."""
    if isinstance(found, float):
        yield found
    else:
        for value in found.values() if isinstance(found, Mapping) else found:
            yield from numbers(value)


def test_numbers_come_from_one_place():
    table = configs_page.Table("Table 1", "", ["coco"], [], word="DATA")
    run = "--config=configs/hspnet/DATA.py:setup=largeloss"
    assert configs_page.numbers(table, configs_page.Row("ours", run)) == ["74.80"]
    with pytest.raises(ValueError, match=r"once: \['74.8'\]"):
        configs_page.numbers(table, configs_page.Row("ours", run, published=["74.8"]))
    with pytest.raises(ValueError, match="for each column"):
        configs_page.numbers(table, configs_page.Row("theirs", published=["1", "2"]))
