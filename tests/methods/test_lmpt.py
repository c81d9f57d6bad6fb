"""LMPT: the goldens and the equations in float64, Table 3's rows, the release, settings."""

from __future__ import annotations

from dataclasses import replace

import exact
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from references import lmpt as reference
from references import prompt_methods

from mlclip_jax import losses, methods
from mlclip_jax.clip import CLIP, CLIPConfig, ImageFeatures, PromptTokens, TextConfig, ViTConfig
from mlclip_jax.data.registry import DataConfig, DataSplits
from mlclip_jax.data.scenes import Scenes
from mlclip_jax.errors import UserError
from mlclip_jax.labels import catalog
from mlclip_jax.methods.base import Batch, LabelInputs
from mlclip_jax.training.build import packaged_tokenizer
from mlclip_jax.training.captions import with_captions

WORDS = exact.Words().encode("a photo of a")
M = len(WORDS)
COUNTS = np.array([40, 3, 11, 1, 7])
BINARY = {"loss": "binary_cross_entropy"}
# What each row of Table 3 is made of: margins and weights of the classes.
ABLATIONS = {
    "full": ({}, reference.margins(COUNTS, 1), reference.weights(COUNTS, 1)),
    "margin": ({"reweight": False}, reference.margins(COUNTS, 1), 5 * [1]),
    "neither": ({"reweight": False, "class_aware_margin": False}, 5 * [1], 5 * [1]),
    "other": ({"margin": 1.3, "gamma": 0.5}, reference.margins(COUNTS, 1.3),
              reference.weights(COUNTS, 0.5)),
}  # fmt: skip


@pytest.fixture(autouse=True)
def double_precision():
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="module")
def golden():
    with np.load(exact.GOLDEN / "lmpt.npz") as file:
        return {key.removeprefix("cse/"): file[key] for key in file if key.startswith("cse/")}


@pytest.fixture(scope="module")
def clip():
    with jax.enable_x64(True):
        return exact.load("clip_vit")[0]


def tiny(table=None, vocab_size=73):
    """A CLIP of the golden's token width and context, with these token embeddings."""
    size = {"width": 8, "layers": 1, "heads": 1, "mlp_width": 8}
    text = TextConfig(vocab_size=vocab_size, context_length=9, **size)
    image = ViTConfig(image_size=8, patch_size=8, **size)
    clip = CLIP(CLIPConfig(8, image, text), rngs=nnx.Rngs(0))
    if table is not None:
        clip.text.token_embedding[...] = jnp.asarray(table)
    return clip


def small(clip=None, **fields):
    """LMPT of the golden's five classes with two context vectors for all."""

    class Ids(exact.Words):
        context_length = 9

        def encode(self, text):
            return [1]

    spec = {"name": "lmpt", "ctx_init": "", "n_ctx": 2, "class_specific": False, **fields}
    clip = clip or tiny()
    return methods.build(spec, clip, space=exact.SPACE, encoder=Ids(), rngs=nnx.Rngs(0))


def arrays(golden, counts=True, **captions):
    """The golden's targets and class counts as a batch and label inputs."""
    targets = jnp.asarray(2 * golden["labels01"] - 1, jnp.int8)
    batch = Batch(None, targets, jnp.arange(3), jnp.ones(3, bool), **captions)
    labels = LabelInputs((), jnp.arange(5), jnp.ones(5, bool))
    return batch, labels.with_counts(golden["freq"], 100) if counts else labels


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("eq6_eta1_gamma1", {}),
        ("eq6_eta1_gamma0.5", {"gamma": 0.5}),
        ("eq6_eta4_gamma1", {"margin": 4.0}),
        ("eq4_only_noreweight_eta4", {"margin": 4.0, "reweight": False}),
        ("eq3_mu1", {"class_aware_margin": False, "reweight": False}),
    ],
)
def test_embedding_loss_of_sentences_equals_golden(golden, name, fields):
    method = small(**fields)
    batch, labels = arrays(golden, caption_features=jnp.asarray(golden["t_caption_feat"]))
    prompts = jnp.asarray(golden["o_prompt_feat"])
    exact.same(method.distances(batch, labels, prompts), golden["paper_delta"])

    def loss(prompts):
        return method.embedding_loss(method.distances(batch, labels, prompts), batch, labels)

    value, gradient = jax.value_and_grad(loss)(prompts)
    exact.same(value, golden[f"paper_{name}_sumC_meanB"], 1e-12)
    exact.same(gradient, golden[f"paper_{name}_grad_o"], 1e-12)


