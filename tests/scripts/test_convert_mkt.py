"""MKT's released files become workdirs with the golden's scores.

The files are the golden's arrays under the release's names. The backbone is the golden's CLIP but
for its last image block, what follows it and the text tower's embeddings of the template's words,
so that what was not converted shows.
"""

from __future__ import annotations

import json
import string
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from mlclip_jax.clip import weights
from mlclip_jax.clip.arrays import from_state_dict
from mlclip_jax.clip.config_files import infer_config
from mlclip_jax.clip.tokenizer import Tokenizer
from mlclip_jax.data import registry
from mlclip_jax.data.registry import DataConfig
from mlclip_jax.labels.space import LabelSpace
from mlclip_jax.training.build import load_trained

GOLDEN = Path(__file__).parents[1] / "golden"
#: The golden's labels, a letter for each of its ids, and the ids of the template's words.
LETTERS = dict(zip((*range(30, 48), *range(50, 58)), "bcdefghijklmnopqrstuvwxyz0", strict=True))
WORDS = {25: "there", 26: "is", 20: "a", 27: "in", 28: "the", 29: "scene"}
MERGES = ("t h", "th e", "the r", "ther e</w>", "i s</w>", "i n</w>", "th e</w>", "s c", "sc e")
MERGES = (*MERGES, "sce n", "scen e</w>")
DELTA = "out/label_emb_all_after_context_update"


@pytest.fixture(scope="module")
def golden() -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """MKT's arrays, and the CLIP's under OpenAI's names."""
    with np.load(GOLDEN / "mkt.npz") as ours, np.load(GOLDEN / "clip_vit.npz") as towers:
        state = {key[3:]: towers[key] for key in towers if key.startswith("sd/")}
        return dict(ours), state


@pytest.fixture(scope="module")
def names(golden) -> tuple[str, ...]:
    tokens, lengths = golden[0]["in/label_tokens"], golden[0]["in/name_lens"]
    return tuple(
        " ".join(LETTERS[i] for i in row[4 : 4 + n].tolist())
        for row, n in zip(tokens, lengths, strict=True)
    )


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    """A folder with a tokenizer that gives the golden's ids."""
    folder = tmp_path_factory.mktemp("words")
    known = {f"{word}</w>": i for i, word in (LETTERS | WORDS).items()}
    known |= {"<|startoftext|>": 510, "<|endoftext|>": 511}
    pieces = [merge.replace(" ", "") for merge in MERGES]
    others = [*string.ascii_lowercase, *(f"{c}</w>" for c in string.ascii_lowercase), *pieces, "0"]
    free = iter(sorted(set(range(512)) - set(known.values())))
    for word in [*others, *(f"unused{i}" for i in range(512))]:
        if word not in known and (number := next(free, None)) is not None:
            known[word] = number
    assert sorted(known.values()) == list(range(512))
    (folder / "vocab.json").write_text(json.dumps(known))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *MERGES, ""]))
    return folder


def test_tokenizer_gives_the_goldens_ids(golden, names, tokenizer) -> None:
    ids = Tokenizer.from_folder(tokenizer)([f"There is a {name} in the scene" for name in names])
    np.testing.assert_array_equal(ids, golden[0]["in/label_tokens"])


@pytest.fixture(scope="module")
def backbone(golden, tokenizer, tmp_path_factory) -> Path:
    """A folder with the golden's CLIP, whose last block and what follows it have other values."""
    folder = tmp_path_factory.mktemp("backbone")
    others = ("visual.transformer.resblocks.1.", "visual.ln_post.", "visual.proj")
    state = {k: v * 1.25 if k.startswith(others) else v for k, v in golden[1].items()}
    clip = from_state_dict(state, infer_config({k: v.shape for k, v in state.items()}))
    weights.save_openai(clip, folder, tokenizer_from=tokenizer)
    return folder


@pytest.fixture(scope="module")
def first(golden) -> dict[str, np.ndarray]:
    """The state dict of the first stage."""
    arrays, state = golden
    found = {k.removeprefix("visual."): v for k, v in state.items() if k.startswith("visual.")}
    found["projection_dist"] = found.pop("proj")
    return found | {k[2:]: v for k, v in arrays.items() if k.startswith("w/projection.")}


@pytest.fixture(scope="module")
def second(golden) -> dict[str, np.ndarray]:
    """The state dict of the second stage: rows that nobody reads are shrunk, as by decay."""
    arrays, state = golden
    text = ("transformer.", "positional_embedding", "ln_final.", "text_projection")
    table = state["token_embedding.weight"].copy()
    table[arrays["in/token_embedding_delta_rows"]] += arrays["in/token_embedding_delta"]
    table[100:500] *= 0.9
    return {"token_embedding.weight": table} | {
        k: v for k, v in state.items() if k.startswith(text)
    }


