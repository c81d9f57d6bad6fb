"""Decoders: goldens of ADDS and ML-Decoder, a float64 reference of Query2Label."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from references import decoders as reference

from mlclip_jax import losses
from mlclip_jax.errors import UserError
from mlclip_jax.modules import decoders

GOLDEN = Path(__file__).parents[1] / "golden"
SIZES = {"heads": 8, "hidden": 96, "dropout": 0.1, "remat": False}
ALL = jnp.ones(5, bool)


@pytest.fixture(autouse=True)
def double_precision():
    with jax.enable_x64(True):
        yield


def load(name: str) -> dict[str, np.ndarray]:
    with np.load(GOLDEN / f"{name}.npz") as file:
        return dict(file)


def double(module: nnx.Module) -> nnx.Module:
    nnx.update(module, jax.tree.map(lambda x: x.astype(jnp.float64), nnx.state(module)))
    return module


def fill(layer: nnx.Module, weight: np.ndarray, bias: np.ndarray) -> None:
    """A linear layer's or a norm's values, from torch's."""
    kernel = layer.scale if isinstance(layer, decoders.LayerNorm) else layer.kernel
    kernel[...] = jnp.asarray(weight.T, jnp.float64)
    layer.bias[...] = jnp.asarray(bias, jnp.float64)


def fill_attention(attention: decoders.CrossAttention, arrays: dict, prefix: str) -> None:
    own = {key.removeprefix(prefix): value for key, value in arrays.items()}
    fill(attention.packed, own["in_proj_weight"], own["in_proj_bias"])
    fill(attention.out, own["out_proj.weight"], own["out_proj.bias"])


def fill_layer(layer: nnx.Module, arrays: dict, prefix: str, names: dict[str, str]) -> None:
    """By our name: theirs, of linear layers and norms ("norms/0")."""
    for ours, theirs in names.items():
        part, _, number = ours.partition("/")
        target = getattr(layer, part)
        target = target[int(number)] if number else target
        fill(target, arrays[f"{prefix}{theirs}.weight"], arrays[f"{prefix}{theirs}.bias"])


ADDS = {
    "up": "ffn2", "down": "ffn1", "norms/0": "norm_q1", "norms/1": "norm_q3", "norms/2": "norm_q5",
    "norms/3": "norm_qout",
}  # fmt: skip
ML = {
    "up": "linear1",
    "down": "linear2",
    "norms/0": "norm1",
    "norms/1": "norm2",
    "norms/2": "norm3",
}


def dual_modal(arrays: dict, layers: int) -> decoders.DualModalDecoder:
    """The golden's first layers."""
    made = decoders.DualModalDecoder(64, layers=layers, **SIZES, rngs=nnx.Rngs(0))
    double(made)
    for number, layer in enumerate(made.layers):
        prefix = f"layer{number}/"
        last = number == layers - 1
        fill_layer(layer, arrays, prefix, ADDS if last else ADDS | {"norms/4": "norm_v"})
        fill_attention(layer.attention, arrays, f"{prefix}attn1.")
        if not last:
            fill_attention(layer.attention2, arrays, f"{prefix}attn2.")
    return made


def ml_decoder(arrays: dict, kind: str) -> decoders.MLDecoder:
    made = double(decoders.MLDecoder(64, layers=1, **SIZES, rngs=nnx.Rngs(0)))
    prefix = f"{kind}/decoder.layers.0."
    fill_layer(made.layers[0], arrays, prefix, ML)
    fill_attention(made.layers[0].attention, arrays, f"{prefix}multihead_attn.")
    return made


def linear(arrays: dict, name: str) -> decoders.Linear:
    weight = arrays[f"{name}.weight"]
    made = double(decoders.torch_linear(weight.shape[1], weight.shape[0], rngs=nnx.Rngs(0)))
    fill(made, weight, arrays[f"{name}.bias"])
    return made


