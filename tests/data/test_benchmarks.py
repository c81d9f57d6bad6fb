"""The registry of benchmarks and what configurations reach of it."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import raw_folders
import raw_folders_more

from mlclip_jax.data import assemble, benchmarks, protocols, registry
from mlclip_jax.data.benchmarks import resolve
from mlclip_jax.errors import UserError
from mlclip_jax.evaluation.protocol import PROTOCOLS
from mlclip_jax.labels import catalog

PARTIAL = ("coco_partial", "coco_partial_sarb", "vg200_partial")
ALL = [name + "(0.3)" * (name in PARTIAL) for name in benchmarks.NAMES]
CLASSES = {"coco": 80, "voc": 20, "nus": 81, "cub": 312, "vg200": 200}


def name_features(names):
    """Stand-in for a text tower."""
    return np.random.default_rng(0).standard_normal((len(names), 8))


@pytest.mark.parametrize("name", ALL)
def test_every_benchmark(name):
    benchmark = resolve(name)
    assert benchmark.name == name and benchmark.protocol in PROTOCOLS
    space = benchmark.space()
    if "zsl" in name:
        sizes = {"nus": (925, 81), "openimages": (7186, 400)}[name.split("_")[0]]
        assert tuple(len(space.subsets[s]) for s in ("seen", "unseen")) == sizes
        assert len(benchmark.train_space()) == sizes[0] and len(space) == sum(sizes)
        assert benchmark.num_train is None
    elif benchmark.train_space is not None:
        assert len(space) == CLASSES[name.split("_")[-1]]
        assert len(benchmark.train_space()) == (15_000 if "21k" in name else 1_000)
        assert benchmark.drop_from == ("train" if "21k" in name else "none")
    else:
        assert len(space) == CLASSES[name.split("_")[0]] and benchmark.num_train > 1_000
    for split in (benchmark.train, *benchmark.splits.values()):
        protocols.parse(split.view)
        reader = pytest.importorskip(f"mlclip_jax.data.raw.{split.corpus}")
        assert split.part in reader.PARTS
        published = reader.EXPECTED[split.part]
        if split.view == "full" and not split.listed:
            assert split.size == published.get("images")
        elif split.view == "require_positive" and split.size and "labelled" in published:
            assert split.size == published["labelled"]
    assert (benchmark.num_validation is None) == ("largeloss" not in name)
    bring = benchmarks.needs(benchmark)
    assert set(bring) == {s.corpus for s in (benchmark.train, *benchmark.splits.values())}
    if benchmark.train.listed:
        assert benchmark.train.listed in bring[benchmark.train.corpus]


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
    assert protocols.parse(benchmark.train_view) == (
        protocols.RequirePositive(),
        protocols.SarbPartial(0.3),
        protocols.ColeFewShot(0.1),
    )
    assert benchmark.num_train == 8_208
    assert resolve("coco_partial(0.3, seed=4)").train_view.endswith("sarb_partial(0.3, seed=4)")
    few = resolve("voc_spml_largeloss_few_shot(0.1)")
    assert (few.num_train, few.num_validation, few.num_test) == (457, 1_143, 5_823)
    keys = np.array([f"{i}.jpg" for i in range(5_717)])
    labels = protocols.apply(few.train_view, np.ones((5_717, 3), np.int8), keys=keys)
    assert len(labels.index) == few.num_train and (labels.targets.sum(1) == 1).all()
    listed = resolve("coco_spml_splc_few_shot(0.5)")
    assert listed.train_view == "cole_few_shot(0.5)" and listed.num_train == 41_040
    assert resolve("nus_zsl_few_shot(0.5)").num_train is None
    assert resolve("imagenet_to_coco(drop_from='both')_few_shot(0.5)").drop_from == "both"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("coco_spml_slpc", "unknown benchmark 'coco_spml_slpc'; did you mean 'coco_spml_splc'"),
        ("coco_spml_splc(0.1)", "coco_spml_splc takes nothing in brackets"),
        ("coco_partial", "takes the share of labels that training sees: coco_partial(0.3)"),
        ("coco_partial()", "'coco_partial()' takes the share of labels that training sees"),
        ("coco_partial(1.5)", "above 0 and at most 1"),
        ("coco_partial(0.3", "cannot read"),
        ("coco_splc_40_few_shot", "share of training images: coco_splc_40_few_shot(0.1)"),
        ("coco_partial(0.3)_few_shot()", "of training images: coco_partial(0.3)_few_shot(0.1)"),
        ("coco_spml_splc_few_shot(16)", "above 0 and at most 1"),
        ("coco_partial(0.3)+full", "only '_few_shot(share)' may be added"),
        ("imagenet_to_coco('eval')", "takes drop_from, one of 'none', 'train', 'eval', 'both'"),
        ("imagenet_to_coco(drop_from='test')", "takes drop_from, one of"),
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


@pytest.mark.parametrize(
    ("config", "count"),
    [
        ({"name": "coco_spml_splc", "data_dir": "x"}, 82_081),
        ({"name": "coco_spml_splc_few_shot(0.5)"}, 41_040),
        ({"name": "nus_zsl"}, None),
        ({"name": "scenes", "num_train": 300}, 300),
    ],
)
def test_num_train(config, count):
    assert registry.num_train(config) == count


@pytest.fixture
def load(monkeypatch):
    """Loads a benchmark without images: the sources are the labelled parts."""
    monkeypatch.setattr(registry, "open_images", lambda part, *_, **__: part)

    def load(name, folder, splits=("test",), trained=None, **more):
        config = {"name": name, "data_dir": str(folder), "check_sizes": False, **more}
        return registry.load(config, image_size=224, splits=splits, space=trained)

    return load


def keys(part):
    return part.manifest.keys[part.labels.index].tolist()


def positives(part):
    return [np.flatnonzero(row > 0).tolist() for row in part.labels.targets]


def test_coco_setups(tmp_path, load):
    raw_folders.coco(tmp_path)
    name = "train2014/COCO_train2014_{:012d}.jpg".format
    data = load("coco", tmp_path)
    assert keys(data.train) == [name(i) for i in (480023, 9, 57, 8)]
    category = catalog.coco().ids.index
    assert positives(data.train) == [[category("58")], [0], [0, category("90")], [category("3")]]
    assert (data.train.labels.targets != 0).all() and len(data.evals["test"].labels.index) == 2
    assert data.protocol == "asl" and data.space == catalog.coco() and data.train_space is None
    assert data.fingerprints["train"] == data.train.fingerprint()

    large = load("coco_spml_largeloss", tmp_path, ("validation", "test"))
    # Strings: "480023" "57" "8" "9"; one of the four is held out, with all its labels.
    train, held = keys(large.train), keys(large.evals["validation"])
    order = [name(i) for i in (480023, 57, 8, 9)]
    assert sorted(train + held, key=order.index) == order and len(held) == 1
    assert train == [key for key in order if key in train]
    assert (large.train.labels.targets.sum(1) == 1).all()
    assert (large.evals["validation"].labels.targets != 0).all()
    assert large.train.manifest is large.evals["validation"].manifest  # read once

    assert len(keys(load("coco_partial_sarb(0.5)", tmp_path).train)) == 5
    partial = load("coco_partial(0.5)", tmp_path)
    draw = np.random.RandomState(0).random_sample((4, 80)) < 0.5
    np.testing.assert_array_equal(partial.train.labels.targets != 0, draw)


def test_fixed_lists_beside_the_corpus_or_anywhere(tmp_path, load):
    raw, elsewhere = tmp_path / "coco", tmp_path / "lists" / "mine.txt"
    raw_folders.coco(raw)
    text = "COCO_train2014_000000000057.jpg,0\nCOCO_train2014_000000480023.jpg, 51"
    raw_folders.write_text(elsewhere, text)
    with pytest.raises(
        UserError,
        match=r"coco_train_singlelabel\.txt, and there is no .*coco.*data\.train_list=FILE",
    ):
        load("coco_spml_splc", tmp_path)
    for more in ({"train_list": str(elsewhere)}, {}):
        data = load("coco_spml_splc", tmp_path, **more)
        assert [k[-10:] for k in keys(data.train)] == ["000057.jpg", "480023.jpg"]
        assert positives(data.train) == [[0], [51]]
        assert (data.train.labels.targets >= 0).all()
        assert (data.evals["test"].labels.targets != 0).all()
        elsewhere.rename(raw / "coco_train_singlelabel.txt") if more else None
    with pytest.raises(UserError, match=r"train has 2 images, but 82,081 are published: check"):
        load("coco_spml_splc", tmp_path, check_sizes=True)
    few = load("coco_spml_splc_few_shot(0.5)", tmp_path)
    assert len(few.train.labels.index) == 1


def test_voc_setups_differ_in_difficult_objects(tmp_path, load):
    raw_folders.voc(tmp_path, year=2012)
    raw_folders.voc(tmp_path, year=2007)
    large = load("voc_spml_largeloss", tmp_path)
    ids = [key[-10:-4] for key in keys(large.evals["test"])]
    person = catalog.voc().index("person")
    assert large.evals["test"].labels.targets[ids.index("000007"), person] == -1
    raw_folders.write_text(tmp_path / "voc_train.txt", "000012.jpg,12\n000017.jpg,14")
    splc = load("voc_spml_splc", tmp_path)
    assert splc.evals["test"].labels.targets[ids.index("000007"), person] == 1
    tail = load("voc_lt", tmp_path)
    assert tail.protocol == "long_tail" and tail.train.manifest.captions is None
    assert all("VOC2012" in key for key in keys(tail.train))
    assert all("VOC2007" in key for key in keys(tail.evals["test"]))
    text = "VOCdevkit/VOC2012/JPEGImages/000012.jpg a rider on a horse."
    raw_folders.write_text(tmp_path / "voc_lt_captions.txt", text)
    captions = load("voc_lt", tmp_path).train.manifest.captions
    assert ("a rider on a horse.",) in captions
    with pytest.raises(UserError, match=r"none\.txt"):
        load("voc_lt", tmp_path, captions_list=str(tmp_path / "none.txt"))


def test_coco_lt(tmp_path, load):
    raw_folders.coco(tmp_path, year=2017)
    text = "train2017/000000000057.jpg 0 79\ntrain2017/000000001000.jpg"
    raw_folders.write_text(tmp_path / "coco_lt_train.txt", text)
    data = load("coco_lt", tmp_path)
    assert positives(data.train) == [[0, 79], []] and (data.train.labels.targets != 0).all()
    assert len(data.evals["test"].labels.index) == 3  # images without labels stay
    assert data.train.manifest.captions is not None


def test_lists_without_labels(tmp_path, load):
    raw_folders.coco(tmp_path, year=2017)
    raw_folders.coco(tmp_path)
    ids = tmp_path / "img_id.pkl"
    raw_folders.write_text(ids, "57\n1000\n9\n")
    data = load("coco_lt", tmp_path, train_list=str(ids))  # DBL's: the labels are the corpus' own
    assert positives(data.train) == [[0, 79], [], [0]] and (data.train.labels.targets != 0).all()
    with pytest.raises(UserError, match="gives no image a label, and coco_spml_splc takes"):
        load("coco_spml_splc", tmp_path, train_list=str(ids))


def test_nus_setups(tmp_path, load):
    raw_folders_more.nuswide(tmp_path)
    listed = "0_2124494179_02a15f03aa_m.jpg,7 8\n1_2124494180_02a15f03aa_m.jpg,1"
    for name in ("nus_train_singlelabel.txt", "nus_val.txt"):
        raw_folders.write_text(tmp_path / name, listed)
    splc = load("nus_spml_splc", tmp_path)
    assert keys(splc.train)[0] == "Flickr/actor/0001_2124494179.jpg"
    assert positives(splc.train) == positives(splc.evals["test"]) == [[7, 8], [1]]
    assert (splc.train.labels.targets >= 0).all()
    assert (splc.evals["test"].labels.targets != 0).all()

    names = np.array(sorted(n.replace("\\", "/") for n in raw_folders_more.NUS_TRAIN))
    values = np.eye(81)[:4]
    for part in ("train", "val"):
        np.save(tmp_path / f"formatted_{part}_images.npy", names)
        np.save(tmp_path / f"formatted_{part}_labels.npy", values)
    large = load("nus_spml_largeloss", tmp_path, ("validation", "test"))
    assert len(large.train.labels.index) == 3
    np.testing.assert_array_equal(large.train.labels.targets.sum(1), 1)
    assert (large.evals["validation"].labels.targets != 0).all()
    assert len(large.evals["test"].labels.index) == 4


@pytest.mark.parametrize("name", ["nus_zsl", "nus_gzsl"])
def test_zero_shot_on_nus(tmp_path, load, name):
    raw_folders_more.nuswide(tmp_path)
    data = load(name, tmp_path)
    assert data.protocol == "nus_zsl"
    assert data.train_space.names == ("nature", "blue", "red")
    assert data.space.names == data.train_space.names + catalog.nus().names
    assert data.train.labels.targets.shape[1] == 3 and (data.train.labels.targets > 0).any(1).all()
    assert data.evals["test"].labels.targets.shape == (3, 84)
    assert registry.label_spaces({"name": name, "data_dir": str(tmp_path)}) == (
        data.train_space,
        data.space,
    )
    train, whole = registry.label_spaces({"name": name})
    assert (len(train), len(whole), whole.names[0]) == (925, 1006, "class 0")


def test_zero_shot_on_nus_with_the_lists_of_mldecoder(tmp_path, load):
    raw_folders_more.nuswide(tmp_path)
    name = "nus_zsl_mldecoder"
    with pytest.raises(
        UserError, match=r"data.csv and benchmark_81_v0.json, and there is no .*csv"
    ):
        load(name, tmp_path)
    raw_folders_more.mldecoder(tmp_path)
    data = load(name, tmp_path)
    assert data.protocol == name and data.train_space.names == ("nature", "blue")
    assert data.space.names == ("nature", "blue", "sky", "zebra")
    assert keys(data.train) == [
        "Flickr/actor/0001_2124494179.jpg",
        "Flickr/castle/0003_2124494181.jpg",
    ]
    assert data.train.labels.targets.tolist() == [[1, -1], [1, 1]]
    # Photos that the official lists train on are evaluated; none is there without a label.
    assert [key[7:10] for key in keys(data.evals["test"])] == ["dog", "bus", "zoo"]
    assert positives(data.evals["test"]) == [[1, 2], [0], [3]]
    assert (data.evals["test"].labels.targets != 0).all()
    spaces = registry.label_spaces({"name": name, "data_dir": str(tmp_path)})
    assert spaces == (data.train_space, data.space)
    assert [len(space) for space in registry.label_spaces({"name": name})] == [925, 1006]
    for file in ("data.csv", "benchmark_81_v0.json"):
        (tmp_path / "elsewhere").mkdir(exist_ok=True)
        (tmp_path / file).rename(tmp_path / "elsewhere" / file)
    path = str(tmp_path / "elsewhere/data.csv")
    again = load(name, tmp_path, train_list=path, test_list=path, trained=data.space)
    assert again.fingerprints == data.fingerprints


def test_zero_shot_on_open_images(tmp_path, load, monkeypatch):
    raw_folders_more.openimages(tmp_path)
    dense = load("openimages_zsl", tmp_path)
    assert dense.protocol == "open_images_zsl" and len(dense.train_space) == 3
    assert dense.train_space.ids == dense.space.ids[:3]
    targets = dense.train.labels.targets
    assert (targets > 0).any(1).all() and (targets == 0).any() and (targets == -1).any()
    monkeypatch.setattr(assemble, "_DENSE_BYTES", 0)
    sparse = load("openimages_zsl", tmp_path)
    assert sparse.train.labels.sparse
    for split, one, other in (
        ("train", dense.train, sparse.train),
        ("test", dense.evals["test"], sparse.evals["test"]),
    ):
        assert keys(one) == keys(other), split
        np.testing.assert_array_equal(one.labels.targets, other.labels.targets.dense())


def test_cub_and_vg(tmp_path, load):
    raw_folders_more.cub(tmp_path / "cub")
    raw_folders_more.vg(tmp_path / "vg")
    large = load("cub_spml_largeloss", tmp_path, ("validation", "test"))
    assert len(large.train.labels.index) == 3 and len(large.evals["validation"].labels.index) == 1
    raw_folders.write_text(
        tmp_path / "cub" / "cub_train.txt", "Black_Footed_Albatross_0009_34.jpg, 4"
    )
    assert positives(load("cub_spml_splc", tmp_path).train) == [[4]]

    config = {"name": "vg200_partial(0.3)"}
    assert registry.label_space(config).names[0] == "class 0"
    with pytest.raises(UserError, match=r"without class names: .* set data\.names_file"):
        load("vg200_partial(0.3)", tmp_path)
    path = tmp_path / "names.txt"
    path.write_text("\n".join(f"thing {i}" for i in range(200)))
    data = load("vg200_partial(1)", tmp_path, names_file=str(path))
    assert data.space.prompt_names[0] == "thing 0" and len(data.train.labels.index) == 4
    assert positives(data.train)[0] == [3, 17]
    path.unlink()  # a trained run has the names
    for names_file in ("", str(path)):
        again = load("vg200_partial(1)", tmp_path, names_file=names_file, trained=data.space)
        assert again.space == data.space and positives(again.train)[0] == [3, 17]


def test_single_to_multi(tmp_path, load):
    raw_folders_more.imagenet(tmp_path / "imagenet")
    raw_folders_more.nuswide(tmp_path / "nuswide")
    raw_folders.coco(tmp_path / "coco")
    aliases = tmp_path / "aliases.yaml"
    # One of the two cranes is the machine.
    aliases.write_text("fish: tench\nbirds: crane\n'crane, n03126707': []\n")
    whole = load("imagenet_to_nus", tmp_path)
    assert [len(whole.train_space), len(whole.space)] == [3, 81]
    assert len(whole.train.labels.index) == 7 and whole.train_space.ids[0] == "n01440764"
    np.testing.assert_array_equal((whole.train.labels.targets > 0).sum(1), 1)
    less = load("imagenet_to_nus(drop_from='train')", tmp_path, aliases=str(aliases))
    assert "  fish = tench, Tinca tinca (n01440764), by 'tench'" in less.matching.report()
    assert less.train_space.ids == ("n03126707",) and len(less.space) == 81
    assert less.train.labels.targets.tolist() == [[1], [1]]
    assert all("n03126707" in key for key in keys(less.train))
    eval_less = load("imagenet_to_nus(drop_from='eval')", tmp_path, aliases=str(aliases))
    assert len(eval_less.train_space) == 3 and len(eval_less.space) == 79
    assert not {"fish", "birds"} & set(eval_less.space.names)
    assert eval_less.evals["test"].labels.targets.shape == (3, 79)
    aliases.write_text("bird: crane\n")
    coco = load("imagenet_to_coco(drop_from='both')", tmp_path, aliases=str(aliases))
    assert "bird" not in coco.space.names and len(coco.train_space) == 1
    raw_folders_more.imagenet21k(tmp_path / "21k" / "imagenet")
    raw_folders_more.nuswide(tmp_path / "21k" / "nuswide")
    # A class with fewer images than 100 is whole: nobody can say how many there are.
    large = load("imagenet21k_to_nus", tmp_path / "21k")
    assert len(large.train_space) == 2 and len(large.train.labels.index) == 3 + 100
    assert resolve("imagenet21k_to_nus").num_train is None
    raw_folders_more.imagenet21k(tmp_path / "imagenet")  # beside the folders of 1k
    beside = load("imagenet21k_to_nus", tmp_path)
    assert beside.fingerprints == large.fingerprints
    assert load("imagenet_to_nus", tmp_path).fingerprints == whole.fingerprints

    aliases.unlink()  # a trained run has the labels that are left
    name = "imagenet_to_nus(drop_from='eval')"
    again = load(name, tmp_path, aliases=str(aliases), trained=eval_less.space)
    assert again.space == eval_less.space and again.matching is None
    assert (
        again.fingerprints["test"] == eval_less.fingerprints["test"] != whole.fingerprints["test"]
    )


def test_prepared_manifests_go_first(tmp_path, load):
    raw = raw_folders.coco(tmp_path / "coco")
    manifest = assemble.open_part("coco", "train2014", str(tmp_path))[0]
    manifest.take(np.array([0, 3])).save(assemble.manifest_path(raw, "train2014"))
    (raw / "annotations" / "instances_train2014.json").unlink()
    assert keys(load("coco", tmp_path).train) == manifest.keys[[0, 3]].tolist()


def test_what_is_missing_is_named(tmp_path, load):
    with pytest.raises(UserError, match=r"needs data\.data_dir.*\(coco: train2014/.*singlelabel"):
        registry.load({"name": "coco_spml_splc"}, image_size=224, splits=())
    with pytest.raises(UserError, match=r"there is no folder .*none: set data\.data_dir"):
        load("coco", tmp_path / "none")
    with pytest.raises(UserError, match=r"cannot read .*instances_train2014"):
        load("coco", tmp_path)
    with pytest.raises(UserError, match=r"unknown split of coco .validation.; known: test"):
        load("coco", tmp_path, ("validation",))


def test_custom_images(tmp_path, load, monkeypatch):
    raw_folders.custom(tmp_path)
    config = {"name": "custom", "data_dir": str(tmp_path), "train_view": "single_positive"}
    data = registry.load(config, image_size=224, splits=("test",))
    # Labels of a run in another order, and one that these images have not.
    order = data.space.select([2, 0, 1])
    again = registry.load(config, image_size=224, splits=("test",), space=order)
    np.testing.assert_array_equal(
        again.evals["test"].labels.targets, data.evals["test"].labels.targets[:, [2, 0, 1]]
    )
    with pytest.raises(UserError, match=r"custom/train in .* has not the label 'aeroplane'"):
        registry.load(config, image_size=224, splits=("test",), space=catalog.voc())
    assert data.space == registry.label_space(config) and data.protocol == "multi_label"
    assert (data.train.labels.targets.sum(1) <= 1).all()
    assert len(data.train.labels.index) == registry.num_train(config)
    assert (data.evals["test"].labels.targets != 0).all()
    # Training images may be evaluated too, with all their labels; training keeps its view.
    both = registry.load(config, image_size=224, splits=("train", "test"))
    np.testing.assert_array_equal(both.train.labels.targets, data.train.labels.targets)
    assert (both.evals["train"].labels.targets != 0).all()
    assert both.fingerprints == data.fingerprints
    few = {**config, "train_view": "few_shot(1)"}
    assert registry.num_train(few) < registry.num_train(config)
    with pytest.raises(UserError, match=r"custom data need data\.data_dir"):
        registry.label_space({"name": "custom"})


def test_restricting_keeps_a_part_as_it_is(tmp_path):
    raw_folders.coco(tmp_path)
    benchmark = resolve("coco")
    manifest, folder = assemble.open_split(
        benchmark, benchmark.train, assemble.Files(str(tmp_path))
    )
    part = assemble.label(
        benchmark, "train", manifest, folder, assemble.Files(str(tmp_path)), check_size=False
    )
    renamed = dataclasses.replace(manifest.space, names=[f"x{i}" for i in range(80)])
    assert assemble.restrict(part, renamed, require_positive=True) is part
    one = assemble.restrict(part, manifest.space.select([0]), require_positive=True)
    assert len(one.labels.index) == 2 and one.labels.targets.shape == (2, 1)
    assert one.manifest.label_matrix()[one.labels.index].tolist() == [[1], [1]]


def test_image_settings():
    config = {"name": "coco", "resize": "squash", "interpolation": "bilinear", "augment": "flip"}
    _, fields = registry.settings(config)
    assert fields.flip and not registry.settings({"name": "coco"})[1].flip
    prepared = fields.preprocess(32)
    assert (prepared.mode, prepared.interpolation, prepared.fast_decode) == (
        "squash",
        "bilinear",
        False,
    )
    with pytest.raises(UserError, match=r"unknown config key 'data\.augment_flip'"):
        registry.settings({"name": "coco", "augment_flip": True})


@pytest.mark.parametrize("sparse", [False, True])
def test_training_counts_of_the_labels_of_evaluation(tmp_path, monkeypatch, sparse):
    raw_folders_more.openimages(tmp_path)
    monkeypatch.setattr(assemble, "_DENSE_BYTES", 0 if sparse else 1 << 20)
    config = {"name": "openimages_gzsl", "data_dir": str(tmp_path), "check_sizes": False}
    data = registry.load(config, image_size=8, splits=("test",))
    seen = len(data.train_space)
    counts = data.train_counts()
    np.testing.assert_array_equal(counts[:seen], (data.train.label_matrix() > 0).sum(0))
    assert counts[:seen].any() and not counts[seen:].any() and len(counts) == len(data.space)
