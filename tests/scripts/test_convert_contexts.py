"""Released contexts (CoOp, LMPT, DualCoOp) become workdirs whose logits are the release's.

The files are made here as the authors' code saves them, from known arrays and the packaged CLIP
with ResNet towers under OpenAI's names.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from references import prompt_methods as reference

from mlclip_jax.clip.arrays import from_state_dict, to_state_dict
from mlclip_jax.data import registry
from mlclip_jax.data.registry import DataConfig
from mlclip_jax.labels.space import LabelSpace
from mlclip_jax.training.build import Backbone, load_backbone, load_trained
from mlclip_jax.training.config import BackboneConfig

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.parity

NAMES = ("dog", "red circle", "traffic_light", "diningtable", "wine glass")
#: Of the names in the file; our modules by the endings of their contexts' names.
PREFIX = {"coop": "", "lmpt": "prompt_learner.", "dual_coop": "prompt_learner."}
MODULES = {
    "coop": {"": "context"},
    "lmpt": {"": "context"},
    "dual_coop": {"_pos": "positive", "_neg": "negative"},
}


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return load_backbone(BackboneConfig(name="clip-mini-rn"))


@pytest.fixture(scope="module")
def towers(backbone) -> dict[str, np.ndarray]:
    """The backbone under OpenAI's names."""
    return to_state_dict(backbone.clip, "openai")


def full_prompts(backbone: Backbone, n_ctx: int) -> np.ndarray:
    """Ids as the releases tokenise: a placeholder for each vector, the name, a period [c t]."""
    placeholders = " ".join(["x"] * n_ctx)
    assert len(backbone.tokenizer.encode(placeholders)) == n_ctx
    return backbone.tokenizer([f"{placeholders} {name.replace('_', ' ')}." for name in NAMES])


def released(
    method: str, backbone: Backbone, towers: dict[str, np.ndarray], *, n_ctx: int, specific: bool
) -> dict[str, torch.Tensor]:
    """The release's state dict."""
    rng = np.random.default_rng(n_ctx + specific)
    embedded = towers["token_embedding.weight"][full_prompts(backbone, n_ctx)]
    shape = (*((len(NAMES),) if specific else ()), n_ctx, embedded.shape[-1])
    found = {}
    for end in MODULES[method]:
        found[f"{PREFIX[method]}ctx{end}"] = rng.normal(0, 0.05, shape).astype(np.float32)
        found[f"{PREFIX[method]}token_prefix{end}"] = embedded[:, :1]
        found[f"{PREFIX[method]}token_suffix{end}"] = embedded[:, 1 + n_ctx :]
    if method != "coop":
        text = ("transformer.", "positional_embedding", "ln_final.", "text_projection")
        found |= {f"text_encoder.{k}": v for k, v in towers.items() if k.startswith(text)}
        for name, array in towers.items():
            if name.startswith("visual."):
                found["image_encoder." + name.removeprefix("visual.")] = array
        found["image_encoder.bn1.num_batches_tracked"] = np.array(7)
    if method == "lmpt":  # its ResNet's statistics move
        found["logit_scale"] = towers["logit_scale"]
        for name in [name for name in found if "running" in name]:
            found[name] = found[name] * 1.2
    if method == "dual_coop":
        ids = full_prompts(backbone, n_ctx)
        found["prompt_learner.tokenized_prompts"] = np.concatenate([ids, ids])
    tensors = {name: torch.from_numpy(np.array(array)) for name, array in found.items()}
    half = method == "lmpt"
    return {name: t.half() if half and t.is_floating_point() else t for name, t in tensors.items()}


def logits(
    method: str, backbone: Backbone, towers: dict[str, np.ndarray], state: dict[str, torch.Tensor]
) -> np.ndarray:
    """What the release computes from its state dict, prompts at full length."""
    state = {name: tensor.float().numpy() for name, tensor in state.items()}
    image = {name: state.get(name.replace("visual.", "image_encoder."), towers[name])
             for name in towers if name.startswith("visual.")}  # fmt: skip
    clip = from_state_dict({**towers, **image}, backbone.clip.config)

    def text(end: str) -> jax.Array:
        ctx, prefix, suffix = (
            state[f"{PREFIX[method]}{part}{end}"]
            for part in ("ctx", "token_prefix", "token_suffix")
        )
        ctx = np.broadcast_to(ctx, (len(NAMES), *ctx.shape[-2:]))
        x = jax.jit(clip.text.hidden_states)(jnp.concatenate([prefix, ctx, suffix], axis=1))
        eot = full_prompts(backbone, ctx.shape[1]).argmax(-1)
        return normalize(x[np.arange(len(NAMES)), eot] @ clip.text.projection[...])

    if method == "dual_coop":
        pool = clip.image.attention_pool
        cells = jax.jit(clip.image.feature_map)(clip.normalize(images()))
        regions = reference.region_features_released(
            cells.reshape(len(cells), -1, cells.shape[-1]), pool.position_embedding[...],
            pool.v.kernel[...], pool.v.bias[...], pool.out.kernel[...], pool.out.bias[...],
        )  # fmt: skip
        plus, minus = reference.dual_coop_scores(regions, text("_pos"), text("_neg"))
        return np.asarray(plus - minus)
    features = normalize(jax.jit(clip.encode_images)(images()).pooled)
    return np.asarray(np.exp(towers["logit_scale"]) * features @ text("").T)