def same(got, expected, bar: float = 1e-6) -> None:
    """max |a - b| / max |b|; JAX's attention takes its softmax in float32."""
    got, expected = np.asarray(got), np.asarray(expected, np.float64)
    assert got.shape == expected.shape and np.abs(expected).max() > 0
    assert np.abs(got - expected).max() <= bar * np.abs(expected).max()


@pytest.mark.parametrize(("layers", "name"), [(1, "L1"), (3, "L3_chain")])
def test_dual_modal_decoder_equals_golden(layers, name):
    arrays = load("adds")
    q, v = jnp.asarray(arrays["in/text_queries"])[None], jnp.asarray(arrays["in/visual_tokens"])
    decoder = dual_modal(arrays, layers)
    answers = decoder(q.astype(jnp.float64), v.astype(jnp.float64), ALL)
    same(answers, arrays[f"out/{name}/Q_out"])
    projection = double(decoders.SharedProjection(64, rngs=nnx.Rngs(0)))
    fill(projection.linear, arrays["fc.weight"], arrays["fc.bias"])
    same(projection(answers), arrays[f"out/{name}/logits"])


def test_dual_modal_gradients_equal_golden():
    arrays = load("adds")
    q, v = (jnp.asarray(arrays[f"in/{k}"], jnp.float64) for k in ("text_queries", "visual_tokens"))
    projection = double(decoders.SharedProjection(64, rngs=nnx.Rngs(0)))
    fill(projection.linear, arrays["fc.weight"], arrays["fc.bias"])
    graphdef, state = nnx.split((dual_modal(arrays, 3), projection))

    def loss(state):
        decoder, projection = nnx.merge(graphdef, state)
        logits = projection(decoder(q[None], v, ALL))
        return losses.asymmetric(logits, jnp.asarray(arrays["in/labels"], jnp.int8) * 2 - 1)

    value, gradients = jax.jit(jax.value_and_grad(loss))(state)
    same(value, arrays["out/L3_chain/loss_asl_gn4_gp0_c05"])
    of_decoder, of_projection = nnx.merge(graphdef, gradients)
    same(of_projection.linear.kernel[...].T, arrays["grad_chain/fc.weight"], 1e-5)
    for number, layer in enumerate(of_decoder.layers):
        found = {
            "attn1.in_proj_bias": layer.attention.packed.bias,
            "ffn2.bias": layer.up.bias,
            "norm_q1.weight": layer.norms[0].scale,
            "norm_qout.weight": layer.norms[3].scale,
        }
        if layer.attention2 is not None:
            found |= {
                "attn2.out_proj.bias": layer.attention2.out.bias,
                "norm_v.weight": layer.norms[4].scale,
            }
        for name, value in found.items():
            same(value[...], arrays[f"grad_chain/layer{number}/{name}"], 1e-5)


