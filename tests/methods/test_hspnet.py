"""HSPNet: the release's arrays, the paper's form, its ablations, padding, errors."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mlclip_jax import methods
from mlclip_jax.clip import PromptTokens
from mlclip_jax.clip.arrays import from_state_dict, to_state_dict
from mlclip_jax.clip.config_files import infer_config
from mlclip_jax.clip.weights import resolve
from mlclip_jax.errors import UserError
from mlclip_jax.labels import catalog
from mlclip_jax.labels.space import LabelSpace, Taxonomy
from mlclip_jax.methods.base import Batch, LabelInputs, Progress
from mlclip_jax.methods.hspnet import HSPNet, HSPNetConfig
from mlclip_jax.modules.graph import dependency_graph, relation
from mlclip_jax.training.step import take_apart

GOLDEN = Path(__file__).parents[1] / "golden"
FORWARD, GRADIENT = 2e-5, 2e-4


def error(a, b) -> float:
    """max |a - b| / max |b|."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    assert a.shape == b.shape
    return np.abs(a - b).max() / np.abs(b).max()


class ToyIds:
    """The golden's ids: start 510, end 511; every text is one token."""

    sot, eot, context_length = 510, 511, 77

    def encode(self, text: str) -> list[int]:
        return [1]


def tokens(rows: np.ndarray, prefix: list[int], skip: int) -> PromptTokens:
    """The golden's full rows as prefix and own tokens."""
    eot = rows.argmax(1) - skip
    own = rows[:, skip : skip + eot.max() + 1]
    return PromptTokens(jnp.array(prefix), jnp.array(own), jnp.array(eot))


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN / "hspnet.npz") as ours, np.load(GOLDEN / "clip_rn.npz") as towers:
        arrays = {key: ours[key] for key in ours}
        state = {key[3:]: towers[key] for key in towers if key.startswith("sd/")}
    return arrays, state


def official(golden, variant: str) -> tuple[HSPNet, LabelInputs, Batch]:
    """Our HSPNet with the golden's weights, label inputs and batch."""
    arrays, state = golden
    clip = from_state_dict(state, infer_config({k: v.shape for k, v in state.items()}))
    space = LabelSpace(
        tuple("abcdefghij"),
        taxonomy=Taxonomy(tuple("wxyz"), tuple(arrays["in/parent_index"])),
    )
    method = HSPNet(
        HSPNetConfig(variant=variant), clip, space=space, encoder=ToyIds(), rngs=nnx.Rngs(0)
    )
    for layer in ("linear1", "linear2"):
        name = f"w/child_prompt_learner.meta_net.{layer}"
        getattr(method.meta, layer).kernel[...] = jnp.array(arrays[f"{name}.weight"].T)
        getattr(method.meta, layer).bias[...] = jnp.array(arrays[f"{name}.bias"])
    graphs = {"gcn": "w/gcn."} | ({"group_gcn": "w/paper_group_gcn/"} if variant == "paper" else {})
    for ours, theirs in graphs.items():
        kernels = [arrays[f"{theirs}gc{i}.weight"] for i in (1, 2, 3)]
        getattr(method, ours).kernels = nnx.List(nnx.Param(jnp.array(k)) for k in kernels)
    if variant == "released":
        method.gcn.gamma[...] = jnp.array(arrays["w/gcn.gamma"][0])
    relation = jnp.array(arrays["in/relation"], jnp.float32)
    groups = clip.encode_text(jnp.array(arrays["in/parent_tokens"]))
    assert error(groups, arrays["out/parent_text"]) < FORWARD
    labels = LabelInputs(
        prompts=(tokens(arrays["in/child_tokens"], [510, -1, -2, -3, -4], 5),),
        index=jnp.arange(10),
        mask=jnp.ones(10, bool),
        group=jnp.array(arrays["in/parent_index"], jnp.int32),
        label_graph=dependency_graph(relation[:10, :10]),
        group_graph=dependency_graph(relation[10:, 10:]),
        group_features=groups,
    )
    images = jnp.array(arrays["in/images"].transpose(0, 2, 3, 1))
    targets = jnp.array(arrays["in/targets"], jnp.int8)
    return method, labels, Batch(images, targets, jnp.arange(4), jnp.ones(4, bool))


