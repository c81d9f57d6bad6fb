"""ViTs of ImageNet: values and gradients of an independent reference, files of both kinds, errors.

With the parity extra also transformers' own ViTModel.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from references.plain_vit import hf_state, states, timm_state
from safetensors.numpy import save_file

from mlclip_jax.clip import ViTConfig
from mlclip_jax.clip.layouts import row_of
from mlclip_jax.clip.plain_vit import plain_config, read_plain
from mlclip_jax.clip.positions import interpolate_positions
from mlclip_jax.clip.vit import VisionTransformer
from mlclip_jax.errors import UserError

SIZES = ViTConfig(32, 8, width=24, layers=2, heads=3, mlp_width=40)


def make_tower(sizes: ViTConfig = SIZES) -> VisionTransformer:
    return VisionTransformer(plain_config(sizes), 16, rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def tower() -> VisionTransformer:
    return make_tower()


@pytest.fixture(scope="module")
def state() -> dict[str, np.ndarray]:
    return timm_state(SIZES)


def paths_of(tower: VisionTransformer) -> dict[str, tuple]:
    return {"/".join(map(str, p)): p for p, _ in nnx.to_flat_state(nnx.state(tower))}


def filled(tower: VisionTransformer, found: dict, dtype=jnp.float32) -> VisionTransformer:
    """The tower with these values, in another dtype."""
    graphdef, start = nnx.split(tower)
    flat = [
        (path, v.replace(jnp.asarray(found.get("/".join(map(str, path)), v.get_value()), dtype)))
        for path, v in nnx.to_flat_state(start)
    ]
    return nnx.merge(graphdef, nnx.from_flat_state(flat))


def hidden(tower: VisionTransformer, images: jax.Array) -> jax.Array:
    return tower.hidden_states(tower.lower(images, 0), 0)


def same(got, expected, bar: float) -> None:
    got, expected = np.asarray(got), np.asarray(expected)
    assert got.shape == expected.shape and np.abs(expected).max() > 0
    assert np.abs(got - expected).max() <= bar * np.abs(expected).max()


def test_values_and_gradients_equal_the_reference(tower, state, tmp_path) -> None:
    """In float64; JAX's attention takes its softmax in float32, hence the bars."""
    save_file(state, str(tmp_path / "vit.safetensors"))
    found = read_plain(tmp_path / "vit.safetensors", tower)
    assert found.keys() == paths_of(tower).keys() - {"projection"}
    assert all(value.dtype == np.float32 for value in found.values())
    with jax.enable_x64(True):
        rng = np.random.default_rng(1)
        images, weights = rng.normal(size=(2, 32, 32, 3)), rng.normal(size=(2, 17, 24))
        double = filled(tower, found, jnp.float64)
        theirs = {k: jnp.asarray(v, jnp.float64) for k, v in state.items() if "head" not in k}
        expected = states(theirs, jnp.asarray(images), SIZES)
        same(hidden(double, jnp.asarray(images)), expected, 1e-6)
        pooled = double(jnp.asarray(images)).pooled
        same(pooled, expected[:, 0] @ double.projection[...], 1e-6)

        graphdef, values = nnx.split(double)
        gradients = jax.grad(
            lambda v: (hidden(nnx.merge(graphdef, v), jnp.asarray(images)) * weights).sum()
        )(nnx.to_pure_dict(values))
        reference = jax.grad(lambda s: (states(s, jnp.asarray(images), SIZES) * weights).sum())
        wanted = reference(theirs)
        for name, path in paths_of(tower).items():
            if name == "projection":
                continue
            leaf = gradients
            for part in path:
                leaf = leaf[part]
            (theirs_name,), transform = row_of("timm_vit", f"image/{name}")
            (got,) = transform.save(np.asarray(leaf))
            same(got, wanted[theirs_name], 1e-5)


