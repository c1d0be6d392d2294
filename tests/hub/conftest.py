"""The Hub on loopback, in the place of the real one."""

import pytest
from hub_stand_in import HubStandIn
from huggingface_hub import close_session


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """The stand-in; waits between retries are skipped, and downloads are cached in the test's own folder."""
    with HubStandIn() as stand_in:
        address = stand_in.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", stand_in.url)
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", address)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub_cache"))
        monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(tmp_path / "hub_cache"))
        monkeypatch.setattr("transformers.utils.hub._is_offline_mode", False, raising=False)
        monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
        close_session()
        yield stand_in
        close_session()
