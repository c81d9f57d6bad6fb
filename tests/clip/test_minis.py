"""The small CLIPs of the package: size, quality, and what other implementations make of them."""

from __future__ import annotations

import functools
import importlib.util
import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from mlclip_jax.clip import PRESETS
from mlclip_jax.clip.weights import MINIS, PRETRAINED, resolve
from mlclip_jax.data.scenes import FAMILIES, Scenes
from mlclip_jax.labels.catalog import scenes as label_space

ROOT = Path(__file__).parents[2]
SPACE = label_space()
GROUPS = ("digits", "shapes", "colours")
SENTENCES = (
    "a photo of a red three and a blue star.",
    "There is a {} in the scene",
    "This photo contains {}",
    "This is a {} photo",
    "itap of a {}.",
    "a bad photo of the {}.",
    "a origami {}.",
    "a photo of the large {}.",
    "a {} in a video game.",
    "art of the {}.",
    "a photo of the small {}.",
    "a close-up photo of my {}, a pixelated jpeg rendering of many",
    "label labels group digit shape colour",
)


@functools.cache
def opened(name):
    checkpoint = resolve(name)
    return checkpoint, checkpoint.load(), checkpoint.tokenizer()


@pytest.mark.parametrize("name", MINIS)
def test_small_and_as_the_preset_says(name):
    assert sum(p.stat().st_size for p in (PRETRAINED / name).iterdir()) <= 4_000_000
    checkpoint, _, tokenizer = opened(name)
    assert checkpoint.config == PRESETS[name]
    assert tokenizer.vocab_size == checkpoint.config.text.vocab_size == tokenizer.eot + 1


@pytest.mark.parametrize("name", MINIS)
def test_every_word_of_captions_and_templates_is_one_token(name):
    tokenizer = opened(name)[2]
    for sentence in SENTENCES:
        for text in (sentence, sentence.upper()):
            words = text.replace("{}", "").replace(".", " ").replace(",", " ").replace("-", " - ")
            assert len(tokenizer.encode(words)) == len(words.split()), text
    for label in (*SPACE.prompt_names, *SPACE.taxonomy.group_prompt_names):
        assert len(tokenizer.encode(label)) == 1
    assert len(tokenizer.encode("naïve 漢字 zebra")) > 6  # anything else goes by pieces


@pytest.mark.parametrize("name", MINIS)
def test_zero_shot_is_twice_chance_in_each_group(name):
    _, clip, tokenizer = opened(name)
    source = Scenes("test", 500, seed=11)
    images = np.stack([source.image(i) for i in range(500)])
    labels = source.label_matrix() > 0
    ids = tokenizer([f"a photo of a {n}." for n in SPACE.prompt_names])
    text = np.asarray(clip.encode_text(jnp.asarray(ids[:, :16])))
    pooled = np.asarray(clip.encode_images(jnp.asarray(images)).pooled)
    scores = pooled @ (text / np.linalg.norm(text, axis=1, keepdims=True)).T
    scores /= np.linalg.norm(pooled, axis=1, keepdims=True)
    precision = []
    for c in range(22):
        hits = labels[np.argsort(-scores[:, c]), c]
        precision.append((np.cumsum(hits) / np.arange(1, 501))[hits].mean())
    for group in GROUPS:
        members = list(SPACE.subsets[group])
        assert np.mean(np.array(precision)[members]) >= 2 * labels[:, members].mean(), group


@pytest.mark.parametrize("name", MINIS)
def test_there_is_room_above_zero_shot(name):
    figures = json.loads((PRETRAINED / name / "metrics.json").read_text())
    trained = max(figures[k]["all"] for k in ("linear_head", "mlp_head"))
    assert figures["zero_shot"]["all"] <= 0.8 * trained
    assert figures["learned_context"]["all"] > figures["zero_shot"]["all"] + 0.02


@pytest.mark.parametrize("name", MINIS)
def test_text_similarity_carries_cooccurrence(name):
    _, clip, tokenizer = opened(name)
    ids = tokenizer([f"a photo of a {n}." for n in SPACE.prompt_names])
    text = np.asarray(clip.encode_text(jnp.asarray(ids[:, :16])))
    text = text / np.linalg.norm(text, axis=1, keepdims=True)
    family = {n: k for k, (c, s, digits) in enumerate(FAMILIES) for n in (c, s, *digits)}
    same, different = [], []
    for a in range(22):
        for b in range(a):
            if SPACE.taxonomy.group_of[a] != SPACE.taxonomy.group_of[b]:
                together = family[SPACE.names[a]] == family[SPACE.names[b]]
                (same if together else different).append(text[a] @ text[b])
    assert np.mean(same) > np.mean(different) + 0.05


def samples(tokenizer, clip):
    source = Scenes("test", 8, seed=5)
    images = np.stack([source.image(i) for i in range(8)])
    ids = tokenizer(["a photo of a three.", "This photo contains a red star", "zebra", ""])
    return np.asarray(clip.normalize(jnp.asarray(images))), images, ids


def close(ours, theirs):
    ours, theirs = np.asarray(ours), theirs.numpy()
    assert np.abs(ours - theirs).max() / np.abs(theirs).max() <= 2e-5


@pytest.mark.parity
def test_transformers_opens_clip_mini():
    import torch
    from transformers import CLIPModel, CLIPTokenizer

    _, clip, tokenizer = opened("clip-mini")
    pixels, images, ids = samples(tokenizer, clip)
    theirs = CLIPModel.from_pretrained(PRETRAINED / "clip-mini").float().eval()
    with torch.no_grad():
        image = theirs.get_image_features(torch.tensor(pixels.transpose(0, 3, 1, 2)))
        text = theirs.get_text_features(torch.tensor(ids, dtype=torch.long))
    close(clip.encode_images(jnp.asarray(images)).pooled, image)
    close(clip.encode_text(jnp.asarray(ids)), text)
    words = CLIPTokenizer.from_pretrained(PRETRAINED / "clip-mini")
    assert words("a photo of a three.")["input_ids"] == ids[0][ids[0].nonzero()[0]].tolist()


@pytest.mark.parity
def test_open_clip_opens_clip_mini_rn():
    import torch
    from safetensors.torch import load_file

    path = ROOT / "scripts" / "make_weight_fixtures.py"
    spec = importlib.util.spec_from_file_location("make_weight_fixtures", path)
    others = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(others)

    folder = PRETRAINED / "clip-mini-rn"
    _, clip, tokenizer = opened("clip-mini-rn")
    pixels, images, ids = samples(tokenizer, clip)
    config = json.loads((folder / "open_clip_config.json").read_text())["model_cfg"]
    theirs = others.import_open_clip().CLIP(**config)
    weights = load_file(folder / "open_clip_model.safetensors")
    theirs.load_state_dict({k: v.float() for k, v in weights.items()}, strict=True)
    theirs.eval()
    with torch.no_grad():
        image = theirs.encode_image(torch.tensor(pixels.transpose(0, 3, 1, 2)))
        text = theirs.encode_text(torch.tensor(ids, dtype=torch.long))
    close(clip.encode_images(jnp.asarray(images)).pooled, image)
    close(clip.encode_text(jnp.asarray(ids)), text)
