"""The store's objects through fsspec: s3fs for S3, and whatever else fsspec knows (`memory://`
for the tests).
"""

from __future__ import annotations

import logging
import threading
import uuid
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from deepspec.errors import TransientError
from deepspec.storage.s3_client import (
    CONNECT_S,
    OWNER,
    PART_BYTES,
    READ_S,
    Buffer,
    Entry,
    Failure,
    FolderListing,
    Head,
    Problem,
    Upload,
    part_bytes,
    problem_of_answer,
    retried,
    scrub,
)

log = logging.getLogger(__name__)
PARTS_AT_ONCE = 4
ABORT_S = 20.0


class FsspecBucket:
    """Any file system of fsspec; its own locks keep the threads of one process apart, nothing
    more.
    """

    errors: tuple[type[Exception], ...] = (OSError,)

    def __init__(self, fs: Any, root: str) -> None:
        self.fs, self.root = fs, root
        self._lock = threading.Lock()

    def path(self, key: str) -> str:
        return f"{self.root}/{key}"

    def problem(self, error: Exception) -> Problem:
        if isinstance(error, FileNotFoundError):
            return Problem("missing", "not found")
        if isinstance(error, FileExistsError):
            return Problem("exists", "exists already")
        passing = isinstance(error, ConnectionError | TimeoutError)
        return Problem(
            "transient" if passing else "fatal", scrub(f"{type(error).__name__}: {error}")
        )

    def read(self, key: str) -> bytes:
        return bytes(self.fs.cat_file(self.path(key)))

    def read_range(self, key: str, start: int, end: int) -> Buffer:
        return bytes(self.fs.cat_file(self.path(key), start=start, end=end))

    def head(self, key: str) -> Head:
        info = self.fs.info(self.path(key))
        if info["type"] == "directory":
            raise FileNotFoundError(key)
        return Head(
            int(info["size"]), str(info.get("ETag") or info.get("created") or info.get("mtime"))
        )

    def listing(self, folder: str) -> FolderListing:
        path = self.path(folder)
        self.fs.invalidate_cache(path)
        files, folders = [], []
        for info in self.fs.ls(path, detail=True):
            name = PurePosixPath(info["name"]).name
            if info["type"] == "directory":
                folders.append(name)
            elif info["name"].strip("/") != path.strip("/"):
                # asked for an object, S3 lists the object itself
                modified = (
                    info.get("LastModified") or info.get("created") or info.get("mtime") or 0.0
                )
                seconds = (
                    modified.timestamp() if hasattr(modified, "timestamp") else float(modified)
                )
                files.append(Entry(name, int(info["size"]), seconds))
        return FolderListing(files, folders)

    def remove(self, key: str) -> None:
        if self.fs.isfile(self.path(key)):
            self.fs.rm_file(self.path(key))

    def put(self, key: str, data: bytes) -> None:
        self.fs.pipe_file(self.path(key), data)

    def put_new(self, key: str, data: bytes, owner: str) -> None:
        with self._lock:
            if self.fs.exists(self.path(key)):
                raise FileExistsError(key)
            self.put(key, data)

    def upload(self, local: Path, key: str) -> None:
        self.fs.put_file(str(local), self.path(key))

    def uploads(self) -> list[Upload]:
        """Every multipart upload below the store's prefix that is neither complete nor aborted;
        only S3 has any.
        """
        return []

    def abort(self, upload: Upload) -> None:
        """The upload's parts are gone, unless it was completed or aborted meanwhile."""


