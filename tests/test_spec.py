"""Text settings: config arguments and call strings."""

from __future__ import annotations

import pytest

from mlclip_jax.errors import UserError
from mlclip_jax.spec import parse_arg, parse_call


def test_config_arguments_take_their_defaults_type() -> None:
    arg = parse_arg("setup=largeloss,tiny,lr=1,k=3", setup="splc", tiny=False, lr=0.1, k=4)
    assert (arg.setup, arg.tiny, arg.lr, arg.k) == ("largeloss", True, 1.0, 3)
    assert parse_arg(None, setup="splc").setup == "splc"
    arg = parse_arg("view=partial(0.1, seed=3)+full(seed=1, x=2),tiny", view="full", tiny=False)
    assert (arg.view, arg.tiny) == ("partial(0.1, seed=3)+full(seed=1, x=2)", True)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tinny", "unknown config argument 'tinny'; did you mean 'tiny'"),
        ("k=three", "k takes a int"),
        ("k", "k takes a int"),
        ("tiny=3", "tiny takes a bool"),
    ],
)
def test_wrong_config_arguments_are_named(text: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_arg(text, tiny=False, k=4)
    assert message in str(caught.value)


def test_calls() -> None:
    assert parse_call("partial(0.3)", what="view") == ("partial", (0.3,), {})
    assert parse_call("hill(margin=1, mean=True)", what="loss") == (
        "hill", (), {"margin": 1, "mean": True}
    )  # fmt: skip
    for text in ("a.b", "f(x)", "f(**{})", "f(", "1"):
        with pytest.raises(UserError, match="should read"):
            parse_call(text, what="loss")