@pytest.mark.parametrize(
    ("name", "counts", "fields"),
    [
        ("fixeddim_rawcounts_margin0.2_gamma2", True, {}),
        ("fixeddim_rawcounts_margin0.2_gamma1", True, {"gamma": 1.0}),
        ("nocounts_margin0.2", False, {}),
        ("nocounts_margin2", False, {"margin": 2.0}),
    ],
)
def test_embedding_loss_of_the_release_equals_golden(golden, name, counts, fields):
    method = small(variant="released", **fields)
    batch, labels = arrays(golden, counts, caption_tokens=jnp.ones((3, 9), jnp.int32))

    def loss(x):
        return method.embedding_loss(x.sum(-1), batch, labels)

    value, gradient = jax.value_and_grad(loss)(jnp.asarray(golden["x_one_minus_cos"]))
    exact.same(value, golden[f"code_{name}"], 1e-12)
    name = name.replace("nocounts_margin0.2", "nocounts")
    exact.same(gradient, golden[f"code_{name}_grad"], 1e-12)


def test_distances_of_tokens_equal_golden(golden):
    # A table of every token embedding of the golden, and ids that point at them.
    captions, prompts = golden["caption_token_emb"], golden["prompt_token_emb"]
    m = int(golden["m_ctx"])
    table = np.concatenate([np.ones((1, 8)), captions.reshape(-1, 8), prompts.reshape(-1, 8)])
    ids = 28 + np.arange(45).reshape(5, 9)
    tokens = PromptTokens(jnp.zeros(0, jnp.int32), jnp.asarray(ids), jnp.full(5, 8))
    method = small(tiny(table), variant="released", margin=2.0, n_ctx=m + 1, token_offset=m)
    batch, labels = arrays(golden, False, caption_tokens=1 + jnp.arange(27).reshape(3, 9))
    got = method.distances(batch, replace(labels, prompts=(tokens,)), None)
    exact.same(jnp.asarray(got, jnp.float64), golden["token_level_x"].sum(-1))
    value = method.embedding_loss(got, batch, labels)
    exact.same(jnp.asarray(value, jnp.float64), golden["token_level_code_loss_margin2"])


def features():
    """Image, label and caption features; the last image has no caption."""
    rng = np.random.default_rng(0)
    images, texts, captions = (jnp.asarray(rng.normal(size=(n, 64))) for n in (3, 5, 3))
    return images, texts, captions.at[2].set(0)


def cross_entropy(logits, targets):
    p = 1 / (1 + jnp.exp(-logits))
    return -jnp.mean(jnp.log(jnp.where(targets > 0, p, 1 - p)))


@pytest.mark.parametrize("share", [0.5, 0.2])
@pytest.mark.parametrize("row", ABLATIONS)
def test_rows_of_table_3(clip, row, share):
    fields, margin, weight = ABLATIONS[row]
    method = exact.make({"name": "lmpt", **BINARY, "classification_weight": share, **fields}, clip)
    images, texts, captions = features()
    batch = exact.batch({"pooled": images}, 3, caption_features=captions)
    labels = exact.inputs(method).with_counts(COUNTS, 50)

    def loss(texts):
        logits = method.logits(ImageFeatures(images), texts, labels)
        return method.loss(logits, batch, labels, exact.START, label_features=texts)

    def expected(texts):
        x = prompt_methods.cosine_logits(images, texts, jnp.exp(clip.logit_scale[...]))
        distances = jnp.stack(
            [jnp.stack([reference.sentence_distance(t, o) for o in texts]) for t in captions[:2]]
        )
        targets = np.asarray(batch.targets)
        embedding = reference.embedding_loss(distances, targets, margin, weight, [1, 1])
        parts = cross_entropy(x, batch.targets), embedding
        return reference.total_loss(*parts, share), parts

    (total, parts), gradient = jax.value_and_grad(loss, has_aux=True)(texts)
    (value, theirs), slope = jax.value_and_grad(expected, has_aux=True)(texts)
    exact.same(total, value, 1e-12)
    exact.same(gradient, slope, 1e-12)
    assert list(parts) == ["classification_loss", "embedding_loss"]
    for ours, other in zip(parts.values(), theirs, strict=True):
        exact.same(ours, other, 1e-12)


