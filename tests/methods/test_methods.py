"""Zero-shot and CoOp: golden parity, padding of classes, what trains, errors."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mlclip_jax import losses, methods
from mlclip_jax.clip import CLIPConfig, PromptTokens, TextConfig, ViTConfig
from mlclip_jax.clip.arrays import from_state_dict
from mlclip_jax.clip.weights import resolve
from mlclip_jax.errors import UserError
from mlclip_jax.labels import catalog
from mlclip_jax.labels.space import LabelSpace
from mlclip_jax.methods.base import Batch, LabelInputs, Method, Progress
from mlclip_jax.modules.heads import cosine_logits

GOLDEN = Path(__file__).parents[1] / "golden"
MINIS = ("clip-mini", "clip-mini-rn")


@pytest.fixture(scope="module")
def official():
    """The golden CLIP and LMPT's CoOp arrays over it."""
    clip, lmpt = np.load(GOLDEN / "clip_vit.npz"), np.load(GOLDEN / "lmpt.npz")
    weights = {k[3:]: clip[k] for k in clip.files if k.startswith("sd/")}
    config = CLIPConfig(
        64,
        ViTConfig(32, 8, 64, 2, 1, 256),
        TextConfig(512, 77, 64, layers=2, heads=1, mlp_width=256),
    )
    return from_state_dict(weights, config), clip, lmpt


def golden_prompts(lmpt, layout: str, k: int, specific: bool) -> PromptTokens:
    """The golden's "X..X name." ids with the context put where the layout wants it."""
    rows, lengths = lmpt[f"coop/tokens_n{k}"], lmpt["coop/true_name_lens"]
    slots = [-(j + 1) for j in range(k)]
    split = {"end": k, "middle": k // 2, "front": 0}[layout]
    own = []
    for row, length in zip(rows, lengths, strict=True):
        end = int(row.argmax())
        name, rest = row[1 + k : 1 + k + length], row[1 + k + length : end + 1]
        own.append([*slots[:split], *name, *slots[split:], *rest])
    prefix = [int(rows[0, 0])]
    if not specific:
        prefix, own = prefix + slots[:split], [row[split:] for row in own]
    ids = np.zeros((len(own), max(map(len, own))), np.int32)
    for i, row in enumerate(own):
        ids[i, : len(row)] = row
    eot = np.array([len(row) - 1 for row in own])
    return PromptTokens(jnp.array(prefix), jnp.array(ids), jnp.array(eot))


@pytest.mark.parametrize("specific", [False, True])
@pytest.mark.parametrize("layout", ["end", "middle", "front"])
@pytest.mark.parametrize("k", [4, 5])
def test_coop_text_features_equal_release(official, k: int, layout: str, specific: bool) -> None:
    clip, _, lmpt = official
    kind = "csc" if specific else "shared"
    prompts = golden_prompts(lmpt, layout, k, specific)
    got = jax.jit(clip.encode_prompts)(prompts, jnp.array(lmpt[f"coop/ctx_n{k}_{kind}"]))
    expected = lmpt[f"coop/n{k}_{kind}_{layout}_text"]
    np.testing.assert_allclose(got, expected, rtol=0, atol=2e-5 * np.abs(expected).max())


@pytest.mark.parametrize("kind", ["shared", "csc"])
def test_coop_logits_and_context_gradient_equal_release(official, kind: str) -> None:
    clip, vit, lmpt = official
    prompts = golden_prompts(lmpt, "end", 4, kind == "csc")
    images = jnp.array(vit["in/images"].transpose(0, 2, 3, 1))
    weights = jnp.array(lmpt[f"coop/n4_{kind}_end_grad_out"])

    def score(context: jax.Array) -> tuple[jax.Array, jax.Array]:
        text = clip.encode_prompts(prompts, context)
        x = cosine_logits(clip.encode_images(images).pooled, text, jnp.exp(clip.logit_scale[...]))
        return (x * weights).sum(), x

    context = jnp.array(lmpt[f"coop/ctx_n4_{kind}"])
    (_, logits), grad = jax.jit(jax.value_and_grad(score, has_aux=True))(context)
    expected = lmpt[f"coop/n4_{kind}_end_logits"]
    np.testing.assert_allclose(logits, expected, rtol=0, atol=2e-5 * np.abs(expected).max())
    expected = lmpt[f"coop/n4_{kind}_end_grad_ctx"]
    np.testing.assert_allclose(grad, expected, rtol=0, atol=2e-4 * np.abs(expected).max())


def make(spec: dict, name: str = "clip-mini", space: LabelSpace | None = None) -> tuple:
    checkpoint = resolve(name)
    tokenizer = checkpoint.tokenizer()
    space = space or catalog.scenes()
    method = methods.build(
        spec, checkpoint.load(), space=space, encoder=tokenizer, rngs=nnx.Rngs(0)
    )
    return method, space, tokenizer


ALL_COOP = [
    {"name": "coop"},
    {"name": "coop", "ctx_init": "a photo of a", "logit_bias": True},
    {"name": "coop", "n_ctx": 3, "class_specific": True, "class_position": "middle"},
]


@pytest.mark.parametrize("spec", [{"name": "zero_shot"}, *ALL_COOP])
@pytest.mark.parametrize("name", MINIS)
def test_padded_classes_change_nothing(spec: dict, name: str) -> None:
    method, space, tokenizer = make(spec, name)
    images = jnp.array(np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3)), jnp.uint8)
    targets = np.random.default_rng(1).integers(-1, 2, (3, 24)).astype(np.int8)

    @jax.jit
    def forward(labels: LabelInputs) -> tuple[jax.Array, jax.Array]:
        features = method.encode_images(images)
        logits = method.logits(features, method.encode_labels(labels), labels)
        batch = Batch(images, jnp.array(targets[:, : labels.num_classes]), jnp.arange(3),
                      jnp.array([True, True, False]))  # fmt: skip
        return logits, method.loss(logits, batch, labels, Progress(jnp.array(0), jnp.array(0)))[0]

    (plain, loss), (padded, padded_loss) = (
        forward(method.label_inputs(space, tokenizer, multiple_of=n)) for n in (1, 8)
    )
    assert (plain.shape, padded.shape) == ((3, 22), (3, 24))
    np.testing.assert_allclose(padded[:, :22], plain, atol=1e-4)
    np.testing.assert_allclose(padded_loss, loss, rtol=1e-4)