@dataclass(frozen=True)
class WordsConfig(DataConfig):
    """No settings of its own."""


@pytest.fixture
def convert(script, backbone, names, monkeypatch, tmp_path, capsys):
    """Runs the script on state dicts; gives its exit code and what it printed."""
    space = LabelSpace(names, name="golden")
    monkeypatch.setitem(registry._DATASETS, "golden", (WordsConfig, None, lambda: space))

    def save(number: int, state: dict[str, np.ndarray]) -> str:
        path = tmp_path / f"{number}.safetensors"
        save_file({name: np.ascontiguousarray(array) for name, array in state.items()}, str(path))
        return str(path)

    def call(*files: dict[str, np.ndarray] | Path, **method) -> tuple[int, str, str]:
        method = {"tune": "prompt", "tune_ends": True, "train_blocks": 1, "top_k": 5} | method
        config = {
            "backbone": {"name": str(backbone)},
            "method": {"name": "mkt", **method},
            "data": {"name": "golden"},
            "compilation_cache": False,
        }
        (tmp_path / "config.py").write_text(f"def get_config():\n    return {config!r}\n")
        paths = [save(i, f) if isinstance(f, dict) else str(f) for i, f in enumerate(files)]
        code = script.main(["mkt", *paths, f"--config={tmp_path / 'config.py'}",
                            f"--workdir={tmp_path / 'run'}"])  # fmt: skip
        return code, *capsys.readouterr()

    return call


def scored(workdir: Path, golden) -> tuple[np.ndarray, np.ndarray]:
    """Label features and scores of a workdir's method on the golden's images."""
    trained = load_trained(workdir)
    method = trained.method
    labels = method.label_inputs(trained.space, trained.backbone.tokenizer)
    texts = jax.jit(method.encode_labels)(labels)
    images = jnp.asarray(golden[0]["in/images"].transpose(0, 2, 3, 1))
    found = jax.jit(method.encode_images)(images)
    return texts, method.logits(found, texts, labels)


def scores_of(arrays: dict[str, np.ndarray], texts: str, k: int = 5) -> np.ndarray:
    """Scores of the golden's image features with some text features (Eq. 3 as released)."""
    z = arrays[texts]
    local = np.sort(arrays["out/patch_feat"] @ z.T, axis=1)[:, -k:].mean(1)
    streams = (local, arrays["out/cls_feat"] @ z.T)
    return sum(s / np.linalg.norm(s, axis=-1, keepdims=True) for s in streams) / 2


def error(a, b) -> float:
    """max |a - b| / max |b|."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    assert a.shape == b.shape
    return np.abs(a - b).max() / np.abs(b).max()


@pytest.mark.parametrize("order", [1, -1])
def test_both_files_give_the_releases_scores(convert, first, second, golden, tmp_path, order):
    code, out, err = convert(*[first, second][::order])
    assert (code, err) == (0, "") and "image_norm='imagenet'" in out
    texts, scores = scored(tmp_path / "run", golden)
    assert error(texts, golden[0][DELTA]) < 2e-5
    assert error(scores_of(golden[0], "out/label_emb_all"), golden[0]["out/score_all"]) < 1e-6
    assert error(scores, scores_of(golden[0], DELTA)) < 2e-5
    meta = load_trained(tmp_path / "run").meta
    assert meta["converted"]["file"] == "0.safetensors and 1.safetensors"
    assert len(meta["converted"]["digest"].split()) == 2


@pytest.mark.parametrize("settings", [{}, {"tune": "image"}, {"train_blocks": "all"}])
def test_first_file_alone(convert, first, golden, tmp_path, settings) -> None:
    """The words of the template are then the backbone's."""
    assert convert(first, **settings)[0] == 0
    texts, scores = scored(tmp_path / "run", golden)
    assert error(texts, golden[0]["out/label_emb_all"]) < 2e-5
    assert error(scores, golden[0]["out/score_all"]) < 2e-5


def test_second_file_alone(convert, second, golden, tmp_path) -> None:
    """The student is then the backbone's image tower."""
    assert convert(second)[0] == 0
    texts, _ = scored(tmp_path / "run", golden)
    assert error(texts, golden[0][DELTA]) < 2e-5
    method = load_trained(tmp_path / "run").method
    np.testing.assert_array_equal(method.student.projection[...], method.clip.image.projection[...])


