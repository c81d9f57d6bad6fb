from __future__ import annotations

import os

import pytest

from mlclip_jax.data import files
from mlclip_jax.errors import UserError


def test_a_lock_is_held_once_and_given_back(tmp_path):
    path = tmp_path / "new" / ".lock"
    for _ in range(2):
        with files.alone(path, "busy"):
            with pytest.raises(UserError, match="busy"), files.alone(path, "busy"):
                raise AssertionError("held twice")
            with files.alone(tmp_path / ".lock", "busy"):
                pass
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot make the folder"):
        files.alone(tmp_path / "file" / ".lock", "busy").__enter__()


def test_a_file_gets_its_name_after_its_content_is_written(tmp_path, monkeypatch):
    part, path = tmp_path / "a.part", tmp_path / "a"
    part.write_text("new")
    path.write_text("old")
    found = []

    def fsync(number):
        found.append((os.pread(number, 9, 0), path.read_text()))

    monkeypatch.setattr(os, "fsync", fsync)
    files.publish(part, path)
    assert found == [(b"new", "old")]
    assert path.read_text() == "new" and not part.exists()
