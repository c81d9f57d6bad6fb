"""Every file in configs/ builds its full-size training step, without weights or data."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from mlclip_jax import losses
from mlclip_jax.data import benchmarks
from mlclip_jax.errors import UserError
from mlclip_jax.train import load_config
from mlclip_jax.training.build import check_settings
from mlclip_jax.training.config import parse_config, to_steps
from mlclip_jax.training.dry_run import abstract_step
from mlclip_jax.training.optim import learning_rate_groups

CONFIGS = Path(__file__).parents[2] / "configs"
# A file that begins with an underscore holds what others share.
FILES = sorted(path for path in CONFIGS.rglob("*.py") if not path.name.startswith("_"))
GOLDEN = Path(__file__).parents[1] / "golden" / "schedules.npz"
TENTHS = [f"partial(0.{tenths})" for tenths in range(1, 10)]


def hspnet(text):
    """The configuration of "coco:arguments" in configs/hspnet, as parsed."""
    name, colon, arg = text.partition(":")
    return parse_config(load_config(f"{CONFIGS}/hspnet/{name}.py{colon}{arg}"))


def dry_run(config):
    """The last stage's plan, after the steps of all were traced."""
    config = parse_config(config)
    check_settings(config)
    for plan, _, (_, metrics) in abstract_step(config):
        assert plan.steps >= 0 and metrics["loss"].shape == ()
    return plan


#: Large towers that train, or many regions and prompts: seconds each.
LONG = {f"{name}/benchmark.py" for name in ("clip_ft", "cocoop", "dual_coop", "fine_tune", "mkt")}


def as_case(path):
    name = str(path.relative_to(CONFIGS))
    return pytest.param(path, id=name, marks=[pytest.mark.slow] if name in LONG else [])


@pytest.mark.parametrize("path", [as_case(path) for path in FILES])
def test_config_dry_run(path):
    dry_run(load_config(str(path)))


BEFORE = ("patch_embed/kernel", "class_embedding", "position_embedding", "norm_pre/scale")


@pytest.mark.parametrize(
    ("arg", "first", "whole"),
    [
        ("row=distillation", 10, False),
        ("row=distillation,blocks=4", 8, False),
        ("row=distillation,blocks=all", 0, True),
        ("row=distillation,student=vit.npz", 0, True),
        ("row=distillation,student=vit.npz,blocks=4", 8, False),
    ],
)
def test_rates_of_mkts_layers(arg, first, whole):
    """Each layer's is 0.65 of the next one's; a student's file is not read yet."""
    config = load_config(f"{CONFIGS}/mkt/benchmark.py:{arg}")
    plan = dry_run(config)
    (stage,) = parse_config(config).stages
    found = learning_rate_groups(list(plan.parts.trainable), stage.optim.groups)
    rates = {path: factor for path, (_, factor) in found.items()}
    own = "student=" in arg
    before = [name for name in BEFORE if not (own and name.startswith("norm_pre"))]
    expected = {f"student/{name}": 0.65**13 for name in before if whole}
    offset = 0 if own else first  # a student from CLIP has the blocks that train and no others
    expected |= {
        f"student/blocks/{i - offset}/mlp/up/kernel": 0.65 ** (12 - i) for i in range(first, 12)
    }
    expected |= {"student/norm_post/scale": 1.0, "student/projection": 1.0}
    assert {path: rates[path] for path in expected} == pytest.approx(expected)
    parts = {re.match(r"student/(blocks/\d+|\w+)", path)[1] for path in rates}
    assert parts == {re.match(r"student/(blocks/\d+|\w+)", path)[1] for path in expected}


@pytest.mark.parametrize(
    ("arg", "first", "second"),
    [
        ("row=mkt", {"student"}, {"context"}),
        ("row=distillation", {"student"}, None),
        ("row=prompt", {"student"}, {"context"}),
        ("row=neither", {"student"}, None),
        ("row=local", {"student"}, None),
        ("row=global", {"student"}, None),
        ("row=global,recipe=released", {"student"}, None),
        ("row=global,variant=paper", {"student"}, None),
        ("recipe=released", {"student"}, {"context", "ends"}),
        ("variant=paper", {"student", "local_head"}, {"context"}),
        ("data=openimages_zsl", {"student"}, {"context"}),
        ("data=openimages_zsl,recipe=released", {"student"}, {"context", "ends"}),
    ],
)
def test_rows_of_mkt_dry_run(arg, first, second):
    """What each stage trains; over the small image tower."""
    config = load_config(f"{CONFIGS}/mkt/benchmark.py:{arg}")
    config.backbone.name = "clip-mini"
    config = parse_config(config)
    check_settings(config)
    found = [plan.parts.trainable for plan, _, _ in abstract_step(config)]
    trained = [{path.split("/")[0] for path in paths} for paths in found]
    assert trained == [first, *([second] if second else [])]


