"""Released checkpoints become workdirs: the golden's arrays under the authors' names, and errors.

The golden's graph convolutions are 64-96-96-64 where the release's and ours are d-2d-2d-d; here 32
hidden units of zeros are added to each, which is the same function. The backbone is the golden's
text tower with an image tower of other values, so that what was not converted shows.
"""

from __future__ import annotations

import json
import os
import string
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from mlclip_jax import evaluate, tag
from mlclip_jax.clip import weights
from mlclip_jax.clip.arrays import from_state_dict, to_state_dict
from mlclip_jax.clip.config_files import infer_config
from mlclip_jax.clip.tokenizer import Tokenizer
from mlclip_jax.data import registry
from mlclip_jax.data.registry import DataConfig, DataSplits
from mlclip_jax.errors import UserError
from mlclip_jax.labels.space import LabelSpace, Taxonomy
from mlclip_jax.modules.graph import dependency_graph
from mlclip_jax.training import loop
from mlclip_jax.training.build import load_trained

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden"
# The golden's ids of the words of its labels and groups, and words for them of one letter each.
NAMES = ("r", "b c", "d", "e f g", "h", "i", "j k", "l", "m", "n q")
GROUPS = ("s", "u v", "w", "x")
WORDS = {20: "a", 21: "photo", 22: "of", 24: "."} | dict(
    zip((*range(30, 45), *range(50, 55)), " ".join((*NAMES, *GROUPS)).split(), strict=True)
)
MERGES = ("p h", "ph o", "pho t", "phot o</w>", "o f</w>")


def error(a, b) -> float:
    """max |a - b| / max |b|."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    assert a.shape == b.shape
    return np.abs(a - b).max() / np.abs(b).max()


@pytest.fixture(scope="module")
def golden():
    """HSPNet's arrays, and the CLIP's under OpenAI's names."""
    with np.load(GOLDEN / "hspnet.npz") as ours, np.load(GOLDEN / "clip_rn.npz") as towers:
        arrays = {key: ours[key] for key in ours}
        state = {key[3:]: towers[key] for key in towers if key.startswith("sd/")}
    return arrays, state


def write_tokenizer(folder: Path) -> Path:
    """A CLIP tokenizer that gives the golden's ids to its labels, groups and templates."""
    folder.mkdir()
    pieces = [merge.replace(" ", "") for merge in MERGES]
    words = {f"{word}</w>": number for number, word in WORDS.items()}
    words |= {"<|startoftext|>": 510, "<|endoftext|>": 511}
    others = [*string.ascii_lowercase, "o</w>", "f</w>", *pieces]
    others += [f"unused{i}" for i in range(512)]
    free = iter(sorted(set(range(512)) - set(words.values())))
    for word in others:
        if word not in words and (number := next(free, None)) is not None:
            words[word] = number
    assert sorted(words.values()) == list(range(512))
    (folder / "vocab.json").write_text(json.dumps(words))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *MERGES, ""]))
    return folder


@pytest.fixture(scope="module")
def backbone(golden, tmp_path_factory) -> Path:
    """A folder with the golden's text tower, another image tower, and a tokenizer."""
    folder = tmp_path_factory.mktemp("backbone")
    state = {k: v * 1.25 if k.startswith("visual.") else v for k, v in golden[1].items()}
    clip = from_state_dict(state, infer_config({k: v.shape for k, v in state.items()}))
    weights.save_openai(clip, folder, tokenizer_from=write_tokenizer(folder / "words"))
    return folder


@pytest.fixture(scope="module")
def released(golden) -> dict[str, np.ndarray]:
    """The golden as the authors' state dict: all names that they save."""
    arrays, state = golden
    found = {f"image_encoder.{k[7:]}": v for k, v in state.items() if k.startswith("visual.")}
    assert "image_encoder.bn1.num_batches_tracked" in found
    text = ("transformer.", "positional_embedding", "ln_final.", "text_projection")
    found |= {f"text_encoder.{k}": v for k, v in state.items() if k.startswith(text)}
    found |= {k[2:]: v for k, v in arrays.items() if k.startswith("w/") and "paper" not in k}
    for name, sides in (("gc1", (0, 32)), ("gc2", (32, 32)), ("gc3", (32, 0))):
        pad = [(0, side) for side in sides]
        found[f"gcn.{name}.weight"] = np.pad(found[f"gcn.{name}.weight"], pad)
    table = state["token_embedding.weight"]
    child, parent = table[arrays["in/child_tokens"]], table[arrays["in/parent_tokens"]]
    for name, embedded in (("child", child), ("parent", parent)):
        found[f"{name}_prompt_learner.token_prefix"] = embedded[:, :1]
        found[f"{name}_prompt_learner.token_suffix"] = embedded[:, 5:]
    found["parent_prompt_learner.token_middle"] = parent[:, 1:5]
    found["parent_prompt_learner.embedding"] = parent
    found["parent_prompt_learner.ctx"] = parent[0, 1:5]
    found["logit_scale"] = state["logit_scale"]
    return {name: np.ascontiguousarray(value) for name, value in found.items()}