def test_label_features_and_logits_equal_release(golden) -> None:
    arrays, _ = golden
    method, labels, batch = official(golden, "released")
    assert error(labels.label_graph, arrays["in/adj_child"]) < FORWARD
    assert error(labels.group_graph, arrays["in/adj_parent"]) < FORWARD
    contexts = method.group_contexts(labels)
    refined = method.gcn(labels.group_features, labels.group_graph)
    assert error(refined, arrays["out/parent_gcn"]) < FORWARD
    assert error(contexts.reshape(4, -1), arrays["out/meta_out_per_parent"]) < FORWARD
    assert error(contexts[labels.group], arrays["out/child_ctx"]) < FORWARD
    features = jax.jit(method.encode_labels)(labels)
    assert error(features, arrays["out/child_gcn"]) < FORWARD
    images = jax.jit(method.encode_images)(batch.images)
    assert error(images.pooled, arrays["out/image_features"]) < FORWARD
    assert error(method.logits(images, features, labels), arrays["out/logits"]) < FORWARD


@pytest.mark.parametrize("epoch", [0, 1])
def test_batch_norm_by_epoch(golden, epoch: int) -> None:
    """The release's first epoch keeps the CLIP's statistics; `epoch` is traced."""
    arrays, _ = golden
    method, labels, batch = official(golden, "released")
    graphdef, state = nnx.split(method)

    @jax.jit
    def logits(state, epoch):
        method = nnx.merge(graphdef, state)
        images = method.encode_images(batch.images, progress=Progress(epoch, epoch))
        return method.logits(images, method.encode_labels(labels), labels)

    got = logits(state, jnp.array(epoch))
    assert error(got, arrays["out/logits_bn_train" if epoch else "out/logits"]) < FORWARD


@pytest.mark.parametrize("epoch", [0, 1])
def test_loss_and_gradients_equal_release(golden, epoch: int) -> None:
    arrays, _ = golden
    method, labels, batch = official(golden, "released")
    parts = take_apart(method)
    at = Progress(step=jnp.array(epoch), epoch=jnp.array(epoch))

    @jax.jit
    @jax.value_and_grad
    def loss(trainable):
        method = parts.merge({**parts.frozen, **trainable})
        images = method.encode_images(batch.images)  # the golden's gradients: statistics fixed
        x = method.logits(images, method.encode_labels(labels), labels)
        return method.loss(x, batch, labels, at)[0]

    value, grads = loss(parts.trainable)
    assert error(value, arrays[f"out/loss_epoch{epoch}"]) < FORWARD
    towers = parts.merge({**{k: jnp.zeros_like(v) for k, v in parts.frozen.items()}, **grads})
    ours = {
        f"image_encoder.{k[7:]}": v
        for k, v in to_state_dict(towers.clip, "openai").items()
        if k.startswith("visual.")
    }
    for layer in ("linear1", "linear2"):
        at_layer = f"child_prompt_learner.meta_net.{layer}"
        ours[f"{at_layer}.weight"] = np.asarray(grads[f"meta/{layer}/kernel"]).T
        ours[f"{at_layer}.bias"] = grads[f"meta/{layer}/bias"]
    for i in range(3):
        ours[f"gcn.gc{i + 1}.weight"] = grads[f"gcn/kernels/{i}"]
    ours["gcn.gamma"] = np.asarray(grads["gcn/gamma"])[None]
    checked = 0
    for key, expected in arrays.items():
        if key.startswith(f"gradnorm{epoch}/"):
            got = np.linalg.norm(ours[key.split("/")[1]])
            assert error(got, expected) < GRADIENT, key
        elif key.startswith(f"grad{epoch}/"):
            name = key.split("/")[1]
            got = ours[name.removesuffix("[:4]")]
            got = got[:4] if name.endswith("[:4]") else got
            assert error(got, expected) < GRADIENT, key
        else:
            continue
        checked += 1
    assert checked == 15


def test_paper_form_equals_reference(golden) -> None:
    arrays, _ = golden
    method, labels, batch = official(golden, "paper")
    features = method.encode_labels(labels)
    unit = features / jnp.linalg.norm(features, axis=-1, keepdims=True)
    assert error(unit, arrays["paper/label_features"]) < FORWARD
    x = method.logits(method.encode_images(batch.images), features, labels)
    assert error(x, arrays["paper/logits"]) < FORWARD
    trained = take_apart(method).trainable
    assert "clip/logit_scale" in trained and "group_gcn/kernels/0" in trained


@pytest.fixture(scope="module")
def mini():
    checkpoint = resolve("clip-mini-rn")
    return checkpoint, checkpoint.tokenizer()


def build(mini, name: str = "hspnet", space: LabelSpace | None = None, **fields):
    """A method over clip-mini-rn with the labels of Scenes."""
    checkpoint, tokenizer = mini
    space = space or catalog.scenes()
    spec = {"name": name, **fields}
    method = methods.build(
        spec, checkpoint.load(), space=space, encoder=tokenizer, rngs=nnx.Rngs(0)
    )
    return method, space, tokenizer