def test_images_without_caption_add_nothing(clip):
    images, texts, captions = features()
    method = exact.make({"name": "lmpt"}, clip)
    labels = exact.inputs(method).with_counts(COUNTS, 50)
    batch = exact.batch({"pooled": images}, 3, caption_features=captions)

    def loss(texts, batch):
        return method.embedding_loss(method.distances(batch, labels, texts), batch, labels)

    first = jax.tree.map(lambda x: x[:2], batch)
    value, gradient = jax.value_and_grad(loss)(texts, batch)
    expected, slope = jax.value_and_grad(loss)(texts, first)
    exact.same(value, expected, 1e-12)
    exact.same(gradient, slope, 1e-12)
    nobody = replace(batch, caption_features=0 * captions)
    value, gradient = jax.value_and_grad(loss)(texts, nobody)
    assert value == 0 and not gradient.any()


@pytest.fixture(scope="module")
def default(clip):
    """The default LMPT, compiled, a batch and what it gives."""
    with jax.enable_x64(True):
        method = exact.make({"name": "lmpt"}, clip)
        run = exact.Runner(method, exact.inputs(method).with_counts(COUNTS, 50))
        images, _, captions = features()
        batch = exact.batch({"pooled": images}, 3, caption_features=captions)
        return method, run, batch, run(batch)


def test_loss_and_gradient_of_the_context(clip, default):
    _, run, batch, got = default
    (start, suffix, eot), encode = exact.surroundings(clip, M), exact.encoder(clip)
    images, captions, targets = batch.images["pooled"], batch.caption_features, batch.targets

    @jax.jit
    def expected(context):
        texts = prompt_methods.class_texts(start, context, suffix, eot, encode)
        x = prompt_methods.cosine_logits(images, texts, jnp.exp(clip.logit_scale[...]))
        distances = jnp.stack(
            [jnp.stack([reference.sentence_distance(t, o) for o in texts]) for t in captions[:2]]
        )
        _, margin, weight = ABLATIONS["full"]
        embedding = reference.embedding_loss(distances, np.asarray(targets), margin, weight, [1, 1])
        balanced = losses.get("distribution_balanced")
        balanced = balanced(x, targets, class_counts=COUNTS, num_images=50)
        return reference.total_loss(balanced, embedding, 0.5), (x, texts)

    context = run.start["context/vectors"]
    words = clip.text.token_embedding[...][np.array(WORDS)]
    np.testing.assert_array_equal(context, np.repeat(words[None], 5, axis=0))
    (loss, (x, texts)), gradient = jax.value_and_grad(expected, has_aux=True)(context)
    exact.same(got.label_features, texts)
    exact.same(got.logits, x)
    exact.same(got.loss, loss)
    exact.same_gradients(got.gradients, {"context/vectors": gradient})


def test_padded_classes_change_nothing(default):
    method, _, batch, plain = default
    exact.padding_changes_nothing(plain, method, batch, COUNTS, 50)


def test_release_compares_input_tokens(clip):
    spec = {"name": "lmpt", "variant": "released", **BINARY, "ctx_init": "", "n_ctx": 3}
    method = exact.make(spec | {"classification_weight": 0.0}, clip)
    run = exact.Runner(method, exact.inputs(method).with_counts(COUNTS, 50))
    rng = np.random.default_rng(0)
    tokens = np.zeros((3, 12), np.int32)
    tokens[0, :8], tokens[1, :12] = rng.integers(1, 500, 8), rng.integers(1, 500, 12)
    images = jnp.asarray(rng.normal(size=(3, 64)))
    batch = exact.batch({"pooled": images}, 3, caption_tokens=jnp.asarray(tokens))
    got = run(batch)
    start, suffix, _ = exact.surroundings(clip, 3)
    embedded = clip.text.token_embedding[...][np.pad(tokens, ((0, 0), (0, 65)))]

    @jax.jit
    def expected(context):
        prompts = prompt_methods.full_prompts(start, context, suffix)
        distances = jnp.stack(
            [jnp.stack([reference.token_distance(t, p, 2) for p in prompts]) for t in embedded[:2]]
        )
        loss = reference.embedding_loss_released(
            distances,
            np.asarray(batch.targets),
            reference.margins(COUNTS, 0.2),
            reference.weights(COUNTS, 2),
            [1, 1],
        )
        return loss, distances

    context = run.start["context/vectors"]
    (loss, distances), gradient = jax.value_and_grad(expected, has_aux=True)(context)
    exact.same(method.distances(batch, exact.inputs(method), None)[:2], distances)
    exact.same(got.parts["embedding_loss"], loss)
    exact.same(got.parts["classification_loss"], cross_entropy(got.logits, batch.targets))
    exact.same(got.loss, loss)
    exact.same_gradients(got.gradients, {"context/vectors": gradient})
    # Places 2.. of the prompt are compared; the start of text and the first vector are before them.
    assert gradient[:, 1].any() and gradient[:, 2].any() and not gradient[:, 0].any()