class Noise:
    """Random images and labels."""

    def __len__(self):
        return 8

    def label_matrix(self):
        return np.random.default_rng(0).choice([-1, 1], (8, 10)).astype(np.int8)

    def class_counts(self):
        return (self.label_matrix() > 0).sum(0)

    def __getitem__(self, i):
        image = np.random.default_rng(i).integers(0, 256, (64, 64, 3)).astype(np.uint8)
        return {"image": image, "targets": self.label_matrix()[i], "index": i}


@dataclass(frozen=True)
class NoiseConfig(DataConfig):
    """No settings of its own."""


@pytest.fixture
def world(golden, backbone, monkeypatch, tmp_path):
    """The golden's labels as a dataset; gives a function that writes a config file."""
    groups = Taxonomy(GROUPS, tuple(golden[0]["in/parent_index"]))
    space = LabelSpace(NAMES, taxonomy=groups, name="golden")
    spaces = {"golden": space, "renamed": replace(space, names=("y", *NAMES[1:]), prompt_names=())}
    spaces["two"] = LabelSpace(("b", "c"), taxonomy=Taxonomy(("u", "v"), (0, 1)))
    for name, labels in spaces.items():

        def load(config, image_size, splits, labels=labels):
            return DataSplits(Noise(), dict.fromkeys(splits, Noise()), labels, config)

        entry = (NoiseConfig, load, lambda labels=labels: labels)
        monkeypatch.setitem(registry._DATASETS, name, entry)

    def write(**fields) -> dict:
        config = {
            "backbone": {"name": str(backbone)},
            "method": {"name": "hspnet"},
            "data": {"name": "golden"},
            "batch_size": 8,
            "ema_decay": 0.9,
            "eval": {"batch_size": 8, "splits": ("test",)},
            "compilation_cache": False,
        } | fields
        (tmp_path / "config.py").write_text(f"def get_config():\n    return {config!r}\n")
        return config

    write()
    return write


@pytest.fixture
def run(script, world, tmp_path, capsys):
    """Runs the script on a file; gives its exit code and what it printed."""

    def call(path: Path, *args: str) -> tuple[int, str, str]:
        config, workdir = f"--config={tmp_path / 'config.py'}", f"--workdir={tmp_path / 'run'}"
        code = script.main(["hspnet", str(path), config, workdir, *args])
        return code, *capsys.readouterr()

    return call


@pytest.fixture
def saved(tmp_path):
    """Writes a state dict as safetensors."""

    def save(state: dict[str, np.ndarray]) -> Path:
        save_file(state, str(tmp_path / "model.safetensors"))
        return tmp_path / "model.safetensors"

    return save


def assert_converted(workdir: Path, golden) -> None:
    """The workdir's method has the golden's parameters and gives its logits."""
    arrays, state = golden
    trained = load_trained(workdir)
    method = trained.method
    clip = to_state_dict(method.clip, "openai")
    for name, value in clip.items():
        np.testing.assert_array_equal(value, state[name], err_msg=name)
    for layer in ("linear1", "linear2"):
        name = f"w/child_prompt_learner.meta_net.{layer}"
        np.testing.assert_array_equal(
            getattr(method.meta, layer).kernel[...], arrays[f"{name}.weight"].T
        )
        np.testing.assert_array_equal(getattr(method.meta, layer).bias[...], arrays[f"{name}.bias"])
    for i, kernel in enumerate(method.gcn.kernels):
        expected = arrays[f"w/gcn.gc{i + 1}.weight"]
        np.testing.assert_array_equal(kernel[: expected.shape[0], : expected.shape[1]], expected)
        assert np.abs(kernel[...]).sum() == pytest.approx(np.abs(expected).sum(), rel=1e-5)
    assert method.gcn.gamma[...] == arrays["w/gcn.gamma"][0]

    relation = jnp.array(arrays["in/relation"], jnp.float32)
    labels = replace(
        method.label_inputs(trained.space, trained.backbone.tokenizer),
        label_graph=dependency_graph(relation[:10, :10]),
        group_graph=dependency_graph(relation[10:, 10:]),
    )
    assert error(labels.group_features, arrays["out/parent_text"]) < 2e-5
    images = jnp.array(arrays["in/images"].transpose(0, 2, 3, 1))
    features = jax.jit(method.encode_images)(images)
    logits = method.logits(features, jax.jit(method.encode_labels)(labels), labels)
    assert error(logits, arrays["out/logits"]) < 2e-5