@pytest.mark.parametrize("variant", ["released", "paper"])
@pytest.mark.parametrize("prompt", ["group", "concat", "add", "shared"])
def test_label_features_follow_the_equations(mini, variant: str, prompt: str) -> None:
    """Each label by itself through the whole text tower, in the order of Eqs. 2-9."""
    method, space, tokenizer = build(mini, variant=variant, prompt=prompt, n_ctx=2)
    clip, labels = method.clip, method.label_inputs(space, tokenizer, multiple_of=8)

    def encode(texts):
        return clip.encode_text(jnp.array(tokenizer(list(texts))))

    groups = encode(f"a photo of a {name}." for name in space.taxonomy.group_names)
    plain = encode(f"a photo of a {name}." for name in space.names)
    own = method.gcn if variant == "released" or prompt == "shared" else method.group_gcn
    rows = []
    for i, name in enumerate(space.names):
        context = jnp.zeros((0, clip.config.text.width))
        if prompt != "shared":
            refined = own(groups, dependency_graph(relation(groups)))
            context = method.meta(refined)[space.taxonomy.group_of[i]]
        if prompt == "concat":
            context = jnp.concatenate([context, method.context.vectors[...]])
        elif prompt != "group":
            vectors = method.context.vectors[...]
            context = vectors + context if prompt == "add" else vectors
        words = clip.text.embed(jnp.array([*tokenizer.encode(f"{name}."), tokenizer.eot]))
        start = clip.text.embed(jnp.array([tokenizer.sot]))
        prompt_row = jnp.concatenate([start, context, words])
        state = clip.text.hidden_states(prompt_row[None])[0, -1]
        rows.append(state @ clip.text.projection[...])
    expected = method.gcn(jnp.stack(rows), dependency_graph(relation(plain)))
    got = jax.jit(method.encode_labels)(labels)
    assert got.shape == (24, 64)
    assert error(got[:22], expected) < FORWARD
    expected = 10.0 if variant == "released" else np.exp(clip.logit_scale[...])
    np.testing.assert_allclose(method.scale(), expected, rtol=1e-6)


def test_ablations_leave_their_parts_out(mini) -> None:
    def parts(**fields) -> set[str]:
        method = build(mini, **fields)[0]
        return {path.split("/")[0] for path in take_apart(method).trainable} - {"clip"}

    assert parts() == {"meta", "gcn"}
    assert parts(variant="paper") == {"meta", "gcn", "group_gcn"}
    assert parts(variant="paper", label_graph=False) == {"meta", "group_gcn"}
    assert parts(group_graph=False, label_graph=False) == {"meta"}
    assert parts(prompt="shared", variant="paper") == {"context", "gcn"}


def test_shared_prompt_is_coop_with_the_label_graph(mini) -> None:
    ours, space, tokenizer = build(mini, prompt="shared")
    coop, _, _ = build(mini, "coop", n_ctx=4, label_graph=True)
    coop.context.vectors[...] = ours.context.vectors[...]
    coop.gcn = ours.gcn
    features = [m.encode_labels(m.label_inputs(space, tokenizer)) for m in (ours, coop)]
    assert error(*features) < FORWARD


def test_clusters_stand_for_themselves(mini) -> None:
    """Groups without names are the mean of their labels' features."""
    space = catalog.scenes()
    own = space.taxonomy
    clusters = replace(space, taxonomy=Taxonomy(("1", "2", "3"), own.group_of, named=False))
    method, _, tokenizer = build(mini, space=clusters)
    got = method.label_inputs(clusters, tokenizer).group_features
    texts = [f"a photo of a {name}." for name in space.names]
    features = np.asarray(method.clip.encode_text(jnp.array(tokenizer(texts))))
    expected = np.stack([features[list(own.members(g))].mean(0) for g in range(3)])
    assert error(got, expected) < FORWARD
    named = method.label_inputs(space, tokenizer).group_features
    assert error(named, expected) > 0.1


def test_labels_without_groups_are_refused(mini) -> None:
    method, space, tokenizer = build(mini)
    with pytest.raises(UserError, match=r"config\.data\.taxonomy"):
        method.label_inputs(replace(space, taxonomy=None), tokenizer)
    with pytest.raises(UserError, match="n_ctx"):
        build(mini, n_ctx=0)


def test_a_group_context_is_encoded_once(mini) -> None:
    """Against a context for each class, which every class encodes for itself."""

    def flops(name: str, **fields) -> float:
        method, space, tokenizer = build(mini, name, n_ctx=32, **fields)
        labels = method.label_inputs(space, tokenizer)
        return jax.jit(method.encode_labels).lower(labels).compile().cost_analysis()["flops"]

    ours = flops("hspnet", group_graph=False, label_graph=False)
    assert ours < 0.4 * flops("coop", class_specific=True)
