"""URLs that name no store, or too much."""

import pytest

from deepspec.errors import StoreError
from deepspec.storage.urls import open_store


@pytest.mark.parametrize("url", ["nosuch://bucket", "s3://"])
def test_a_url_that_is_no_store_is_refused(url: str):
    with pytest.raises(StoreError):
        open_store(url)


def test_keys_in_the_url_are_refused_and_not_repeated():
    with pytest.raises(StoreError, match="keys do not belong") as caught:
        open_store("s3://AKIASECRET:hunter2@bucket/x")
    assert "hunter2" not in str(caught.value) and "AKIASECRET" not in str(caught.value)


def test_a_secret_key_with_a_slash_is_refused_and_not_repeated():
    with pytest.raises(StoreError, match="keys do not belong") as caught:
        open_store("s3://AKIASECRET:hun/ter2@bucket/x")
    assert "ter2" not in str(caught.value)
