"""Prompts are laid out as their papers say, and share what can be shared."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mlclip_jax.clip.weights import resolve
from mlclip_jax.errors import UserError
from mlclip_jax.modules.heads import normalize
from mlclip_jax.modules.prompts import (
    Context,
    context_prompts,
    template_prompts,
)

NAMES = ("three", "blue", "potted_plant", "zebra crossing sign")


@pytest.fixture(scope="module")
def tokenizer():
    return resolve("clip-mini").tokenizer()


def full_ids(prompts, i: int) -> list[int]:
    return [*prompts.prefix, *prompts.own[i, : prompts.eot[i] + 1]]


@pytest.mark.parametrize(
    "template",
    ["a photo of a {}.", "{} in the scene", "There is a {} in the scene", "x{}", "{x} ({}"],
)
def test_templates_equal_tokenising_the_whole_text(tokenizer, template: str) -> None:
    prompts = template_prompts(template, NAMES, tokenizer)
    for i, name in enumerate(NAMES):
        text = template.replace("{}", name.replace("_", " "))
        assert full_ids(prompts, i) == [tokenizer.sot, *tokenizer.encode(text), tokenizer.eot]
    words = template.split("{}")[0].split() if " {}" in template else []
    assert len(prompts.prefix) == 1 + len(words)


@pytest.mark.parametrize("class_specific", [False, True])
@pytest.mark.parametrize("position", ["end", "middle", "front"])
def test_context_stands_where_it_should(tokenizer, position: str, class_specific: bool) -> None:
    prompts = context_prompts(5, NAMES, tokenizer, position=position, class_specific=class_specific)
    before = {"end": 5, "middle": 2, "front": 0}[position]
    slots = [-1, -2, -3, -4, -5]
    for i, name in enumerate(NAMES):
        word = tokenizer.encode(name.replace("_", " "))
        period = tokenizer.encode(".")
        expected = [
            tokenizer.sot, *slots[:before], *word, *slots[before:], *period, tokenizer.eot
        ]  # fmt: skip
        assert full_ids(prompts, i) == expected
    assert len(prompts.prefix) == (1 if class_specific else 1 + before)
    assert (prompts.own[np.arange(4), prompts.eot] == tokenizer.eot).all()


def test_long_prompts_name_the_label(tokenizer) -> None:
    name = " ".join(["three"] * 80)
    with pytest.raises(UserError, match=r"label 'three three.*' has 8\d tokens.* takes 77"):
        template_prompts("a photo of a {}.", (name,), tokenizer)


@pytest.mark.parametrize("template", ["a photo", "{} and {}"])
def test_templates_need_one_place(tokenizer, template: str) -> None:
    with pytest.raises(UserError, match="exactly one"):
        template_prompts(template, NAMES, tokenizer)


def test_context_starts_from_words_or_at_random(tokenizer) -> None:
    table = jnp.asarray(np.random.default_rng(0).normal(size=(tokenizer.vocab_size, 8)))
    kwargs = {"table": table, "encoder": tokenizer, "rngs": nnx.Rngs(0)}
    words = Context(n_ctx=16, words="a photo of a", classes=None, **kwargs)
    ids = tokenizer.encode("a photo of a")
    np.testing.assert_array_equal(words(), table[np.array(ids)])
    copies = Context(n_ctx=16, words="a photo of a", classes=3, **kwargs)
    assert copies().shape == (3, len(ids), 8)
    with pytest.raises(UserError, match="'_ ': it has no tokens"):
        Context(n_ctx=16, words="_ ", classes=None, **kwargs)
    random = Context(n_ctx=16, words="", classes=3, **kwargs)
    assert random().shape == (3, 16, 8)
    assert 0.015 < random().std() < 0.025
    np.testing.assert_array_equal(random(jnp.array([2, 0])), random()[np.array([2, 0])])


def test_normalize_is_safe_at_zero() -> None:
    x = jnp.array([[3.0, 4.0], [0.0, 0.0]], jnp.bfloat16)
    y = normalize(x)
    assert y.dtype == jnp.float32
    np.testing.assert_allclose(y, [[0.6, 0.8], [0, 0]], atol=1e-6)