class S3fsBucket(FsspecBucket):
    """S3 through s3fs, with the requests spelled out where s3fs would make more of them."""

    def __init__(self, root: str) -> None:
        import aiohttp
        import botocore.exceptions

        super().__init__(s3_filesystem(), root)
        self.errors = (
            OSError,
            botocore.exceptions.BotoCoreError,
            botocore.exceptions.ClientError,
            aiohttp.ClientError,
        )
        self._no_credentials = (
            botocore.exceptions.NoCredentialsError,
            botocore.exceptions.PartialCredentialsError,
            botocore.exceptions.ProfileNotFound,
            botocore.exceptions.CredentialRetrievalError,
            botocore.exceptions.TokenRetrievalError,
        )
        self._connection = (
            botocore.exceptions.ConnectionError,
            botocore.exceptions.HTTPClientError,
            aiohttp.ClientError,
        )
        self.name, _, self.prefix = root.partition("/")

    def call(self, method: str, key: str, **fields: Any) -> dict[str, Any]:
        return dict(
            self.fs.call_s3(
                method,
                Bucket=self.name,
                Key=f"{self.prefix}/{key}" if self.prefix else key,
                **fields,
            )
        )

    def problem(self, error: Exception) -> Problem:
        # s3fs gives the server's answer a class and an errno of its own; the cause still says what
        # it was.
        response = getattr(error.__cause__ or error, "response", None)
        if isinstance(response, dict):
            status, code = (
                response.get("ResponseMetadata", {}).get("HTTPStatusCode"),
                str(response.get("Error", {}).get("Code", "")),
            )
            return problem_of_answer(status, "" if code.isdigit() else code)
        if isinstance(error, self._no_credentials):
            return Problem("no credentials", type(error).__name__)
        if isinstance(error, PermissionError):
            return Problem("denied", "permission denied")
        if isinstance(error, self._connection):
            return Problem("transient", scrub(f"{type(error).__name__}: {error}"))
        return super().problem(error)

    def read(self, key: str) -> bytes:
        try:
            # a range, because s3fs asks for the size first otherwise
            return bytes(self.fs.cat_file(self.path(key), start=0))
        except OSError as error:
            if self.problem(error).kind == "bad range":  # an empty object has no byte 0
                return b""
            raise

    def head(self, key: str) -> Head:
        found = self.call("head_object", key)
        return Head(
            int(found["ContentLength"]),
            str(found["ETag"]).strip('"'),
            found.get("Metadata", {}).get(OWNER, ""),
        )

    def remove(self, key: str) -> None:
        self.call("delete_object", key)

    def put(self, key: str, data: bytes) -> None:
        self.call("put_object", key, Body=data)

    def put_new(self, key: str, data: bytes, owner: str) -> None:
        self.call("put_object", key, Body=data, IfNoneMatch="*", Metadata={OWNER: owner})

    def upload(self, local: Path, key: str) -> None:
        size = part_bytes(local.stat().st_size)
        num_parts = max(1, -(-local.stat().st_size // size))
        owner = uuid.uuid4().hex
        upload_id = str(
            self.call("create_multipart_upload", key, Metadata={OWNER: owner})["UploadId"]
        )

        def send(number: int) -> dict[str, Any]:
            with local.open("rb") as file:
                file.seek((number - 1) * size)
                body = file.read(size)
            part = {"UploadId": upload_id, "PartNumber": number, "Body": body}
            put = partial(self.call, "upload_part", key, **part)
            return {
                "PartNumber": number,
                "ETag": retried(f"upload {key} part {number}", put, self)["ETag"],
            }

        whole = False
        try:
            with ThreadPoolExecutor(PARTS_AT_ONCE) as pool:
                parts = list(pool.map(send, range(1, num_parts + 1)))
            self._complete(Upload(key, upload_id, 0.0), parts, owner)
            whole = True
        finally:
            if not whole:
                self._abort_or_leave(Upload(key, upload_id, 0.0))

    def _complete(self, upload: Upload, parts: list[dict[str, Any]], owner: str) -> None:
        """Make one object of the parts.

        If the answer is lost it is looked for, not asked for again: a gateway that died in the
        middle keeps the upload locked.
        """
        try:
            self.call(
                "complete_multipart_upload",
                upload.key,
                UploadId=upload.upload_id,
                MultipartUpload={"Parts": parts},
            )
        except self.errors as error:
            if self.problem(error).kind != "transient" or not self._is_there(upload.key, owner):
                raise

    def _is_there(self, key: str, owner: str) -> bool:
        try:
            return retried(f"head {key}", lambda: self.head(key), self).owner == owner
        except Failure:
            return False

    def _abort_or_leave(self, upload: Upload) -> None:
        """A server that cannot even abort now must not hide why the upload failed; `gc` finds
        what is left.
        """
        try:
            self.abort(upload)
        except (Failure, TransientError) as error:
            log.warning("op=abort key=%s left=yes reason=%s", upload.key, error)

    def uploads(self) -> list[Upload]:
        found: list[Upload] = []
        marks: dict[str, str] = {}
        prefix = f"{self.prefix}/" if self.prefix else ""
        while True:
            page = self.fs.call_s3(
                "list_multipart_uploads", Bucket=self.name, Prefix=prefix, **marks
            )
            for upload in page.get("Uploads", []):
                found.append(
                    Upload(
                        upload["Key"].removeprefix(prefix),
                        upload["UploadId"],
                        upload["Initiated"].timestamp(),
                    )
                )
            if not page.get("IsTruncated"):
                return found
            marks = {
                "KeyMarker": page["NextKeyMarker"],
                "UploadIdMarker": page["NextUploadIdMarker"],
            }

    def abort(self, upload: Upload) -> None:
        abort = lambda: self.call("abort_multipart_upload", upload.key, UploadId=upload.upload_id)  # noqa: E731
        try:
            retried(f"abort {upload.key}", abort, self, within_s=ABORT_S)
        except Failure as failure:
            if failure.problem.kind != "missing":
                raise


def s3_filesystem() -> Any:
    """A new s3fs client that looks for credentials and endpoint where every AWS tool does, and does
    not retry.

    The body of each request is hashed into its signature, so that a server refuses bytes that
    changed on the way; newer checksum headers are left out, because servers other than Amazon's
    refuse those.
    """
    import s3fs

    settings = {
        "retries": {"total_max_attempts": 1},
        "connect_timeout": CONNECT_S,
        "read_timeout": READ_S,
        "max_pool_connections": 64,
        "request_checksum_calculation": "when_required",
        "response_checksum_validation": "when_required",
        "s3": {"payload_signing_enabled": True},
    }
    fs = s3fs.S3FileSystem(
        config_kwargs=settings,
        use_listings_cache=False,
        skip_instance_cache=True,
        default_block_size=PART_BYTES,
    )
    fs.retries = 1
    return fs
