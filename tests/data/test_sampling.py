"""Class-aware draws: who is drawn how often, in which order, and from which sources."""

from __future__ import annotations

import numpy as np
import pytest
from cached_noise import make

from mlclip_jax.data.captions import Captioned
from mlclip_jax.data.features import CachedSource
from mlclip_jax.data.manifest import Manifest, Rows
from mlclip_jax.data.protocols import Labels, SparseTargets
from mlclip_jax.data.sampling import ClassAware
from mlclip_jax.data.scenes import Scenes
from mlclip_jax.data.sources import ImageConfig, ImageSource
from mlclip_jax.errors import UserError
from mlclip_jax.labels.space import LabelSpace

# Images of each class; nothing has class 2, image 5 has no class.
SHOWING = {0: (0, 1, 2, 3, 4, 6, 7), 1: (9, 10), 3: (8,), 4: (11, 12, 13, 14)}
CLASS_OF = {image: c for c, images in SHOWING.items() for image in images}


def draws(seed=0):
    pairs = np.array(list(CLASS_OF.items()))
    order = np.random.default_rng(0).permutation(len(pairs))  # which does not matter
    return ClassAware(*pairs[order].T, seed=seed)


def turns(count, **kwargs):
    """The draws of several turns of all classes, [turns classes 3]."""
    found = draws(**kwargs)
    return np.array([found[i] for i in range(12 * count)]).reshape(count, 4, 3)


def test_every_class_gives_three_images_each_turn():
    classes = np.vectorize(CLASS_OF.get)(turns(40))
    assert (classes == classes[..., :1]).all()
    orders = classes[..., 0].tolist()
    assert all(sorted(order) == list(SHOWING) for order in orders)
    assert len(set(map(tuple, orders))) > 10


def test_images_of_a_class_come_again_when_all_have_been_shown():
    shown = turns(28).reshape(-1).tolist()  # 84 of each class
    for c, images in SHOWING.items():
        own = [image for image in shown if CLASS_OF[image] == c]
        rounds = np.array(own).reshape(-1, len(images)).tolist()
        assert all(sorted(one) == list(images) for one in rounds)
        if len(images) > 2:
            assert len(set(map(tuple, rounds))) > 5


def test_draws_depend_on_seed_and_number_alone():
    expected = turns(6).reshape(-1)
    for i in reversed(range(len(expected))):
        assert draws()[i] == expected[i]
    far = 10**12 + 7
    assert draws()[far] == draws()[far]
    assert turns(6, seed=1).reshape(-1).tolist() != expected.tolist()
    assert turns(1, seed=-1).shape == (1, 4, 3)


@pytest.mark.parametrize("view", ["long_tail(50)", "single_positive+long_tail(50)"])
def test_classes_of_a_long_tail_are_seen_alike(view):
    source = Scenes("train", 1500, view=view)
    found, there = ClassAware(*source.positives(), seed=0), source.label_matrix() > 0
    counts = there.sum(0)
    assert counts.min() > 0 and counts.max() > 10 * counts.min()
    picked = np.array([found[i] for i in range(3 * 22 * 100)])
    seen = there[picked].sum(0)
    if "single" in view:
        assert (seen == 300).all()
    else:  # classes are seen in turns of others too
        assert (seen >= 300).all()
        assert seen.max() / seen.min() < 0.5 * counts.max() / counts.min()
    rarest = there[:, counts.argmin()]
    assert (np.bincount(picked, minlength=len(source))[rarest] >= 300 // counts.min()).all()


def test_images_without_positives_are_never_drawn():
    assert 5 not in turns(100)
    with pytest.raises(UserError, match="no training image has any: set sampling='uniform'"):
        ClassAware(*np.nonzero(np.zeros((4, 3), bool)), seed=0)


def test_sources_of_the_library_know_their_positives(tmp_path):
    scenes = Scenes("train", 40, view="long_tail(4)+partial(0.5)")
    expected = np.argwhere(scenes.label_matrix() > 0).tolist()
    captioned = Captioned(scenes, np.zeros((len(scenes), 2), np.int32))
    cached = CachedSource.__new__(CachedSource)
    cached.source = make(tmp_path, captioned).images.source
    for source in (scenes, captioned, cached):
        assert np.stack(source.positives(), 1).tolist() == expected

    rows = Rows.from_lists([[0, 2], [], [1], [2]])
    space = LabelSpace(("x", "y", "z"), name="xyz")
    manifest = Manifest("made/up", space, np.array(["a", "b", "c", "d"]), rows)
    index = np.array([3, 0, 1])
    transform = ImageConfig().transform(16, train=True)
    for targets in (manifest.label_matrix(), SparseTargets(rows, None, 3)):
        source = ImageSource(manifest, Labels(targets[index], index), None, transform)
        assert sorted(np.stack(source.positives(), 1).tolist()) == [[0, 2], [1, 0], [1, 2]]