def normalize(x: jax.Array) -> jax.Array:
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


def images() -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3)), jnp.uint8)


@dataclass(frozen=True)
class WordsConfig(DataConfig):
    """No settings of its own."""


@pytest.fixture
def convert(script, backbone, towers, monkeypatch, tmp_path, capsys):
    """Saves a state dict and runs the script on it; gives its exit code and what it printed."""
    spaces = {"words": NAMES, "renamed": ("cat", *NAMES[1:3], "dining table", NAMES[4])}
    for name, labels in spaces.items():
        space = LabelSpace(labels, name=name)
        monkeypatch.setitem(registry._DATASETS, name, (WordsConfig, None, lambda s=space: s))

    def call(
        state: dict, method: str, *, data: str = "words", clip: str = "clip-mini-rn", **settings
    ) -> tuple[int, str, str]:
        config = {
            "backbone": {"name": clip},
            "method": {"name": method, "ctx_init": "", "class_specific": False, **settings},
            "data": {"name": data},
            "compilation_cache": False,
        }
        (tmp_path / "config.py").write_text(f"def get_config():\n    return {config!r}\n")
        torch.save(state, tmp_path / "model.pth.tar-50")
        code = script.main([method, str(tmp_path / "model.pth.tar-50"),
                            f"--config={tmp_path / 'config.py'}",
                            f"--workdir={tmp_path / 'run'}"])  # fmt: skip
        return code, *capsys.readouterr()

    return call


@pytest.mark.parametrize("specific", [False, True])
@pytest.mark.parametrize("method", MODULES)
def test_logits_are_the_releases(convert, backbone, towers, tmp_path, method, specific) -> None:
    state = released(method, backbone, towers, n_ctx=3, specific=specific)
    prefix = "module." if method == "lmpt" else ""
    content = {"epoch": 3, "state_dict": {prefix + name: t for name, t in state.items()}}
    code, out, err = convert(content, method, n_ctx=3, class_specific=specific)
    assert (code, err) == (0, "") and "differ from" not in out
    trained = load_trained(tmp_path / "run")
    labels = trained.method.label_inputs(trained.space, trained.backbone.tokenizer)
    features = jax.jit(trained.method.encode_images)(images())
    texts = jax.jit(trained.method.encode_labels)(labels)
    ours = trained.method.logits(features, texts, labels)
    theirs = logits(method, backbone, towers, state)
    assert np.abs(ours - theirs).max() / np.abs(theirs).max() < 2e-5
    for end, module in MODULES[method].items():
        vectors = getattr(trained.method, module).vectors[...]
        np.testing.assert_array_equal(vectors, state[f"{PREFIX[method]}ctx{end}"].float())


def test_checkpoints_of_dassl(convert, backbone, towers, tmp_path) -> None:
    """With the objects that its schedulers hold, and a score of numpy's."""

    class ConstantWarmup(torch.optim.lr_scheduler.LRScheduler):
        def __init__(self, optimizer, successor) -> None:
            self.successor = successor
            super().__init__(optimizer)

        def get_lr(self):
            return [1e-5]

    state = released("coop", backbone, towers, n_ctx=3, specific=False)
    parameter = torch.nn.Parameter(state["ctx"])
    sgd, adam, adamw = torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW
    rates = torch.optim.lr_scheduler
    for make, successor in (
        (adam, lambda optimizer: rates.MultiStepLR(optimizer, [3, 5])),
        (adamw, lambda optimizer: rates.StepLR(optimizer, 3)),
        (sgd, lambda optimizer: rates.CosineAnnealingLR(optimizer, 50.0)),
    ):
        optimizer = make([parameter], **({"lr": 0.002, "momentum": 0.9} if make is sgd else {}))
        parameter.sum().backward()
        optimizer.step()
        content = {
            "state_dict": state,
            "epoch": 50,
            "optimizer": optimizer.state_dict(),
            "scheduler": ConstantWarmup(optimizer, successor(optimizer)).state_dict(),
            "val_result": np.float64(61.5),
        }
        code, _, err = convert(content, "coop", n_ctx=4)
        assert code == 2 and "set method.n_ctx=3\n" in err
    assert convert(content, "coop", n_ctx=3)[0] == 0
    assert len(load_trained(tmp_path / "run").method.context.vectors[...]) == 3


