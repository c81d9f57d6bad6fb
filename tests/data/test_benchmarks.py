"""The registry of benchmarks and what configurations reach of it."""

from __future__ import annotations

import numpy as np
import pytest

from mlclip_jax.data import benchmarks, protocols, registry
from mlclip_jax.data.benchmarks import resolve
from mlclip_jax.errors import UserError
from mlclip_jax.evaluation.protocol import PROTOCOLS

SHARES = {"coco_partial": "(0.3)", "vg200_partial": "(0.3)"}
ALL = [name + SHARES.get(name, "") for name in benchmarks.NAMES]
CLASSES = {"coco": 80, "voc": 20, "nus": 81, "cub": 312, "vg200": 200}


def name_features(names):
    """Stand-in for a text tower."""
    return np.random.default_rng(0).standard_normal((len(names), 8))


@pytest.mark.parametrize("name", ALL)
def test_every_benchmark(name):
    benchmark = resolve(name)
    assert benchmark.name == name and benchmark.protocol in PROTOCOLS
    assert len(benchmark.space()) == CLASSES[name.split("_")[0]]
    assert [type(view).name for view in protocols.parse(benchmark.train_view)] == [
        "partial" if "partial" in name else "single_positive"
    ]
    assert (benchmark.num_validation is None) == ("largeloss" not in name)


@pytest.mark.parametrize("corpus", ["voc", "cub", "coco", "nus"])
def test_a_fifth_of_the_images_is_held_out(corpus):
    """As the published code rounds it: n - round(0.2 n) train, the rest validate."""
    split = resolve(f"{corpus}_spml_largeloss")
    n = split.num_train + split.num_validation
    assert split.num_validation == round(0.2 * n)
    if corpus in ("voc", "cub", "coco"):  # NUS has other lists in the other setting
        assert n == resolve(f"{corpus}_spml_splc").num_train
        assert split.num_test == resolve(f"{corpus}_spml_splc").num_test


def test_sizes_of_tables_with_lists_of_their_own():
    nus = resolve("nus_spml_splc")
    assert (nus.num_train, nus.num_test) == (119_103, 50_720)
    vg = resolve("vg200_partial(0.5)")
    assert (vg.num_train, vg.num_test) == (82_904, 10_000)
    assert resolve("coco_partial(0.5)").num_train == resolve("coco_spml_splc").num_train == 82_081


def test_shares_of_labels_and_of_images():
    benchmark = resolve("coco_partial(0.3)_few_shot(0.1)")
    assert protocols.parse(benchmark.train_view) == (protocols.Partial(0.3), protocols.FewShot(0.1))
    assert benchmark.num_train == 8_208
    few = resolve("voc_spml_largeloss_few_shot(0.1)")
    assert (few.num_train, few.num_validation, few.num_test) == (457, 1_143, 5_823)
    labels = protocols.apply(few.train_view, np.ones((4_574, 3), np.int8))
    assert len(labels.index) == few.num_train and (labels.targets.sum(1) == 1).all()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("coco_spml_slpc", "unknown benchmark 'coco_spml_slpc'; did you mean 'coco_spml_splc'"),
        ("coco_spml_splc(0.1)", "coco_spml_splc takes nothing in brackets"),
        ("coco_partial", "'partial' takes (share, seed)"),
        ("coco_partial(1.5)", "above 0 and at most 1"),
        ("coco_partial(0.3", "cannot read"),
        ("coco_spml_splc_few_shot", "'few_shot' takes (amount, seed)"),
        ("coco_spml_splc_few_shot(16)", "takes a fraction of the images"),
        ("coco_spml_splc_few_shot(1.5)", "fraction"),
        ("coco_spml_splc_few_shot(0.1)+long_tail", "only '_few_shot(share)' may be added"),
    ],
)
def test_errors(name, message):
    for read in (resolve, lambda name: registry.label_space({"name": name})):
        with pytest.raises(UserError) as caught:
            read(name)
        assert message.removeprefix("unknown benchmark ") in str(caught.value)


def test_label_spaces_of_configurations():
    config = {"name": "voc_spml_splc", "data_dir": "anywhere"}
    space = registry.label_space(config)
    assert space == resolve("voc_spml_splc").space()
    assert registry.label_space({**config, "taxonomy": "none"}).taxonomy is None
    clusters = {**config, "taxonomy": "cluster(5)"}
    assert len(registry.label_space(clusters, name_features=name_features).taxonomy) == 5
    with pytest.raises(ValueError, match="needs name_features"):
        registry.label_space(clusters)
    with pytest.raises(UserError, match=r"unknown config key 'data\.train_view'"):
        registry.label_space({**config, "train_view": "full"})
    with pytest.raises(UserError, match="unknown dataset 'sceness'; did you mean 'scenes'"):
        registry.label_space({"name": "sceness"})


def test_scenes_take_a_taxonomy_too():
    config = {"name": "scenes", "num_train": 40, "taxonomy": "cluster"}
    data = registry.load(config, image_size=64, splits=("validation",), name_features=name_features)
    assert data.space == registry.label_space(config, name_features=name_features)
    assert len(data.space.taxonomy) == 3 and not data.space.taxonomy.named
    assert len(data.train) == 40 and data.protocol == "scenes"


def test_images_cannot_be_read_and_vg_asks_for_names(tmp_path):
    with pytest.raises(UserError, match=r"images of coco_partial.* cannot be read by this version"):
        registry.load({"name": "coco_partial(0.3)"}, image_size=448, splits=())
    config = {"name": "vg200_partial(0.3)"}
    assert registry.label_space(config).names[0] == "class 0"
    with pytest.raises(UserError, match=r"without class names: .* set data\.names_file"):
        registry.load(config, image_size=448, splits=())
    path = tmp_path / "names.txt"
    path.write_text("\n".join(f"thing {i}" for i in range(200)))
    config["names_file"] = str(path)
    assert registry.label_space(config).prompt_names[0] == "thing 0"
    with pytest.raises(UserError, match="cannot be read by this version"):
        registry.load(config, image_size=448, splits=())


@pytest.mark.parametrize(
    ("config", "count"),
    [
        ({"name": "coco_spml_splc", "data_dir": "x"}, 82_081),
        ({"name": "coco_spml_splc_few_shot(0.5)"}, 41_040),
        ({"name": "scenes", "num_train": 300}, 300),
    ],
)
def test_num_train(config, count):
    assert registry.num_train(config) == count
