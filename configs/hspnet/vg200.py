"""HSPNet on VG-200: partial labels.

    python -m mlclip_jax.train --config="configs/hspnet/vg200.py:setup=partial(0.1),data_dir=DIR" \
        --config.data.names_file=names.txt --workdir=runs/vg200

Arguments: setup=partial(0.1)|...|partial(0.9), few_shot=1.0 (share of the training images),
row=hspnet|hcp|no_group_graph|no_label_graph|spl|spl_gcn|splc_star|largeloss_star,
prompt=group|concat|add|shared, taxonomy=cluster|cluster(20)|FILE.yaml, variant=released|paper,
seed=0, data_dir= (folder of images and annotations).

The published lists have neither the names of the 200 classes nor groups: names come from a file,
one a line in the order of the indices. The paper's groups, taken from WordNet, are in a picture
only: clusters of the names' text features stand in for them (on COCO 75.62 against 75.71, Table 4),
or a YAML file, a mapping of each group to the list of its labels.

Published mAP: 49.4 (Table 7, average of the nine shares of labels), with the paper's groups. There
is no validation part: "best" is the best epoch on the test images, the last epoch stands beside it.
The release has nothing of partial labels.

Needs VG-200's images and lists (Chen et al., 2019): `mlclip prepare vg`, or the download itself.
"""

from __future__ import annotations

import runpy
from pathlib import Path

from ml_collections import ConfigDict

_COMMON = runpy.run_path(str(Path(__file__).with_name("_common.py")))
_SHARES = (43.0, 46.7, 48.7, 49.9, 50.5, 51.1, 51.4, 51.6, 51.9)

#: Table 7.
PAPER = {f"partial(0.{tenths})": {"hspnet": mean} for tenths, mean in enumerate(_SHARES, 1)}


def get_config(arg: str | None = None) -> ConfigDict:
    """The settings of a run."""
    return _COMMON["benchmark"](arg, "vg200", PAPER, taxonomy="cluster")
