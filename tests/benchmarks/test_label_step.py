"""The benchmark of label steps: what it measures, and that a thousand labels fit one TPU chip."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from mlclip_jax.training.build import packaged_tokenizer


@pytest.fixture
def label_step(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    import label_step

    return label_step


def test_names_have_one_to_four_tokens(label_step):
    encode = packaged_tokenizer(77).encode
    names = label_step.label_space(9605).names
    assert len(set(names)) == 9605
    assert Counter(len(encode(name)) for name in names).keys() == {1, 2, 3, 4}
    assert {len(encode(name)) for name in label_step.label_space(20).names} == {1, 2, 3, 4}


def test_the_rule_bounds_the_tokens_of_a_chunk(label_step):
    for classes, class_specific, chunk in (
        (1006, False, None),  # 6 tokens of their own
        (1006, True, 512),  # 24
        (9605, False, 2048),
        (9605, True, 512),
    ):
        case = label_step.with_chunk(label_step.Case(classes, class_specific))
        assert case.class_chunk == chunk
        tokens = 24 if class_specific else 6
        assert (chunk or classes) * tokens <= label_step.MAX_TOKENS


@pytest.mark.slow
@pytest.mark.parametrize("class_specific", [False, True])
def test_a_thousand_labels_fit_one_tpu_chip(label_step, class_specific):
    pytest.importorskip("libtpu", reason="needs the tpu extra: pip install 'mlclip-jax[tpu]'")
    with label_step.tpu_compiler() as on_tpu:
        assert on_tpu(label_step.with_chunk(label_step.Case(1006, class_specific))) < 16e9
