"""Label features in figures: how compact the groups of labels are, and places in a picture."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from mlclip_jax.labels.space import Taxonomy

TSNE_FROM = 8  # labels; of fewer, t-SNE's neighbourhoods mean nothing
RETRIEVED = 3  # labels that are retrieved for each, as in MKT's Figure 3
_SAME = 1e-6  # features whose directions differ by less are one point


class Compactness(NamedTuple):
    """How the label features of a method lie by group.

    Attributes:
        within: float64 `[g]`, mean cosine over the pairs of labels of a group; NaN for one label.
        between: float64 `[g]`, mean cosine of a group's labels with the labels of all other groups.
        silhouette: mean over all labels, with the distance 1 - cosine; NaN: all groups are single.
        retrieval: see `retrieval_accuracy`.
    """

    within: np.ndarray
    between: np.ndarray
    silhouette: float
    retrieval: float

    @property
    def difference(self) -> np.ndarray:
        """float64 `[g]`: within - between."""
        return self.within - self.between


def compactness(features: np.ndarray, taxonomy: Taxonomy) -> Compactness:
    """Cosines within and between the groups of labels, and the silhouette, in float64.

    With unit features u_i, a group G of n labels out of c, and s_G the sum of its features:

        within_G  = sum_{i != j in G} u_i . u_j / (n (n - 1)) = (s_G . s_G - n) / (n (n - 1))
        between_G = sum_{i in G, j not in G} u_i . u_j / (n (c - n))

    The silhouette (Rousseeuw, 1987) of label i is (b - a) / max(a, b): a is its mean distance to
    the others of its group, b the least mean distance to another group; it is 0 for a group of one.

    Args:
        features: `[c d]`, of any length; a row of zeros has cosine 0 with every other.
        taxonomy: of the c labels, with at least two groups.
    """
    unit = _unit(features)
    group = np.asarray(taxonomy.group_of)
    member = (group[:, None] == np.arange(len(taxonomy))).astype(np.float64)  # [c g]
    number = member.sum(axis=0)
    others = np.where(number > 1, number - 1, np.nan)  # of a label, in its group
    sums = member.T @ unit  # [g d]
    themselves = (unit**2).sum(axis=1)  # 1, or 0 for a row of zeros
    squares = (sums**2).sum(axis=1)
    within = (squares - member.T @ themselves) / (number * others)
    between = (sums @ sums.sum(axis=0) - squares) / (number * (len(unit) - number))

    cosines, at = unit @ sums.T, (np.arange(len(unit)), group)  # [c g]: summed over each group
    own = 1 - (cosines[at] - themselves) / others[group]
    cosines /= number
    cosines[at] = -np.inf
    nearest = 1 - cosines.max(axis=1)
    # The floor makes labels that all coincide 0, not a quotient of rounding errors.
    scores = (nearest - own) / np.maximum(np.maximum(own, nearest), 1e-9)
    single = number[group] == 1
    silhouette = np.nan if single.all() else float(np.where(single, 0.0, scores).mean())
    return Compactness(within, between, silhouette, retrieval_accuracy(features, taxonomy))


def retrieval_accuracy(features: np.ndarray, taxonomy: Taxonomy, k: int = RETRIEVED) -> float:
    """Share of the k labels nearest to each label, itself left out, that are of its group.

    Nearest by cosine; of equal ones the first. Of a group of n labels n - 1 can be right at most.

    Args:
        features: `[c d]`, of any length; c > k.
        taxonomy: of the c labels.

    Returns:
        NaN for k labels or fewer.

    Source: He et al., AAAI 2023 (MKT), Figure 3, "overall Top-3 accuracy".
    """
    unit, group = _unit(features), np.asarray(taxonomy.group_of)
    if len(unit) <= k:
        return float("nan")
    cosines = unit @ unit.T
    np.fill_diagonal(cosines, -np.inf)
    nearest = np.argsort(-cosines, axis=1, kind="stable")[:, :k]
    return float((group[nearest] == group[:, None]).mean())


def perplexity(labels: int) -> float:
    """t-SNE's effective number of neighbours for so many labels: 30, or a third of the others."""
    return min(30.0, (labels - 1) / 3)


def project(features: np.ndarray) -> np.ndarray:
    """Places of label features in two dimensions, as float64 `[c 2]`.

    t-SNE of the unit-length features (as HSPNet's Figure 3), started from their principal
    components, with a fixed seed; the principal components themselves below `TSNE_FROM` labels.
    Centred, with a root mean square distance of 1 from the centre and the larger spread along the
    first axis: neither place, scale nor direction of a t-SNE means anything, so they are made the
    same for all. Features that are all the same have all the place 0.

    Args:
        features: `[c d]`, at least two of each.
    """
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE
    from threadpoolctl import threadpool_limits

    unit = _unit(features)
    if np.ptp(unit, axis=0).max() < _SAME:
        return np.zeros((len(unit), 2))
    if len(unit) < TSNE_FROM:
        places = PCA(2, svd_solver="full").fit_transform(unit)
    else:
        tsne = TSNE(2, perplexity=perplexity(len(unit)), init="pca", random_state=0)
        # One thread: the sums, and so the picture, are the same whatever the number of cores; and
        # threads that wait for a busy core cost ten times what they save.
        with threadpool_limits(1):
            places = tsne.fit_transform(unit).astype(np.float64)
    places -= places.mean(axis=0)
    places = places @ np.linalg.svd(places, full_matrices=False)[2].T
    return places / np.sqrt((places**2).sum(axis=1).mean())


def turn(places: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """`places` turned, or mirrored, to lie as near to `reference` as they can; both `[c 2]`.

    The orthogonal Procrustes solution: distances among the places stay.
    """
    left, _, right = np.linalg.svd(places.T @ reference)
    return places @ (left @ right)


def _unit(features: np.ndarray) -> np.ndarray:
    """Rows scaled to unit length in float64; a row of zeros stays."""
    features = np.asarray(features, np.float64)
    length = np.linalg.norm(features, axis=1, keepdims=True)
    return features / np.where(length > 0, length, 1.0)