def test_without_captions_it_is_coop(clip):
    batch = exact.batch({"pooled": features()[0]}, 3)
    found = []
    for spec in (
        {"name": "lmpt", **BINARY, "classification_weight": 1.0},
        {"name": "coop", **BINARY, "ctx_init": "a photo of a", "class_specific": True},
    ):
        method = exact.make(spec, clip)
        assert method.captions() is None and not method.needs_counts()
        found.append(exact.Runner(method, exact.inputs(method))(batch))
    jax.tree.map(np.testing.assert_array_equal, *found)


@pytest.mark.parametrize(
    ("fields", "read", "characters", "counts"),
    [
        ({}, "features", None, True),
        ({"variant": "released"}, "tokens", 75, True),
        ({"variant": "released", "level": "sentence"}, "features", 75, True),
        ({"level": "token"}, "tokens", None, True),
        ({**BINARY}, "features", None, True),
        ({**BINARY, "class_aware_margin": False, "reweight": False}, "features", None, False),
        ({"class_aware_margin": False, "reweight": False}, "features", None, True),
        ({"classification_weight": 0.0}, "features", None, True),
    ],
)
def test_what_it_reads(fields, read, characters, counts):
    method = small(**fields)
    captions = method.captions()
    assert (captions.read, captions.max_characters) == (read, characters)
    assert method.needs_counts() == counts


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"classification_weight": 1.5}, "lambda of LMPT, lies in [0, 1], not at 1.5"),
        ({"classification_weight": -0.1}, "lambda of LMPT"),
        ({"class_aware_margin": False}, "method.reweight goes with class_aware_margin"),
        ({"variant": "released", "reweight": False}, "goes without class_aware_margin or reweight"),
        ({"variant": "release"}, "method.variant"),
        ({"level": "word"}, "method.level"),
        ({"variant": "released", "reduction": "sum"}, "is a mean over the classes"),
        ({"token_offset": 9}, "method.token_offset is 9 and prompts have 9 tokens"),
    ],
)
def test_wrong_settings_are_named(fields, message):
    with pytest.raises(UserError) as caught:
        small(**fields)
    assert message in str(caught.value)


class SomeCaptions:
    """A source in which one image is left without a caption."""

    def __init__(self, source):
        self.source = source
        self.captions = ((), *source.captions[1:])

    def __len__(self):
        return len(self.source)

    def __getitem__(self, i):
        return self.source[i]


@pytest.mark.parametrize("variant", ["paper", "released"])
def test_captions_in_the_batch(variant):
    with jax.enable_x64(False):
        tokenizer, space = packaged_tokenizer(40), catalog.scenes()
        source = SomeCaptions(Scenes("train", 4, seed=0))
        clip = tiny(vocab_size=tokenizer.vocab_size)
        clip.text = type(clip.text)(
            replace(clip.config.text, context_length=40), 8, rngs=nnx.Rngs(0)
        )
        method = methods.build(
            {"name": "lmpt", "variant": variant}, clip, space=space, encoder=tokenizer,
            rngs=nnx.Rngs(0),
        )  # fmt: skip
        said = []
        data = DataSplits(source, {}, space, DataConfig())
        example = with_captions(data, method, tokenizer, say=said.append).train
        ids = tokenizer([text[0][:75] for text in source.captions[1:]], truncate=True)
        assert "1 images have none" in said[0]
        if variant == "released":
            width = example[0]["caption_tokens"].shape[0]
            found = np.stack([example[i]["caption_tokens"] for i in range(4)])
            np.testing.assert_array_equal(found[1:], ids[:, :width])
            assert not ids[:, width:].any()
        else:
            found = np.stack([example[i]["caption_features"] for i in range(4)])
            ids = tokenizer([text[0] for text in source.captions[1:]], truncate=True)
            expected = jax.jit(clip.encode_text)(ids)
            np.testing.assert_allclose(found[1:], expected, atol=1e-5)
        assert not found[0].any()
