"""Losses against their authors' code, values and gradients, in float64."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from loss_cases import GOLDEN, check, close, ternary, value_and_grad

from mlclip_jax import losses
from mlclip_jax.losses import Progress
from mlclip_jax.losses.common import focal_weight, softplus, towards
from mlclip_jax.losses.longtail import class_balanced_weights

LOSSES, LMPT, HSPNET = (GOLDEN[name] for name in ("losses", "lmpt", "hspnet"))
X, Y = LOSSES["in/logits"], LOSSES["in/labels"]
VOC = {"class_counts": LMPT["in/voc_class_freq"], "num_images": int(LMPT["in/voc_train_num"])}
COCO = {"class_counts": LMPT["in/coco_class_freq"], "num_images": int(LMPT["in/coco_train_num"])}
TOY = {"class_counts": LOSSES["in/class_freq"], "num_images": int(LOSSES["in/train_num"])}


def epoch(e):
    return {"progress": Progress(step=0, epoch=e)}


# ---- losses.npz ----------------------------------------------------------------------------------

ASL = sorted(key.removeprefix("out/") for key in LOSSES.files if key.startswith("out/ASL_gn"))


@pytest.mark.parametrize("name", ASL)
def test_asymmetric(name):
    _, negative, positive, clip, weight = name.split("_")
    loss = losses.get(
        f"asymmetric(gamma_negative={negative[2:]}, gamma_positive={positive[2:]}, "
        f"clip={clip[4:]}, focal_gradient={weight == 'wgrad'})"
    )
    check(lambda x: loss(x, ternary(Y)), "losses", name, X)


@pytest.mark.parametrize(
    ("name", "spec"),
    [
        ("ASL_extreme_gn4_gp0_clip0.05_wconst", "asymmetric"),
        ("ASL_extreme_gn4_gp1_clip0.05_wgrad", "asymmetric(gamma_positive=1, focal_gradient=True)"),
        ("SPLC_extreme_epoch0", "splc(change_epoch=4)"),
        ("SPLC_extreme_epoch1", "splc"),
    ],
)
def test_extreme_logits(name, spec):
    targets = ternary(LOSSES["in/labels_extreme"], absent=0)
    loss = losses.get(spec)
    check(lambda x: loss(x, targets, **epoch(1)), "losses", name, LOSSES["in/logits_extreme"])


@pytest.mark.parametrize(
    ("name", "spec", "labels", "e"),
    [
        ("SPLC_epoch0_single", "splc", "in/labels_single_positive", 0),
        ("SPLC_epoch0_multi", "splc", "in/labels", 0),
        ("SPLC_epoch1_single", "splc", "in/labels_single_positive", 1),
        ("SPLC_epoch1_multi", "splc", "in/labels", 1),
        (
            "SPLC_mean_tau0.7_margin0.5_gamma1_epoch3_change2",
            "splc(threshold=0.7, margin=0.5, gamma=1, change_epoch=2, reduction='mean')",
            None,
            3,
        ),
        ("Hill_default_sum", "hill", "in/labels", 0),
        ("Hill_single_sum", "hill", "in/labels_single_positive", 0),
        (
            "Hill_lamb1.3_margin0.5_gamma1_mean",
            "hill(scale=1.3, margin=0.5, gamma=1, reduction='mean')",
            "in/labels",
            0,
        ),
        ("BCE_sum", "binary_cross_entropy(reduction='sum')", "in/labels", 0),
        ("DB_elementwise_mean_focal", "distribution_balanced", "in/labels", 0),
        (
            "DB_elementwise_mean_nofocal",
            "distribution_balanced(gamma=0, balance=1)",
            "in/labels",
            0,
        ),
    ],
)
def test_losses(name, spec, labels, e):
    labels = "in/labels_single_positive" if labels is None else labels
    targets = ternary(LOSSES[labels], absent=0)
    check(lambda x: losses.get(spec)(x, targets, **TOY, **epoch(e)), "losses", name, X)


def test_hill_at_large_logits():
    targets = ternary(LOSSES["in/labels_extreme"])
    x = LOSSES["in/logits_extreme_clipped12"]
    check(lambda x: losses.hill(x, targets), "losses", "Hill_extreme12", x)


@pytest.mark.parametrize("balance", [0.25, 2.0])
def test_focal(balance):
    # The release has one factor for all entries, where the paper weighs positives and the rest.
    name = f"Focal_balance{balance:g}_gamma2_mean"
    check(lambda x: balance * losses.focal(x, ternary(Y)), "losses", name, X)


@pytest.mark.parametrize("target", [1, -1])
def test_asymmetric_in_float32_keeps_small_gradients(target):
    x = np.array([[8.0, 12.0, 15.0, 17.0]])
    targets = np.full(x.shape, target, np.int8)
    spec = "asymmetric(gamma_negative=0, clip=0)"
    grad = jax.grad(lambda x: losses.get(spec)(x, targets))(jnp.asarray(x, jnp.float32))
    expected = -1 / (1 + np.exp(x)) if target > 0 else 1 / (1 + np.exp(-x))
    np.testing.assert_allclose(grad, expected, rtol=1e-5)


def test_asymmetric_softmax():
    targets = ternary(np.eye(11)[LOSSES["in/labels_class_index"]])
    name = "ASLSingleLabel_gp0_gn4_eps0.1_mean"
    check(lambda x: losses.asymmetric_softmax(x, targets), "losses", name, X)


def test_asymmetric_of_dual_prompts():
    given = LOSSES["in/labels_with_ignore"]
    targets = np.select([given == 1, given == 0], [1, -1], 0).astype(np.int8)
    loss = losses.get("asymmetric(gamma_negative=2, gamma_positive=1, ignore_unobserved=True)")

    def dual(x):
        return loss(x[:, 1] - x[:, 0], targets)

    check(dual, "losses", "DualCoOp_ASL_gn2_gp1_clip0.05", LOSSES["in/logits_pair"])


@pytest.mark.parametrize("kind", ["inv", "sqrt_inv"])
def test_inverse_frequency_with_tolerance(kind):
    power = 1.0 if kind == "inv" else 0.5

    def loss(x):
        positive = jnp.asarray(Y > 0)
        n, total = TOY["class_counts"].astype(np.float64), TOY["num_images"]
        weight = jnp.where(positive, 1, 0.5) * (total / n) ** power
        z = losses.tolerant_logits(x, positive, n, total, bias=0.025, negative_scale=2)
        right = towards(positive, z)
        return 2 * (weight * softplus(-right) * focal_weight(right, 2.0)).mean()

    check(loss, "losses", f"Resample_{kind}_focal_mean", X)


def test_inverse_frequency():
    targets = ternary(Y)
    got, _ = value_and_grad(lambda x: losses.inverse_frequency(x, targets, **TOY), X)
    weight = np.sqrt(TOY["num_images"] / TOY["class_counts"])
    close(got, (weight * np.logaddexp(0, np.where(Y > 0, -X, X))).mean())


# ---- lmpt.npz ------------------------------------------------------------------------------------

SETTINGS = {
    "voc": (VOC, "mu=0.3, negative_scale=5"),
    "coco": (COCO, "mu=0.2, negative_scale=2"),
}


@pytest.mark.parametrize("data", SETTINGS)
@pytest.mark.parametrize("release", ["wutong", "lmpt"])
@pytest.mark.parametrize("focal", ["focal", "nofocal"])
def test_distribution_balanced_releases(data, release, focal):
    given, settings = SETTINGS[data]
    variant = "authors" if release == "wutong" else "lmpt"
    no_focal = ", gamma=0, balance=1" if focal == "nofocal" else ""
    loss = losses.get(f"distribution_balanced({settings}, variant={variant!r}{no_focal})")
    targets = ternary(LMPT[f"in/{data}_labels"])
    name = f"db_{release}_{data}_{focal}"
    check(lambda x: loss(x, targets, **given), "lmpt", name, LMPT[f"in/{data}_logits"])


@pytest.mark.parametrize("data", SETTINGS)
def test_distribution_balanced_as_printed(data):
    given, settings = SETTINGS[data]
    loss = losses.get(f"distribution_balanced({settings}, variant='paper')")
    targets = ternary(LMPT[f"in/{data}_labels"])
    x = LMPT[f"in/{data}_logits"]
    check(lambda x: loss(x, targets, **given), "lmpt", f"db_paper_printed_{data}", x)
    # Summed over the positives of the image, the authors' loss is the printed one, but for the
    # bias (divided by the scale) and the factor 2.
    scale = int(settings.rpartition("=")[2])
    loss = losses.get(f"distribution_balanced({settings}, bias={0.05 * scale}, balance=1)")
    check(lambda x: loss(x, targets, **given), "lmpt", f"db_paper_perinstance_{data}", x)


def test_distribution_balanced_of_each_image():
    given, settings = SETTINGS["voc"]
    targets = ternary(LMPT["in/voc_labels"])
    loss = losses.get(f"distribution_balanced({settings}, reduction='sum')")
    with jax.enable_x64(True):
        x = jnp.asarray(LMPT["in/voc_logits"])
        rows = jnp.eye(len(x), dtype=bool)[:, :, None]
        got = jax.vmap(lambda row: loss(x, targets, where=row, **given))(rows)
    close(got, LMPT["out/db_wutong_voc_focal/elementwise"].sum(-1))


@pytest.mark.parametrize("data", SETTINGS)
def test_pieces_of_distribution_balanced(data):
    given, settings = SETTINGS[data]
    scale = int(settings.rpartition("=")[2])
    positive = jnp.asarray(LMPT[f"in/{data}_labels"] > 0)
    mu = 0.3 if data == "voc" else 0.2
    with jax.enable_x64(True):
        n = jnp.asarray(given["class_counts"], jnp.float64)
        weight = losses.rebalancing_weights(positive, n, mu=mu)
        close(weight, LMPT[f"out/db_{data}_rebalance_weight"])
        zero = jnp.zeros(positive.shape, jnp.float64)
        bias = losses.tolerant_logits(
            zero, positive, n, given["num_images"], bias=0.05 / scale, negative_scale=1
        )
        close(bias[0], LMPT[f"out/db_{data}_init_bias"])


def negative_tolerant(x, weight, gamma):
    """Compositions that only LMPT's baselines use: tolerance around other weights."""
    positive = jnp.asarray(LMPT["in/voc_labels"] > 0)
    n = VOC["class_counts"].astype(np.float64)
    z = losses.tolerant_logits(x, positive, n, VOC["num_images"], bias=0.05, negative_scale=2)
    right = towards(positive, z)
    return (weight(positive, n) * softplus(-right) * focal_weight(right, gamma)).mean()