def test_recipes_of_mkt():
    for arg, batches, decay, rates, lengths in (
        ("", (128, 16), 0.005, (1e-3, 3e-5), ("20 epochs", "10 epochs")),
        ("data=openimages_zsl", (128, 16), 0.005, (1e-3, 3e-5), ("4 epochs", "2 epochs")),
        ("recipe=released", (64, 512), 0.05, (1e-3, 1e-3), ("20 epochs", "4 epochs")),
    ):
        stages = parse_config(load_config(f"{CONFIGS}/mkt/benchmark.py:{arg}")).stages
        assert tuple(stage.batch_size for stage in stages) == batches
        assert tuple(stage.optim.learning_rate for stage in stages) == rates
        assert tuple(stage.duration for stage in stages) == lengths
        assert tuple(stage.optim.min_learning_rate for stage in stages) == (1e-6, 1e-8)
        assert {stage.optim.weight_decay for stage in stages} == {decay}
        assert tuple(len(stage.optim.groups) for stage in stages) == (2, 0)


@pytest.mark.parametrize("variant", ["released", "paper"])
def test_mkt_where_only_positives_are_known(variant):
    """Other labels count as negative, as in CLIP-FT's config."""
    text = f"{CONFIGS}/mkt/benchmark.py:data=coco_spml_splc,row=neither,variant={variant}"
    (stage,) = parse_config(load_config(text)).stages
    loss, targets = losses.get(stage.method["loss"]), np.array([[1, 0, 0]], np.int8)
    scores = np.array([[0.5, 0.25, 0.0]], np.float32)
    pairs = np.array([0.75, 0.5])
    expected = pairs.mean() if variant == "released" else pairs.sum()
    assert float(loss(scores, targets)) == pytest.approx(expected)
    plain = parse_config(load_config(f"{CONFIGS}/mkt/benchmark.py:variant={variant}"))
    assert all("loss" not in stage.method for stage in plain.stages)


@pytest.mark.parametrize(
    ("arg", "message"),
    [
        ("benchmark.py:vectors=glove.txt", "row=mkt is not of Table 3: add row=neither"),
        ("scenes.py:vectors=glove.txt,row=global", "row=global is not of Table 3: add row=neither"),
        ("benchmark.py:blocks=13", "blocks=13: ViT-B/16 has 12 blocks, give 1 to those or all"),
        ("benchmark.py:blocks=al", "blocks=al: ViT-B/16 has 12 blocks"),
        ("benchmark.py:backbone=RN50", "backbone=RN50: mkt takes a ViT by its preset's name"),
        ("benchmark.py:row=mtk", "unknown row 'mtk'; did you mean 'mkt'?"),
    ],
)
def test_errors_of_mkt(arg, message):
    with pytest.raises(UserError) as caught:
        load_config(f"{CONFIGS}/mkt/{arg}")
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("arg", "parts"),
    [
        ("row=hspnet", {"meta", "gcn"}),
        ("row=hcp", {"meta"}),
        ("row=no_group_graph", {"meta", "gcn"}),
        ("row=no_label_graph", {"meta", "gcn"}),
        ("row=no_label_graph,prompt=shared", {"context"}),
        ("prompt=concat,taxonomy=cluster", {"meta", "gcn", "context"}),
        ("row=spl", {"context"}),
        ("row=spl_gcn", {"context", "gcn"}),
        ("row=splc_star,setup=largeloss", {"context"}),
        ("row=largeloss_star,setup=partial(0.3)", {"context"}),
        ("variant=paper", {"meta", "gcn", "group_gcn"}),
        ("variant=paper,row=no_label_graph", {"meta", "group_gcn"}),
        ("variant=paper,row=spl_gcn", {"context", "gcn"}),
    ],
)
def test_rows_of_hspnet_dry_run(arg, parts):
    """What each row trains; over the small image tower, as the rows differ beside it."""
    config = load_config(f"{CONFIGS}/hspnet/coco.py:{arg}")
    config.backbone = {"name": "clip-mini-rn"}
    trained = {path.split("/")[0] for path in dry_run(config).parts.trainable}
    assert trained == parts | {"clip"}


