"""The published benchmarks by name: images, labels, sizes, and what training may see.

    "coco_spml_splc"                   single positive labels, the fixed lists of SPLC
    "coco_spml_largeloss"              the same, drawn and split as Cole et al. and LargeLoss do
    "coco_partial(0.3)"                each label observed with probability 0.3
    "coco_spml_splc_few_shot(0.1)"     any of them with a tenth of the training images
    "imagenet_to_coco(drop_from='eval')"  ADDS's "without overlapped classes"

`NAMES` has them all, `needs` says of one what the user must bring. Sizes count what the authors'
files and code give, after images without labels are left out where theirs are and the validation
part is split off.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

from mlclip_jax.data import protocols
from mlclip_jax.errors import UserError
from mlclip_jax.labels import catalog
from mlclip_jax.labels.matching import DropFrom
from mlclip_jax.labels.space import LabelSpace
from mlclip_jax.spec import parse_call, unknown


@dataclass(frozen=True)
class Split:
    """One split of a benchmark.

    Attributes:
      corpus: module of `data.raw` that reads it.
      part: of its `PARTS`.
      size: images after the view; None where nobody has published it.
      view: what its labels show, as `data.protocols` reads it.
      listed: name of the published file that lists images and labels; "" for the corpus' own. Of
        arrays, the one of the images; of a CSV, the labels are those of its file of classes.
      complete: whether labels that a list does not give are negative, not unobserved.
      captions: name of a published file of captions, which is used where it is there.
      difficult: what labels with difficult objects only are (`Manifest.label_matrix`).
      labels: the corpus' "own", those of its subset "seen", or of NUS the tags and the concepts
        "joined".
    """

    corpus: str
    part: str
    size: int | None
    view: str = "full"
    listed: str = ""
    complete: bool = False
    captions: str = ""
    difficult: Literal["positive", "negative", "ignore"] = "positive"
    labels: Literal["own", "seen", "joined"] = "own"

    @property
    def list_files(self) -> tuple[str, ...]:
        """Names of the published files of its images and labels: none, a list or two files."""
        names = self.listed, file_of_labels(self.listed)
        return tuple(dict.fromkeys(filter(None, names)))


@dataclass(frozen=True)
class Benchmark:
    """One benchmark in one setting.

    Attributes:
      name: as configurations write it.
      space: makes the label space of evaluation.
      train, validation, test: the splits; no validation where None.
      source: where splits and labels come from.
      protocol: of `evaluation.protocol.PROTOCOLS`, by which it is reported.
      names: where the names of the labels are: in the "package", in the "files" of the corpus
        (`space` then has stand-ins), or nowhere, so that training needs a file of them ("user").
      train_space: makes the label space of training where it is another one.
      drop_from: where training and evaluation have labels of their own: out of which of the two
        the labels are left that both have.
    """

    name: str
    space: Callable[[], LabelSpace]
    train: Split
    validation: Split | None
    test: Split
    source: str
    protocol: str = "asl"
    names: Literal["package", "files", "user"] = "package"
    train_space: Callable[[], LabelSpace] | None = None
    drop_from: DropFrom | None = None

    @property
    def splits(self) -> dict[str, Split]:
        """The splits that evaluation may open, by name."""
        found = {"validation": self.validation, "test": self.test}
        return {name: split for name, split in found.items() if split is not None}

    @property
    def num_train(self) -> int | None:
        """Training images; None where not published."""
        return self.train.size

    @property
    def num_validation(self) -> int | None:
        """Validation images; None where there is no such part."""
        return self.validation and self.validation.size

    @property
    def num_test(self) -> int | None:
        """Test images; None where not published."""
        return self.test.size

    @property
    def train_view(self) -> str:
        """What the training labels show, as `data.protocols` reads it."""
        return self.train.view


def _stand_ins(name: str, seen: int, unseen: int = 0) -> Callable[[], LabelSpace]:
    """Maker of a space whose names are in the corpus' files: "class 0", ... in their place."""

    def make() -> LabelSpace:
        count = seen + unseen
        subsets = {"seen": tuple(range(seen)), "unseen": tuple(range(seen, count))}
        return LabelSpace(
            names=tuple(f"class {i}" for i in range(count)),
            subsets=subsets if unseen else {},
            name=name,
        )

    return make


