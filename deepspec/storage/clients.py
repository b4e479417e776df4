"""The clients of this process: one for all stores of one URL."""

import os
from typing import Literal

import fsspec

from deepspec.errors import StoreError
from deepspec.storage import s3_obstore
from deepspec.storage.s3_client import Bucket
from deepspec.storage.s3_fsspec import S3fsBucket
from deepspec.storage.s3_obstore import ObstoreBucket

CLIENT_VARIABLE = "DEEPSPEC_S3_CLIENT"
ClientName = Literal["obstore", "s3fs", "fsspec"]

# A new client costs half a second and its own connections. By process, because clients do not
# survive a fork, and by what the environment has of keys and endpoints, because clients read that
# once.
_clients: dict[tuple[object, ...], Bucket] = {}


def client_of(url: str, root: str, *, name: ClientName | None = None) -> Bucket:
    """The client for the store at `url`, whose root is "bucket/prefix".

    Without a `name` it is the fastest that works in this process.
    """
    name = (name or wanted_client()) if url.startswith(("s3://", "s3a://")) else "fsspec"
    settings = frozenset(item for item in os.environ.items() if item[0].startswith("AWS_"))
    key = (os.getpid(), name, url, root, settings)
    if key not in _clients:
        makers = {
            "obstore": lambda: ObstoreBucket(root),
            "s3fs": lambda: S3fsBucket(root),
            "fsspec": lambda: Bucket(fsspec.core.url_to_fs(url)[0], root),
        }
        # Two threads may both make one; no lock, because a fork may happen while another thread
        # holds it.
        _clients.setdefault(key, makers[name]())
    return _clients[key]


def wanted_client() -> Literal["obstore", "s3fs"]:
    """The client that `DEEPSPEC_S3_CLIENT` names, otherwise obstore where it works.

    Raises:
        StoreError: the variable names none of the two, or one that is not installed.
    """
    wanted = os.environ.get(CLIENT_VARIABLE, "")
    if wanted not in ("", "obstore", "s3fs"):
        raise StoreError(
            f"there is no S3 client {wanted!r}",
            where=CLIENT_VARIABLE,
            fix="use obstore or s3fs, or unset it",
        )
    if wanted == "obstore" and not s3_obstore.installed():
        raise StoreError(
            "obstore is not installed",
            where=CLIENT_VARIABLE,
            fix="pip install 'deepspec[s3]', or unset it",
        )
    # A forced obstore gives way, too: in a process forked from one that used it, it would wait for
    # ever.
    return "s3fs" if wanted == "s3fs" or not s3_obstore.usable() else "obstore"