@pytest.mark.parametrize("method", MODULES)
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n_ctx": 4}, "set method.n_ctx=3"),
        ({"n_ctx": 3, "class_specific": True}, "set method.class_specific=False"),
        ({}, "set method.n_ctx=3"),
        ({"n_ctx": 3, "ctx_init": "a photo of a"}, "set method.n_ctx=3, method.ctx_init=''"),
    ],
)
def test_config_must_fit_the_context(convert, backbone, towers, method, settings, message) -> None:
    state = released(method, backbone, towers, n_ctx=3, specific=False)
    code, _, err = convert(state, method, **settings)
    assert (code, err) == (2, f"error: the config is not the release's: {message}\n")


def test_words_may_start_a_context_of_their_length(convert, backbone, towers) -> None:
    state = released("coop", backbone, towers, n_ctx=4, specific=True)
    code, _, err = convert(state, "coop", ctx_init="a photo of a")
    assert code == 2 and "set method.class_specific=True\n" in err
    assert convert(state, "coop", ctx_init="a photo of a", class_specific=True)[0] == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"class_position": "front"}, "set method.class_position='end'"),
        ({"logit_scale": 10.0, "logit_bias": True}, "logit_scale=None, method.logit_bias=False"),
        ({"label_graph": True}, "set method.label_graph=False"),
    ],
)
def test_config_must_be_the_releases(convert, backbone, towers, settings, message) -> None:
    state = released("coop", backbone, towers, n_ctx=3, specific=False)
    code, _, err = convert(state, "coop", n_ctx=3, **settings)
    assert code == 2 and message in err and err.count("\n") == 1


@pytest.mark.parametrize("method", MODULES)
def test_labels_are_compared(convert, backbone, towers, method) -> None:
    """Those that were tokenised otherwise are named; other numbers of them are an error."""
    state = released(method, backbone, towers, n_ctx=3, specific=True)
    few = {name: t[:4] if t.shape[:1] == (len(NAMES),) else t for name, t in state.items()}
    ours = f"[{len(NAMES)}, 3, {towers['ln_final.weight'].shape[0]}]"
    code, _, err = convert(few, method, n_ctx=3, class_specific=True)
    assert code == 2 and f"the configuration says {ours}" in err
    code, out, _ = convert(state, method, data="renamed", n_ctx=3, class_specific=True)
    assert code == 0
    assert "the prompts of 2 labels or groups differ" in out and ": cat, dining table\n" in out


@pytest.mark.parametrize("method", MODULES)
def test_backbone_must_be_the_releases(convert, backbone, towers, method) -> None:
    state = released(method, backbone, towers, n_ctx=3, specific=False)
    for name in [name for name in state if "token_prefix" in name or "ln_final" in name]:
        other = {**state, name: state[name] * 1.05}
        code, _, err = convert(other, method, n_ctx=3)
        assert code == 2 and "another CLIP than the config's backbone: 1 arrays" in err
        assert name in err


def test_backbone_of_another_width(convert, backbone, towers) -> None:
    state = released("coop", backbone, towers, n_ctx=3, specific=False)
    code, _, err = convert(state, "coop", clip="clip-mini", n_ctx=3)
    assert code == 2 and "  mismatched  ctx [3, 64], the configuration says [3, 128]\n" in err


def test_contexts_of_two_lengths(convert, backbone, towers) -> None:
    state = released("dual_coop", backbone, towers, n_ctx=3, specific=False)
    state["prompt_learner.ctx_neg"] = state["prompt_learner.ctx_neg"][:2]
    code, _, err = convert(state, "dual_coop", n_ctx=3)
    assert code == 2 and "differ in length or form" in err and "prompt_learner.ctx_neg [2, " in err


@pytest.mark.parametrize("method", MODULES)
def test_every_array_is_accounted_for(convert, backbone, towers, method) -> None:
    state = released(method, backbone, towers, n_ctx=3, specific=False)
    width = towers["ln_final.weight"].shape[0]
    name = next(name for name in state if "ctx" in name)
    missing = {k: v for k, v in state.items() if k != name} | {"ctx_other": state[name]}
    code, _, err = convert(missing, method, n_ctx=3)
    assert code == 2 and err.count("\n") == 3
    assert f"  missing     {name} [3, {width}]\n" in err
    assert f"  unexpected  ctx_other [3, {width}]\n" in err
