"""Whole runs: resuming bit for bit, stages, the guard, what checkpoints hold."""

from __future__ import annotations

import gc
import json
import re
import shutil

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import toys
from toys import toy_world  # noqa: F401  (a fixture)

from mlclip_jax.errors import UserError
from mlclip_jax.training import loop
from mlclip_jax.training import stage as stage_module
from mlclip_jax.training.build import load_trained
from mlclip_jax.training.checkpoint import Checkpoints, restore_model
from mlclip_jax.training.config import parse_config
from mlclip_jax.training.loop import check_unchanged, differences, fit
from mlclip_jax.training.mesh import make_mesh

pytestmark = pytest.mark.usefixtures("toy_world")

TWO_STAGES = (
    {"name": "bias", "method": {"part": "none"}, "duration": "3 steps"},
    {"name": "tower", "optim": {"schedule": "onecycle"}, "duration": "8 steps", "ema_decay": 0.5},
)

AVERAGED = {
    "method": {"name": "tower", "train_bn": True},
    "ema_decay": 0.9,
    "log_every": "3 steps",
}


def one_device():
    return make_mesh(jax.devices()[:1])


def run(workdir, config=None, *, stop_at=None, mesh=None):
    """Trains; `stop_at` interrupts before the batch of that number, counted over the run."""
    with pytest.MonkeyPatch.context() as patch:
        if stop_at is not None:
            original, served = stage_module.train_batches, [0]

            def interrupted(*args, **kwargs):
                for batch in original(*args, **kwargs):
                    # One batch is always under way ahead of the step.
                    if served[0] > stop_at:
                        raise KeyboardInterrupt
                    served[0] += 1
                    yield batch

            patch.setattr(stage_module, "train_batches", interrupted)
        return fit(config or toys.config(), workdir, mesh=mesh or one_device(), quiet=True)


def rows(workdir):
    """Metric rows without what the clock decides."""
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    timed = ("images_per_second",)
    return [{k: v for k, v in json.loads(line).items() if k not in timed} for line in lines]


def arrays(workdir, step=None):
    """All arrays of the latest checkpoint."""
    with Checkpoints(workdir) as checkpoints:
        step = checkpoints.steps()[-1] if step is None else step
        shapes = checkpoints._tree(step)
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), shapes)
        restore = ocp.args.PyTreeRestore(item=shapes, restore_args=as_numpy)
        tree = checkpoints._manager.restore(step, args=ocp.args.Composite(state=restore))["state"]
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def assert_same(left, right):
    assert left.keys() == right.keys()
    for path, value in left.items():
        np.testing.assert_array_equal(value, right[path], err_msg=path)


def test_run_learns_and_reports(tmp_path):
    result = run(tmp_path, toys.config(duration="12 epochs", ema_decay=0.9))
    table = rows(tmp_path)
    losses = [row["loss"] for row in table if row["split"] == "train"]
    assert len(losses) == 30 and losses[-1] < 0.9 * losses[0]
    assert result.step == 60 and result.metrics["validation"].keys() == {"raw", "ema"}
    assert [r["step"] for r in table if r["split"] == "train"] == list(range(2, 61, 2))
    evaluations = [r for r in table if r["split"] == "validation"]
    assert [r["step"] for r in evaluations] == [s for s in range(5, 61, 5) for _ in range(2)]
    last = evaluations[-1]
    assert last["weights"] == "ema" and last["mAP"] == result.metrics["validation"]["ema"]["mAP"]
    assert len(last["per_class_ap"]) == 6 and {"mAP/colour", "mAP/number"} <= last.keys()
    assert set(table[0]) >= {"loss", "grad_norm", "learning_rate", "epoch", "stage", "step"}


