"""Weights of others: every layout, every check, and the way back."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from mlclip_jax.clip import weights
from mlclip_jax.clip.arrays import expected_shapes
from mlclip_jax.clip.config import PRESETS
from mlclip_jax.clip.config_files import hugging_face_config, infer_config, open_clip_config
from mlclip_jax.clip.model import CLIP
from mlclip_jax.errors import UserError

ROOT = Path(__file__).parents[2]
FIXTURES = ROOT / "tests" / "fixtures" / "weights"
FOLDERS = ("hf", "hf_flax", "hf_sharded", "openai_vit", "openai_rn")
FORWARD = 2e-5
PUBLISHED = [name for name in PRESETS if name not in weights.MINIS]


def error(a, b) -> float:
    """max |a - b| / max |b|."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return np.abs(a - b).max() / np.abs(b).max()


def features(clip: CLIP, images, ids) -> tuple[np.ndarray, np.ndarray]:
    # One compilation is quicker than one for each operation.
    both = jax.jit(lambda images, ids: (clip.encode_images(images).pooled, clip.encode_text(ids)))
    image, text = both(jnp.asarray(images, jnp.float32), jnp.asarray(ids))
    return np.asarray(image), np.asarray(text)


def leaves(clip: CLIP) -> dict[str, np.ndarray]:
    flat = nnx.to_flat_state(nnx.state(clip))
    return {"/".join(map(str, path)): np.asarray(v.get_value()) for path, v in flat}


def assert_same_leaves(one: CLIP, two: CLIP) -> None:
    one, two = leaves(one), leaves(two)
    assert one.keys() == two.keys()
    for path, leaf in one.items():
        np.testing.assert_array_equal(leaf, two[path], err_msg=path)


@pytest.fixture(scope="module")
def loaded() -> dict[str, CLIP]:
    return {name: weights.resolve(FIXTURES / name).load() for name in FOLDERS}


# --- loading ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FOLDERS)
def test_features_are_those_of_the_other_implementation(loaded, name):
    expected = np.load(FIXTURES / name / "expected.npz")
    image, text = features(loaded[name], expected["images"], expected["ids"])
    assert error(image, expected["image"]) <= FORWARD
    assert error(text, expected["text"]) <= FORWARD


@pytest.mark.parametrize("name", FOLDERS)
def test_parameters_are_float32_whatever_is_stored(loaded, name):
    assert {leaf.dtype for leaf in leaves(loaded[name]).values()} == {np.dtype(np.float32)}


def test_stored_dtypes_of_the_fixtures():
    import ml_dtypes

    shard = sorted((FIXTURES / "hf_sharded").glob("*.safetensors"))[0]
    assert {a.dtype for a in load_file(shard).values()} == {np.dtype(ml_dtypes.bfloat16)}
    half = load_file(FIXTURES / "openai_rn" / "open_clip_model.safetensors")
    assert half["visual.conv1.weight"].dtype == np.float16


def test_flax_and_torch_layouts_agree(loaded):
    assert_same_leaves(loaded["hf"], loaded["hf_flax"])


def test_configuration_comes_from_the_files():
    checkpoints = {name: weights.resolve(FIXTURES / name) for name in FOLDERS}
    assert {n: c.layout for n, c in checkpoints.items()} == {
        "hf": "hf",
        "hf_flax": "hf_flax",
        "hf_sharded": "hf",
        "openai_vit": "openai",
        "openai_rn": "openai",
    }
    hf, sharded = checkpoints["hf"].config, checkpoints["hf_sharded"].config
    assert (hf.text.eot_id, hf.text.activation, hf.text.norm_eps) == (None, "quick_gelu", 1e-5)
    assert (sharded.text.eot_id, sharded.image.activation) == (50, "gelu")
    assert sharded.image.norm_eps == 1e-3
    assert (hf.text.heads, hf.image.heads, hf.image.mlp_width) == (4, 2, 64)
    resnet = checkpoints["openai_rn"].config
    assert (resnet.image.layers, resnet.image.heads) == ((1, 2, 1, 1), 4)
    for checkpoint in checkpoints.values():
        assert checkpoint.config.image_mean == (0.5, 0.45, 0.4)
        assert checkpoint.config.image_std == (0.25, 0.3, 0.35)


