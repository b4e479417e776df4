"""What answers of S3 servers mean, and what a user is shown of them."""

import pytest

from deepspec.errors import DamagedData, StoreError
from deepspec.storage.s3_errors import Problem, problem_of_answer, scrub, user_error


@pytest.mark.parametrize(
    ("status", "code", "kind"),
    [
        (404, "NoSuchKey", "missing"),
        (404, "NoSuchBucket", "no bucket"),  # the code counts more than the status
        (412, "", "exists"),
        (403, "", "denied"),
        (400, "BadDigest", "transient"),
        (503, "NeverHeardOf", "transient"),
        (400, "EntityTooSmall", "fatal"),
        (None, "", "fatal"),
    ],
)
def test_an_answer_is_known_by_its_code_or_else_by_its_status(status, code: str, kind: str):
    assert problem_of_answer(status, code).kind == kind


def test_each_problem_has_the_error_that_its_callers_expect():
    assert isinstance(user_error(Problem("missing", ""), "here"), FileNotFoundError)
    assert isinstance(user_error(Problem("bad range", ""), "here"), DamagedData)
    for kind in ("no bucket", "denied", "no credentials", "fatal"):
        assert isinstance(user_error(Problem(kind, "400 X"), "here"), StoreError)


def test_no_secret_is_left_in_a_text(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "s3cr3t/key")
    text = (
        "403 for https://user:pass@host/x?X-Amz-Signature=abc123&x-amz-credential=AKIA5 "
        "with s3cr3t/key of AKIAABCDEFGHIJKLMNOP <StringToSign>AWS4 here</StringToSign>\nmore"
    )
    found = scrub(text)
    for secret in ("pass@", "abc123", "AKIA5", "s3cr3t", "AKIAABCDEFGHIJKLMNOP", "AWS4", "more"):
        assert secret not in found
    assert found.startswith("403 for https://")
