"""Scenes: small multi-label images of real handwritten digits and drawn shapes, made from a seed.

A scene is a square RGB image (64 pixels unless asked otherwise) with two to four objects on a noisy
grey background, at most one in each quadrant. An object has a kind and a colour: a kind is one of
ten digits (images of real handwriting, scikit-learn's `load_digits`) or six drawn shapes. Labels
are the kinds and the colours that are present: 22 in three groups (`labels.catalog.scenes`).
Another number of objects and smaller ones can be asked for.

Every scene is a pure function of (seed, split, index) and of how it is to look: all its random
numbers come from a counter-based hash of the three, so access is random, no state is kept, and the
labels of a whole split are known without rendering anything.

Splits ("train", "validation", "test") share no digit image: each digit's images are divided
0.6 / 0.2 / 0.2.

**Planted co-occurrence.** Each scene has one of six families, drawn uniformly:

    red circle zero six      blue triangle two four      yellow cross five
    orange square one seven  green star three eight      purple heart nine

An object takes its kind from the family with probability 0.55 and from all 16 kinds otherwise, and
its colour from the family with probability 0.5 and from all six colours otherwise. So labels of one
family are seen together more than twice as often as labels of two families; the captions ("a photo
of a red three and a green star.") name every object, and so text features learned from captions
carry the same statistics. Within a scene no kind occurs twice.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mlclip_jax.data import protocols
from mlclip_jax.errors import UserError
from mlclip_jax.labels import catalog
from mlclip_jax.labels.space import LabelSpace

SPLITS = ("train", "validation", "test")
_SPLIT_SHARES = (0.6, 0.2, 0.2)
_DIGITS, _SHAPES, _COLOURS = catalog.SCENES_DIGITS, catalog.SCENES_SHAPES, catalog.SCENES_COLOURS
KINDS = _DIGITS + _SHAPES

# colour, shape, digits of each family
FAMILIES = (
    ("red", "circle", ("zero", "six")),
    ("orange", "square", ("one", "seven")),
    ("blue", "triangle", ("two", "four")),
    ("green", "star", ("three", "eight")),
    ("yellow", "cross", ("five",)),
    ("purple", "heart", ("nine",)),
)
KIND_COUPLING = 0.55
COLOUR_COUPLING = 0.5
_DIGIT_SHARE = 0.6  # how many objects are digits, within families and outside
_RGB = {
    "red": (0.88, 0.12, 0.12),
    "green": (0.10, 0.72, 0.20),
    "blue": (0.15, 0.30, 0.95),
    "yellow": (0.95, 0.90, 0.15),
    "purple": (0.62, 0.18, 0.80),
    "orange": (0.98, 0.55, 0.08),
}

_MAX_OBJECTS = 4
_ATTEMPTS = 6  # draws of a kind before the next unused kind is taken
# Sizes of objects in pixels of a 64-pixel scene, both ends included.
_DIGIT_SIZES = (24, 30)
_SHAPE_SIZES = (17, 27)
_MIN_SIDE = 4  # pixels as drawn
_ANGLES = (-15, -10, -5, 0, 5, 10, 15)  # degrees, shapes only

# Numbers of the random draws of one scene.
_COUNT, _FAMILY, _ORDER, _GREY, _SLOPE_X, _SLOPE_Y, _NOISE_X, _NOISE_Y = range(8)
_OBJECT = 8  # first draw of object 0
_SIZE, _X, _Y, _SOURCE, _ANGLE, _RED, _GREEN, _BLUE, _FROM_FAMILY, _COLOUR = range(10)
_KIND = 10  # then three draws (from family?, digit?, which) for each attempt
_PER_OBJECT = _KIND + 3 * _ATTEMPTS
_DRAWS = _OBJECT + _MAX_OBJECTS * _PER_OBJECT


@dataclass(frozen=True)
class SceneObject:
    """One object of a scene: label indices of its kind and colour, and its tight box.

    `box` is (x0, y0, x1, y1) in pixels, x1 and y1 exclusive.
    """

    kind: int
    colour: int
    box: tuple[int, int, int, int]


def _mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele et al., 2014): a bijection of uint64 that scatters."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _uniform(seed: int, split: int, index: np.ndarray) -> np.ndarray:
    """Random numbers in [0, 1) of scenes: a pure function of the arguments, float64 [n draws]."""
    golden = np.uint64(0x9E3779B97F4A7C15)
    with np.errstate(over="ignore"):
        stream = np.array([seed % 2**64], np.uint64)
        stream = _mix(_mix(stream + golden) + np.uint64(split + 1) * golden)
        scene = _mix(stream + (index.astype(np.uint64) + np.uint64(1)) * golden)[:, None]
        draws = np.arange(1, _DRAWS + 1, dtype=np.uint64)[None] * golden
        return (_mix(scene + draws) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _pick(u: np.ndarray, count: int | np.ndarray) -> np.ndarray:
    """Integers in [0, count) from uniform numbers."""
    return (u * count).astype(np.int64)


@functools.cache
def _digit_images() -> tuple[tuple[np.ndarray, ...], ...]:
    """Handwritten digits by [split][digit]: float32 [n 10 10] in [0, 1], with an empty border."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images = np.pad(data.images.astype(np.float32) / 16.0, ((0, 0), (1, 1), (1, 1)))
    rng = np.random.default_rng(0)  # the division is part of the data set, whatever the seed
    by_digit = []
    for digit in range(10):
        rows = rng.permutation(np.flatnonzero(data.target == digit))
        ends = np.round(np.cumsum(_SPLIT_SHARES) * len(rows)).astype(int)[:-1]
        by_digit.append([images[part] for part in np.split(rows, ends)])
    return tuple(tuple(parts[split] for parts in by_digit) for split in range(len(SPLITS)))