@pytest.mark.parametrize("name", ["distribution_balanced", "splc", "class_balanced"])
def test_losses_get_what_they_ask_for(name: str) -> None:
    method, space, tokenizer = make({"name": "zero_shot", "loss": name})
    rng = np.random.default_rng(0)
    training = rng.choice(np.array([-1, 1], np.int8), (50, len(space)), p=[0.8, 0.2])
    x = jnp.asarray(rng.normal(size=(4, 24)), jnp.float32)
    targets = jnp.asarray(rng.integers(-1, 2, (4, 24)), jnp.int8)
    batch = Batch(jnp.zeros(()), targets, jnp.arange(4), jnp.ones(4, bool))
    labels = method.label_inputs(space, tokenizer, multiple_of=8)
    at = Progress(step=jnp.array(7), epoch=jnp.array(2))
    assert method.needs_counts() == (name != "splc")
    if method.needs_counts():
        with pytest.raises(UserError, match=f"loss '{name}' needs class_counts"):
            method.loss(x, batch, labels, at)
        labels = labels.with_counts((training > 0).sum(0), len(training))
    got, _ = method.loss(x, batch, labels, at)
    expected = losses.get(name)(
        x[:, :22],
        targets[:, :22],
        progress=at,
        class_counts=(training > 0).sum(0),
        num_images=50,
    )
    np.testing.assert_allclose(got, expected, rtol=1e-6)


def test_coop_from_words_starts_at_zero_shot() -> None:
    zero, space, tokenizer = make({"name": "zero_shot"})
    labels = zero.label_inputs(space, tokenizer)
    expected = jax.jit(zero.encode_labels)(labels)
    coop, *_ = make({"name": "coop", "ctx_init": "a photo of a"})
    got = jax.jit(coop.encode_labels)(coop.label_inputs(space, tokenizer))
    got = got / jnp.linalg.norm(got, axis=-1, keepdims=True)
    np.testing.assert_allclose(got, expected, atol=2e-6)


def test_template_ensemble_is_the_mean_of_unit_features() -> None:
    templates = ("a photo of a {}.", "art of the {}.")
    alone = []
    for template in templates:
        one, space, tokenizer = make({"name": "zero_shot", "templates": (template,)})
        alone.append(np.asarray(jax.jit(one.encode_labels)(one.label_inputs(space, tokenizer))))
    both, *_ = make({"name": "zero_shot", "templates": templates})
    got = jax.jit(both.encode_labels)(both.label_inputs(space, tokenizer))
    mean = np.mean(alone, axis=0)
    np.testing.assert_allclose(got, mean / np.linalg.norm(mean, axis=1, keepdims=True), atol=1e-6)


def trained(method: Method) -> set[str]:
    state = nnx.state(method, method.trainable)
    return {"/".join(map(str, path)) for path, _ in nnx.to_flat_state(state)}


def test_what_trains() -> None:
    assert trained(make({"name": "zero_shot"})[0]) == set()
    assert trained(make(ALL_COOP[0])[0]) == {"context/vectors"}
    assert trained(make(ALL_COOP[1])[0]) == {"context/vectors", "bias"}
    both = trained(make({"name": "coop", "train_image_encoder": True}, "clip-mini-rn")[0])
    assert "clip/image/layer1/0/conv1/kernel" in both
    assert not any(path.startswith("clip/text") or path == "clip/logit_scale" for path in both)


def test_trained_context_scores_other_labels_but_not_class_specific() -> None:
    other = LabelSpace(names=("red three", "blue star", "green"), name="mine")
    unified, _, tokenizer = make({"name": "coop"})
    assert jax.eval_shape(unified.encode_labels, unified.label_inputs(other, tokenizer)).shape == (
        3,
        64,
    )
    specific, *_ = make({"name": "coop", "class_specific": True})
    with pytest.raises(UserError, match="made for 22 classes and mean nothing for the 3"):
        specific.label_inputs(other, tokenizer)
    turned = catalog.scenes().select(range(21, -1, -1))
    with pytest.raises(UserError, match=r"for the 22 of .* in another order"):
        specific.label_inputs(turned, tokenizer)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"name": "coopp"}, "unknown method 'coopp'; did you mean 'coop'"),
        ({"name": "coop", "nctx": 4}, "'method.nctx': did you mean 'n_ctx'"),
        ({"name": "coop", "n_ctx": "4"}, "method.n_ctx"),
        ({"name": "coop", "n_ctx": 0}, "method.n_ctx is 0: a prompt needs a vector"),
        ({"name": "zero_shot", "templates": ()}, "at least one template"),
        ({"name": "coop", "loss": "bce"}, "unknown loss 'bce'"),
    ],
)
def test_wrong_settings_are_named(spec: dict, message: str) -> None:
    with pytest.raises(UserError) as caught:
        make(spec)
    assert message in str(caught.value)
