"""What the errors of S3 clients and servers mean, and the errors that users get for them."""

import os
import re
from typing import Literal, NamedTuple

from deepspec.errors import DamagedData, StoreError

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
CODES: dict[Kind, str] = {
    "missing": "NoSuchKey NoSuchUpload 404",
    "no bucket": "NoSuchBucket",
    "exists": "PreconditionFailed ConditionalRequestConflict 409 412",
    "denied": "AccessDenied SignatureDoesNotMatch InvalidAccessKeyId InvalidToken ExpiredToken"
    " AllAccessDisabled AccountProblem 401 403",
    "bad range": "InvalidRange 416",
    "unsupported": "NotImplemented 501",
    # The body changed or broke off on its way to the server, or the server wants fewer requests or
    # a second try.
    "transient": "BadDigest XAmzContentSHA256Mismatch IncompleteBody RequestTimeout SlowDown"
    " Throttling ThrottlingException RequestLimitExceeded TooManyRequests InternalError"
    " ServiceUnavailable OperationAborted 408 429",
}  # S3's error codes, and the HTTP statuses of answers without one of these
KINDS = {code: kind for kind, codes in CODES.items() for code in codes.split()}
SECRETS = (
    r"()\b(?:AKIA|ASIA)[A-Z0-9]{12,}",
    r"(?i)((?:x-amz-(?:credential|signature|security-token)|awsaccesskeyid|signature"
    r"|authorization|token)\s*[=:]\s*)[^\s&\"'<>]+",
    r"(?i)(<(?:AWSAccessKeyId|SignatureProvided|StringToSign|Token)[^>]*>)[^<]*",
    r"(://)[^/@\s]+@",
)
SECRET_VARIABLES = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")
DAMAGED_FIX = "run `python -m deepspec verify`, then the stage again"


class Problem(NamedTuple):
    """What a client's error means, and its text without any secret."""

    kind: Kind
    text: str


class Failure(Exception):
    """A request failed; `problem` has the reason."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem.text)
        self.problem = problem


def problem_of_answer(status: int | None, code: str) -> Problem:
    """What an answer with this HTTP status and S3 error code means."""
    status = status or 0
    kind = KINDS.get(code) or KINDS.get(str(status), "transient" if status >= 500 else "fatal")
    return Problem(kind, " ".join(str(part) for part in (status, code) if part))


def problem_of(error: Exception, *, transient: bool) -> Problem:
    """The problem of an error without an answer of the server."""
    return Problem("transient" if transient else "fatal", scrub(f"{type(error).__name__}: {error}"))


def user_error(problem: Problem, where: str) -> Exception:
    """The error that a user gets for a problem that will not go away."""
    kind, text = problem
    if kind == "missing":
        return FileNotFoundError(where)
    if kind == "bad range":
        return cut_short(where)
    known = {
        "no bucket": ("there is no such bucket", "create it, or choose another with --store"),
        "denied": (
            f"the server refuses these credentials ({text})",
            "check the keys in use and their rights",
        ),
        "no credentials": (
            "no credentials were found",
            "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE",
        ),
    }
    unknown = (
        f"the server refuses the request ({text})",
        "check AWS_ENDPOINT_URL, the region and the server's log",
    )
    what, fix = known.get(kind, unknown)
    return StoreError(what, where=where, fix=fix)


def cut_short(where: str) -> DamagedData:
    """The error for an object that is shorter than its record says."""
    return DamagedData(
        "the object ends before the bytes that were requested", where=where, fix=DAMAGED_FIX
    )


def scrub(text: str) -> str:
    """The text's first line without keys, tokens, signatures and passwords."""
    line = text.strip().partition("\n")[0]
    for name in SECRET_VARIABLES:
        secret = os.environ.get(name)
        line = line.replace(secret, "***") if secret else line
    for pattern in SECRETS:
        line = re.sub(pattern, r"\1***", line)
    return line[:300]