@pytest.mark.parametrize(
    ("corpus", "key", "rate", "gcn_rate"),
    [
        ("coco", "coco", 1e-4, 5e-4),
        ("voc", "voc", 1e-4, 7e-4),
        ("nus", "nus", 1e-4, 5e-4),
        ("cub", "cub_bs128", 1e-3, 5e-3),
    ],
)
def test_published_runs(corpus, key, rate, gcn_rate):
    """The settings of HSPNet's published logs."""
    config = hspnet(corpus)
    (stage,) = config.stages
    optim = stage.optim
    with np.load(GOLDEN) as golden:
        # The release counts 641 steps for COCO, 642 with the incomplete batch it keeps.
        assert stage.ema_decay == pytest.approx(float(golden[f"ema/decay_{key}"]), abs=1e-6)
        sizes = {"batch_size": 128, "num_examples": 128 * int(golden["onecycle/steps_per_epoch"])}
        assert to_steps(optim.schedule_duration, **sizes) == len(golden["onecycle/lr"])
        assert optim.pct_start == golden["onecycle/pct_start"]
    assert (optim.name, optim.schedule, optim.cycle_momentum) == ("adam", "onecycle", True)
    assert (optim.beta1, optim.beta2, optim.eps, optim.weight_decay) == (0.9, 0.999, 1e-8, 1e-4)
    assert optim.learning_rate == rate
    ((pattern, factor),) = optim.groups
    assert pattern == "gcn" and factor * rate == pytest.approx(gcn_rate)
    assert (config.backbone.name, config.backbone.image_size) == ("RN50", None)
    assert (stage.batch_size, stage.duration) == (128, "30 epochs")
    assert config.data["augment"] == "none" and config.eval.splits == ("test",)
    assert stage.method == {
        "name": "hspnet",
        "variant": "released",
        "loss": "splc",
        "prompt": "group",
        "n_ctx": 4,
        "train_image_encoder": True,
        "batch_norm": "frozen_first_epoch",
    }


def test_paper_preset():
    """One rate for all over the epochs that are run, and mirrored crops."""
    for corpus in ("coco", "cub"):
        config = hspnet(f"{corpus}:variant=paper")
        (stage,) = config.stages
        assert stage.method["variant"] == "paper" and config.data["augment"] == "flip_rrc"
        assert (stage.optim.learning_rate, stage.optim.groups) == (1e-4, ())
        assert (stage.duration, stage.optim.schedule_duration) == ("30 epochs", None)


@pytest.mark.parametrize("corpus", ["coco", "vg200"])
def test_partial_labels(corpus):
    config = hspnet(f"{corpus}:setup=partial(0.3)")
    (stage,) = config.stages
    assert config.data["name"] == f"{corpus}_partial(0.3)"
    assert config.data["augment"] == "flip_rrc"
    assert (config.backbone.name, config.backbone.image_size) == ("RN101", 448)
    assert (stage.optim.learning_rate, stage.optim.groups) == (1e-4, ())
    assert (stage.batch_size, stage.duration) == (32, "30 epochs")
    assert (stage.optim.learning_rate, stage.optim.schedule_duration) == (1e-4, None)
    assert config.eval.splits == ("test",)


def test_setups_and_shares_of_images():
    config = hspnet("coco:setup=largeloss,few_shot=0.1,data_dir=here,seed=3,taxonomy=cluster(9)")
    assert config.data["name"] == "coco_spml_largeloss_few_shot(0.1)"
    assert (config.data["data_dir"], config.data["taxonomy"]) == ("here", "cluster(9)")
    assert config.seed == 3 and config.eval.splits == ("validation", "test")
    # 6 566 images are 52 batches; in an epoch the old average falls to 0.82 of itself.
    assert config.stages[0].ema_decay ** 52 == pytest.approx(0.82)


def test_starred_rows():
    splc, large = (
        hspnet(f"voc:row={row}").stages[0].method for row in ("splc_star", "largeloss_star")
    )
    assert splc["loss"] == "splc" and large["loss"].startswith("large_loss(")
    assert {**splc, "loss": ""} == {**large, "loss": ""}
    assert (splc["name"], splc["ctx_init"], splc["logit_scale"]) == ("coop", "a photo of a", 10.0)


@pytest.mark.parametrize(
    ("row", "setup", "mean"),
    [
        ("hspnet", "largeloss", 61.0),
        ("hspnet", "splc", 63.1),
        ("splc_star", "largeloss", 59.0),
        ("splc_star", "splc", 61.2),
        ("largeloss_star", "largeloss", 59.1),
        ("largeloss_star", "splc", 61.1),
    ],
)
def test_numbers_of_table_1(row, setup, mean):
    """Against the averages that the table prints."""
    numbers = [
        hspnet(f"{corpus}:setup={setup},row={row}").paper["mAP"]
        for corpus in ("coco", "voc", "nus", "cub")
    ]
    assert np.mean(numbers) == pytest.approx(mean, abs=0.051)


