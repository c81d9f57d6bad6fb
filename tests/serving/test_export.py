"""Classifiers: the logits of the method they were made of, the way to disk and back, the verb."""

from __future__ import annotations

import functools
import json
import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image
from safetensors.numpy import load_file, save_file

from mlclip_jax import cli, export, methods
from mlclip_jax.clip.weights import PRETRAINED, resolve
from mlclip_jax.data import registry
from mlclip_jax.data.scenes import Scenes
from mlclip_jax.errors import UserError
from mlclip_jax.evaluation.evaluator import predict_fn
from mlclip_jax.labels import catalog
from mlclip_jax.labels.space import LabelSpace
from mlclip_jax.methods.coop import CoOp, CoOpConfig
from mlclip_jax.serving import export as serving
from mlclip_jax.serving.export import Origin, fold, load, save
from mlclip_jax.serving.tagger import Tagger
from mlclip_jax.training.loop import fit

sys.path.insert(0, str(Path(__file__).parent))
from small_clip import write_clip

SPACE = catalog.scenes()


def origin(name: str) -> Origin:
    return Origin(name, "clip-mini-rn", "0" * 64, 7, "ema")


def perturbed(module: nnx.Module, seed: int = 0) -> nnx.Module:
    """Every leaf moved by a tenth of its spread: no gate, bias or statistic at its start."""
    rng = np.random.default_rng(seed)
    for _, variable in nnx.to_flat_state(nnx.state(module)):
        value = np.asarray(variable.get_value())
        noise = rng.uniform(-0.1, 0.1, value.shape) * (value.std() + 0.1 * np.abs(value).mean())
        variable[...] = jnp.asarray(np.where(value > 0, np.abs(value + noise), value + noise))
    return module


def build(spec: dict, backbone: str = "clip-mini-rn", dtype: str = "float32") -> tuple:
    checkpoint = resolve(backbone)
    encoder = checkpoint.tokenizer()
    clip = checkpoint.load(dtype=dtype)
    method = methods.build(spec, clip, space=SPACE, encoder=encoder, rngs=nnx.Rngs(0))
    return perturbed(method), encoder


@pytest.fixture(scope="module")
def images():
    scenes = Scenes("test", 5)
    return np.stack([scenes.image(i) for i in range(5)])


@functools.cache
def folded(case: str) -> tuple:
    """Method, encoder and classifier of one of `METHODS`."""
    spec = METHODS[case]
    method, encoder = build(spec)
    return method, encoder, fold(method, SPACE, encoder, origin(spec["name"]))


@pytest.fixture
def classifier():
    return folded("hspnet")[-1]


def predict(module, encoder, images, multiple_of=1):
    graphdef, state = nnx.split(module)
    predictor, state = predict_fn(graphdef), (nnx.to_pure_dict(state),)
    labels = module.label_inputs(SPACE, encoder, multiple_of=multiple_of)
    return np.asarray(
        predictor.logits(state, images, predictor.encode_labels(state, labels), labels)
    )


# --- folding ----------------------------------------------------------------------------------

METHODS = {
    "hspnet": {"name": "hspnet"},
    "paper": {"name": "hspnet", "variant": "paper", "prompt": "concat"},
    "coop": {"name": "coop", "n_ctx": 4, "logit_bias": True, "label_graph": True},
    "zero_shot": {"name": "zero_shot", "templates": ("a photo of a {}.", "art of the {}.")},
}


@pytest.mark.parametrize("case", METHODS)
def test_same_logits(case, images):
    method, encoder, made = folded(case)
    assert made.matrix.shape == (22, 64) and made.bias.shape == (22,)
    expected = predict(method, encoder, images, multiple_of=8)[:, :22]
    found = predict(made, None, images, multiple_of=8)
    assert found.shape == (5, 24) and found.dtype == np.float32
    assert np.abs(found[:, :22] - expected).max() < 2e-5 * np.abs(expected).max()
    np.testing.assert_array_equal(found[:, 22:], found[:, [0, 0]])  # padding repeats class 0


def test_matrix_is_scale_times_unit_label_features():
    method, encoder, made = folded("coop")
    features = np.asarray(
        jax.jit(method.encode_labels)(method.label_inputs(SPACE, encoder)), np.float64
    )
    scale = np.exp(float(method.clip.logit_scale[...]))
    expected = scale * features / np.linalg.norm(features, axis=1, keepdims=True)
    assert np.abs(made.matrix[...] - expected).max() < 2e-5 * np.abs(expected).max()
    np.testing.assert_allclose(made.bias[...], float(method.bias[...]), rtol=1e-6)
    assert float(method.bias[...]) != 0
    assert float(made.scale()) == pytest.approx(scale, rel=1e-5)