def test_ml_decoder_equals_release():
    arrays = load("ml_decoder")
    tokens = jnp.asarray(arrays["in/features_nchw"], jnp.float64).reshape(2, 48, 12).swapaxes(1, 2)
    decoder, projection = ml_decoder(arrays, "zsl"), decoders.SharedProjection(64, rngs=nnx.Rngs(0))
    weight = arrays["zsl/decoder.duplicate_pooling"]
    fill(projection.linear, weight.T, arrays["zsl/decoder.duplicate_pooling_bias"])
    parts = {
        "decoder": decoder,
        "projection": projection,
        "embed": linear(arrays, "zsl/decoder.embed_standart"),
        "words": linear(arrays, "zsl/wordvec_proj"),
    }
    graphdef, state = nnx.split(nnx.Dict(parts))

    def logits(state, words):
        m = nnx.merge(graphdef, state)
        q, u = jax.nn.relu(m["words"](words)), jax.nn.relu(m["embed"](tokens))
        return m["projection"](m["decoder"](q[None], u, jnp.ones(len(words), bool)))

    seen, unseen = (
        jnp.asarray(arrays[f"zsl/query_wordvecs{which}"], jnp.float64) for which in ("", "_unseen")
    )
    same(logits(state, seen), arrays["zsl/logits"])
    same(logits(state, unseen), arrays["zsl/logits_unseen"])

    def loss(state):
        targets = jnp.asarray(arrays["zsl/labels"], jnp.int8) * 2 - 1
        return losses.asymmetric(logits(state, seen), targets)

    value, gradients = jax.value_and_grad(loss)(state)
    same(value, arrays["zsl/loss_asl"])
    m = nnx.merge(graphdef, gradients)
    layer, prefix = m["decoder"].layers[0], "zsl_grad/decoder."
    same(m["projection"].linear.kernel[...], arrays[f"{prefix}duplicate_pooling"], 1e-5)
    same(m["embed"].bias[...], arrays[f"{prefix}embed_standart.bias"], 1e-5)
    same(m["words"].kernel[...].T, arrays["zsl_grad/wordvec_proj.weight"], 1e-5)
    for name, value in {
        "norm1.weight": layer.norms[0].scale,
        "norm2.bias": layer.norms[1].bias,
        "norm3.weight": layer.norms[2].scale,
        "multihead_attn.in_proj_bias": layer.attention.packed.bias,
        "multihead_attn.out_proj.bias": layer.attention.out.bias,
        "linear1.bias": layer.up.bias,
        "linear2.bias": layer.down.bias,
    }.items():
        same(value[...], arrays[f"{prefix}layers.0.{name}"], 1e-5)


def test_group_queries_equal_release():
    arrays = load("ml_decoder")
    tokens = jnp.asarray(arrays["in/features_nchw"], jnp.float64).reshape(2, 48, 12).swapaxes(1, 2)
    projection = double(decoders.GroupProjection(4, 64, 11, rngs=nnx.Rngs(0)))
    assert projection.kernel.shape == arrays["group/decoder.duplicate_pooling"].shape
    projection.kernel[...] = jnp.asarray(arrays["group/decoder.duplicate_pooling"], jnp.float64)
    projection.bias[...] = jnp.asarray(arrays["group/decoder.duplicate_pooling_bias"], jnp.float64)
    u = jax.nn.relu(linear(arrays, "group/decoder.embed_standart")(tokens))
    q = jnp.asarray(arrays["group/decoder.query_embed.weight"], jnp.float64)
    answers = ml_decoder(arrays, "group")(q[None], u, jnp.ones(4, bool))
    same(projection(answers), arrays["group/logits"])


def torch_names(layer: nnx.Module, names: dict[str, str], attentions: dict[str, str]) -> dict:
    """A layer's values by torch's names, as references take them."""
    found = {}
    for ours, theirs in names.items():
        part, _, number = ours.partition("/")
        module = getattr(layer, part)
        module = module[int(number)] if number else module
        kernel = module.scale if isinstance(module, decoders.LayerNorm) else module.kernel
        found[f"{theirs}.weight"] = np.asarray(kernel[...]).T
        found[f"{theirs}.bias"] = np.asarray(module.bias[...])
    for ours, theirs in attentions.items():
        module = getattr(layer, ours)
        found[f"{theirs}.in_proj_weight"] = np.asarray(module.packed.kernel[...]).T
        found[f"{theirs}.in_proj_bias"] = np.asarray(module.packed.bias[...])
        found[f"{theirs}.out_proj.weight"] = np.asarray(module.out.kernel[...]).T
        found[f"{theirs}.out_proj.bias"] = np.asarray(module.out.bias[...])
    return found


def random(module: nnx.Module, seed: int) -> nnx.Module:
    """Every value away from its start, norms and biases too."""
    rng = np.random.default_rng(seed)
    state = nnx.state(module)
    nnx.update(module, jax.tree.map(lambda x: x + 0.2 * rng.normal(size=x.shape), double(state)))
    return module


