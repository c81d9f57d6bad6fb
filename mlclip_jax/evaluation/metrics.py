"""Multi-label metrics on the host, exact over batches, hosts and padding.

`Predictions` gathers scores and targets batch by batch and merges with other gatherings; the
functions compute figures from whole arrays in float64, block by block: memory above the inputs
does not grow with the product of images and classes.

Targets are int8 `[n c]`: +1 positive, 0 unobserved, -1 negative. What a 0 counts as is the
`assume_negative` argument of the functions:

- `True`: a negative (benchmarks with complete labels, whose files say 1 and 0);
- `False`: nothing, the entry is left out;
- `None` (default): left out in a class that has an explicit -1 somewhere, else a negative.

Average precision in the conventions of the field:

| convention | `average_precision` | `mean_average_precision` |
|---|---|---|
| ASL, ML-Decoder, SPLC, HSPNet, DualCoOp | `assume_negative=True` | `empty="zero"` |
| BiAM, MKT (unknown labels left out) | `assume_negative=False` | `empty="zero"` |
| scikit-learn, LMPT | `assume_negative=True, ties="grouped"` | `empty="zero"` |

All figures are fractions between 0 and 1; tables print them as percentages. Which figures a
benchmark reports, by which conventions, is in `evaluation.protocol`.
"""

from __future__ import annotations

from mlclip_jax.evaluation.decisions import (
    DecisionCounts,
    best_f1_threshold,
    best_f1_thresholds,
    count_decisions,
    precision_recall_f1,
    top_k,
)
from mlclip_jax.evaluation.predictions import Predictions
from mlclip_jax.evaluation.ranking import (
    average_precision,
    count_positives,
    frequency_groups,
    mean_average_precision,
    weighted_mean_average_precision,
)

__all__ = [
    "DecisionCounts",
    "Predictions",
    "average_precision",
    "best_f1_threshold",
    "best_f1_thresholds",
    "count_decisions",
    "count_positives",
    "frequency_groups",
    "mean_average_precision",
    "precision_recall_f1",
    "top_k",
    "weighted_mean_average_precision",
]
