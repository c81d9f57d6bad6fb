from __future__ import annotations

import pytest
import raw_folders
import raw_folders_more

from mlclip_jax.data import assemble, builders
from mlclip_jax.data.raw import NEEDED, custom

MAKE = {
    name: getattr(raw_folders, name, None) or getattr(raw_folders_more, name) for name in NEEDED
}


@pytest.mark.parametrize("corpus", MAKE)
def test_the_folder_of_a_corpus_is_known_by_what_it_holds(tmp_path, corpus):
    def found(data_dir):
        return assemble.corpus_folder(str(data_dir), corpus)

    raw = tmp_path / "downloads" / corpus
    MAKE[corpus](raw)
    assert found(raw) == raw == found(tmp_path / "downloads")
    (raw / corpus).mkdir()  # a folder of images, say
    (raw / corpus / "1.jpg").touch()
    assert found(raw) == raw == found(tmp_path / "downloads")
    # Prepared: the manifest alone says so, even where the raw files are around it.
    (raw / corpus / "any.manifest.npz").touch()
    assert found(raw) == raw / corpus
    # Where nothing is known of either, errors are about the folder of its name.
    (tmp_path / "empty" / corpus).mkdir(parents=True)
    assert found(tmp_path / "empty") == tmp_path / "empty" / corpus
    assert found(tmp_path / "none") == tmp_path / "none"


def test_own_images_in_a_folder_called_custom(tmp_path):
    raw = tmp_path / "photos"
    images = {"image": "custom/1.jpg", "labels": ["sea"]}, {"image": "2.jpg", "labels": []}
    raw_folders.write_custom(raw, images, suffix=".jsonl")
    for image in images:
        raw_folders.write_image(raw / image["image"], 0)
    manifest, folder = assemble.open_part("custom", "train", str(raw))
    assert folder == raw and manifest.keys.tolist() == ["custom/1.jpg", "2.jpg"]
    out = tmp_path / "out"
    builders.prepare("custom", "train", custom.read(raw, "train"), raw, out)
    manifest, folder = assemble.open_part("custom", "train", str(out))
    assert folder == out / "custom" and manifest.keys.tolist() == ["custom/1.jpg", "2.jpg"]