@pytest.mark.parametrize("self_attention", [False, True])
def test_query2label_equals_reference(self_attention):
    width, c, grid, rng = 16, 5, 3, np.random.default_rng(0)
    sizes = {"heads": 2, "hidden": 24, "dropout": 0.1}
    encoder = random(decoders.EncoderLayer(width, **sizes, rngs=nnx.Rngs(0)), 1)
    decoder = random(
        decoders.StandardDecoder(
            width, layers=2, remat=False, self_attention=self_attention, **sizes, rngs=nnx.Rngs(1)
        ),
        2,
    )
    projection = random(decoders.GroupProjection(c, width, c, rngs=nnx.Rngs(2)), 3)
    tokens, queries = rng.normal(size=(2, grid**2, width)), rng.normal(size=(c, width))
    positions = decoders.sine_positions(grid, width)
    expected = reference.sine_positions(grid, grid, width)
    np.testing.assert_allclose(positions, expected, atol=1e-7)
    memory = encoder(jnp.asarray(tokens), jnp.asarray(expected), None)
    answers = decoder(
        jnp.asarray(queries)[None], memory, jnp.ones(c, bool), positions=jnp.asarray(expected)
    )
    got = projection(answers)
    ffn = {"up": "linear1", "down": "linear2"}
    norms = ["norm1"] * self_attention + ["norm2", "norm3"]
    attentions = {"attention": "multihead_attn"}
    attentions |= {"self_attention": "self_attn"} if self_attention else {}
    in_decoder = ffn | {f"norms/{i}": name for i, name in enumerate(norms)}
    last = {"norm.weight": np.asarray(decoder.norm.scale[...])}
    for image, row in zip(tokens, np.asarray(got), strict=True):
        wanted = reference.query2label(
            image,
            expected,
            queries,
            [
                torch_names(
                    encoder,
                    ffn | {"norms/0": "norm1", "norms/1": "norm2"},
                    {"attention": "self_attn"},
                )
            ],
            [torch_names(layer, in_decoder, attentions) for layer in decoder.layers],
            {"weight": last["norm.weight"], "bias": np.asarray(decoder.norm.bias[...])},
            np.asarray(projection.kernel[...])[..., 0],
            np.asarray(projection.bias[...]),
            2,
            self_attention=self_attention,
        )
        same(row, wanted)


@pytest.mark.parametrize("self_attention", [None, True])
def test_padded_classes_are_not_seen(self_attention):
    """Neither by tokens (dual-modal) nor by other classes (standard with self-attention)."""
    rng = np.random.default_rng(0)
    q, v = jnp.asarray(rng.normal(size=(1, 5, 16))), jnp.asarray(rng.normal(size=(2, 7, 16)))
    sizes = {"layers": 3, "heads": 2, "hidden": 24, "dropout": 0.1, "remat": False}
    if self_attention:
        made = decoders.StandardDecoder(16, self_attention=True, **sizes, rngs=nnx.Rngs(0))
    else:
        made = decoders.DualModalDecoder(16, **sizes, rngs=nnx.Rngs(0))
    double(made)
    plain = made(q, v, ALL)
    padded = jnp.concatenate([q, 9 * jnp.ones((1, 3, 16))], axis=1)
    mask = jnp.arange(8) < 5
    same(made(padded, v, mask)[:, :5], plain)
    assert np.abs(np.asarray(made(padded, v, jnp.ones(8, bool))[:, :5] - plain)).max() > 1e-3


