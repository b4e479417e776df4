"""Every request of a remote store passes here: a client of this process, tried again where that
may help, errors made ours.
"""

from __future__ import annotations

import copy
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import Literal, TypeVar

import fsspec

from deepspec.errors import DamagedData, StoreError, TransientError
from deepspec.storage import s3_obstore
from deepspec.storage.s3_client import CLIENT_VARIABLE, Bucket, Failure, retried
from deepspec.storage.s3_fsspec import FsspecBucket, S3fsBucket
from deepspec.storage.s3_obstore import ObstoreBucket

QUICK_S, CHECK_S = 6.0, 10.0
ResultT = TypeVar("ResultT")
Client = Literal["obstore", "s3fs", "fsspec"]


# One client for all stores of one URL: a new one costs half a second and its own connections. By
# process, because clients do not survive a fork, and by what the environment says of keys and
# endpoints, because clients read that once.
_clients: dict[tuple[object, ...], FsspecBucket | ObstoreBucket] = {}


class Calls:
    """Requests to `root` ("bucket/prefix")."""

    def __init__(self, url: str, root: str) -> None:
        self.url, self.root = url, root
        self.is_s3 = url.startswith(("s3://", "s3a://"))
        self.patience_s: float | None = None  # None: as long as `retried` allows

    @property
    def bucket(self) -> Bucket:
        """The client for everything that both can do."""
        return self._bucket(wanted_client() if self.is_s3 else "fsspec")

    @property
    def fsspec_bucket(self) -> FsspecBucket:
        """The client under `Store.fs`, and for multipart uploads that others left."""
        found = self._bucket("s3fs" if self.is_s3 else "fsspec")
        assert isinstance(found, FsspecBucket)  # noqa: S101 - what `_bucket` makes under these names
        return found

    def quick(self) -> Calls:
        """The same clients, giving up after `QUICK_S`: for checks before the work."""
        other = copy.copy(self)
        other.patience_s = QUICK_S
        return other

    def once(self, op: str, key: str, call: Callable[[Bucket], ResultT]) -> ResultT:
        """What `call` returns for the client of this process, counted as done once however often it
        was tried.

        Raises:
            FileNotFoundError, StoreError, DamagedData: a reason that stays.
            TransientError: none of many tries went well.
        """
        try:
            return self.attempt(op, key, call)
        except Failure as failure:
            raise self.error(failure, key) from None

    def by_fsspec(self, op: str, key: str, call: Callable[[FsspecBucket], ResultT]) -> ResultT:
        """As `once`, for what only the fsspec client can do."""
        bucket = self.fsspec_bucket
        try:
            return retried(
                f"{op} {self.url}/{key}", lambda: call(bucket), bucket, within_s=self.patience_s
            )
        except Failure as failure:
            raise self.error(failure, key) from None

    def attempt(self, op: str, key: str, call: Callable[[Bucket], ResultT]) -> ResultT:
        """As `once`, with a reason that stays left as it is, a Failure."""
        bucket = self.bucket
        return retried(
            f"{op} {self.url}/{key}", lambda: call(bucket), bucket, within_s=self.patience_s
        )

    def _bucket(self, client: Client) -> FsspecBucket | ObstoreBucket:
        settings = frozenset(item for item in os.environ.items() if item[0].startswith("AWS_"))
        key = (os.getpid(), client, self.url, self.root, settings)
        found = _clients.get(key)
        if found is None:
            makers: dict[Client, Callable[[], FsspecBucket | ObstoreBucket]] = {
                "obstore": lambda: ObstoreBucket(self.root),
                "s3fs": lambda: S3fsBucket(self.root),
                "fsspec": lambda: FsspecBucket(fsspec.core.url_to_fs(self.url)[0], self.root),
            }
            # Two threads may both make one; no lock, because a fork may happen while another thread
            # holds it.
            found = _clients.setdefault(key, makers[client]())
        return found

    def error(self, failure: Failure, key: str) -> Exception:
        kind, words = failure.problem
        where = f"{self.url}/{key}"
        if kind == "missing":
            return FileNotFoundError(where)
        if kind == "bad range":
            return self.cut_short(key)
        known = {
            "no bucket": ("there is no such bucket", "create it, or choose another with --store"),
            "denied": (
                f"the server refuses these credentials ({words})",
                "check the keys in use and their rights",
            ),
            "no credentials": (
                "no credentials were found",
                "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE",
            ),
        }
        unknown = (
            f"the server refuses the request ({words})",
            "check AWS_ENDPOINT_URL, the region and the server's log",
        )
        what, fix = known.get(kind, unknown)
        return StoreError(what, where=where, fix=fix)

    def cut_short(self, key: str) -> DamagedData:
        fix = "run `python -m deepspec verify`, then the stage again"
        return DamagedData(
            "the object ends before the bytes that were asked for",
            where=f"{self.url}/{key}",
            fix=fix,
        )


def within(seconds: float, call: Callable[[], bool], *, where: str) -> bool:
    """What `call` returns, or whatever it raises.

    Raises:
        TransientError: the server cannot be reached, or does not answer in so many seconds (the
            call is then left to itself). Not a StoreError: every child of a lane begins with this
            check, and one that meets a restarting server must be tried again.
    """
    done: Future[bool] = Future()

    def run() -> None:
        try:
            done.set_result(call())
        except BaseException as error:  # noqa: BLE001 - raised again below, in the thread that waits
            done.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    fix = "check AWS_ENDPOINT_URL and the network, or choose another with --store"
    if not wait([done], seconds).done:
        raise TransientError(
            f"cannot reach the store: no answer in {seconds:g} s", where=where, fix=fix
        )
    try:
        return done.result()
    except TransientError as error:
        raise TransientError(
            f"cannot reach the store: {error.what}", where=where, fix=fix
        ) from None


def wanted_client() -> Literal["obstore", "s3fs"]:
    """The client that `DEEPSPEC_S3_CLIENT` names, otherwise obstore where it is installed and can
    run in this process.

    Raises:
        StoreError: the variable names none of the two, or one that is not installed.
    """
    asked = os.environ.get(CLIENT_VARIABLE, "")
    if asked not in ("", "obstore", "s3fs"):
        raise StoreError(
            f"there is no S3 client {asked!r}",
            where=CLIENT_VARIABLE,
            fix="use obstore or s3fs, or unset it",
        )
    if asked == "obstore" and not s3_obstore.installed():
        raise StoreError(
            "obstore is not installed",
            where=CLIENT_VARIABLE,
            fix="pip install 'deepspec[s3]', or unset it",
        )
    # A forced obstore gives way, too: in a process forked from one that used it, it would wait for
    # ever.
    return "s3fs" if asked == "s3fs" or not s3_obstore.usable() else "obstore"
