"""Writes configs/README.md: each row of the papers' tables with the command that runs it.

    python scripts/configs_page.py            # --check: write nothing, exit code 1 if it is stale

Rows are those of configs/tables.yaml, which says what may stand in it; published numbers are those
of the configs (`config.paper`), and of that file where no config has them.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import functools
import re
import shlex
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from mlclip_jax.train import parse_arguments

ROOT = Path(__file__).parents[1]
TABLES = ROOT / "configs" / "tables.yaml"
PAGE = ROOT / "configs" / "README.md"
NOTHING = "\N{EN DASH}"

HEAD = """\
# Configs, and the rows of the papers' tables

<!-- written by scripts/configs_page.py from tables.yaml and the config files: edit those -->

Find the table, and put the command's cell of a row in place of CELL:

```bash
mlclip train CELL --config.data.data_dir=data --workdir=runs/mine
mlclip evaluate --workdir=runs/mine --checkpoint=best
```

A word in capitals in a cell stands for the head of one of the columns of numbers. The second row of
LMPT's Table 3, on VOC-LT:

```bash
mlclip train --config=configs/lmpt/voc_lt.py:row=coop --config.data.data_dir=data \\
    --workdir=runs/mine
```

`data` is where `mlclip prepare` or a download has put the images ([docs/data.md](../docs/data.md)).
The last cell runs the same system on Scenes, with a CLIP that ships in the package: it needs no
download and no `data_dir`, and its numbers are not to be compared with those of the row.

Numbers are the papers', in per cent; none was measured here. {nothing} is one that is not in the
text they were taken from. Words in a command's place say why a row does not run, words below a
command how it differs from what was published.
"""


@dataclass(frozen=True)
class Row:
    """A row as configs/tables.yaml has it."""

    row: str
    run: str = ""
    scenes: str = ""
    published: Sequence[str] = ()
    why: str = ""
    task: str = ""


@dataclass(frozen=True)
class Table:
    """A table as configs/tables.yaml has it."""

    table: str
    about: str
    columns: Sequence[str]
    rows: Sequence[Row]
    word: str = ""
    figures: Sequence[str] = ("mAP",)
    digits: str = "2"
    note: str = ""
    why: str = ""

    def each(self, text: str) -> list[str]:
        """The text for each column."""
        return [text.replace(self.word, column) if self.word else text for column in self.columns]


def read() -> dict[tuple[str, str], list[Table]]:
    """Tables by paper and its full title."""
    papers = {}
    # Everything is text, so that numbers keep their last zero.
    for paper in yaml.load(TABLES.read_text(encoding="utf-8"), yaml.BaseLoader):
        tables = [Table(**table) for table in paper["tables"]]
        papers[paper["paper"], paper["source"]] = [
            replace(table, rows=[Row(**row) for row in table.rows]) for table in tables
        ]
    return papers


@functools.cache
def settings(command: str) -> Mapping[str, Any]:
    """The configuration of a run."""
    with contextlib.chdir(ROOT):
        return parse_arguments([*shlex.split(command), "--workdir=none"])[0]


def published(command: str) -> dict[str, float]:
    """What the paper has for a run, by name of the figure."""
    return dict(settings(command).get("paper") or {}) if command else {}


def numbers(table: Table, row: Row) -> list[str]:
    """The published numbers of a row, by column.

    Raises:
      ValueError: both a config and configs/tables.yaml have them, or there are too many or few.
    """
    runs = [published(command) for command in table.each(row.run)]
    if row.published and (any(runs) or len(row.published) != len(table.columns)):
        raise ValueError(
            f"{table.table}, {row.row}: numbers for each column, once: {row.published}"
        )
    if row.published:
        return list(row.published)
    prefix = f"{row.task}/" if row.task else ""
    # Without a word, each column is a figure; with one, each is a run that may have several.
    figures = [table.figures] * len(runs) if table.word else [[name] for name in table.columns]
    cells = []
    for run, names in zip(runs, figures, strict=True):
        known = [run[prefix + name] for name in names if prefix + name in run]
        cells.append(" / ".join(f"{number:.{table.digits}f}" for number in known) or NOTHING)
    return cells


def lines(table: Table) -> Iterator[str]:
    """A table in Markdown, with its title and notes."""
    yield from ("", f"### {table.table}", "", table.about)
    if table.rows:
        heads = [f"`{column}`" if table.word else column for column in table.columns]
        yield from ("", markdown(["row", "command", *heads, "on Scenes"]))
        yield markdown(["---", "---", *["---:"] * len(heads), "---"])
    for row in table.rows:
        why = row.why or ("" if row.run else table.why)
        parts = [f"`{row.run}`" if row.run else "", f"*{why}*" if why else ""]
        scenes = f"`{row.scenes}`" if row.scenes else ""
        title, command = row.row.replace("*", r"\*"), "<br>".join(filter(None, parts))
        yield markdown([title, command, *numbers(table, row), scenes])
    if table.note:
        yield from ("", table.note)


def markdown(cells: Iterable[str]) -> str:
    """A line of a table."""
    return "| " + " | ".join(cells) + " |"


def files() -> Iterator[str]:
    """The config files and what they are, by the first lines of their headers."""
    yield from ("", "## Files", "", "Each file's header has its arguments.", "")
    yield from (markdown(["file", "what it is"]), markdown(["---", "---"]))
    for path in sorted((ROOT / "configs").rglob("[!_]*.py")):
        header = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        name = path.relative_to(ROOT / "configs")
        yield markdown([f"[{name}]({name})", header.partition("\n")[0]])


def page() -> str:
    """The whole page."""
    papers = read()
    found = [HEAD.format(nothing=NOTHING)]
    for (paper, _), tables in papers.items():
        links = (f"[{t.table}](#{anchor(paper, t)})" for t in tables)
        found.append(f"- **{paper}**: {', '.join(links)}")
    found.append("- [Files](#files)")
    for (paper, source), tables in papers.items():
        found += ["", f"## {paper}", "", source + "."]
        for table in tables:
            found += lines(replace(table, table=f"{paper}, {table.table}"))
    return "\n".join([*found, *files(), ""])


def anchor(paper: str, table: Table) -> str:
    """Where GitHub puts the heading of a table."""
    return re.sub(r"[^\w -]", "", f"{paper}, {table.table}".lower()).replace(" ", "-")


def main() -> int:
    """Writes the page, or checks it; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing: is the page stale?")
    check, text = parser.parse_args().check, page()
    if not check:
        PAGE.write_text(text, encoding="utf-8")
    stale = not PAGE.exists() or PAGE.read_text(encoding="utf-8") != text
    print(f"{PAGE.relative_to(ROOT)} is {'stale' if stale else 'up to date'}")
    return int(stale)


if __name__ == "__main__":
    sys.exit(main())
