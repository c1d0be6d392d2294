"""Corpora that the scripts which make manifests are tried on."""

import prepare_libri_light
import pytest
from corpora import encode_clips, write_libri_light, write_release, write_voxpopuli


@pytest.fixture
def in_process(monkeypatch):
    """Look at files without workers, which take most of the time of small trees."""
    monkeypatch.setattr("w2v2.audio.inspection.map_files", lambda paths, action, *_: map(action, paths))


@pytest.fixture(scope="session")
def spoken(tmp_path_factory):
    return encode_clips(tmp_path_factory.mktemp("spoken"))


@pytest.fixture
def release(tmp_path, spoken):
    return write_release(tmp_path / "cv-corpus-17.0-2024-03-15", spoken)


@pytest.fixture
def libri_light(tmp_path, monkeypatch):
    """A tree, and figures that fit it."""
    hours = write_libri_light(tmp_path / "librilight")
    monkeypatch.setattr(prepare_libri_light, "KNOWN", prepare_libri_light.KNOWN | hours)
    return tmp_path / "librilight"


@pytest.fixture
def voxpopuli(tmp_path):
    return write_voxpopuli(tmp_path / "vox")
