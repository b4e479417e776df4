"""S3 through obstore, the fast client, where it is installed; s3fs does the same with more CPU."""

import functools
import importlib.util
import os
import re
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path, PurePosixPath
from typing import Any

from typing_extensions import override

from deepspec.storage.s3_client import (
    CONNECT_S,
    OWNER,
    PARTS_AT_ONCE,
    READ_S,
    Bucket,
    Head,
    part_bytes,
)
from deepspec.storage.s3_errors import Problem, problem_of_answer
from deepspec.storage.store import Buffer, Entry, FolderListing

# Botocore renews at least ten minutes early; obstore wants new ones five minutes before the end.
CREDENTIALS_KEPT = timedelta(minutes=10)
STATUS = re.compile(r"status code: (\d{3})")
CODE = re.compile(r"<Code>(\w+)</Code>")

# The process that started obstore's threads, which do not exist in its forks.
_used_in: list[int] = []


@functools.cache
def installed() -> bool:
    """Whether the package is there."""
    return importlib.util.find_spec("obstore") is not None


def usable() -> bool:
    """Whether obstore works in this process.

    A fork of a process that used it would wait for ever, even with a new client.
    """
    return installed() and _used_in[:1] in ([], [os.getpid()])


class ObstoreBucket(Bucket):
    """S3 through obstore; credentials, endpoint and region are those that botocore finds."""

    def __init__(self, root: str) -> None:
        import obstore
        from obstore import exceptions

        _used_in[:] = [os.getpid()]
        self.obstore = obstore
        self.errors = (exceptions.BaseError, OSError)
        exists = (exceptions.AlreadyExistsError, exceptions.PreconditionError)
        self.meanings = (
            (exists, Problem("exists", "exists already")),
            (exceptions.UnauthenticatedError, Problem("no credentials", "no credentials")),
            (exceptions.PermissionDeniedError, Problem("denied", "permission denied")),
            *self.meanings,
        )
        # A part that fails once is not worth sending the whole file again; everything else is
        # retried in `retries` alone.
        connect = _s3_connection(root)
        self.store = connect(0)
        self._upload_store = connect(3)

    @override
    def problem(self, error: Exception) -> Problem:
        text = str(error).split("Debug source:")[0]
        status, code = STATUS.search(text), CODE.search(text)
        if status:
            return problem_of_answer(int(status[1]), code[1] if code else "")
        found = super().problem(error)
        is_transient = found.kind == "fatal" and "HTTP error" in text
        return found._replace(kind="transient") if is_transient else found

    @override
    def read(self, key: str) -> bytes:
        return bytes(self.obstore.get(self.store, key).bytes())

    @override
    def read_range(self, key: str, start: int, end: int) -> Buffer:
        return memoryview(self.obstore.get_range(self.store, key, start=start, end=end))

    @override
    def head(self, key: str) -> Head:
        # obstore.head would leave out the attributes.
        found = self.obstore.get(self.store, key, options={"head": True})
        return Head(
            int(found.meta["size"]),
            str(found.meta["e_tag"]).strip('"'),
            str(found.attributes.get(OWNER, "")),
        )

    @override
    def listing(self, folder: str) -> FolderListing:
        found = self.obstore.list_with_delimiter(self.store, folder)
        return FolderListing(
            [
                Entry(PurePosixPath(o["path"]).name, int(o["size"]), o["last_modified"].timestamp())
                for o in found["objects"]
            ],
            [PurePosixPath(prefix).name for prefix in found["common_prefixes"]],
        )

    @override
    def remove(self, key: str) -> None:
        self.obstore.delete(self.store, key)

    @override
    def put(self, key: str, data: bytes) -> None:
        self.obstore.put(self.store, key, data, use_multipart=False)

    @override
    def put_new(self, key: str, data: bytes, owner: str) -> None:
        self.obstore.put(
            self.store, key, data, use_multipart=False, mode="create", attributes={OWNER: owner}
        )

    @override
    def upload(self, local: Path, key: str) -> None:
        self.obstore.put(
            self._upload_store,
            key,
            local,
            use_multipart=True,
            chunk_size=part_bytes(local.stat().st_size),
            max_concurrency=PARTS_AT_ONCE,
        )


def _s3_connection(root: str) -> Callable[[int], Any]:
    """Makes S3 clients of obstore that retry a request so many times."""
    from botocore.session import Session
    from obstore.store import S3Store

    session = Session()
    meta = session.create_client("s3").meta
    is_http = meta.endpoint_url.startswith("http://")
    name, _, prefix = root.partition("/")
    options = {
        "connect_timeout": f"{CONNECT_S}s",
        "read_timeout": f"{READ_S}s",
        "timeout": "600s",
        "allow_http": is_http,
    }
    bundle = session.get_config_variable("ca_bundle")
    if bundle and not is_http:
        options["root_certificate"] = Path(bundle).read_bytes()
    backoff = {
        "init_backoff": timedelta(milliseconds=200),
        "max_backoff": timedelta(seconds=2),
        "base": 2,
    }
    return lambda max_retries: S3Store(
        name,
        prefix=prefix or None,
        config={
            "endpoint": meta.endpoint_url,
            "region": meta.region_name or "us-east-1",
            "virtual_hosted_style_request": "false",
        },
        client_options=options,
        credential_provider=_credentials(session),
        retry_config={
            "max_retries": max_retries,
            "retry_timeout": timedelta(seconds=30),
            "backoff": backoff,
        },
    )


def _credentials(session: Any) -> Callable[[], dict[str, Any]]:
    """What obstore calls for keys.

    Botocore renews those of a role in time, so obstore is made to call again every few minutes.
    """

    def provide() -> dict[str, Any]:
        found = session.get_credentials()
        if found is None:
            raise PermissionError("no credentials")
        keys = found.get_frozen_credentials()
        return {
            "access_key_id": keys.access_key,
            "secret_access_key": keys.secret_key,
            "token": keys.token,
            "expires_at": datetime.now(UTC) + CREDENTIALS_KEPT,
        }

    return provide