def test_both_rules_for_the_end_of_text_matter():
    # Larger ids than the end of text come first, and one row ends twice.
    expected = np.load(FIXTURES / "hf_sharded" / "expected.npz")
    ids = expected["ids"]
    assert (ids.argmax(1) != (ids == 50).argmax(1)).all()
    assert ((ids == 50).sum(1) == [1, 1, 1, 2]).all()
    checkpoint = weights.resolve(FIXTURES / "hf_sharded")
    state = weights.to_state_dict(checkpoint.load(), "hf")
    config = replace(checkpoint.config, text=replace(checkpoint.config.text, eot_id=None))
    by_largest = weights.from_state_dict(state, config, layout="hf")
    assert error(features(by_largest, expected["images"], ids)[1], expected["text"]) > 0.1


def test_bfloat16_compute_keeps_float32_parameters():
    clip = weights.resolve(FIXTURES / "hf").load(dtype=jnp.bfloat16)
    expected = np.load(FIXTURES / "hf" / "expected.npz")
    assert {leaf.dtype for leaf in leaves(clip).values()} == {np.dtype(np.float32)}
    image, _ = features(clip, expected["images"], expected["ids"])
    assert 1e-4 < error(image, expected["image"]) < 5e-2


def test_other_image_sizes(loaded):
    clip = weights.resolve(FIXTURES / "hf").load(image_size=48)
    assert clip.config.image.image_size == 48
    table = clip.image.position_embedding[...]
    assert table.shape == (37, 32)
    np.testing.assert_array_equal(table[0], loaded["hf"].image.position_embedding[...][0])
    shapes = jax.eval_shape(clip.encode_images, jnp.zeros((1, 48, 48, 3)))
    assert shapes.pooled.shape == (1, 24)

    resnet = weights.resolve(FIXTURES / "openai_rn").load(image_size=96)
    assert resnet.image.attention_pool.position_embedding.shape == (10, 128)
    shapes = jax.eval_shape(resnet.encode_images, jnp.zeros((1, 96, 96, 3)))
    assert shapes.pooled.shape == (1, 24)
    with pytest.raises(UserError, match="50"):
        weights.resolve(FIXTURES / "hf").load(image_size=50)


def test_digest(tmp_path):
    path = FIXTURES / "hf" / "model.safetensors"
    assert weights.resolve(path.parent).digest() == hashlib.sha256(path.read_bytes()).hexdigest()
    shutil.copytree(FIXTURES / "hf_sharded", tmp_path / "copy")
    original = weights.resolve(FIXTURES / "hf_sharded").digest()
    assert weights.resolve(tmp_path / "copy").digest() == original
    shard = sorted((tmp_path / "copy").glob("*.safetensors"))[1]
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    assert weights.resolve(tmp_path / "copy").digest() != original


# --- what does not fit ------------------------------------------------------------------------


def test_every_difference_is_in_one_error(loaded, tmp_path):
    shutil.copytree(FIXTURES / "openai_rn", tmp_path / "rn")
    path = tmp_path / "rn" / "open_clip_model.safetensors"
    state = load_file(path)
    del state["ln_final.bias"], state["visual.layer2.1.bn2.running_var"]
    state["visual.extra.weight"] = np.zeros((3, 2), np.float32)
    state["logit_bias"] = np.zeros((), np.float32)
    state["text_projection"] = np.zeros((24, 25), np.float32)
    state["input_resolution"] = np.asarray(64)
    save_file(state, path)
    with pytest.raises(UserError) as caught:
        weights.resolve(tmp_path / "rn").load()
    message = str(caught.value)
    assert str(tmp_path / "rn") in message
    for line in (
        "missing     ln_final.bias [24]",
        "missing     visual.layer2.1.bn2.running_var [8]",
        "unexpected  logit_bias []",
        "unexpected  visual.extra.weight [3, 2]",
        "mismatched  text_projection [24, 25], the configuration says [24, 24]",
    ):
        assert f"  {line}" in message.splitlines()
    assert len(message.splitlines()) == 6