def test_bfloat16_stays_bfloat16(images, tmp_path):
    method, encoder = build({"name": "coop", "n_ctx": 2}, "clip-mini", "bfloat16")
    save(fold(method, SPACE, encoder, origin("coop")), tmp_path / "model")
    made = load(tmp_path / "model")
    assert made.dtype == jnp.bfloat16
    assert jax.eval_shape(made.encode_images, images).pooled.dtype == jnp.bfloat16
    expected = predict(method, encoder, images)
    assert np.abs(predict(made, None, images) - expected).max() < 2e-5 * np.abs(expected).max()


class SeesImages(CoOp):
    """Label features that the image moves, as in CoCoOp."""

    def encode_labels(self, labels, *, image_features=None, progress=None):
        features = super().encode_labels(labels)
        return features if image_features is None else features + image_features.pooled.mean(0)


class Bent(CoOp):
    """No cosine any more."""

    def logits(self, image_features, label_features, labels, *, progress=None):
        return jnp.tanh(super().logits(image_features, label_features, labels))


class Unscaled(CoOp):
    """Dot products: the length of the image feature counts."""

    def logits(self, image_features, label_features, labels, *, progress=None):
        return image_features.pooled @ label_features.T


class ReadsTokens(CoOp):
    """A head over patches."""

    reads_tokens = True


class OtherPixels(CoOp):
    """Something else than CLIP's own image feature."""

    def encode_images(self, images, *, progress=None):
        return super().encode_images(images[:, ::-1])


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (SeesImages, "label features depend on the image"),
        (Bent, "no cosines"),
        (Unscaled, "no cosines"),
        (ReadsTokens, "pooled feature"),
        (OtherPixels, "pooled feature"),
    ],
)
def test_what_is_no_cosine_is_refused(kind, reason):
    checkpoint = resolve("clip-mini")
    encoder = checkpoint.tokenizer()
    method = kind(
        CoOpConfig(n_ctx=2), checkpoint.load(), space=SPACE, encoder=encoder, rngs=nnx.Rngs(0)
    )
    with pytest.raises(UserError, match=f"odd does not fold.*{reason}"):
        fold(method, SPACE, encoder, origin("odd"))


# --- on disk ----------------------------------------------------------------------------------


def test_round_trip_is_exact(classifier, tmp_path):
    save(classifier, tmp_path / "models" / "one")
    found = load(tmp_path / "models" / "one")
    assert found.config == classifier.config and found.space == classifier.space
    before, after = (dict(nnx.to_flat_state(nnx.state(c))) for c in (classifier, found))
    assert before.keys() == after.keys()
    for path, variable in before.items():
        assert type(variable) is type(after[path])
        np.testing.assert_array_equal(variable.get_value(), after[path].get_value())
    files = sorted(path.name for path in (tmp_path / "models" / "one").iterdir())
    assert files == ["classifier.json", "model.safetensors"]
    assert [path.name for path in (tmp_path / "models").iterdir()] == ["one"]
    names = load_file(tmp_path / "models" / "one" / "model.safetensors")
    assert {name.split("/")[0] for name in names} == {"image", "matrix", "bias"}
    assert "image/layer1/0/bn1/var" in names
    described = json.loads((tmp_path / "models" / "one" / "classifier.json").read_text())
    assert described["config"]["origin"] == {
        "method": "hspnet", "backbone": "clip-mini-rn", "digest": "0" * 64, "step": 7,
        "weights": "ema", "version": "0.1.0",
    }  # fmt: skip
    assert described["labels"]["names"] == list(SPACE.names)


def test_an_existing_folder_is_left_alone(classifier, tmp_path):
    (tmp_path / "mine").mkdir()
    with pytest.raises(UserError, match="mine exists already"):
        save(classifier, tmp_path / "mine")
    assert not list((tmp_path / "mine").iterdir())


