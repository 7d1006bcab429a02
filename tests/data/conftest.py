"""No test of this folder reaches the network or the data of this machine."""

import pytest

from utils.data import download


@pytest.fixture(autouse=True)
def no_network(monkeypatch, tmp_path):
    monkeypatch.delenv("DATA_ROOT", raising=False)
    monkeypatch.setattr(download, "DOWNLOADS", tmp_path / "downloads")