_PARTIAL = "sarb_partial({})"
_SPLC = "the single-positive lists of SPLC (Zhang et al., 2021) and HSPNet; no validation part"
_LEFT = "the lists of SPLC (Zhang et al., 2021) with a share of the labels left"
_LARGELOSS = "Cole et al. (2021) and LargeLoss (Kim et al., 2022): a fifth held out, seed 1200"
_SARB = "SARB (Pu et al., 2022), seed 0"
_MKT = "LESA, BiAM and MKT (He et al., 2023): the official split, every test image"
_MLDECODER = "ML-Decoder (Ridnik et al., 2023) and ADDS: its own lists of images and labels"
_LT = "Wu et al. (2020), as LMPT (Xia et al., 2024) runs it"
_ADDS = "ADDS (Xu et al., 2023): trained on single labels, tested on several"

_COCO_TEST = Split("coco", "val2014", 40_137, "require_positive")
_COCO_FULL = Split("coco", "train2014", 82_081, "require_positive")
_VOC_TEST = Split("voc", "val2012", 5_823)
_CUB_TEST = Split("cub", "test", 5_794)
_NUS_81 = Split("nuswide", "test", 107_859)
_IMAGENET_TRAIN = Split("imagenet", "train", 1_281_167)


def _with(split: Split, view: str = "", **changes: object) -> Split:
    """`split` with its view continued."""
    views = [text for text in (split.view, view) if text not in ("", "full")]
    return dataclasses.replace(split, view="+".join(views) or "full", **changes)


def _largeloss(
    corpus: str,
    space: Callable[[], LabelSpace],
    everything: Split,
    test: Split,
    num_train: int,
    num_validation: int,
) -> Benchmark:
    """The setup of Cole et al.; `everything` has the images in the order of their code."""
    return Benchmark(
        f"{corpus}_spml_largeloss",
        space,
        _with(everything, "cole_single_positive+holdout(0.2)", size=num_train),
        _with(everything, "holdout(0.2, 'validation')", size=num_validation),
        test,
        _LARGELOSS,
    )


def _zero_shot(corpus: str) -> list[Benchmark]:
    """Zero-shot and generalised zero-shot: one benchmark, whose protocol reports both."""
    if corpus == "nus":
        train = Split("nuswide", "train_tags", None, "require_positive")
        test = Split("nuswide", "test_tags", 107_859, labels="joined")
        make, protocol = _stand_ins("nus1006", 925, 81), "nus_zsl"
    else:
        train = Split("openimages", "train", None, "require_positive", labels="seen")
        test = Split("openimages", "test", 125_436)  # of the release; MKT's table: 125,456
        make, protocol = _stand_ins("openimages", 7_186, 400), "open_images_zsl"

    def seen() -> LabelSpace:
        return make().select("seen")

    benchmarks = [
        Benchmark(f"{corpus}_{task}", make, train, None, test, _MKT, protocol, "files", seen)
        for task in ("zsl", "gzsl")
    ]
    if corpus == "nus":
        listed = Split("nuswide", "all", None, listed="data.csv")
        train, protocol = dataclasses.replace(listed, labels="seen"), "nus_zsl_mldecoder"
        benchmarks.append(
            Benchmark(protocol, make, train, None, listed, _MLDECODER, protocol, "files", seen)
        )
    return benchmarks


def _splc(corpus: str, space: Callable[[], LabelSpace], train: Split, test: Split) -> Benchmark:
    """Single positives from a fixed list, no validation part."""
    return Benchmark(f"{corpus}_spml_splc", space, train, None, test, _SPLC)


def _single_to_multi(
    name: str,
    space: Callable[[], LabelSpace],
    test: Split,
    train: Split = _IMAGENET_TRAIN,
    classes: int = 1_000,
    drop_from: DropFrom = "none",
) -> Benchmark:
    """Trained on single labels of ImageNet, tested on several."""
    seen = _stand_ins("imagenet", classes)
    more = {"train_space": seen, "drop_from": drop_from}
    return Benchmark(name, space, train, None, test, _ADDS, "single_to_multi", **more)