@pytest.mark.parametrize(
    ("fields", "stop_at", "devices"),
    [
        pytest.param({}, 8, 1, id="plain"),
        pytest.param(AVERAGED, 7, 1, id="average-and-batch-norm"),
        pytest.param(AVERAGED, 7, 8, id="average-and-batch-norm-on-eight-devices"),
        pytest.param(
            {"stages": TWO_STAGES, "eval": {"every": "2 steps", "splits": ("test",)}},
            8,
            1,
            id="second-stage",
        ),
        pytest.param(
            {
                "optim": {"schedule": "plateau", "plateau_patience": 0, "learning_rate": 1e-3},
                "eval": {"every": "2 steps"},
                "data": {"name": "blocks", "mirrored": True},
            },
            7,
            1,
            id="plateau-and-flip",
        ),
        pytest.param({"sampling": "class_aware"}, 8, 1, id="class-aware"),
    ],
)
def test_resumed_equals_uninterrupted(tmp_path, fields, stop_at, devices):
    config, mesh = toys.config(**fields), make_mesh(jax.devices()[:devices])
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    expected = run(whole, config, mesh=mesh)
    with pytest.raises(KeyboardInterrupt):
        run(broken, config, stop_at=stop_at, mesh=mesh)
    with Checkpoints(broken) as checkpoints:
        reached = checkpoints.steps()[-1]
    assert 0 < reached < stop_at
    result = run(broken, config, mesh=mesh)
    assert result.step == expected.step and result.metrics == expected.metrics
    assert rows(broken) == rows(whole)
    assert_same(arrays(broken), arrays(whole))


def test_sampling_is_of_the_stage(tmp_path, monkeypatch):
    original, asked = stage_module.train_batches, []

    def noted(source, batch_size, **kwargs):
        asked.append(kwargs["sampling"])
        return original(source, batch_size, **kwargs)

    monkeypatch.setattr(stage_module, "train_batches", noted)
    stages = (
        {"name": "one", "duration": "2 steps"},
        {"name": "two", "duration": "2 steps", "sampling": "class_aware"},
    )
    assert run(tmp_path, toys.config(stages=stages)).step == 4
    assert asked == ["uniform", "class_aware"]


def test_steps_under_way_are_bounded(tmp_path, monkeypatch):
    original, waiting = stage_module.StageRun._retire, []

    def counted(self):
        waiting.append(len(self.waiting))
        original(self)

    monkeypatch.setattr(stage_module.StageRun, "_retire", counted)
    off = {"every": "0 steps"}
    run(tmp_path, toys.config(duration="12 steps", eval=off, checkpoint=off))
    assert len(waiting) == 12 and max(waiting) == stage_module.IN_FLIGHT + 1


def test_a_step_transfers_nothing_by_itself(tmp_path, monkeypatch):
    # Labels left on the host would be sent anew for every step.
    monkeypatch.setattr(loop, "shard_labels", lambda labels, mesh: labels)
    with pytest.raises(Exception, match="Disallowed host-to-device transfer"):
        run(tmp_path, toys.config(duration="2 steps"))


def test_evaluation_reads_each_split_once_for_all_weights(tmp_path, monkeypatch):
    original, opened = stage_module.eval_batches, []

    def counted(source, *args, **kwargs):
        opened.append(source.seed)
        return original(source, *args, **kwargs)

    monkeypatch.setattr(stage_module, "eval_batches", counted)
    evaluation = {"every": "2 steps", "splits": ("validation", "test")}
    run(tmp_path, toys.config(duration="4 steps", ema_decay=0.5, eval=evaluation))
    assert opened == [1, 2, 1, 2]


def test_leaves_are_on_the_devices_once(tmp_path, monkeypatch):
    original, found = stage_module.StageRun._retire, []

    def count():
        gc.collect()
        alone = [leaf for leaf in jax.live_arrays() if len(leaf.devices()) == 1]
        embeddings = [leaf for leaf in alone if leaf.shape == (64, 16)]
        return len({leaf.unsafe_buffer_pointer() for leaf in embeddings})

    def counted(self):
        original(self)
        found.append(count() - before)

    before = count()
    monkeypatch.setattr(stage_module.StageRun, "_retire", counted)
    stages = tuple(
        {"name": part, "method": {"part": part}, "duration": "2 steps"}
        for part in ("none", "clip/", "bias")
    )
    run(tmp_path, toys.config(stages=stages))
    assert found == [1, 1, 3, 3, 1, 1]  # where they train, with Adam's two moments


