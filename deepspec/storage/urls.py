"""From a store's URL to the store."""

from pathlib import Path

import fsspec
from fsspec.implementations.local import LocalFileSystem

from deepspec.errors import StoreError
from deepspec.storage.local import LocalStore
from deepspec.storage.remote import RemoteStore
from deepspec.storage.store import Store, Uploads


def open_store(url: str, *, scratch: str | None = None, uploads: Uploads = "read_back") -> Store:
    """The store at `url`.

    Args:
        url: a local folder, `s3://bucket/prefix` (credentials and endpoint: as for every AWS tool)
            or `memory://name`.
        scratch: local folder for copies of remote files, both ways (None: ~/.cache/deepspec).
        uploads: whether a file published with a checksum is read back from the bucket, or only its
            size compared.

    Raises:
        StoreError: the URL names no store, or holds keys.
    """
    folder = Path(scratch) if scratch else Path.home() / ".cache" / "deepspec"
    protocol = fsspec.utils.get_protocol(url)
    is_s3 = protocol in ("s3", "s3a")
    # A secret key may hold a slash: then the colon before it shows that there is one.
    host = url.partition("://")[2].partition("/")[0]
    if "@" in host or (is_s3 and ":" in host):
        raise StoreError(
            "keys do not belong into a store's URL",
            where=f"store {protocol}://",
            fix="set AWS_ACCESS_KEY_ID or AWS_PROFILE",
        )
    where, fix = f"store {url}", "give a local folder or s3://bucket/prefix"
    try:
        kind = fsspec.get_filesystem_class(protocol)
    except (ValueError, ImportError) as error:
        raise StoreError(f"{error}", where=where, fix=fix) from None
    root = str(kind._strip_protocol(url)).rstrip("/")
    if is_s3 and not root:
        raise StoreError("the URL names no bucket", where=where, fix=fix)
    if issubclass(kind, LocalFileSystem):
        return LocalStore(url, root, scratch=folder)
    return RemoteStore(url.rstrip("/"), root, scratch=folder, uploads=uploads)
