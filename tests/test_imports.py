"""Imports flow one way, and the light entry points stay light."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "mlclip_jax"
LEAVES = {"errors", "fields", "spec", "__init__"}
VERBS = {"prepare", "train", "evaluate", "export", "tag", "cli"}
# What each part may import besides itself and the leaves; a part that is not listed is an error.
ALLOWED = {
    "clip": set(),
    "labels": set(),
    "data": {"labels"},
    "losses": set(),
    "modules": {"clip", "labels"},
    "methods": {"modules", "losses", "clip", "labels"},
    "evaluation": {"methods", "modules", "losses", "clip", "labels", "data"},
    "training": {"evaluation", "methods", "modules", "losses", "clip", "labels", "data"},
    "serving": {"training", "evaluation", "methods", "modules", "losses", "clip", "labels", "data"},
}
HEAVY_AT_THE_TOP = {"torch", "transformers", "matplotlib", "sklearn", "tensorflow", "open_clip"}


def modules():
    return sorted(PACKAGE.rglob("*.py"))


def part_of(path):
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imported(tree, *, top_only=False):
    """Full names of everything imported, `from a import b` as a.b."""
    for node in tree.body if top_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_flow_one_way(path):
    part = part_of(path)
    for name in imported(ast.parse(path.read_text())):
        first, *rest = name.split(".")
        if first != "mlclip_jax" or not rest or rest[0] == "__version__":
            continue
        target = rest[0]
        assert target in ALLOWED or target in LEAVES | VERBS, f"{path}: unknown part {target}"
        if target in LEAVES or target == part:
            continue
        assert part not in LEAVES or target in LEAVES, f"{path} is a leaf and imports {name}"
        allowed = ALLOWED.get(part, set(ALLOWED) if part in VERBS else set())
        assert target in allowed, f"{path} ({part}) may not import {name}"


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_heavy_libraries_are_imported_inside_functions(path):
    names = {name.split(".")[0] for name in imported(ast.parse(path.read_text()), top_only=True)}
    assert not names & HEAVY_AT_THE_TOP


def test_every_part_is_known():
    parts = {part_of(path) for path in modules()}
    assert parts <= set(ALLOWED) | LEAVES | VERBS


@pytest.mark.parametrize(
    "code",
    [
        "import mlclip_jax",
        "import mlclip_jax.cli; mlclip_jax.cli.main(['--help'])",
        "import mlclip_jax.cli; mlclip_jax.cli.main(['--version'])",
    ],
)
def test_light_entry_points_import_no_jax(code):
    check = "import sys; heavy = {'jax', 'flax', 'numpy', 'PIL'} & set(sys.modules)"
    script = f"{code}\n{check}\nassert not heavy, heavy"
    subprocess.run([sys.executable, "-c", script], check=True, stdout=subprocess.DEVNULL)