def test_finished_run_is_left_as_it_is(tmp_path):
    first = run(tmp_path)
    before = (tmp_path / "metrics.jsonl").read_text()
    again = run(tmp_path)
    assert again.step == first.step and again.metrics == first.metrics
    assert (tmp_path / "metrics.jsonl").read_text() == before


def test_longer_duration_goes_on(tmp_path, capsys):
    run(tmp_path)
    config = toys.config(duration="3 epochs")
    assert fit(config, tmp_path, mesh=one_device()).step == 15
    output = capsys.readouterr().out
    assert "differs from the checkpoint's in: duration\n" in output
    assert "after 10 of 15 steps" in output


def test_eight_devices_run_like_one(tmp_path):
    config = toys.config(method={"name": "tower", "train_bn": True}, duration="3 steps")
    one, eight = run(tmp_path / "one", config), run(tmp_path / "eight", config, mesh=make_mesh())
    assert one.step == eight.step == 3
    left, right = rows(tmp_path / "one")[0], rows(tmp_path / "eight")[0]
    np.testing.assert_allclose(left["loss"], right["loss"], rtol=1e-5)


def test_a_run_continues_on_other_devices(tmp_path):
    config = toys.config(**AVERAGED)
    run(tmp_path / "whole", config)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "broken", config, stop_at=7, mesh=make_mesh())
    assert run(tmp_path / "broken", config).step == 10
    left, right = arrays(tmp_path / "broken"), arrays(tmp_path / "whole")
    assert left.keys() == right.keys()
    for path in left:
        np.testing.assert_allclose(left[path], right[path], rtol=1e-3, atol=1e-5, err_msg=path)


def test_checkpoint_holds_what_differs_from_the_backbone(tmp_path):
    run(tmp_path, toys.config(duration="1 steps"))
    saved = arrays(tmp_path)
    text = " ".join(saved)
    assert "clip/image/conv/kernel" in text and "bias" in text
    assert "clip/text" not in text and "logit_scale" not in text
    # BatchNorm statistics did not move, so they are the backbone's; nothing was averaged.
    assert "bn/mean" not in text and "['ema']" not in text

    moving = tmp_path / "moving"
    run(moving, toys.config(duration="1 steps", method={"name": "tower", "train_bn": True}))
    assert "['batch_stats']['clip/image/bn/mean']" in arrays(moving)


def test_later_stages_keep_what_earlier_ones_trained(tmp_path):
    stages = (
        {"name": "one", "method": {"train_bn": True}, "duration": "2 steps"},
        {"name": "two", "method": {"part": "none"}, "duration": "2 steps"},
    )
    run(tmp_path, toys.config(stages=stages, checkpoint={"keep": 9}))
    first, second = arrays(tmp_path, 2), arrays(tmp_path, 4)
    for path in ("conv/kernel", "projection", "bn/scale"):
        trained = first[f"['trainable']['clip/image/{path}']"]
        np.testing.assert_array_equal(second[f"['frozen']['clip/image/{path}']"], trained)
    np.testing.assert_array_equal(
        second["['frozen']['clip/image/bn/mean']"], first["['batch_stats']['clip/image/bn/mean']"]
    )
    assert {k for k in second if "trainable" in k} == {"['trainable']['bias']"}
    assert [row["stage"] for row in rows(tmp_path)] == ["one", "one", "two", "two"]


