"""What any S3 client must do for the store (`Bucket`), and what is said and tried again when one
fails.

Two clients fit: `bucket_fsspec` (s3fs, always there) and `bucket_obstore` (faster, optional).
Neither retries by itself what `retried` retries, so that how long an outage may last is decided in
one place.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple, Protocol, TypeVar

import tenacity

from deepspec.errors import TransientError

log = logging.getLogger(__name__)

# at least 36 s in all: a server may restart meanwhile
TRIES, FIRST_WAIT_S, LONGEST_WAIT_S, JITTER_S = 12, 0.2, 5.0, 0.3
CONNECT_S, READ_S = 5, 60
PART_BYTES, MAX_PARTS = 8 << 20, 10_000
OWNER = "deepspec-owner"  # user metadata of an object: the one call that put it there
CLIENT_VARIABLE = "DEEPSPEC_S3_CLIENT"

ResultT = TypeVar("ResultT")
Buffer = bytes | memoryview
Kind = Literal[
    "missing",
    "no bucket",
    "exists",
    "denied",
    "no credentials",
    "bad range",
    "unsupported",
    "transient",
    "fatal",
]

KINDS: dict[str, Kind] = {
    "NoSuchKey": "missing",
    "NoSuchUpload": "missing",
    "NoSuchBucket": "no bucket",
    "PreconditionFailed": "exists",
    "ConditionalRequestConflict": "exists",
    "AccessDenied": "denied",
    "SignatureDoesNotMatch": "denied",
    "InvalidAccessKeyId": "denied",
    "InvalidToken": "denied",
    "ExpiredToken": "denied",
    "AllAccessDisabled": "denied",
    "AccountProblem": "denied",
    "InvalidRange": "bad range",
    "NotImplemented": "unsupported",
    # The body changed or broke off on its way to the server, or the server asks for less or a
    # second try.
    "BadDigest": "transient",
    "XAmzContentSHA256Mismatch": "transient",
    "IncompleteBody": "transient",
    "RequestTimeout": "transient",
    "SlowDown": "transient",
    "Throttling": "transient",
    "ThrottlingException": "transient",
    "RequestLimitExceeded": "transient",
    "TooManyRequests": "transient",
    "InternalError": "transient",
    "ServiceUnavailable": "transient",
    "OperationAborted": "transient",
}
STATUS_KINDS: dict[int, Kind] = {
    401: "denied",
    403: "denied",
    404: "missing",
    408: "transient",
    409: "exists",
    412: "exists",
    416: "bad range",
    429: "transient",
    501: "unsupported",
}


class Entry(NamedTuple):
    """One file of a folder; `modified` in unix seconds."""

    name: str
    num_bytes: int
    modified: float


class FolderListing(NamedTuple):
    """What lies directly in a folder."""

    files: list[Entry]
    folders: list[str]


class Head(NamedTuple):
    """Which version of an object is there; `owner` is what `put_new` left on it."""

    num_bytes: int
    etag: str
    owner: str = ""


class Problem(NamedTuple):
    """What a client's error means, and a few words without any secret."""

    kind: Kind
    words: str


class Failure(Exception):
    """A request that failed for good."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem.words)
        self.problem = problem


class ShortBody(ConnectionError):
    """Fewer bytes came than the server has."""


class Bucket(Protocol):
    """One client of one process. Keys are relative to the store; every method is one try and
    may raise any of `errors`.
    """

    errors: tuple[type[Exception], ...]

    def problem(self, error: Exception) -> Problem: ...
    def read(self, key: str) -> bytes: ...
    def read_range(self, key: str, start: int, end: int) -> Buffer: ...
    def head(self, key: str) -> Head: ...
    def listing(self, folder: str) -> FolderListing: ...
    def remove(self, key: str) -> None:
        """Nothing is there under this key afterwards; that nothing was there before is no error."""

    def put(self, key: str, data: bytes) -> None:
        """One request; the server checks the bytes it gets where it can."""

    def put_new(self, key: str, data: bytes, owner: str) -> None:
        """One request with `If-None-Match: *`, never a multipart upload: servers ignore the
        condition there.
        """

    def upload(self, local: Path, key: str) -> None:
        """In concurrent parts; a failed upload is aborted, its error raised."""


class Upload(NamedTuple):
    """A multipart upload that was begun and neither completed nor aborted; `started` in unix
    seconds.
    """

    key: str
    upload_id: str
    started: float


def retried(
    what: str, call: Callable[[], ResultT], bucket: Bucket, *, within_s: float | None = None
) -> ResultT:
    """What `call` returns, tried again while the reason for its failure may pass: `TRIES` tries, at
    least 36 s.

    With `within_s`, no further try begins after so many seconds.

    Raises:
        Failure: a reason that stays (missing, exists, denied, ...).
        TransientError: it failed every time.
    """

    def once() -> ResultT:
        try:
            return call()
        except bucket.errors as error:
            raise Failure(bucket.problem(error)) from error

    def say(state: tenacity.RetryCallState) -> None:
        wait_s = state.next_action.sleep if state.next_action else 0.0
        reason = state.outcome.exception() if state.outcome else ""
        log.warning(
            "op=%s try=%d of=%d next_in_s=%.1f reason=%s",
            what,
            state.attempt_number,
            TRIES,
            wait_s,
            reason,
        )

    stop = tenacity.stop_after_attempt(TRIES)
    retrying = tenacity.Retrying(
        retry=tenacity.retry_if_exception(
            lambda error: isinstance(error, Failure) and error.problem.kind == "transient"
        ),
        wait=tenacity.wait_exponential(multiplier=FIRST_WAIT_S, max=LONGEST_WAIT_S)
        + tenacity.wait_random(0, JITTER_S),
        stop=stop
        if within_s is None
        else tenacity.stop_any(stop, tenacity.stop_after_delay(within_s)),
        before_sleep=say,
        reraise=True,
    )
    try:
        return retrying(once)
    except Failure as failure:
        if failure.problem.kind != "transient":
            raise
        reason = failure.problem.words
    raise TransientError(
        f"the server did not answer: {reason}",
        where=what,
        fix="run the same again once the server is back",
    )


def problem_of_answer(status: int | None, code: str) -> Problem:
    """What an answer with this HTTP status and S3 error code means."""
    kind = (
        KINDS.get(code)
        or STATUS_KINDS.get(status or 0)
        or ("transient" if (status or 0) >= 500 else "fatal")
    )
    return Problem(kind, " ".join(str(part) for part in (status, code) if part))


def scrub(text: str) -> str:
    """The text's first line without keys, tokens, signatures and passwords."""
    line = text.strip().splitlines()[0] if text.strip() else ""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
        secret = os.environ.get(name)
        line = line.replace(secret, "***") if secret else line
    for pattern in SECRETS:
        line = pattern.sub(r"\1***", line)
    return line[:300]


SECRETS = [
    re.compile(r"()\b(?:AKIA|ASIA)[A-Z0-9]{12,}"),
    re.compile(
        r"(?i)((?:x-amz-(?:credential|signature|security-token)|awsaccesskeyid|signature|authorization|token)\s*[=:]\s*)[^\s&\"'<>]+"
    ),
    re.compile(r"(?i)(<(?:AWSAccessKeyId|SignatureProvided|StringToSign|Token)[^>]*>)[^<]*"),
    re.compile(r"(://)[^/@\s]+@"),
]


def part_bytes(num_bytes: int) -> int:
    """The size of a part with which the file stays below the number of parts that S3 allows."""
    return max(PART_BYTES, -(-num_bytes // MAX_PARTS))