def scaled(weight):
    return lambda p, n: jnp.where(p, 1, 0.5) * weight(p, n)


def by_class(p, n):
    return class_balanced_weights(p, n, mode="by_class")


BASELINES = {
    "BCE": lambda x, y: losses.binary_cross_entropy(x, y),
    "FL": lambda x, y: losses.focal(x, y, alpha=0.5),
    "CBloss": lambda x, y: (
        5 * losses.class_balanced(x, y, class_counts=VOC["class_counts"], mode="by_class", gamma=2)
    ),
    "R-BCE-Focal": lambda x, y: losses.rebalanced_focal(
        x, y, class_counts=VOC["class_counts"], balance=0.5
    ),
    "NTR-Focal": lambda x, y: 0.5 * negative_tolerant(x, lambda p, n: 1, 2.0),
    "CBloss-ntr": lambda x, y: 5 * negative_tolerant(x, scaled(by_class), 2.0),
    "DBloss": lambda x, y: losses.distribution_balanced(x, y, **VOC, bias=0.1, balance=0.5),
    "DBloss-noFocal": lambda x, y: losses.distribution_balanced(
        x, y, **VOC, bias=0.1, gamma=0, balance=0.5
    ),
}


@pytest.mark.parametrize("name", BASELINES)
def test_baselines_of_lmpt(name):
    targets = ternary(LMPT["in/voc_labels"])
    loss = BASELINES[name]
    check(lambda x: loss(x, targets), "lmpt", f"bl_{name}", LMPT["in/voc_logits"])