_BENCHMARKS: dict[str, Benchmark] = {
    benchmark.name: benchmark
    for benchmark in (
        # HSPNet, Table 1: single positives.
        _splc(
            "coco",
            catalog.coco,
            Split("coco", "train2014", 82_081, listed="coco_train_singlelabel.txt"),
            _COCO_TEST,
        ),
        _splc(
            "voc",
            catalog.voc,
            Split("voc", "train2012", 5_717, listed="voc_train.txt"),
            _VOC_TEST,
        ),
        _splc(
            "nus",
            catalog.nus,
            Split("nuswide", "all", 119_103, listed="nus_train_singlelabel.txt"),
            Split("nuswide", "all", 50_720, listed="nus_val.txt", complete=True),
        ),
        _splc("cub", catalog.cub, Split("cub", "train", 5_994, listed="cub_train.txt"), _CUB_TEST),
        _largeloss(
            "coco", catalog.coco, _with(_COCO_FULL, "order_by('id')"), _COCO_TEST, 65_665, 16_416
        ),
        _largeloss(
            "voc",
            catalog.voc,
            Split("voc", "train2012", 5_717, "order_by('name')", difficult="negative"),
            dataclasses.replace(_VOC_TEST, difficult="negative"),
            4_574,
            1_143,
        ),
        _largeloss(
            "nus",
            catalog.nus,
            Split("nuswide", "all", 150_000, listed="formatted_train_images.npy"),
            Split("nuswide", "all", 60_260, listed="formatted_val_images.npy"),
            120_000,
            30_000,
        ),
        _largeloss("cub", catalog.cub, Split("cub", "train", 5_994), _CUB_TEST, 4_795, 1_199),
        # SPLC's further lists: 40 % and 75 % of the labels.
        *(
            Benchmark(
                f"coco_splc_{percent}",
                catalog.coco,
                Split("coco", "train2014", 82_081, listed=f"coco_train_{share}left.txt"),
                None,
                _COCO_TEST,
                _LEFT,
            )
            for percent, share in ((40, 0.4), (75, 0.75))
        ),
        # HSPNet, Table 7: partial labels. "_sarb" keeps the 702 training and 367 test images
        # without any label, as SARB's own code does; HSPNet's figures leave them out.
        Benchmark(
            "coco_partial",
            catalog.coco,
            _with(_COCO_FULL, _PARTIAL),
            None,
            _COCO_TEST,
            f"{_SARB}, over the images with a label (HSPNet's numbers)",
        ),
        Benchmark(
            "coco_partial_sarb",
            catalog.coco,
            Split("coco", "train2014", 82_783, _PARTIAL),
            None,
            Split("coco", "val2014", 40_504),
            _SARB,
        ),
        Benchmark(
            "vg200_partial",
            catalog.vg200,
            Split("vg", "train", 82_904, _PARTIAL),
            None,
            Split("vg", "test", 10_000),
            f"{_SARB}; lists of SSGRL (Chen et al., 2019)",
            names="user",
        ),
        # All labels: ADDS, Table 1.
        Benchmark("coco", catalog.coco, _COCO_FULL, None, _COCO_TEST, "ASL and ML-Decoder; ADDS"),
        # LMPT.
        Benchmark(
            "voc_lt",
            catalog.voc,
            Split("voc", "trainval2012", 1_142, "pareto_tail", captions="voc_lt_captions.txt"),
            None,
            Split("voc", "test2007", 4_952),
            _LT,
            "long_tail",
        ),
        Benchmark(
            "coco_lt",
            catalog.coco,
            Split("coco", "train2017", 1_909, listed="coco_lt_train.txt", complete=True),
            None,
            Split("coco", "val2017", 5_000),
            _LT,
            "long_tail",
        ),
        # MKT; on NUS-WIDE ADDS, with ML-Decoder's lists, too.
        *_zero_shot("nus"),
        *_zero_shot("openimages"),
        # ADDS, Tables 3, 4 and 8. Labels are dropped after the first 15,000 classes are taken.
        _single_to_multi("imagenet_to_coco", catalog.coco, _COCO_TEST),
        _single_to_multi("imagenet_to_nus", catalog.nus, _NUS_81),
        # At most 1,500,000 images of 21k: some classes have fewer than 100.
        *(
            _single_to_multi(
                f"imagenet21k_to_{corpus}",
                space,
                test,
                Split("imagenet", "21k_15000x100", None),
                15_000,
                "train",
            )
            for corpus, space, test in (
                ("coco", catalog.coco, _COCO_TEST),
                ("nus", catalog.nus, _NUS_81),
            )
        ),
    )
}
NAMES = tuple(_BENCHMARKS)