@functools.cache
def _noise() -> np.ndarray:
    """A tile of smooth-and-fine noise, float32 [256 256 3], periodic: scenes take any window."""
    rng = np.random.default_rng(1)
    fine = rng.standard_normal((256, 256, 3)).astype(np.float32)
    coarse = rng.standard_normal((32, 32)).astype(np.float32)
    grow = _upscale(256, 32, periodic=True)
    return 0.04 * fine + 0.06 * (grow @ coarse @ grow.T)[:, :, None]


@functools.cache
def _upscale(size: int, source: int, *, periodic: bool = False) -> np.ndarray:
    """The matrix of linear interpolation from `source` to `size` pixels, float32 [size source].

    Beyond the outer pixels it holds their values, or goes on at the other side if `periodic`.
    """
    at = (np.arange(size) + 0.5) * source / size - 0.5
    low = np.floor(at).astype(int)
    share = (at - low).astype(np.float32)
    matrix = np.zeros((size, source), np.float32)
    rows = np.arange(size)
    place = (lambda i: i % source) if periodic else (lambda i: np.clip(i, 0, source - 1))
    np.add.at(matrix, (rows, place(low)), 1 - share)
    np.add.at(matrix, (rows, place(low + 1)), share)
    return matrix


def _inside_polygon(x: np.ndarray, y: np.ndarray, corners: Sequence[tuple[float, float]]) -> Any:
    """Which points lie inside a polygon (even-odd rule)."""
    inside = np.zeros(x.shape, bool)
    for (x0, y0), (x1, y1) in zip(corners, (*corners[1:], corners[0]), strict=True):
        if y0 != y1:
            crosses = (y0 > y) != (y1 > y)
            inside ^= crosses & (x < (x1 - x0) * (y - y0) / (y1 - y0) + x0)
    return inside


def _regular(count: int, radii: Sequence[float]) -> list[tuple[float, float]]:
    """Corners at equal angles from the top, their radii taken in turn."""
    angles = 2 * np.pi * np.arange(count) / count
    return [
        (radii[i % len(radii)] * float(np.sin(a)), -radii[i % len(radii)] * float(np.cos(a)))
        for i, a in enumerate(angles)
    ]