@pytest.mark.parametrize("mode", ["by_class", "average_n", "average_w", "min_n"])
def test_class_balanced_weights(mode):
    positive = jnp.asarray(LMPT["in/voc_labels"] > 0)
    with jax.enable_x64(True):
        n = jnp.asarray(VOC["class_counts"], jnp.float64)
        got = class_balanced_weights(positive, n, mode=mode)
    expected = LMPT[f"out/CB_weight_{mode}"]
    close(got, np.broadcast_to(expected, got.shape))


@pytest.mark.parametrize(
    ("name", "spec"),
    [
        ("BCE_mean", "assume_negative"),
        ("MLSM_mean", "multi_label_soft_margin"),
        ("ASL_lmpt_g4_0_c05_mean_nograd", "asymmetric(reduction='mean')"),
        ("ASL_lmpt_g4_0_c05_mean_grad", "asymmetric(reduction='mean', focal_gradient=True)"),
    ],
)
def test_other_losses_of_lmpt(name, spec):
    targets = ternary(LMPT["in/voc_labels"])
    check(lambda x: losses.get(spec)(x, targets), "lmpt", name, LMPT["in/voc_logits"])


def test_focal_of_lmpt():
    targets = ternary(LMPT["in/voc_labels"])
    name = "focal_wutong_sigmoid_b025_mean"
    check(lambda x: 0.25 * losses.focal(x, targets), "lmpt", name, LMPT["in/voc_logits"])