def test_tokenizer_gives_the_goldens_ids(golden, backbone) -> None:
    tokenizer = Tokenizer.from_folder(backbone)
    child = tokenizer([f"{name}." for name in NAMES])
    np.testing.assert_array_equal(child[:, 1:73], golden[0]["in/child_tokens"][:, 5:])
    parent = tokenizer([f"a photo of a {group}." for group in GROUPS])
    np.testing.assert_array_equal(parent, golden[0]["in/parent_tokens"])


def test_converted_run_gives_the_releases_logits(run, saved, released, golden, tmp_path) -> None:
    code, out, err = run(saved(released))
    assert (code, err) == (0, "")
    assert "graphs of labels and groups are computed" in out and "differ from the check" not in out
    assert_converted(tmp_path / "run", golden)
    trained = load_trained(tmp_path / "run")
    assert trained.space.name == "golden" and trained.step == 0
    assert trained.meta["converted"]["file"] == "model.safetensors"


def test_workdir_is_like_any_other(run, world, saved, released, tmp_path, capsys) -> None:
    """Evaluation, tagging, and the refusals of training and converting once more."""
    path, workdir = saved(released), tmp_path / "run"
    assert run(path)[0] == 0
    assert evaluate.main([f"--workdir={workdir}", "--no-baseline"]) == 0
    assert "hspnet" in capsys.readouterr().out
    Image.fromarray(Noise()[0]["image"]).save(tmp_path / "one.png")
    assert tag.main([str(tmp_path / "one.png"), f"--workdir={workdir}", "--top_k=3"]) == 0
    assert len(json.loads(capsys.readouterr().out)["labels"]) == 3

    assert run(path)[::2] == (
        2,
        f"error: {workdir} holds a checkpoint already: choose another workdir\n",
    )
    with pytest.raises(UserError, match=r"converted from .* train in another workdir"):
        loop.fit(world(), workdir, quiet=True)


def test_every_difference_is_in_one_error(run, saved, released) -> None:
    wrong = {k: v for k, v in released.items() if k != "gcn.gc2.weight"}
    wrong["gcn.gc4.weight"] = np.zeros((2, 2), np.float32)
    wrong["text_encoder.other"] = np.zeros(3, np.float32)
    wrong["image_encoder.bn1.running_mean"] = np.zeros(9, np.float32)
    code, _, err = run(saved(wrong))
    assert code == 2 and err.count("\n") == 5
    for line in (
        "  missing     gcn.gc2.weight [128, 128]",
        "  unexpected  gcn.gc4.weight [2, 2]",
        "  unexpected  text_encoder.other [3]",
        "  mismatched  image_encoder.bn1.running_mean [9], the configuration says [8]",
    ):
        assert line in err.splitlines()


def test_text_tower_is_the_backbones(run, saved, released) -> None:
    """Up to the rounding of storage and averages; and it may be left out."""
    name = "text_encoder.transformer.resblocks.1.mlp.c_fc.weight"
    code, _, err = run(saved(released | {name: released[name] * 1.01}))
    assert code == 2 and "another CLIP than the config's backbone: 1 arrays" in err and name in err
    few = {k: v for k, v in released.items() if not k.startswith("text_encoder.")}
    few["text_encoder.ln_final.bias"] = released["text_encoder.ln_final.bias"] * np.float32(1.001)
    assert run(saved(few))[0] == 0