def test_trained_method_comes_back(tmp_path):
    result = run(tmp_path, toys.config(ema_decay=0.5, stages=TWO_STAGES))
    batch = toys.batch()
    for weights in ("raw", "ema"):
        trained = load_trained(tmp_path, which="latest", weights=weights)
        assert trained.step == result.step == 11 and trained.meta["weights"] == weights
        assert trained.space == toys.SPACE
        saved = arrays(tmp_path)
        part = "trainable" if weights == "raw" else "ema"
        kernel = trained.method.clip.image.conv.kernel[...]
        np.testing.assert_array_equal(kernel, saved[f"['{part}']['clip/image/conv/kernel']"])
        features = trained.method.encode_images(batch.images)
        assert features.pooled.shape == (8, 16)
    assert load_trained(tmp_path).meta["weights"] == "ema"


def test_best_checkpoints_stay(tmp_path):
    # Raw and averaged weights in turn; they peak at different steps.
    original, scores = stage_module.evaluate, iter([0.9, 0.1, 0.2, 0.8, 0.3, 0.2, 0.4, 0.1])

    def scripted(*args, **kwargs):
        found = original(*args, **kwargs)
        for result in found.values():
            result.metrics["mAP"] = next(scores)
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage_module, "evaluate", scripted)
        evaluation = {"every": "2 steps", "splits": ("validation",)}
        run(tmp_path, toys.config(ema_decay=0.5, eval=evaluation, duration="8 steps"))
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.steps() == [2, 4, 8]
    assert restore_model(tmp_path, weights="raw").step == 2
    assert restore_model(tmp_path, weights="ema").step == 4
    assert restore_model(tmp_path, which="latest").step == 8


def test_best_checkpoint_is_of_the_last_stage(tmp_path):
    original, scores = stage_module.evaluate, iter([0.9, 0.1, 0.2, 0.1])

    def scripted(*args, **kwargs):
        found = original(*args, **kwargs)
        for result in found.values():
            result.metrics["mAP"] = next(scores)
        return found

    stages = ({"name": "one", "duration": "1 steps"}, {"name": "two", "duration": "3 steps"})
    evaluation = {"every": "1 steps", "splits": ("validation",)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage_module, "evaluate", scripted)
        run(tmp_path, toys.config(stages=stages, eval=evaluation))
    assert restore_model(tmp_path).step == 3


def test_guard_names_the_step_and_the_last_good_checkpoint(tmp_path):
    config = toys.config(
        duration="40 steps",
        optim={"name": "sgd", "learning_rate": 1e30, "schedule": "constant", "warmup": "6 steps"},
        checkpoint={"every": "1 steps"},
        eval={"every": "0 steps"},
    )
    with pytest.raises(
        UserError, match=r"are not finite at step 2 .*last good checkpoint is step 1 in"
    ):
        run(tmp_path, config)
    assert restore_model(tmp_path).step == 1
    with pytest.raises(UserError, match="there is no checkpoint yet"):
        run(tmp_path / "none", {**config, "checkpoint": {"every": "10 steps"}})


def test_missing_checkpoint(tmp_path):
    with pytest.raises(UserError, match=r"no checkpoint in .*: train first with python -m"):
        load_trained(tmp_path)
    run(tmp_path, toys.config(duration="1 steps"))
    with pytest.raises(UserError, match="no averaged weights: the run had no ema_decay"):
        load_trained(tmp_path, weights="ema")


@pytest.mark.parametrize(
    "damage",
    [
        "meta/metadata",
        "state/_METADATA",
        "state/manifest.ocdbt",
        "state/d",
        "state/ocdbt.process_0/d",
    ],
)
def test_damaged_checkpoint_is_named(tmp_path, damage, monkeypatch):
    run(tmp_path, toys.config(duration="1 steps"))
    damaged = tmp_path / "checkpoints" / "1" / damage
    if damaged.is_dir():
        shutil.rmtree(damaged)
    else:
        damaged.write_bytes(b"")
    if "METADATA" not in damage:  # arrays that are not there are not asked for
        monkeypatch.setattr(Checkpoints, "_restore", None)
    with pytest.raises(UserError, match=r"checkpoint 1 in .* cannot be read: it is damaged"):
        load_trained(tmp_path)
    with pytest.raises(UserError, match=r"checkpoint 1 in .* cannot be read: it is damaged"):
        run(tmp_path, toys.config(duration="2 steps"))


