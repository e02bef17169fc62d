"""The digest of a model's folder: of large files, samples."""

import os

import pytest

from orpo_dist.run import local_model
from orpo_dist.run.local_model import content_digest


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(os.urandom(10_000))
    return tmp_path


def test_other_files_do_not_count(folder):
    before = content_digest(folder)
    (folder / "README.md").write_text("new")
    assert content_digest(folder) == before


@pytest.mark.parametrize("place", [0, 4999, 9999])
@pytest.mark.parametrize("sample", [1 << 16, 16])
def test_a_changed_byte_in_a_sample_counts(folder, monkeypatch, place, sample):
    monkeypatch.setattr(local_model, "SAMPLE_BYTES", sample)
    monkeypatch.setattr(local_model, "SAMPLES", 3)
    before = content_digest(folder)
    file = folder / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(content)
    assert content_digest(folder) != before


def test_sizes_and_config_count(folder):
    before = content_digest(folder)
    (folder / "config.json").write_text("{ }")
    assert content_digest(folder) != before