@pytest.mark.parametrize(("corpus", "mean"), [("coco", 83.4), ("vg200", 49.4)])
def test_numbers_of_table_7(corpus, mean):
    numbers = [hspnet(f"{corpus}:setup={setup}").paper["mAP"] for setup in TENTHS]
    assert np.mean(numbers) == pytest.approx(mean, abs=0.051) and numbers == sorted(numbers)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("coco", 75.71),
        ("coco:variant=paper", 75.71),
        ("coco:taxonomy=cluster", 75.62),
        ("coco:row=spl", 74.36),
        ("coco:row=hcp", 75.18),
        ("coco:row=no_group_graph", 75.52),
        ("coco:row=hcp,setup=largeloss", None),
        ("coco:row=spl,setup=partial(0.3)", None),
        ("coco:row=hcp,taxonomy=cluster", None),
        ("coco:taxonomy=random", None),
        ("coco:prompt=concat", None),
        ("coco:few_shot=0.5", None),
        ("coco:setup=partial(0.35)", None),
        ("voc:row=spl", None),
    ],
)
def test_published_numbers_stand_beside_their_own_row_only(text, number):
    assert hspnet(text).paper == ({} if number is None else {"mAP": number})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("coco:setup=slpc", "unknown setup of coco 'slpc'; did you mean 'splc'?"),
        ("voc:setup=partial(0.3)", "unknown setup of voc 'partial'; known: largeloss, splc"),
        ("vg200:setup=splc", "unknown setup of vg200 'splc'; known: partial"),
        ("coco:setup=partial", "takes the share of labels that training sees: coco_partial(0.3)"),
        ("coco:setup=splc(0.3)", "takes nothing in brackets"),
        ("coco:few_shot=2", "few_shot"),
        ("coco:row=hsp", "unknown row 'hsp'; did you mean"),
        ("coco:row=splc_start", "did you mean 'splc_star'?"),
        ("coco:variant=release", "unknown variant 'release'; did you mean 'released'?"),
        ("coco:row=spl,prompt=add", "row 'spl' has no groups"),
        ("coco:view=full", "unknown config argument 'view'"),
        ("scenes:row=splc_star", "unknown row 'splc_star'"),
    ],
)
def test_errors_of_hspnet(text, message):
    with pytest.raises(UserError) as caught:
        hspnet(text)
    assert message in str(caught.value)


@pytest.mark.parametrize("method", ["coop", "zero_shot"])
@pytest.mark.parametrize("name", [*benchmarks.NAMES, "custom"])
def test_every_benchmark_has_a_config(method, name):
    name += "(0.5)" if "partial" in name else ""
    config = parse_config(load_config(f"{CONFIGS}/{method}/benchmark.py:data={name},data_dir=here"))
    settings = check_settings(config)
    assert settings["data"]["name"] == name and settings["data"]["data_dir"] == "here"
    if name != "custom":
        assert set(config.eval.splits) == set(benchmarks.resolve(name).splits)


@pytest.mark.parametrize(
    ("name", "loss"),
    [
        ("coco_spml_splc", "splc"),
        ("coco_splc_40", "splc"),
        ("vg200_partial(0.3)", "splc"),
        ("nus_gzsl", "ranking"),
        ("imagenet21k_to_nus", "asymmetric_softmax(gamma_negative=0.0, smoothing=0.0)"),
        ("coco", "binary_cross_entropy"),
        ("voc_lt", "distribution_balanced(negative_scale=5.0, mu=0.3)"),
        ("coco_lt", "distribution_balanced"),
    ],
)
def test_the_loss_of_coop_goes_by_the_labels(name, loss):
    """Each traces at full size, on the small tower."""
    config = load_config(f"{CONFIGS}/coop/benchmark.py:data={name},backbone=clip-mini-rn")
    config.duration = "10 steps"
    assert config.method["loss"] == loss
    dry_run(config)


@pytest.mark.parametrize("method", ["coop", "zero_shot"])
def test_long_tail_figures_of_the_paper(method):
    """Table 1 of LMPT; the total is the mean over the classes of the three groups."""
    sizes = {"voc_lt": (6, 6, 8), "coco_lt": (22, 33, 25)}
    for name, counts in sizes.items():
        for backbone in ("RN50", "ViT-B/16"):
            file = f"{CONFIGS}/{method}/benchmark.py:data={name},backbone={backbone}"
            paper = parse_config(load_config(file)).paper
            total, *parts = paper.values()
            assert list(paper) == ["mAP", "mAP/head", "mAP/medium", "mAP/tail"]
            assert total == pytest.approx(np.average(parts, weights=counts), abs=1.5)
    assert not parse_config(load_config(f"{CONFIGS}/{method}/benchmark.py:data=coco")).paper
