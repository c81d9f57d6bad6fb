"""HSPNet's release: jameslahm/HSPNet, one state dict a file, raw and averaged weights apart."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mlclip_jax.clip.layouts import SAME, TRANSPOSE, Row, Transform
from mlclip_jax.clip.tokenizer import Tokenizer
from mlclip_jax.labels.space import LabelSpace
from mlclip_jax.methods.hspnet import HSPNet
from mlclip_jax.modules.prompts import readable
from released.base import Release, tower_rows


def hspnet_prompts(
    method: HSPNet, space: LabelSpace, tokenizer: Tokenizer
) -> dict[str, tuple[Sequence[str], np.ndarray]]:
    """HSPNet's buffers: what follows the context in the labels' prompts, the groups' whole."""
    table = np.asarray(method.clip.text.token_embedding[...])
    end = tokenizer.context_length - method.config.n_ctx
    labels = tokenizer([f"{readable(name)}." for name in space.prompt_names])
    groups = tokenizer(
        [f"a photo of a {readable(name)}." for name in space.taxonomy.group_prompt_names]
    )
    return {
        "child_prompt_learner.token_suffix": (space.names, table[labels[:, 1:end]]),
        "parent_prompt_learner.embedding": (space.taxonomy.group_names, table[groups]),
    }


META = "child_prompt_learner.meta_net.linear{}"
RELEASE = Release(
    method="hspnet",
    settings={
        "variant": "released",
        "prompt": "group",
        "group_graph": True,
        "label_graph": True,
        "logit_scale": None,
    },
    learned=(
        *tower_rows("image", "image_encoder."),
        Row((f"{META}.weight",), "meta/linear{}/kernel", TRANSPOSE),
        Row((f"{META}.bias",), "meta/linear{}/bias", SAME),
        *(Row((f"gcn.gc{i + 1}.weight",), f"gcn/kernels/{i}", SAME) for i in range(3)),
        Row(
            ("gcn.gamma",),
            "gcn/gamma",
            Transform(lambda arrays: arrays[0].reshape(()), lambda leaf: [leaf.reshape(1)]),
        ),
    ),
    frozen=tower_rows("text", "text_encoder."),
    unused=(
        "logit_scale",  # the release multiplies by 10
        "parent_prompt_learner.ctx",  # the groups' prompts are fixed and whole in .embedding
        "parent_prompt_learner.token_prefix",
        "parent_prompt_learner.token_middle",
        "parent_prompt_learner.token_suffix",
        "child_prompt_learner.token_prefix",  # start of text
    ),
    prompts=hspnet_prompts,
    remark="the graphs of labels and groups are computed from the backbone's text features: the "
    "release reads them from files whose script is not published, so scores may differ a little",
)
