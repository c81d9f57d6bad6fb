"""The train command: settings from the command line, mistakes in one line."""

from __future__ import annotations

import pytest
import toys
from toys import toy_world  # noqa: F401  (a fixture)

from mlclip_jax import train

CONFIG = """
from mlclip_jax.spec import parse_arg

def get_config(arg=""):
    arg = parse_arg(arg, steps=2)
    return {config} | {{"duration": f"{{arg.steps}} steps"}}
"""


@pytest.fixture
def config_file(tmp_path):
    path = tmp_path / "config.py"
    path.write_text(CONFIG.format(config=repr(toys.config(ema_decay=None))))
    return path


def test_overrides_reach_the_configuration(config_file, tmp_path):
    config, workdir = train.parse_arguments(
        [
            f"--config={config_file}:steps=3",
            f"--workdir={tmp_path / 'run'}",
            "--config.optim.learning_rate=0.5",
            "--config.ema_decay=0.9",
            "--config.optim.schedule=constant",
            "--noconfig.compilation_cache",
            "--config.eval.splits=('test',)",
            "--config.optim.clip_norm=2",
            "--config.checkpoint.every=3 steps",
        ]
    )
    assert workdir == tmp_path / "run"
    assert config.duration == "3 steps" and config.optim.learning_rate == 0.5
    assert config.ema_decay == 0.9 and config.optim.schedule == "constant"
    assert config.eval.splits == ("test",) and config.optim.clip_norm == 2
    assert config.compilation_cache is False
    assert config.checkpoint.every == "3 steps"


@pytest.mark.usefixtures("toy_world")
def test_command_trains(config_file, tmp_path, capsys):
    args = [f"--config={config_file}", f"--workdir={tmp_path / 'run'}"]
    assert train.main([*args, "--config.method.train_bn=True"]) == 0
    printed = capsys.readouterr()
    assert "trained 2 steps" in printed.out and "clip/image/conv/kernel" in printed.out
    assert "compiled the step of stage 'train'" in printed.err
    assert (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.usefixtures("toy_world")
@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--config.optim.learning_rat=1"], "did you mean 'learning_rate'?"),
        (["--config.method.train_b=1"], "unknown config key 'method.train_b'"),
        (["--config.data.num_trai=1"], "unknown config key 'data.num_trai'"),
        (["--config.data.name=scene"], "unknown dataset 'scene'"),
        (["--config.optim.learning_rate=abc"], "could not convert string to float: 'abc'"),
        (["--config.optim.learning_rate"], "has no value"),
        (["--config.optim.learning_rate.x=1"], "cannot apply --config.optim.learning_rate.x=1"),
        (["extra"], "unexpected argument 'extra'"),
        (["--wrkdir=x"], "Did you mean: workdir"),
        (["--config.optim.learning_rate=-1"], "'optim.learning_rate' must be above 0, not -1.0"),
        (["--config.eval.metric=map"], "in config key 'eval.metric': 'map'; known: mAP, mAP/"),
        (["--config.batch_size=9"], "9 does not divide over 8 devices: use 8 or 16"),
        (["--config.optim.groups=(('nothing', 2.0),)"], "'nothing' matches no trainable"),
    ],
)
def test_mistakes_are_one_line(config_file, tmp_path, capsys, args, message):
    base = [f"--config={config_file}", f"--workdir={tmp_path / 'run'}"]
    assert train.main([*base, *args]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "--config is missing"),
        (["--config=c.py"], "--workdir is missing"),
        (["--config=nowhere.py", "--workdir=x"], "there is no config file nowhere.py"),
        (["--config={}:stps=1", "--workdir=x"], "unknown config argument 'stps'"),
    ],
)
def test_mistakes_in_the_basic_arguments(config_file, capsys, args, message):
    assert train.main([arg.format(config_file) for arg in args]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "argument", "message"),
    [
        ("# A page\n\nin words\n", "", "line 3"),
        ("import no_such_module\n", "", "No module named 'no_such_module'"),
        ("seed = 1\n", "", "defines no get_config()"),
        (
            "def get_config():\n    return {}\n",
            ":steps=1",
            "takes no argument: leave out ':steps=1'",
        ),
        ("def get_config():\n    pass\n", "", "gives None, not a dictionary"),
    ],
)
def test_mistakes_in_the_config_file(tmp_path, capsys, text, argument, message):
    path = tmp_path / "mine.py"
    path.write_text(text)
    assert train.main([f"--config={path}{argument}", f"--workdir={tmp_path / 'run'}"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert message in error and str(path) in error


@pytest.mark.usefixtures("toy_world")
def test_workdir_that_is_a_file(config_file, capsys):
    assert train.main([f"--config={config_file}", f"--workdir={config_file}"]) == 2
    error = capsys.readouterr().err
    assert str(config_file) in error and "choose another place" in error


def test_help(capsys):
    assert train.main(["--help"]) == 0
    assert "--config=FILE" in capsys.readouterr().out
