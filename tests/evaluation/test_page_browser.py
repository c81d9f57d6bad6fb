"""The report's page in a headless Chromium: no error, nothing overflows, sorting and picking."""

from __future__ import annotations

import numpy as np
import pytest
import webdriver
from test_report import ODD, findings

from mlclip_jax.evaluation import page
from mlclip_jax.labels.catalog import scenes
from mlclip_jax.labels.space import LabelSpace

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(
        not (webdriver.CHROMIUM and webdriver.DRIVER), reason="no chromium and chromedriver here"
    ),
]
SORTED = "return [...document.querySelectorAll('#classes tbody tr')].map(r => r.cells[{}].{})"
# Elements that stick out to the right or the left of the window and are in no box that scrolls.
OVERFLOW = """
return [...document.querySelectorAll('body *')].filter(e => {
  const box = e.getBoundingClientRect();
  return box.width && !e.closest('.scroll') && (box.right > innerWidth + 1 || box.left < -1);
}).map(e => e.outerHTML.slice(0, 120));
"""
# Text of charts that leaves its drawing.
CLIPPED = """
return [...document.querySelectorAll('svg text')].filter(e => {
  const box = e.getBoundingClientRect(), all = e.ownerSVGElement.getBoundingClientRect();
  return box.left < all.left - 1 || box.right > all.right + 1 || box.bottom > all.bottom + 1
    || box.top < all.top - 1;
}).map(e => e.textContent);
"""


@pytest.fixture(scope="module")
def browser():
    with webdriver.Browser() as made:
        yield made


@pytest.fixture(scope="module", params=["scenes", "long names", "one class"])
def path(request, tmp_path_factory):
    spaces = {
        "scenes": scenes(),
        "long names": LabelSpace(
            (
                ODD,
                "W" * 60,
                "標" * 40,
                *(f"a class with a rather long name {i}" for i in range(140)),
            )
        ),
        "one class": LabelSpace(("only",)),
    }
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(page.render(findings(spaces[request.param])), encoding="utf-8")
    return path


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [1280, 390, 320])
def test_nothing_overflows_and_no_error(browser, path, width, dark):
    browser.resize(width, 800, dark=dark)
    browser.open(path)
    assert browser.run("return innerWidth") == width
    assert browser.run("return document.documentElement.scrollWidth") <= width
    assert browser.run(OVERFLOW) == []
    assert browser.run(CLIPPED) == []
    assert browser.console() == []
    colour = browser.run("return getComputedStyle(document.body).backgroundColor")
    assert (np.mean([int(c) for c in colour[4:-1].split(",")]) < 128) == dark


def test_headers_sort(browser, path):
    browser.resize(1280, 800)
    browser.open(path)
    heads = browser.run("return [...document.querySelectorAll('#classes th button')]"
                        ".map(b => b.textContent)")  # fmt: skip
    column = heads.index("positives")
    click = f"document.querySelectorAll('#classes thead th button')[{column}].click()"
    state = f"return document.querySelectorAll('#classes thead th')[{column}].ariaSort"
    before = browser.run(SORTED.format(column, "dataset.value"))
    for direction in ("descending", "ascending"):
        browser.run(click)
        values = [float(v) for v in browser.run(SORTED.format(column, "dataset.value"))]
        assert values == sorted(map(float, before), reverse=direction == "descending")
        assert browser.run(state) == direction
    # The column of thresholds has one class without a number: last, whatever the direction.
    column = heads.index("threshold")
    focus = f"document.querySelectorAll('#classes thead th button')[{column}].focus()"
    browser.run(focus)
    for key in ("Enter", " "):
        browser.press(key)
        values = browser.run(SORTED.format(column, "dataset.value"))
        numbers = [float(v) for v in values if v]
        assert values[len(numbers) :] == [""] * (len(values) - len(numbers))
        assert numbers == sorted(numbers, reverse=key == "Enter")
    sorts = browser.run("return [...document.querySelectorAll('#classes [aria-sort]')].length")
    assert sorts == 1
    browser.run("document.querySelector('#classes thead th button').click()")
    names = browser.run(SORTED.format(0, "textContent"))
    assert names == browser.run(
        SORTED.format(0, "textContent") + ".sort((a, b) => a.localeCompare(b))"
    )
    assert browser.console() == []


def test_finding_and_picking_a_class(browser, path):
    browser.resize(390, 800)
    browser.open(path)
    name = browser.run("return document.querySelector('#pick').options[1].textContent")
    before = browser.run("return document.querySelector('#positives').getAttribute('d')")
    browser.run("const pick = document.querySelector('#pick'); pick.value = 1;"
                "pick.dispatchEvent(new Event('change'));")  # fmt: skip
    assert browser.run("return document.querySelector('#picked').textContent").startswith(name)
    for number in (0, 1):
        drawn = browser.run(f"return document.querySelector('#curve{number}').getAttribute('d')")
        assert drawn.startswith("M")
    after = browser.run("return document.querySelector('#positives').getAttribute('d')")
    rows = browser.run("return document.querySelectorAll('#classes tbody tr').length")
    assert rows == 1 or after != before
    browser.run("const box = document.querySelector('#filter');"
                f"box.value = {name!r}; box.dispatchEvent(new Event('input'));")  # fmt: skip
    left = browser.run("return [...document.querySelectorAll('#classes tbody tr')]"
                       ".filter(r => !r.hidden).map(r => r.cells[0].textContent)")  # fmt: skip
    assert name in left and all(name in one for one in left)
    assert browser.console() == []