#: What the raw folder of a corpus holds.
CORPORA = {
    "coco": "train2014/, val2014/ (or train2017/, val2017/) and annotations/",
    "voc": "VOCdevkit/ with VOC2012/, and for the long tail VOC2007/",
    "nuswide": "ImageList/, Groundtruth/, NUS_WID_Tags/ and Flickr/",
    "cub": "CUB_200_2011/",
    "vg": "VG_100K/, VG_100K_2/ and SSGRL's train_list_500.txt, test_list_500.txt and "
    "vg_category_500_labels_index.json",
    "openimages": "the annotations of images by people, class-descriptions.csv, "
    "classes-trainable.txt, top_400_unseen.csv of BiAM, train/, validation/ and test/",
    "imagenet": "train/ and synset_words.txt; of 21k the folders or archives of the classes and "
    "words.txt",
}


def needs(benchmark: Benchmark) -> dict[str, str]:
    """What the user must bring: of each corpus, what its folder holds, lists included."""
    found: dict[str, list[str]] = {}
    for split in (benchmark.train, *benchmark.splits.values()):
        files = found.setdefault(split.corpus, [CORPORA[split.corpus]])
        files += [name for name in split.list_files if name not in files]
    return {corpus: "; ".join(files) for corpus, files in found.items()}


def file_of_labels(images: str) -> str:
    """Name of the file of labels that goes with an array of images or a CSV; of a list, its own."""
    if images.endswith(".csv"):
        return "benchmark_81_v0.json"
    return images.replace("images", "labels") if images.endswith(".npy") else images


def list_files(corpus: str) -> list[str]:
    """Names of all published lists, captions among them, that a folder of a corpus may hold."""
    splits = [s for b in _BENCHMARKS.values() for s in (b.train, *b.splits.values())]
    names = [{*split.list_files, split.captions} for split in splits if split.corpus == corpus]
    return sorted(set().union(*names) - {""})


def resolve(name: str) -> Benchmark:
    """The benchmark that a text names.

    Args:
      name: one of `NAMES`; "..._partial" with the share of labels that is observed, "(0.3)";
        "imagenet..._to_..." with "(drop_from='eval')" or 'train', 'both', 'none', if it is not to
        be the default; and at the end, where wanted, "_few_shot(0.1)" with the share of the
        training images, drawn as LargeLoss draws them.

    Raises:
      UserError: unknown name, or a share that is missing, superfluous or not a probability.
    """
    base, few, share = name.partition("_few_shot")
    word, bracket, inside = base.partition("(")
    if word not in _BENCHMARKS:
        raise unknown("benchmark", word, NAMES)
    benchmark = dataclasses.replace(_BENCHMARKS[word], name=name)
    train = benchmark.train
    if _PARTIAL in train.view:
        if inside in ("", ")"):
            raise UserError(
                f"benchmark {name!r} takes the share of labels that training sees: {word}(0.3)"
            )
        own = _PARTIAL.removesuffix("({})") + bracket + inside
        _single(name, own)
        train = dataclasses.replace(train, view=train.view.replace(_PARTIAL, own))
    elif bracket and benchmark.drop_from:
        benchmark = dataclasses.replace(benchmark, drop_from=_drop_from(base))
    elif bracket:
        raise UserError(f"benchmark {name!r}: {word} takes nothing in brackets")
    if few:
        if share in ("", "()"):
            raise UserError(
                f"benchmark {name!r} takes the share of training images: {base}_few_shot(0.1)"
            )
        view = _single(name, f"cole_few_shot{share}")
        size = train.size and view.count(train.size)
        train = _with(train, f"cole_few_shot{share}", size=size)
    return dataclasses.replace(benchmark, train=train)


def _single(name: str, text: str) -> protocols.View:
    """The only view of a text."""
    views = protocols.parse(text)
    if len(views) != 1:
        raise UserError(f"benchmark {name!r}: only '_few_shot(share)' may be added to a name")
    return views[0]


def _drop_from(text: str) -> DropFrom:
    """`drop_from` of "name(drop_from='eval')"."""
    name, positional, keywords = parse_call(text, what="benchmark")
    value = keywords.get("drop_from")
    if positional or set(keywords) != {"drop_from"} or value not in get_args(DropFrom):
        choices = ", ".join(map(repr, get_args(DropFrom)))
        raise UserError(f"benchmark {text!r}: {name} takes drop_from, one of {choices}")
    return value
