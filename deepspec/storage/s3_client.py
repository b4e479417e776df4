"""What a client of a bucket must do for the store.

Three fit: s3fs (always there, `s3_fsspec.py`), obstore (faster, optional, `s3_obstore.py`), and any
other file system of fsspec (`fsspec_client.py`). None of them retries by itself: how long an outage
may last is decided in `retries.py` alone.
"""

from pathlib import Path
from typing import NamedTuple, Protocol

from deepspec.storage.s3_errors import Problem
from deepspec.storage.store import Buffer, FolderListing, Upload

CONNECT_S, READ_S = 5, 60
PART_BYTES, MAX_PARTS = 8 << 20, 10_000
PARTS_AT_ONCE = 4
OWNER = "deepspec-owner"  # user metadata of an object: the one call that created it


class Head(NamedTuple):
    """Which version of an object is there; `owner` is what `put_new` left on it."""

    num_bytes: int
    etag: str
    owner: str = ""


class Bucket(Protocol):
    """One client of one process; keys are relative to the store.

    Every method is one try and may raise any of `errors`.
    """

    errors: tuple[type[Exception], ...]

    def problem(self, error: Exception) -> Problem:
        """What one of `errors` means."""

    def read(self, key: str) -> bytes:
        """The whole object."""

    def read_range(self, key: str, start: int, end: int) -> Buffer:
        """The bytes [start, end), or as many of them as came."""

    def head(self, key: str) -> Head:
        """The object's version."""

    def listing(self, folder: str) -> FolderListing:
        """What lies directly below the prefix."""

    def remove(self, key: str) -> None:
        """There is no object of this key afterwards, as there may have been none before."""

    def put(self, key: str, data: bytes) -> None:
        """Write in one request; the server compares the bytes with their hash where it can."""

    def put_new(self, key: str, data: bytes, owner: str) -> None:
        """Write in one request with `If-None-Match: *`.

        Never in a multipart upload: servers ignore the condition there.
        """

    def upload(self, local: Path, key: str) -> None:
        """Write a file in concurrent parts; a failed upload is aborted, its error raised."""

    def uploads(self) -> list[Upload]:
        """Every unfinished multipart upload below the store's prefix; only s3fs can list them."""
        return []

    def abort(self, upload: Upload) -> None:
        """The upload's parts are gone, unless it was completed or aborted meanwhile."""
        return


def part_bytes(num_bytes: int) -> int:
    """The size of a part with which the file stays below the number of parts that S3 allows."""
    return max(PART_BYTES, -(-num_bytes // MAX_PARTS))


def create(bucket: Bucket, key: str, data: bytes, *, owner: str) -> bool | None:
    """Whether this call put the object there; None if the server knows no conditional writes.

    If something is in the way, it may be our own: its answer got lost and the request was sent
    again. The owner tells that even from equal bytes of another process.
    """
    try:
        bucket.put_new(key, data, owner)
    except bucket.errors as error:
        kind = bucket.problem(error).kind
        if kind == "unsupported":
            return None
        if kind != "exists":
            raise
        try:
            return bucket.head(key).owner == owner
        except FileNotFoundError:
            raise ConnectionError("a conflict was reported, and nothing is there now") from None
    return True