@functools.lru_cache(maxsize=4096)
def _shape_mask(shape: int, size: int, angle: int) -> np.ndarray:
    """Coverage of a drawn shape turned by `angle` degrees, float32 [size size] in [0, 1]."""
    fine = 4
    grid = (np.arange(size * fine) + 0.5) / (size * fine) * 2 - 1
    x, y = np.meshgrid(grid, grid)
    c, s = np.cos(np.deg2rad(angle)), np.sin(np.deg2rad(angle))
    x, y = c * x + s * y, c * y - s * x
    name = _SHAPES[shape]
    if name == "circle":
        mask = x**2 + y**2 <= 0.9**2
    elif name == "square":
        mask = np.maximum(abs(x), abs(y)) <= 0.74
    elif name == "triangle":
        mask = _inside_polygon(x, y + 0.18, _regular(3, (1.0,)))
    elif name == "star":
        mask = _inside_polygon(x, y, _regular(10, (0.98, 0.42)))
    elif name == "cross":
        mask = (np.minimum(abs(x), abs(y)) <= 0.26) & (np.maximum(abs(x), abs(y)) <= 0.88)
    else:  # heart
        u, v = x * 1.28, -y * 1.28 + 0.12
        mask = (u**2 + v**2 - 1) ** 3 - u**2 * v**3 <= 0
    return mask.reshape(size, fine, size, fine).mean((1, 3)).astype(np.float32)