@pytest.mark.parametrize("kind", ["DualModalDecoder", "MLDecoder", "StandardDecoder"])
def test_dropout_and_recomputation(kind):
    """Dropout keeps the mean, differs by image and key, and is the same where recomputed."""
    rng = np.random.default_rng(0)
    q, v = jnp.asarray(rng.normal(size=(1, 5, 16))), jnp.asarray(rng.normal(size=(1, 7, 16)))
    v = jnp.repeat(v, 2, axis=0)
    sizes = {"layers": 2, "heads": 2, "hidden": 24, "dropout": 0.3}
    made, again = (
        double(getattr(decoders, kind)(16, remat=remat, **sizes, rngs=nnx.Rngs(0)))
        for remat in (False, True)
    )
    key = jax.random.key(3)
    dropped = np.asarray(made(q, v, ALL, key=key))
    assert np.abs(dropped[0] - dropped[1]).max() > 0.1
    assert np.abs(dropped - np.asarray(made(q, v, ALL, key=jax.random.key(4)))).max() > 0.1
    same(again(q, v, ALL, key=key), dropped)
    x = np.asarray(decoders.dropout(jnp.ones((2, 100, 200)), 0.3, key, 1))
    few = decoders.dropout(jnp.ones((2, 40, 200)), 0.3, key, 1)
    np.testing.assert_array_equal(few, x[:, :40])  # classes that only pad change nothing
    assert set(np.unique(x).round(6)) == {0.0, round(1 / 0.7, 6)} and abs(x.mean() - 1) < 0.02


def test_attention_is_told():
    rng = np.random.default_rng(0)
    q, v = jnp.asarray(rng.normal(size=(1, 5, 16))), jnp.asarray(rng.normal(size=(2, 7, 16)))
    made = double(decoders.CrossAttention(16, 2, rngs=nnx.Rngs(0)))
    watch: list = []
    mask = jnp.arange(7) < 6
    made(q, v, mask=mask, watch=watch)
    (found,) = watch
    assert found.shape == (2, 5, 7) and not np.asarray(found)[..., 6].any()
    np.testing.assert_allclose(found.sum(-1), 1, rtol=1e-6)
    kernel, bias = np.asarray(made.packed.kernel[...]), np.asarray(made.packed.bias[...])
    queries = (np.asarray(q[0]) @ kernel + bias)[:, :16].reshape(5, 2, 8)
    keys = (np.asarray(v[1]) @ kernel + bias)[:6, 16:32].reshape(6, 2, 8)
    scores = np.exp(np.einsum("che,the->hct", queries, keys) / np.sqrt(8))
    expected = (scores / scores.sum(-1, keepdims=True)).mean(0)
    np.testing.assert_allclose(found[1, :, :6], expected, rtol=1e-6)


def test_starting_values_are_torchs():
    made = decoders.CrossAttention(256, 8, rngs=nnx.Rngs(0))
    packed, out = np.asarray(made.packed.kernel[...]), np.asarray(made.out.kernel[...])
    assert (
        np.abs(packed).max() <= (6 / 1024) ** 0.5 and abs(packed.std() - (2 / 1024) ** 0.5) < 1e-3
    )
    assert np.abs(out).max() <= 1 / 16 and abs(out.std() - 1 / 16 / 3**0.5) < 1e-3
    assert not np.asarray(made.packed.bias[...]).any() and not np.asarray(made.out.bias[...]).any()
    linear = decoders.torch_linear(256, 64, rngs=nnx.Rngs(0))
    assert 0 < np.abs(np.asarray(linear.bias[...])).max() <= 1 / 16
    group = decoders.GroupProjection(100, 256, 312, rngs=nnx.Rngs(0))
    assert group.kernel.shape == (100, 256, 4) and group.bias.shape == (312,)
    assert abs(np.asarray(group.kernel[...]).std() - (2 / (356 * 4)) ** 0.5) < 1e-3


def test_wrong_sizes_are_named():
    with pytest.raises(UserError, match=r"method\.heads is 7 and does not divide the width 64"):
        decoders.CrossAttention(64, 7, rngs=nnx.Rngs(0))
    for made in (decoders.MLDecoder, decoders.StandardDecoder):
        with pytest.raises(UserError, match=r"method\.layers is 0"):
            made(64, layers=0, **SIZES, rngs=nnx.Rngs(0))
    for wrong in ({"dropout": 1.0}, {"dropout": -0.5}, {"hidden": 0}, {"heads": 0}, {"heads": -1}):
        ((name, value),) = wrong.items()
        with pytest.raises(UserError, match=rf"method\.{name} is {value}"):
            decoders.DualModalDecoder(64, layers=1, **SIZES | wrong, rngs=nnx.Rngs(0))