def test_nothing_half_written_stays(classifier, tmp_path, monkeypatch):
    monkeypatch.setattr(serving.json, "dumps", lambda *a, **k: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save(classifier, tmp_path / "model")
    assert not list(tmp_path.iterdir())


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def edit_weights(path: Path, **changes) -> None:
    save_file(load_file(path) | changes, path)


def edit_description(path: Path, change) -> None:
    described = json.loads(path.read_text())
    change(described)
    path.write_text(json.dumps(described))


@pytest.mark.parametrize(
    ("name", "damage", "words"),
    [
        ("classifier.json", Path.unlink, "holds no classifier"),
        ("classifier.json", cut, "cannot be read as JSON"),
        ("classifier.json", lambda p: edit_description(p, lambda d: d.pop("labels")), "'labels'"),
        (
            "classifier.json",
            lambda p: edit_description(p, lambda d: d.update(format="other")),
            "'format' must be one of 'mlclip_jax classifier 1', not 'other'",
        ),
        (
            "classifier.json",
            lambda p: edit_description(p, lambda d: d["labels"].update(names=["cat", "cat"])),
            "more than once",
        ),
        (
            "classifier.json",
            lambda p: edit_description(p, lambda d: d["config"]["image"].update(layers=[1, 1])),
            "config.image",
        ),
        ("model.safetensors", Path.unlink, "model.safetensors"),
        ("model.safetensors", cut, "model.safetensors cannot be read"),
        (
            "model.safetensors",
            lambda p: edit_weights(p, bias=np.zeros(21, np.float32), more=np.zeros(2, np.float32)),
            r"unexpected  more \[2\]\n  mismatched  bias \[21\], the configuration says \[22\]",
        ),
        (
            "model.safetensors",
            lambda p: p.write_bytes(
                (PRETRAINED / "clip-mini-rn" / "open_clip_model.safetensors").read_bytes()
            ),
            r"missing     matrix \[22 64\]".replace(" 64", ", 64"),
        ),
    ],
)
def test_damage_is_one_clear_error(classifier, tmp_path, name, damage, words):
    save(classifier, tmp_path / "model")
    damage(tmp_path / "model" / name)
    with pytest.raises(UserError, match=words) as caught:
        load(tmp_path / "model")
    assert str(tmp_path / "model") in str(caught.value)


def test_a_classifier_has_its_own_labels(classifier):
    with pytest.raises(UserError, match=r"knows the 22 labels .* not the 2 of 'mine'"):
        classifier.label_inputs(LabelSpace(("cat", "dog"), name="mine"))
    with pytest.raises(UserError, match="in their order"):
        classifier.label_inputs(SPACE.select(range(21, -1, -1)))


# --- tagging and the verb ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return write_clip(tmp_path_factory.mktemp("clip"))


def test_zero_shot_scores_keep_their_meaning(clip, tmp_path):
    labels = LabelSpace(("cat", "dog", "red car"))
    checkpoint = resolve(clip)
    encoder = checkpoint.tokenizer()
    method = methods.build(
        {"name": "zero_shot"}, checkpoint.load(), space=labels, encoder=encoder, rngs=nnx.Rngs(0)
    )
    save(fold(method, labels, encoder, origin("zero_shot")), tmp_path / "model")
    tagger = Tagger.from_classifier(tmp_path / "model", batch_size=2)
    assert tagger.score_kind == "softmax"
    pixels = [np.random.default_rng(i).integers(0, 256, (40, 32, 3), np.uint8) for i in range(3)]
    for found, expected in zip(
        tagger.tag(pixels), Tagger.from_clip(clip, labels).tag(pixels), strict=True
    ):
        assert [tag["label"] for tag in found] == [tag["label"] for tag in expected]
        for one, other in zip(found, expected, strict=True):
            assert one["score"] == pytest.approx(other["score"], abs=2e-5)
            assert one["cosine"] == pytest.approx(other["cosine"], abs=2e-5)


@pytest.fixture(scope="module")
def workdir(clip, tmp_path_factory):
    """A run of two steps that trains the image tower and keeps an average."""
    folder = tmp_path_factory.mktemp("run") / "hspnet"
    config = {
        "backbone": {"name": str(clip)},
        "method": {"name": "hspnet"},
        "data": {"name": "scenes", "num_train": 16, "num_validation": 8, "num_test": 21},
        "batch_size": 8,
        "duration": "2 steps",
        "optim": {"learning_rate": 0.01},
        "ema_decay": 0.5,
        "compilation_cache": False,
    }
    result = fit(config, folder, quiet=True)
    return folder, result.metrics["test"]


@pytest.mark.parametrize("weights", ["raw", "ema"])
def test_the_verb_end_to_end(workdir, tmp_path, capsys, weights):
    run, metrics = workdir
    output = tmp_path / "model"
    arguments = ["export", f"--workdir={run}", f"--output={output}", "--checkpoint=latest"]
    assert cli.main([*arguments, f"--weights={weights}", "--batch_size=9"]) == 0
    out = capsys.readouterr().out
    figure = f"{100 * metrics[weights]['mAP']:.2f}"
    assert f"hspnet ({weights} weights of step 2): mAP {figure} on test" in out
    assert f"classifier, read back: mAP {figure}" in out
    difference, largest = re.search(r"at most (\S+), the largest is (\S+)", out).groups()
    assert float(difference) < 2e-5 * float(largest)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert load(output).config.origin.weights == weights

    image = tmp_path / "one.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 40, 3), np.uint8)).save(image)
    lines = []
    for source in (
        [f"--classifier={output}"],
        [f"--workdir={run}", "--checkpoint=latest", f"--weights={weights}"],
    ):
        assert cli.main(["tag", str(image), "--top_k=22", *source]) == 0
        captured = capsys.readouterr()
        assert "sigmoid scores" in captured.err
        lines.append({t["label"]: t["score"] for t in json.loads(captured.out)["labels"]})
    assert lines[0].keys() == set(SPACE.names)
    assert lines[0] == pytest.approx(lines[1], abs=2e-5)


def test_without_the_data(workdir, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(registry, "load", lambda *_, **__: pytest.fail("the data are read"))
    model = tmp_path / "model"
    assert export.main([f"--workdir={workdir[0]}", f"--output={model}", "--split=none"]) == 0
    difference, largest = re.search(
        r"at most (\S+), the largest is (\S+)", capsys.readouterr().out
    ).groups()
    assert float(difference) < 2e-5 * float(largest)
    assert load(model).space == SPACE


def test_other_labels_take_groups(workdir, tmp_path, capsys):
    """HSPNet scores labels it was not trained for, once they have groups."""
    image, labels, groups = (tmp_path / name for name in ("one.png", "mine.txt", "groups.yaml"))
    Image.new("RGB", (40, 40)).save(image)
    labels.write_text("red heart\nblue star\nseven\n")
    groups.write_text("shape: [red heart, blue star]\ndigit: [seven]\n")
    arguments = ["tag", str(image), f"--workdir={workdir[0]}", f"--labels={labels}"]
    assert cli.main(arguments) == 2
    assert "--taxonomy" in capsys.readouterr().err
    scores = []
    for taxonomy in (groups, "cluster(2)"):
        assert cli.main([*arguments, f"--taxonomy={taxonomy}"]) == 0
        tags = json.loads(capsys.readouterr().out)["labels"]
        assert {tag["label"] for tag in tags} == {"red heart", "blue star", "seven"}
        scores.append([tag["score"] for tag in tags])
    assert scores[0] != scores[1]


def test_disagreement_writes_nothing(workdir, tmp_path, capsys, monkeypatch):
    def other(folder):
        found = load(folder)
        found.bias[...] = found.bias[...].at[3].add(0.1)
        return found

    monkeypatch.setattr(serving, "load", other)
    code = export.main([f"--workdir={workdir[0]}", f"--output={tmp_path / 'model'}"])
    printed = capsys.readouterr()
    assert code == 2 and "differ by at most 0.1" in printed.out
    assert "error: classifier and method disagree" in printed.err
    assert not list(tmp_path.iterdir())


def test_mistakes_take_one_line(workdir, tmp_path, capsys):
    def error(*args):
        assert cli.main(list(args)) == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1 and lines[0].startswith("error: ")
        return lines[0]

    run, output = f"--workdir={workdir[0]}", f"--output={tmp_path / 'model'}"
    assert "tset" in error("export", run, output, "--split=tset")
    assert "no checkpoint" in error("export", f"--workdir={tmp_path}", output)
    assert "batch_size" in error("export", run, output, "--batch_size=0")
    assert "exists already" in error("export", run, f"--output={tmp_path}")
    assert not list(tmp_path.iterdir())
    image = tmp_path / "one.png"
    Image.new("RGB", (40, 40)).save(image)
    line = error("tag", str(image), f"--classifier={tmp_path}")
    assert "holds no classifier" in line and "mlclip export" in line
    both = [f"--classifier={tmp_path}", run]
    for extra in (both, [both[0], "--labels=x.txt"], [both[0], "--template=a {}"],
                  [both[0], "--weights=raw"]):  # fmt: skip
        with pytest.raises(SystemExit) as stop:
            cli.main(["tag", str(image), *extra])
        assert stop.value.code == 2