def test_each_packed_part_is_named(loaded):
    config = weights.resolve(FIXTURES / "hf").config
    state = weights.to_state_dict(loaded["hf"], "hf")
    del state["text_model.encoder.layers.1.self_attn.k_proj.weight"]
    with pytest.raises(UserError) as caught:
        weights.from_state_dict(state, config, layout="hf", source="a dictionary")
    lines = str(caught.value).splitlines()
    assert lines[0].startswith("a dictionary")
    assert lines[1:] == [
        "  missing     text_model.encoder.layers.1.self_attn.k_proj.weight [24, 24]"
    ]


@pytest.mark.parametrize("layout", ["hf", "hf_flax", "openai"])
def test_no_leaf_keeps_its_initial_value(loaded, layout):
    # Through each table and back: every leaf has a name, and no two leaves share one.
    state = weights.to_state_dict(loaded["openai_vit"], layout)
    config = weights.resolve(FIXTURES / "openai_vit").config
    again = weights.from_state_dict(state, config, layout=layout)
    assert_same_leaves(again, loaded["openai_vit"])


def test_resnet_has_no_hugging_face_form(loaded, tmp_path):
    with pytest.raises(UserError, match="no ResNet towers"):
        weights.save_hf(loaded["openai_rn"], tmp_path / "rn", tokenizer_from=None)
    assert not (tmp_path / "rn").exists()
    with pytest.raises(UserError, match="no place for image/"):
        weights.to_state_dict(loaded["openai_rn"], "hf")


# --- finding ----------------------------------------------------------------------------------


def test_names_that_are_nothing():
    with pytest.raises(UserError, match=r"no folder, no preset \(clip-mini.*'org/name'"):
        weights.resolve("ViT-B/31/x")
    with pytest.raises(UserError, match="no folder"):
        weights.resolve("./nowhere")


def test_hub_sources(monkeypatch):
    import huggingface_hub

    calls = []

    def snapshot(hub_id, *, revision, allow_patterns):
        calls.append((hub_id, revision, allow_patterns[-1]))
        return str(FIXTURES / ("hf_flax" if "flax_model*" in allow_patterns[-1] else "nothing"))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    checkpoint = weights.resolve("ViT-L/14-336", revision="v1")
    assert checkpoint.source == "ViT-L/14-336"
    assert checkpoint.layout == "hf_flax"
    assert {call[:2] for call in calls} == {("openai/clip-vit-large-patch14-336", "v1")}
    assert [call[2] for call in calls] == [
        "open_clip_model*.safetensors",
        "model*.safetensors",
        "flax_model*.msgpack",
    ]


def test_hub_failure_names_the_id_and_the_mend(monkeypatch):
    import huggingface_hub

    def snapshot(*args, **kwargs):
        raise ConnectionError("no network\nlong story")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    with pytest.raises(UserError) as caught:
        weights.resolve("someone/some-clip", revision="main")
    message = str(caught.value)
    assert "'someone/some-clip' at revision 'main'" in message
    assert "no network" in message
    assert "pass its path" in message
    assert "\n" not in message