CSE = {
    "eq6_eta1_gamma1": {"margin": 1.0, "gamma": 1.0},
    "eq6_eta1_gamma0.5": {"margin": 1.0, "gamma": 0.5},
    "eq6_eta4_gamma1": {"margin": 4.0, "gamma": 1.0},
    "eq4_only_noreweight_eta4": {"margin": 4.0, "reweight": False},
    "eq3_mu1": {"class_counts": None},
}


@pytest.mark.parametrize("name", CSE)
def test_class_specific_embedding(name):
    targets = ternary(LMPT["cse/labels01"])
    settings = {"class_counts": LMPT["cse/freq"], **CSE[name]}

    def loss(prompts, reduction="sum_classes_mean_images", where=None):
        captions = jnp.asarray(LMPT["cse/t_caption_feat"])
        distances = losses.embedding_distances(captions, prompts)
        return losses.class_specific_embedding(
            distances, targets, reduction=reduction, where=where, **settings
        )

    prompts = LMPT["cse/o_prompt_feat"]
    value, grad = value_and_grad(loss, prompts)
    close(value, LMPT[f"cse/paper_{name}_sumC_meanB"])
    close(grad, LMPT[f"cse/paper_{name}_grad_o"])
    mean, _ = value_and_grad(lambda o: loss(o, "mean"), prompts)
    close(mean, LMPT[f"cse/paper_{name}_meanCB"])
    with jax.enable_x64(True):
        rows = jnp.eye(3, dtype=bool)[:, :, None]
        each = jax.vmap(lambda row: loss(jnp.asarray(prompts), "sum", row))(rows)
    expected = LMPT[f"cse/paper_{name}_elementwise"].sum(-1)
    close(each, expected)


def test_distances_of_lmpt():
    with jax.enable_x64(True):
        got = losses.embedding_distances(
            jnp.asarray(LMPT["cse/t_caption_feat"]), jnp.asarray(LMPT["cse/o_prompt_feat"])
        )
        close(got, LMPT["cse/paper_delta"])
        tokens = losses.token_distances(
            jnp.asarray(LMPT["cse/caption_token_emb"], jnp.float64),
            jnp.asarray(LMPT["cse/prompt_token_emb"], jnp.float64),
            offset=int(LMPT["cse/m_ctx"]),
        )
        close(tokens, LMPT["cse/token_level_x"].sum(-1))
        released = losses.class_specific_embedding_released(
            tokens, ternary(LMPT["cse/labels01"]), margin=2.0
        )
        close(released, LMPT["cse/token_level_code_loss_margin2"])


@pytest.mark.parametrize(
    ("value", "grad", "settings"),
    [
        ("nocounts_margin0.2", "nocounts_grad", {}),
        ("nocounts_margin2", "nocounts_margin2_grad", {"margin": 2.0}),
        ("fixeddim_rawcounts_margin0.2_gamma1", None, {"gamma": 1.0, "counts": True}),
        ("fixeddim_rawcounts_margin0.2_gamma2", None, {"gamma": 2.0, "counts": True}),
    ],
)
def test_class_specific_embedding_as_released(value, grad, settings):
    settings = dict(settings)
    counts = LMPT["cse/freq"] if settings.pop("counts", False) else None
    targets = ternary(LMPT["cse/labels01"])

    def loss(x):
        return losses.class_specific_embedding_released(
            x.sum(-1), targets, class_counts=counts, **settings
        )

    got, got_grad = value_and_grad(loss, LMPT["cse/x_one_minus_cos"])
    close(got, LMPT[f"cse/code_{value}"])
    close(got_grad, LMPT[f"cse/code_{grad or value + '_grad'}"])


def test_total_loss_of_lmpt():
    with jax.enable_x64(True):
        bce = losses.binary_cross_entropy(
            jnp.asarray(LMPT["in/voc_logits"]), ternary(LMPT["in/voc_labels"])
        )
        cse = losses.class_specific_embedding(
            jnp.asarray(LMPT["cse/paper_delta"]),
            ternary(LMPT["cse/labels01"]),
            class_counts=LMPT["cse/freq"],
        )
        close(0.5 * bce + 0.5 * cse, LMPT["cse/total_lambda0.5_example"])


# ---- hspnet.npz ----------------------------------------------------------------------------------


@pytest.mark.parametrize("e", [0, 1])
def test_loss_of_hspnet(e):
    targets = ternary(HSPNET["in/targets"], absent=0)
    value, _ = value_and_grad(lambda x: losses.splc(x, targets, **epoch(e)), HSPNET["out/logits"])
    close(value, HSPNET[f"out/loss_epoch{e}"])
