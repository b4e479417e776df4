"""From a store's URL to the store."""

from __future__ import annotations

from deepspec.storage.remote import Uploads
from deepspec.storage.store import Store


def open_store(url: str, *, scratch: str | None = None, uploads: Uploads = "read_back") -> Store:
    """The store at `url`: a local folder, `s3://bucket/prefix` or `memory://name`."""
    return Store(url, scratch=scratch, uploads=uploads)
