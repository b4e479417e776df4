"""S3 through s3fs, which is always installed."""

import logging
import uuid
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from typing_extensions import override

from deepspec.errors import TransientError
from deepspec.storage.retries import retried
from deepspec.storage.s3_client import (
    CONNECT_S,
    OWNER,
    PART_BYTES,
    PARTS_AT_ONCE,
    READ_S,
    Bucket,
    Head,
    part_bytes,
)
from deepspec.storage.s3_errors import Failure, Problem, problem_of_answer
from deepspec.storage.store import Upload

log = logging.getLogger(__name__)
ABORT_S = 20.0


class S3fsBucket(Bucket):
    """S3 through s3fs, with the requests spelled out where s3fs would make more of them."""

    def __init__(self, root: str) -> None:
        import aiohttp
        import botocore.exceptions as botocore

        super().__init__(s3_filesystem(), root)
        self.errors = (OSError, botocore.BotoCoreError, botocore.ClientError, aiohttp.ClientError)
        no_credentials = (
            botocore.NoCredentialsError,
            botocore.PartialCredentialsError,
            botocore.ProfileNotFound,
            botocore.CredentialRetrievalError,
            botocore.TokenRetrievalError,
        )
        self.meanings = (
            (no_credentials, Problem("no credentials", "no credentials")),
            (PermissionError, Problem("denied", "permission denied")),
            *self.meanings,
        )
        connection = (botocore.ConnectionError, botocore.HTTPClientError, aiohttp.ClientError)
        self.transient = (*connection, ConnectionError, TimeoutError)
        self.name, _, prefix = root.partition("/")
        self.prefix = f"{prefix}/" if prefix else ""

    def call(self, method: str, key: str, **fields: Any) -> dict[str, Any]:
        """One request about an object, as botocore names its methods and fields."""
        return dict(self.fs.call_s3(method, Bucket=self.name, Key=self.prefix + key, **fields))

    @override
    def problem(self, error: Exception) -> Problem:
        # s3fs gives the server's answer a class and an errno of its own; the cause still has what
        # it was.
        response = getattr(error.__cause__ or error, "response", None)
        if isinstance(response, dict):
            status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
            code = str(response.get("Error", {}).get("Code", ""))
            return problem_of_answer(status, "" if code.isdigit() else code)
        return super().problem(error)

    @override
    def read(self, key: str) -> bytes:
        try:
            # A range, because s3fs requests the size first otherwise.
            return bytes(self.fs.cat_file(self.path(key), start=0))
        except OSError as error:
            if self.problem(error).kind == "bad range":  # an empty object has no byte 0
                return b""
            raise

    @override
    def head(self, key: str) -> Head:
        found = self.call("head_object", key)
        return Head(
            int(found["ContentLength"]),
            str(found["ETag"]).strip('"'),
            found.get("Metadata", {}).get(OWNER, ""),
        )

    @override
    def remove(self, key: str) -> None:
        self.call("delete_object", key)

    @override
    def put(self, key: str, data: bytes) -> None:
        self.call("put_object", key, Body=data)

    @override
    def put_new(self, key: str, data: bytes, owner: str) -> None:
        self.call("put_object", key, Body=data, IfNoneMatch="*", Metadata={OWNER: owner})

    @override
    def upload(self, local: Path, key: str) -> None:
        num_bytes = local.stat().st_size
        size = part_bytes(num_bytes)
        owner = uuid.uuid4().hex
        begun = self.call("create_multipart_upload", key, Metadata={OWNER: owner})
        upload = Upload(key, str(begun["UploadId"]), 0.0)

        def send(number: int) -> dict[str, Any]:
            with local.open("rb") as file:
                file.seek((number - 1) * size)
                body = file.read(size)
            put = partial(
                self.call,
                "upload_part",
                key,
                UploadId=upload.upload_id,
                PartNumber=number,
                Body=body,
            )
            sent = retried(f"upload {key} part {number}", put, self)
            return {"PartNumber": number, "ETag": sent["ETag"]}

        try:
            with ThreadPoolExecutor(PARTS_AT_ONCE) as pool:
                parts = list(pool.map(send, range(1, max(1, -(-num_bytes // size)) + 1)))
            self._complete(upload, parts, owner)
        except BaseException:
            # A server that cannot even abort now must not hide why the upload failed; `gc` finds
            # what is left.
            try:
                self.abort(upload)
            except (Failure, TransientError) as error:
                log.warning("op=abort key=%s left=yes reason=%s", upload.key, error)
            raise

    def _complete(self, upload: Upload, parts: list[dict[str, Any]], owner: str) -> None:
        """Make one object of the parts.

        If the answer is lost, the object is looked for instead of a second try: a gateway that died
        in the middle keeps the upload locked.
        """
        try:
            self.call(
                "complete_multipart_upload",
                upload.key,
                UploadId=upload.upload_id,
                MultipartUpload={"Parts": parts},
            )
        except self.errors as error:
            if self.problem(error).kind != "transient":
                raise
            with suppress(Failure):
                head = partial(self.head, upload.key)
                if retried(f"head {upload.key}", head, self).owner == owner:
                    return
            raise

    @override
    def uploads(self) -> list[Upload]:
        found = []
        after: dict[str, str] = {}
        place = {"Bucket": self.name, "Prefix": self.prefix}
        while True:
            page = self.fs.call_s3("list_multipart_uploads", **place, **after)
            for item in page.get("Uploads", []):
                key = item["Key"].removeprefix(self.prefix)
                found.append(Upload(key, item["UploadId"], item["Initiated"].timestamp()))
            if not page.get("IsTruncated"):
                return found
            after = {
                "KeyMarker": page["NextKeyMarker"],
                "UploadIdMarker": page["NextUploadIdMarker"],
            }

    @override
    def abort(self, upload: Upload) -> None:
        abort = partial(self.call, "abort_multipart_upload", upload.key, UploadId=upload.upload_id)
        try:
            retried(f"abort {upload.key}", abort, self, within_s=ABORT_S)
        except Failure as failure:
            if failure.problem.kind != "missing":
                raise


def s3_filesystem() -> Any:
    """A new s3fs client that finds credentials and endpoint as every AWS tool, and never retries.

    The body of each request is hashed into its signature, so that a server refuses bytes that
    changed on the way; newer checksum headers are left out, because servers other than Amazon's
    refuse those.
    """
    import s3fs

    fs = s3fs.S3FileSystem(
        config_kwargs={
            "retries": {"total_max_attempts": 1},
            "connect_timeout": CONNECT_S,
            "read_timeout": READ_S,
            "max_pool_connections": 64,
            "request_checksum_calculation": "when_required",
            "response_checksum_validation": "when_required",
            "s3": {"payload_signing_enabled": True},
        },
        use_listings_cache=False,
        skip_instance_cache=True,
        default_block_size=PART_BYTES,
    )
    fs.retries = 1
    return fs