def _draw_objects(u: np.ndarray, objects: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Kinds and colours of scenes: indices into KINDS and _COLOURS, int64 [n 4] each, -1 = none."""
    n = len(u)
    count = objects or 2 + _pick(u[:, _COUNT], _MAX_OBJECTS - 1)
    family = _pick(u[:, _FAMILY], len(FAMILIES))
    shape_of = np.array([KINDS.index(shape) for _, shape, _ in FAMILIES])
    colour_of = np.array([_COLOURS.index(colour) for colour, _, _ in FAMILIES])
    digits_of = np.array([[KINDS.index(d[0]), KINDS.index(d[-1])] for _, _, d in FAMILIES])
    kinds = np.full((n, _MAX_OBJECTS), -1)
    colours = np.full((n, _MAX_OBJECTS), -1)
    for slot in range(_MAX_OBJECTS):
        draw = u[:, _OBJECT + slot * _PER_OBJECT : _OBJECT + (slot + 1) * _PER_OBJECT]
        kind = np.full(n, -1)
        for attempt in range(_ATTEMPTS):
            a, b, c = draw[:, _KIND + 3 * attempt : _KIND + 3 * attempt + 3].T
            coupled, digit = a < KIND_COUPLING, b < _DIGIT_SHARE
            drawn = np.where(
                coupled,
                np.where(digit, digits_of[family, _pick(c, 2)], shape_of[family]),
                np.where(digit, _pick(c, len(_DIGITS)), len(_DIGITS) + _pick(c, len(_SHAPES))),
            )
            free = (kind < 0) & (kinds[:, :slot] != drawn[:, None]).all(1)
            kind = np.where(free, drawn, kind)
        left = kind < 0
        kind = np.where(left, drawn, kind)
        for _ in range(slot):  # rare: walk on to a kind that is not in the scene yet
            taken = left & (kinds[:, :slot] == kind[:, None]).any(1)
            kind = np.where(taken, (kind + 1) % len(KINDS), kind)
        coupled = draw[:, _FROM_FAMILY] < COLOUR_COUPLING
        colour = np.where(coupled, colour_of[family], _pick(draw[:, _COLOUR], len(_COLOURS)))
        present = slot < count
        kinds[:, slot] = np.where(present, kind, -1)
        colours[:, slot] = np.where(present, colour, -1)
    return kinds, colours


class Scenes:
    """Random-access source of scenes, for grain and for everything else.

    Args:
      split: "train", "validation" or "test".
      size: number of scenes; a larger split starts with the scenes of a smaller one.
      seed: of the scenes and, unless a view names its own, of the views.
      image_size: pixels of a side; objects grow with it.
      object_scale: size of objects relative to the usual one, in (0, 1].
      objects: how many are in each scene, 1 to 4, the first ones drawn; None: two to four as drawn.
      view: label views applied to the full labels, e.g. "single_positive" or
        "long_tail+partial(0.3)"; see `data.protocols`. Views may leave out images.

    Item i is {"image": uint8 [h w 3], "targets": int8 [22], "index": int}, index being i itself.
    """

    def __init__(
        self,
        split: str,
        size: int,
        *,
        seed: int = 0,
        image_size: int = 64,
        object_scale: float = 1.0,
        objects: int | None = None,
        view: str = "full",
    ) -> None:
        if split not in SPLITS:
            raise UserError(f"no split named {split!r}; Scenes has {', '.join(SPLITS)}")
        if size < 1:
            raise UserError(f"size is {size}: Scenes needs at least one image")
        if image_size < 32:
            raise UserError(f"image_size is {image_size}: Scenes needs at least 32 pixels")
        least = _MIN_SIDE * 64 / (min(*_DIGIT_SIZES, *_SHAPE_SIZES) * image_size)
        if not least <= object_scale <= 1:
            raise UserError(
                f"object_scale is {object_scale}: at image_size={image_size} it must be from "
                f"{np.ceil(least * 100) / 100:g} (objects of {_MIN_SIDE} pixels a side) to 1"
            )
        if objects not in (None, 1, 2, 3, 4):
            raise UserError(f"objects (data.train_objects) is {objects}: use 1 to 4, or None")
        self.split, self.seed, self.image_size, self.view = split, seed, image_size, view
        self.object_scale, self.objects = object_scale, objects
        self.space: LabelSpace = catalog.scenes()
        index = np.arange(size, dtype=np.int64)
        kinds, colours = _draw_objects(_uniform(seed, SPLITS.index(split), index), objects)
        full = np.full((size, len(self.space)), -1, np.int8)
        rows = np.broadcast_to(index[:, None], kinds.shape)
        full[rows[kinds >= 0], kinds[kinds >= 0]] = 1
        full[rows[colours >= 0], len(KINDS) + colours[colours >= 0]] = 1
        labels = protocols.apply(view, full, seed=seed, subsets=self.space.subsets)
        self._scene = labels.index  # which scene each example is
        self._kinds, self._colours = kinds[self._scene], colours[self._scene]
        self._full, self._targets = full[self._scene], labels.targets

    def __len__(self) -> int:
        """Number of examples, after the view."""
        return len(self._scene)

    def __repr__(self) -> str:
        # grain names its transformations by the source's repr; it must be stable and short.
        look = "".join(f", {name}={value}" for name, value in self._look().items())
        return (
            f"Scenes({self.split!r}, {len(self)}, seed={self.seed}, "
            f"image_size={self.image_size}{look}, view={self.view!r})"
        )

    def __getitem__(self, i: int) -> dict[str, Any]:
        """Example i: image, targets through the view, index."""
        i = range(len(self))[i]  # negative indices, and IndexError past the end
        return {"image": self.image(i), **self.annotations(i)}

    def annotations(self, i: int) -> dict[str, Any]:
        """Example i without its image."""
        return {"targets": self._targets[i].copy(), "index": i}

    def identity(self) -> dict[str, Any]:
        """What decides the images, see `data.features`."""
        scenes = hashlib.sha256(self._scene.tobytes()).hexdigest()
        named = {"split": self.split, "seed": self.seed, "image_size": self.image_size}
        return {"name": "scenes", **named, **self._look(), "scenes": scenes}

    def _look(self) -> dict[str, Any]:
        """The settings of objects that are not the usual ones: usual scenes are named without."""
        look = {"object_scale": (self.object_scale, 1), "objects": (self.objects, None)}
        return {name: value for name, (value, usual) in look.items() if value != usual}

    def label_matrix(self, *, full: bool = False) -> np.ndarray:
        """Targets of all examples, int8 [n 22], without rendering.

        Args:
          full: the full ground truth (+1/-1) in place of what the view shows.
        """
        return (self._full if full else self._targets).copy()

    def class_counts(self) -> np.ndarray:
        """Positives of each class that the view shows, int64 [22]."""
        return np.count_nonzero(self._targets > 0, axis=0)

    def positives(self) -> tuple[np.ndarray, np.ndarray]:
        """The example and the class of each positive that the view shows, int64 [k] both."""
        return np.nonzero(self._targets > 0)

    def caption(self, i: int) -> str:
        """A sentence that names every object, "a photo of a red three and a blue star."."""
        things = [
            f"{'an' if _COLOURS[c] == 'orange' else 'a'} {_COLOURS[c]} {KINDS[k]}"
            for k, c in zip(self._kinds[i], self._colours[i], strict=True)
            if k >= 0
        ]
        others = f"{', '.join(things[:-1])} and " if things[1:] else ""
        return f"a photo of {others}{things[-1]}."

    @property
    def captions(self) -> tuple[tuple[str, ...], ...]:
        """Captions of each example, one a scene, for `data.captions.tokenize`."""
        return tuple((self.caption(i),) for i in range(len(self)))

    def boxes(self, i: int) -> tuple[SceneObject, ...]:
        """The objects of scene i in drawing order, each with its tight box in pixels."""
        out = []
        for kind, colour, x, y, alpha, _ in self._objects(i, self._draws(i)):
            rows, columns = np.flatnonzero(alpha.max(1) > 0.3), np.flatnonzero(alpha.max(0) > 0.3)
            x0, y0, x1, y1 = columns[0] + x, rows[0] + y, columns[-1] + x + 1, rows[-1] + y + 1
            box = (int(x0), int(y0), int(x1), int(y1))
            out.append(SceneObject(kind=kind, colour=len(KINDS) + colour, box=box))
        return tuple(out)

    def label_boxes(self, i: int) -> dict[int, list[tuple[int, int, int, int]]]:
        """The boxes of each label of scene i, by its index; a colour has those of its objects."""
        found: dict[int, list[tuple[int, int, int, int]]] = {}
        for thing in self.boxes(i):
            for label in (thing.kind, thing.colour):
                found.setdefault(label, []).append(thing.box)
        return found

    def image(self, i: int) -> np.ndarray:
        """Renders scene i, uint8 [h w 3]."""
        size = self.image_size
        u = self._draws(i)
        noise = _noise()
        ny, nx = _pick(u[[_NOISE_Y, _NOISE_X]], noise.shape[0])
        at_y, at_x = (np.arange(size) + ny) % 256, (np.arange(size) + nx) % 256
        ramp = np.linspace(-0.15, 0.15, size, dtype=np.float32)
        slope_y, slope_x = (2 * u[[_SLOPE_Y, _SLOPE_X]] - 1).astype(np.float32)
        grey = np.float32(0.08 + 0.5 * u[_GREY]) + slope_y * ramp[:, None] + slope_x * ramp
        canvas = np.repeat(grey[:, :, None], 3, axis=2)
        for _, _, x, y, alpha, rgb in self._objects(i, u):
            patch = canvas[y : y + alpha.shape[0], x : x + alpha.shape[1]]
            patch += alpha[:, :, None] * (rgb - patch)
        canvas += noise[at_y[:, None], at_x]
        return (np.clip(canvas, 0, 1) * 255 + 0.5).astype(np.uint8)

    def _draws(self, i: int) -> np.ndarray:
        index = np.asarray([self._scene[i]])
        return _uniform(self.seed, SPLITS.index(self.split), index)[0]

    def _objects(self, i: int, u: np.ndarray) -> list[tuple[int, int, int, int, Any, Any]]:
        """(kind, colour, x, y, alpha [s s], rgb [3]) of each object; (x, y) is the top left."""
        cells = np.argsort(u[_ORDER] * np.array([1.0, 7.0, 31.0, 101.0]) % 1.0, kind="stable")
        half, scale = self.image_size / 2, self.image_size / 64 * self.object_scale
        out = []
        for slot, (kind, colour) in enumerate(zip(self._kinds[i], self._colours[i], strict=True)):
            if kind < 0:
                break
            draw = u[_OBJECT + slot * _PER_OBJECT : _OBJECT + (slot + 1) * _PER_OBJECT]
            low, high = _DIGIT_SIZES if kind < len(_DIGITS) else _SHAPE_SIZES
            side = round((low + int(_pick(draw[_SIZE], high - low + 1))) * scale)
            if kind < len(_DIGITS):
                images = _digit_images()[SPLITS.index(self.split)][kind]
                source = images[int(_pick(draw[_SOURCE], len(images)))]
                grow = _upscale(side, source.shape[0])
                alpha = np.clip(2.0 * (grow @ source @ grow.T) - 0.4, 0, 1)
            else:
                angle = _ANGLES[int(_pick(draw[_ANGLE], len(_ANGLES)))]
                alpha = _shape_mask(int(kind) - len(_DIGITS), side, angle)
            # Anywhere in its quadrant, and up to three (scaled) pixels over its edges.
            cell = np.array([cells[slot] % 2, cells[slot] // 2]) * half
            over = 3 * scale
            at = cell - over + draw[[_X, _Y]] * max(half - side + 2 * over, 1)
            x, y = np.clip(np.round(at).astype(int), 0, self.image_size - side)
            rgb = np.array(_RGB[_COLOURS[colour]]) + 0.12 * (draw[[_RED, _GREEN, _BLUE]] - 0.5)
            out.append((int(kind), int(colour), int(x), int(y), alpha, rgb.astype(np.float32)))
        return out
