"""Configurations: checked, resolved into stages, durations in any unit."""

from __future__ import annotations

import json

import pytest
from ml_collections import ConfigDict

from mlclip_jax.errors import UserError
from mlclip_jax.training.config import parse_config, to_steps

BASE = {"method": {"name": "coop", "n_ctx": 4}, "data": {"name": "scenes"}}


def with_fields(**fields):
    return parse_config({**BASE, **fields})


def test_defaults_make_one_stage():
    config = parse_config(ConfigDict(BASE))
    (stage,) = config.stages
    assert stage.name == "train" and stage.batch_size == 32 and stage.ema_decay is None
    assert stage.method == {"name": "coop", "n_ctx": 4}
    assert config.eval.splits == ("validation", "test") and config.checkpoint.keep == 1


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"batchsize": 3}, "unknown config key 'batchsize': did you mean 'batch_size'?"),
        ({"optim": {"learning_rat": 1.0}}, "'optim.learning_rat': did you mean 'learning_rate'?"),
        ({"eval": {"evry": "1 epochs"}}, "'eval.evry': did you mean 'every'?"),
        ({"stages": ({"optm": {}},)}, r"'stages\[0\].optm': did you mean 'optim'?"),
        ({"stages": ({"seed": 1},)}, r"'stages\[0\].seed'"),
        ({"stages": ({"optim": {"lr": 1}},)}, r"unknown config key 'stages\[0\].optim.lr'"),
        ({"seed": "one"}, "'seed' must be int, not 'one'"),
        ({"seed": True}, "'seed' must be int, not True"),
        ({"optim": {"name": "adm"}}, "'optim.name' must be one of 'adamw', 'adam', 'sgd'"),
        ({"backbone": 3}, "'backbone' must be a mapping, not 3"),
        ({"paper": {"mAP": 713}}, "'paper.mAP' must be a number between 0 and 100, not 713"),
        ({"paper": {"mAP": "71"}}, "'paper.mAP' must be a number between 0 and 100, not '71'"),
        ({"eval": {"splits": "test"}}, "'eval.splits' must be tuple"),
        ({"batch_size": 0}, "'batch_size' must be at least 1"),
        ({"sampling": "by class"}, "'sampling' must be one of 'uniform', 'class_aware'"),
        ({"ema_decay": 1.0}, "'ema_decay' must lie in"),
        ({"duration": "5"}, "'duration': '5' is no length"),
        ({"duration": "5 minutes"}, "write 'N steps', 'N epochs' or 'N examples'"),
        ({"duration": "nan steps"}, "is no length"),
        ({"optim": {"warmup": "some"}}, "'optim.warmup': 'some' is no length"),
        ({"log_every": "-1 steps"}, "'log_every': '-1 steps' is no length"),
        ({"method": {"n_ctx": 4}}, "'method.name' is missing"),
        ({"stages": ({"name": "a"}, {"name": "a"})}, "repeats a stage name"),
    ],
)
def test_mistakes_are_named(fields, message):
    with pytest.raises(UserError, match=message):
        with_fields(**fields)


def test_missing_part_is_named():
    with pytest.raises(UserError, match="'data' is missing"):
        parse_config({"method": {"name": "coop"}})


def test_stages_override_the_run():
    config = with_fields(
        optim={"learning_rate": 0.1, "weight_decay": 0.5},
        ema_decay=0.9,
        stages=(
            {"name": "first", "optim": {"learning_rate": 1}, "method": {"n_ctx": 2}},
            {"batch_size": 8, "sampling": "class_aware", "duration": "3 steps", "ema_decay": None},
        ),
    )
    first, second = config.stages
    assert (first.name, second.name) == ("first", "stage2")
    assert (first.optim.learning_rate, second.optim.learning_rate) == (1.0, 0.1)
    assert first.optim.weight_decay == second.optim.weight_decay == 0.5
    assert first.method == {"name": "coop", "n_ctx": 2} and second.method["n_ctx"] == 4
    assert (first.batch_size, second.batch_size) == (32, 8)
    assert (first.sampling, second.sampling) == ("uniform", "class_aware")
    assert (first.ema_decay, second.ema_decay) == (0.9, None)


def test_groups_come_as_pairs_or_mapping():
    pairs = (("^gcn/", 5.0), ("head", 2.0))
    for groups in (pairs, dict(pairs), [list(pair) for pair in pairs]):
        assert with_fields(optim={"groups": groups}).stages[0].optim.groups == pairs


def test_json_gives_the_same_configuration():
    config = with_fields(
        stages=({"name": "a", "optim": {"groups": (("x", 1.0),)}}, {"name": "b"}),
        eval={"splits": ("test",)},
    )
    assert parse_config(json.loads(json.dumps(config.source))) == config


def test_durations():
    sizes = {"batch_size": 32, "num_examples": 1000}
    assert to_steps("7 steps", **sizes) == 7
    assert to_steps("2 epochs", **sizes) == 62
    assert to_steps("0.5 epoch", **sizes) == 16
    assert to_steps("1e3 examples", **sizes) == 32
    # What is positive is at least one step; zero turns a thing off.
    for duration in ("0.01 epochs", "0.1 steps", "1 examples"):
        assert to_steps(duration, **sizes) == 1
    for unit in ("steps", "epochs", "examples"):
        assert to_steps(f"0 {unit}", **sizes) == 0
    with pytest.raises(UserError, match="batch_size 32 is larger than the 20 training examples"):
        to_steps("1 epochs", batch_size=32, num_examples=20)