def test_pickles_are_never_opened(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04N.")
    with pytest.raises(UserError, match=r"pytorch_model.bin.*never opened.*save_pretrained"):
        weights.resolve(tmp_path)


def test_folders_without_a_clip(tmp_path):
    with pytest.raises(UserError, match=r"looked for open_clip_model\.safetensors"):
        weights.resolve(tmp_path)
    save_file({"blocks.0.attn.qkv.weight": np.zeros((3, 1))}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"no CLIP.*blocks\.0\.attn\.qkv\.weight"):
        weights.resolve(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"not one")
    with pytest.raises(UserError, match="cannot be read"):
        weights.resolve(tmp_path)


def test_missing_shard_and_configuration(tmp_path):
    shutil.copytree(FIXTURES / "hf_sharded", tmp_path / "copy")
    (tmp_path / "copy" / "config.json").rename(tmp_path / "config.json")
    with pytest.raises(UserError, match=r"no config\.json"):
        weights.resolve(tmp_path / "copy")
    (tmp_path / "copy" / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(UserError, match=r"model-00002-of-00003\.safetensors"):
        weights.resolve(tmp_path / "copy")


def test_whole_clip_is_preferred_to_the_image_tower_alone(tmp_path):
    # A timm folder: its model.safetensors and config.json are of timm's image model.
    shutil.copytree(FIXTURES / "openai_vit", tmp_path / "timm")
    save_file({"cls_token": np.zeros((1, 1, 8))}, tmp_path / "timm" / "model.safetensors")
    (tmp_path / "timm" / "config.json").write_text('{"architecture": "vit"}')
    assert weights.resolve(tmp_path / "timm").layout == "openai"


# --- configuration files ----------------------------------------------------------------------


def test_hugging_face_defaults_and_old_dictionaries(tmp_path):
    def read(**content):
        (tmp_path / "config.json").write_text(json.dumps(content))
        return hugging_face_config(tmp_path)

    bare = read(model_type="clip")
    assert bare.text.eot_id == 49407
    assert (bare.image, bare.embed_dim) == (PRESETS["ViT-B/32"].image, 512)
    released = read(text_config={"eos_token_id": 2}, vision_config={})
    assert released == PRESETS["ViT-B/32"]
    old = read(
        text_config={"hidden_size": 1, "eos_token_id": 2},
        text_config_dict={"hidden_size": 768},
        vision_config_dict=None,
    )
    assert (old.text.width, old.text.eot_id) == (768, 49407)
    with pytest.raises(UserError, match="'siglip'"):
        read(model_type="siglip")
    with pytest.raises(UserError, match="'gelu_new'"):
        read(vision_config={"hidden_act": "gelu_new"})


def test_open_clip_models_that_are_not_clip(tmp_path):
    path = tmp_path / "open_clip_config.json"
    model = {
        "embed_dim": 8,
        "custom_text": True,
        "vision_cfg": {"timm_model_name": "vit"},
        "text_cfg": {"no_causal_mask": True, "pool_type": "last"},
    }
    path.write_text(json.dumps({"model_cfg": model}))
    with pytest.raises(UserError) as caught:
        open_clip_config(path)
    for part in ("custom_text=True", "timm_model_name", "no_causal_mask", "pool_type='last'"):
        assert part in str(caught.value)
    path.write_text("[1]")
    with pytest.raises(UserError, match="no JSON object"):
        open_clip_config(path)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes_are_inferred_from_shapes(name):
    assert infer_config(expected_shapes(PRESETS[name], "openai")) == PRESETS[name]


def test_files_without_a_configuration(loaded, tmp_path):
    golden = np.load(ROOT / "tests" / "golden" / "clip_rn.npz")
    state = {name[3:]: golden[name] for name in golden if name.startswith("sd/")}
    save_file(state, tmp_path / "model.safetensors")
    checkpoint = weights.resolve(tmp_path)
    assert checkpoint.layout == "openai"
    _, text = features(checkpoint.load(), np.zeros((1, 64, 64, 3)), golden["in/tokens"])
    assert error(text, golden["out/text_features"]) <= FORWARD
    with pytest.raises(UserError, match="'text_projection' is not among"):
        infer_config({"visual.conv1.weight": (1, 1, 1, 1)})


# --- saving -----------------------------------------------------------------------------------


@pytest.mark.parametrize("save", [weights.save_hf, weights.save_openai])
@pytest.mark.parametrize("name", ["hf", "openai_vit"])
def test_saved_folders_load_again(loaded, tmp_path, save, name):
    save(loaded[name], tmp_path / "saved", tokenizer_from=None)
    checkpoint = weights.resolve(tmp_path / "saved")
    assert checkpoint.config == loaded[name].config
    assert_same_leaves(checkpoint.load(), loaded[name])
    assert not [p for p in (tmp_path / "saved").iterdir() if p.name.startswith(".")]


def test_saved_resnet_and_end_of_text(loaded, tmp_path):
    for name in ("openai_rn", "hf_sharded"):
        if name == "hf_sharded":  # exact GELU and its own end of text
            weights.save_hf(loaded[name], tmp_path / "hf", tokenizer_from=None)
            assert weights.resolve(tmp_path / "hf").config == loaded[name].config
        weights.save_openai(loaded[name], tmp_path / name, tokenizer_from=None)
        checkpoint = weights.resolve(tmp_path / name)
        assert checkpoint.config == loaded[name].config
        assert_same_leaves(checkpoint.load(), loaded[name])


@pytest.mark.parametrize("dtype", [np.float16, jnp.bfloat16])
def test_half_precision_storage(loaded, tmp_path, dtype):
    weights.save_openai(loaded["openai_vit"], tmp_path, tokenizer_from=None, dtype=dtype)
    assert weights.resolve(tmp_path).files[0].stat().st_size < 130_000
    again = leaves(weights.resolve(tmp_path).load())
    for path, leaf in leaves(loaded["openai_vit"]).items():
        np.testing.assert_array_equal(again[path], leaf.astype(dtype).astype(np.float32))


def test_tokenizer_files_travel(loaded, tmp_path):
    (tmp_path / "vocab.json").write_text("{}")
    (tmp_path / "merges.txt").write_text("")
    (tmp_path / "notes.txt").write_text("")
    weights.save_hf(loaded["hf"], tmp_path / "saved", tokenizer_from=tmp_path)
    names = {p.name for p in (tmp_path / "saved").iterdir()}
    assert names == {
        "config.json",
        "merges.txt",
        "model.safetensors",
        "preprocessor_config.json",
        "vocab.json",
    }
    with pytest.raises(UserError, match="no tokenizer"):
        weights.save_hf(loaded["hf"], tmp_path / "other", tokenizer_from=FIXTURES / "hf")


def test_a_tokenizer_of_another_model_is_refused(loaded, tmp_path):
    words = [*map(chr, range(33, 127)), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {word: i for i, word in enumerate(words)}
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    weights.save_hf(loaded["hf"], tmp_path / "saved", tokenizer_from=tmp_path)
    checkpoint = weights.resolve(tmp_path / "saved")
    assert checkpoint.config.text.vocab_size == 64
    with pytest.raises(UserError, match=r"has 96 tokens and the text tower only 64.*same place"):
        checkpoint.tokenizer()


def test_failed_writes_leave_the_old_file(loaded, tmp_path, monkeypatch):
    import safetensors.numpy

    weights.save_hf(loaded["hf"], tmp_path, tokenizer_from=None)
    before = (tmp_path / "model.safetensors").read_bytes()

    def full(tensors, path, metadata):
        Path(path).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(safetensors.numpy, "save_file", full)
    with pytest.raises(OSError, match="disk full"):
        weights.save_hf(loaded["openai_vit"], tmp_path, tokenizer_from=None)
    assert (tmp_path / "model.safetensors").read_bytes() == before
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


# --- the other implementations, live ----------------------------------------------------------


@pytest.fixture(scope="module")
def others():
    """scripts/make_weight_fixtures.py as a module."""
    spec = importlib.util.spec_from_file_location(
        "make_weight_fixtures", ROOT / "scripts" / "make_weight_fixtures.py"
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parity
@pytest.mark.parametrize("name", ["hf", "hf_sharded", "openai_vit", "openai_rn"])
def test_fixtures_are_what_the_script_makes(others, name):
    make = others.hugging_face if name.startswith("hf") else others.open_clip
    made = others.features(*make(name))
    recorded = np.load(FIXTURES / name / "expected.npz")
    for key in recorded:
        assert error(made[key], recorded[key]) <= 1e-6


@pytest.mark.parity
@pytest.mark.parametrize("name", ["hf", "openai_vit", "hf_sharded"])
def test_transformers_opens_what_we_save(loaded, others, tmp_path, name):
    from transformers import CLIPImageProcessor, CLIPModel

    weights.save_hf(loaded[name], tmp_path, tokenizer_from=None)
    model, report = CLIPModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    eot = 50 if name == "hf_sharded" else others.VOCAB - 1
    images, ids = others.inputs(32, eot, seed=11)
    theirs = others.features(model.eval(), images, ids)
    image, text = features(loaded[name], images, ids)
    assert error(image, theirs["image"]) <= FORWARD
    assert error(text, theirs["text"]) <= FORWARD
    processor = CLIPImageProcessor.from_pretrained(tmp_path)
    assert tuple(processor.image_mean) == loaded[name].config.image_mean


@pytest.mark.parity
@pytest.mark.parametrize("name", ["openai_rn", "hf", "hf_sharded"])
def test_open_clip_opens_what_we_save(loaded, others, tmp_path, name):
    from safetensors.torch import load_file as load_torch

    weights.save_openai(loaded[name], tmp_path, tokenizer_from=None)
    config = json.loads((tmp_path / "open_clip_config.json").read_text())["model_cfg"]
    model = others.import_open_clip().CLIP(**config)
    model.load_state_dict(load_torch(tmp_path / "open_clip_model.safetensors"), strict=True)
    eot = 50 if name == "hf_sharded" else others.VOCAB - 1
    size = loaded[name].config.image.image_size
    images, ids = others.inputs(size, eot, seed=12)
    theirs = others.features(model.eval(), images, ids)
    image, text = features(loaded[name], images, ids)
    assert error(image, theirs["image"]) <= FORWARD
    assert error(text, theirs["text"]) <= FORWARD


@pytest.mark.parity
@pytest.mark.parametrize("size", [24, 48, 72])
def test_other_image_sizes_equal_transformers(others, size):
    import torch

    model, _, ids = others.hugging_face("hf")
    images, _ = others.inputs(size, others.VOCAB - 1, seed=13)
    clip = weights.resolve(FIXTURES / "hf").load(image_size=size)
    pixels = torch.from_numpy(images.transpose(0, 3, 1, 2).astype(np.float32))
    with torch.no_grad():
        theirs = model.get_image_features(pixel_values=pixels, interpolate_pos_encoding=True)
    theirs = others.pooled(theirs).numpy()
    assert error(features(clip, images, ids)[0], theirs) <= FORWARD


@pytest.mark.parity
@pytest.mark.parametrize("name", PUBLISHED)
def test_full_size_names_and_shapes_equal_open_clip(others, name):
    import torch

    open_clip = others.import_open_clip()
    folder = Path(open_clip.__file__).parent / "model_configs"
    file = f"{name.replace('/', '-')}-quickgelu.json"
    if not (folder / file).is_file():
        file = f"{name.replace('/', '-')}.json"
    config = json.loads((folder / file).read_text())
    with torch.device("meta"):
        model = open_clip.CLIP(**{**config, "quick_gelu": True})
    theirs = {n: tuple(t.shape) for n, t in model.state_dict().items()}
    theirs = {n: s for n, s in theirs.items() if not n.endswith("num_batches_tracked")}
    assert expected_shapes(PRESETS[name], "openai") == theirs


@pytest.mark.parity
@pytest.mark.parametrize("name", [n for n in PUBLISHED if n.startswith("ViT")])
def test_full_size_names_and_shapes_equal_transformers(name):
    import torch
    from transformers import CLIPConfig, CLIPModel

    from mlclip_jax.clip.config_files import hugging_face_files

    config = CLIPConfig(**hugging_face_files(PRESETS[name])["config.json"])
    with torch.device("meta"):
        model = CLIPModel(config)
    theirs = {n: tuple(t.shape) for n, t in model.state_dict().items()}
    assert expected_shapes(PRESETS[name], "hf") == theirs