def test_checkpoints_of_others_are_named(tmp_path):
    (tmp_path / "checkpoints" / "5").mkdir(parents=True)
    with pytest.raises(UserError, match="not of a training run"):
        load_trained(tmp_path)
    with pytest.raises(UserError, match="not of a training run"):
        run(tmp_path)


def test_other_backbone_labels_or_shapes_are_refused(tmp_path):
    run(tmp_path, toys.config(duration="1 steps"))
    with pytest.raises(UserError, match="trained on other weights of 'other'"):
        run(tmp_path, toys.config(backbone={"name": "other"}))
    with pytest.raises(UserError, match=r"does not fit .*missing ema/bias"):
        run(tmp_path, toys.config(ema_decay=0.9))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"seed": 3}, "seed was 0 and is 3"),
        ({"batch_size": 16}, "batch_size was 8 and is 16"),
        ({"sampling": "class_aware"}, "sampling was 'uniform' and is 'class_aware'"),
        ({"data": {"name": "blocks", "num_train": 48}}, "data.num_train was 40 and is 48"),
        ({"method": {"name": "tower", "train_bn": True}}, "method.train_bn was False and is True"),
        (
            {"backbone": {"name": "toy", "image_norm": "imagenet"}},
            "backbone.image_norm was None and is 'imagenet'",
        ),
        ({"stages": TWO_STAGES}, "stages was None and is "),
    ],
)
def test_what_decides_a_run_may_not_change(tmp_path, fields, message):
    run(tmp_path, toys.config(duration="1 steps"))
    with pytest.raises(UserError, match=f"{re.escape(message)}.*use another workdir"):
        run(tmp_path, toys.config(**{"duration": "2 steps", **fields}))


def test_what_a_stage_trains_may_not_change_but_its_length_may(tmp_path):
    first, second = TWO_STAGES
    run(tmp_path, toys.config(stages=TWO_STAGES))
    longer = {**second, "duration": "9 steps"}
    assert run(tmp_path, toys.config(stages=(first, longer))).step == 12
    other = {**second, "method": {"part": "clip/"}}
    with pytest.raises(UserError, match=r"stages\[1\]\.method\.part was 'clip/image/' and is"):
        run(tmp_path, toys.config(stages=(first, other)))
    with pytest.raises(UserError, match="stages was "):
        run(tmp_path, toys.config(stages=(first,)))


def test_a_default_written_out_or_other_workers_are_no_change(tmp_path):
    data = {"name": "blocks", "num_train": 40, "num_workers": 1}
    method = {"name": "tower", "train_bn": False}
    config = toys.config(duration="2 steps", seed=0, data=data, method=method)
    check_unchanged(parse_config(toys.config()), parse_config(config), tmp_path)


def test_method_without_parameters_is_only_evaluated(tmp_path):
    config = toys.config(method={"name": "zero_shot"}, duration="0 steps")
    result = run(tmp_path, config)
    assert result.step == 0 and "mAP" in result.metrics["validation"]["raw"]
    assert load_trained(tmp_path).step == 0
    with pytest.raises(UserError, match="nothing trains in method 'zero_shot'"):
        run(tmp_path / "other", {**config, "duration": "1 steps"})


def test_differences_are_dotted():
    old = {"a": 1, "b": {"c": 2, "d": [1, 2]}, "e": 3}
    new = {"a": 1, "b": {"c": 3, "d": (1, 5)}, "f": 3}
    expected = {"b.c": (2, 3), "b.d[1]": (2, 5), "e": (3, None), "f": (None, 3)}
    assert differences(old, new) == expected
    assert differences(new, json.loads(json.dumps(new))) == {}