def test_labels_are_compared(run, world, saved, released) -> None:
    """Other numbers are an error, other names a remark."""
    world(data={"name": "two"})
    code, _, err = run(saved(released))
    assert code == 2
    assert "child_prompt_learner.token_suffix [10, 72, 64], the configuration says [2, 72" in err
    assert "parent_prompt_learner.embedding [4, 77, 64], the configuration says [2, 77, 64]" in err
    world(data={"name": "renamed"})
    code, out, _ = run(saved(released))
    assert code == 0 and "the prompts of 1 labels or groups differ" in out and ": y\n" in out


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"method": {"name": "coop"}}, "the config's method is 'coop' and the file is of 'hspnet'"),
        ({"method": {"name": "hspnet", "variant": "paper"}}, "set method.variant='released'"),
        ({"method": {"name": "hspnet", "prompt": "add"}}, "set method.prompt='group'"),
    ],
)
def test_config_must_be_the_releases(run, world, saved, released, fields, message) -> None:
    world(**fields)
    code, _, err = run(saved(released))
    assert code == 2 and message in err and err.count("\n") == 1


def test_command_line_mistakes(run, script, saved, released, tmp_path) -> None:
    assert run(tmp_path / "no.ckpt")[::2] == (
        2,
        f"error: there is no file {tmp_path / 'no.ckpt'}\n",
    )
    code, _, err = run(saved(released), "--ema")
    assert code == 2 and "one set of weights: leave out --ema" in err
    code, _, err = run(saved(released), "--config.method.variant=paper")
    assert code == 2 and "set method.variant='released'" in err
    assert "unknown config key 'method.vriant'" in run(tmp_path, "--config.method.vriant=a")[2]
    with pytest.raises(SystemExit):
        script.main(["hspnett", "x.ckpt"])


def test_missing_pytorch_is_one_line(run, tmp_path, monkeypatch) -> None:
    (tmp_path / "model.ckpt").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "torch", None)
    code, _, err = run(tmp_path / "model.ckpt")
    assert code == 2 and "pip install 'mlclip-jax[parity]'" in err and err.count("\n") == 1


# --- PyTorch's files --------------------------------------------------------------------------


@pytest.mark.parity
@pytest.mark.parametrize("form", ["plain", "nested", "raw", "ema"])
def test_pytorch_files(run, released, golden, tmp_path, form) -> None:
    """As the authors save them, from several devices, and with averaged weights beside."""
    import torch

    state = {name: torch.from_numpy(value.copy()) for name, value in released.items()}
    zeros = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    content = {
        "plain": state,
        "nested": {"epoch": 3, "state_dict": {f"module.{k}": v for k, v in state.items()}},
        "raw": {"model": state, "model_ema": zeros},
        "ema": {"model": zeros, "model_ema": state},
    }[form]
    torch.save(content, tmp_path / "model.ckpt")
    if form in ("raw", "ema"):
        code, _, err = run(tmp_path / "model.ckpt")
        assert code == 2 and "choose with --raw or --ema" in err
        assert run(tmp_path / "model.ckpt", f"--{form}")[0] == 0
    else:
        assert run(tmp_path / "model.ckpt")[0] == 0
    assert_converted(tmp_path / "run", golden)


class Harm:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parity
def test_nothing_is_unpickled(run, tmp_path) -> None:
    import torch

    torch.save({"state_dict": {}, "other": Harm(tmp_path / "harm")}, tmp_path / "model.ckpt")
    code, _, err = run(tmp_path / "model.ckpt")
    assert code == 2 and "nothing is unpickled here" in err and err.count("\n") == 1
    assert not (tmp_path / "harm").exists()


@pytest.mark.parity
def test_other_pytorch_files(run, released, tmp_path) -> None:
    import torch

    path = tmp_path / "model.ckpt"
    for content, message in (
        ([1, 2], "holds a list and no state dict"),
        ({"epoch": 3, "net": {}}, "there is epoch, net where tensors should be"),
        ({"state_dict": {}}, "there is nothing where tensors should be"),
    ):
        torch.save(content, path)
        code, _, err = run(path)
        assert code == 2 and message in err and err.count("\n") == 1
    torch.save({name: torch.from_numpy(value.copy()) for name, value in released.items()}, path)
    path.write_bytes(path.read_bytes()[:-2000])
    code, _, err = run(path)
    assert code == 2 and "fetch it again" in err and err.count("\n") == 1
    path.write_bytes(b"")
    assert "fetch it again" in run(path)[2]
