"""Classes ride the data axis: the text tower's work on a device falls with their number."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from flax import nnx

from mlclip_jax import methods
from mlclip_jax.clip.weights import resolve
from mlclip_jax.labels.space import LabelSpace
from mlclip_jax.training.mesh import make_mesh, replicate, shard_labels
from mlclip_jax.training.step import nest, take_apart


@pytest.mark.parametrize("class_specific", [True, False])
def test_text_work_is_split_over_the_devices(class_specific: bool) -> None:
    """FLOPs on each of 8 devices are an eighth, but for a prefix that all classes share."""
    checkpoint = resolve("clip-mini")
    tokenizer, space = checkpoint.tokenizer(), LabelSpace(tuple(f"label {i}" for i in range(64)))
    method = methods.build(
        {"name": "coop", "n_ctx": 4, "class_specific": class_specific},
        checkpoint.load(), space=space, encoder=tokenizer, rngs=nnx.Rngs(0),
    )  # fmt: skip
    parts = take_apart(method)
    leaves = {**parts.trainable, **parts.frozen}
    host_labels = method.label_inputs(space, tokenizer, multiple_of=8)

    def run(devices: int) -> tuple[float, np.ndarray]:
        mesh = make_mesh(jax.devices()[:devices])
        encode = jax.jit(
            lambda leaves, labels: nnx.merge(
                parts.graphdef, nest(leaves, parts.paths)
            ).encode_labels(labels)
        )
        arguments = replicate(leaves, mesh), shard_labels(host_labels, mesh)
        compiled = encode.lower(*arguments).compile()
        return compiled.cost_analysis()["flops"], np.asarray(compiled(*arguments))

    (alone, expected), (shared, got) = run(1), run(8)
    assert shared < (0.13 if class_specific else 0.25) * alone
    np.testing.assert_allclose(got, expected, atol=1e-5 * np.abs(expected).max())