@pytest.mark.parametrize("form", ["npz", "folder", "hf", "hf_classifier"])
def test_files_of_all_kinds(tower, state, tmp_path, form) -> None:
    save_file(state, str(tmp_path / "plain.safetensors"))
    expected = read_plain(tmp_path / "plain.safetensors", tower)
    path = tmp_path / "other"
    path.mkdir()
    if form == "npz":
        path = path / "vit.npz"
        np.savez(path, **state)
    else:
        prefix = "vit." if form == "hf_classifier" else ""
        named = state if form == "folder" else hf_state(state, prefix)
        if prefix:
            named["classifier.weight"] = np.zeros((10, 24), np.float32)
        named = {name: np.ascontiguousarray(array) for name, array in named.items()}
        save_file(named, str(path / "model.safetensors"))
        (path / "config.json").write_text("{}")
    found = read_plain(path, tower)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value)


def test_positions_of_another_image_size(state, tmp_path) -> None:
    save_file(state, str(tmp_path / "vit.safetensors"))
    larger = make_tower(ViTConfig(48, 8, width=24, layers=2, heads=3, mlp_width=40))
    found = read_plain(tmp_path / "vit.safetensors", larger)
    expected = interpolate_positions(state["pos_embed"][0], (6, 6))
    np.testing.assert_array_equal(found["position_embedding"], expected)
    assert found["position_embedding"].shape == larger.position_embedding.shape


def test_wrong_files_are_named(tower, state, tmp_path) -> None:
    def message(path) -> str:
        with pytest.raises(UserError) as caught:
            read_plain(path, tower)
        return str(caught.value)

    assert "there is no file" in message(tmp_path / "vit.npz")
    assert "holds none: give the file's path" in message(tmp_path)
    (tmp_path / "vit.pth").write_bytes(b"")
    assert "safetensors.torch.save_file" in message(tmp_path / "vit.pth")
    for name in ("vit.npz", "vit.safetensors"):
        (tmp_path / name).write_bytes(b"nothing")
        assert "cannot be read" in message(tmp_path / name)
    assert "holds vit.npz, vit.safetensors" in message(tmp_path)
    np.savez(tmp_path / "vit.npz", conv1=np.zeros(3))
    assert "timm's or Hugging Face's names (its keys begin with conv1)" in message(
        tmp_path / "vit.npz"
    )
    np.savez(tmp_path / "vit.npz", cls_token=np.array([{}], object))
    assert "cannot be read as .npz" in message(tmp_path / "vit.npz")
    wrong = {k: v for k, v in state.items() if k != "norm.bias"}
    wrong |= {"dist_token": state["cls_token"], "norm.weight": np.ones(25, np.float32)}
    wrong["pos_embed"] = state["pos_embed"][:, :13]
    save_file({k: np.ascontiguousarray(v) for k, v in wrong.items()}, tmp_path / "vit.safetensors")
    lines = message(tmp_path / "vit.safetensors").splitlines()
    assert "read as a ViT of the backbone's sizes" in lines[0]
    assert lines[1:] == [
        "  missing     norm.bias [24]",
        "  unexpected  dist_token [1, 1, 24]",
        "  mismatched  norm.weight [25], the configuration says [24]",
        "  mismatched  pos_embed [1, 13, 24], the configuration says [1, 17, 24]",
    ]


@pytest.mark.parity
def test_equals_transformers(tower, tmp_path) -> None:
    import torch
    from transformers import ViTConfig as TheirConfig
    from transformers import ViTModel

    torch.manual_seed(0)
    config = TheirConfig(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=40,
        image_size=32, patch_size=8, layer_norm_eps=1e-6, initializer_range=0.2,
    )  # fmt: skip
    theirs = ViTModel(config).eval()
    for parameter in theirs.parameters():
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, 1, 0.2)
    theirs.save_pretrained(tmp_path)
    ours = filled(tower, read_plain(tmp_path, tower))
    images = np.random.default_rng(2).normal(size=(2, 32, 32, 3)).astype(np.float32)
    with torch.no_grad():
        expected = theirs(torch.from_numpy(images.transpose(0, 3, 1, 2).copy())).last_hidden_state
    same(hidden(ours, jnp.asarray(images)), expected.numpy(), 2e-5)