def test_names_of_openai(convert, first, golden, tmp_path) -> None:
    named = {f"visual.{'proj' if k == 'projection_dist' else k}": v
             for k, v in first.items() if "projection.fc" not in k}  # fmt: skip
    assert convert(named)[0] == 0
    assert error(scored(tmp_path / "run", golden)[1], golden[0]["out/score_all"]) < 2e-5


def test_local_head_is_taken_where_it_is_used(convert, first, golden, tmp_path) -> None:
    assert convert(first, local_head="mlp")[0] == 0
    method = load_trained(tmp_path / "run").method
    for i, layer in ((1, method.local_head.linear1), (2, method.local_head.linear2)):
        name = f"projection.fc{i}"
        np.testing.assert_array_equal(layer.kernel[...], first[f"{name}.weight"].T)
        np.testing.assert_array_equal(layer.bias[...], first[f"{name}.bias"])


def test_blocks_below_the_student_are_the_backbones(convert, first, golden, tmp_path) -> None:
    name = "transformer.resblocks.0.mlp.c_fc.weight"
    other = {**first, name: first[name] * 1.05}
    code, _, err = convert(other)
    assert code == 2 and "1 arrays that training leaves alone differ" in err
    assert f"visual.{name}" in err and "or method.train_blocks to as many blocks" in err
    assert convert(other, train_blocks="all")[0] == 0
    student = load_trained(tmp_path / "run").method.student
    np.testing.assert_array_equal(student.blocks[0].mlp.up.kernel[...], other[name].T)


def test_text_tower_is_the_backbones(convert, first, second) -> None:
    other = {**second, "ln_final.bias": second["ln_final.bias"] + 0.1}
    code, _, err = convert(first, other)
    assert code == 2 and "another CLIP" in err and "ln_final.bias" in err


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tune": "image"}, "set method.tune='prompt'"),
        ({"tune_ends": False}, "set method.tune_ends=True"),
        ({"variant": "paper"}, "set method.variant='released'"),
        ({"template": "a photo of a {}"}, "set method.template='There is a {} in the scene'"),
        ({"score": "sum"}, "set method.score=None"),
    ],
)
def test_config_must_be_the_releases(convert, first, second, settings, message) -> None:
    code, _, err = convert(first, second, **settings)
    assert code == 2 and message in err and err.count("\n") == 1


def test_local_head_needs_the_first_file(convert, second) -> None:
    code, _, err = convert(second, local_head="mlp")
    assert code == 2 and "set method.local_head='shared'\n" in err


def test_every_array_is_accounted_for(convert, first, second) -> None:
    missing = {k: v for k, v in first.items() if k != "ln_post.bias"}
    missing["ln_pots.bias"] = first["ln_post.bias"]
    short = {**second, "token_embedding.weight": second["token_embedding.weight"][:500]}
    code, _, err = convert(missing, short)
    assert code == 2 and err.count("\n") == 4
    for line in (
        "  missing     visual.ln_post.bias [64]",
        "  unexpected  visual.ln_pots.bias [64]",
        "  mismatched  token_embedding.weight [500, 64], the configuration says [512, 64]",
    ):
        assert line in err.splitlines()


def test_a_file_for_each_stage(convert, script, first, second, tmp_path, capsys) -> None:
    code, _, err = convert(first, first)
    assert code == 2 and "two files hold MKT's image tower: give one file for each stage" in err
    code, _, err = convert(second, second)
    assert code == 2 and "two files hold MKT's prompt" in err
    files = [str(tmp_path / f"{i}.safetensors") for i in (0, 1)]
    config = tmp_path / "config.py"
    settings = {"method": {"name": "coop"}, "data": {"name": "golden"}}
    config.write_text(f"def get_config():\n    return {settings!r}\n")
    arguments = [f"--config={config}", f"--workdir={tmp_path / 'run'}"]
    assert script.main(["coop", *files, *arguments]) == 2
    assert "2 files are given and coop's release is one" in capsys.readouterr().err


@pytest.mark.parity
def test_pytorch_files(convert, first, second, golden, tmp_path) -> None:
    """Nested as the official file is, and from several devices."""
    import torch

    def tensors(state: dict[str, np.ndarray], prefix: str = "") -> dict[str, torch.Tensor]:
        return {prefix + name: torch.from_numpy(array.copy()) for name, array in state.items()}

    torch.save({"model": tensors(first)}, tmp_path / "first.pth")
    torch.save(tensors(second, "module."), tmp_path / "second.pth")
    assert convert(tmp_path / "first.pth", tmp_path / "second.pth")[0] == 0
    texts, scores = scored(tmp_path / "run", golden)
    assert error(texts, golden[0][DELTA]) < 2e-5
    assert error(scores, scores_of(golden[0], DELTA)) < 2e-5
