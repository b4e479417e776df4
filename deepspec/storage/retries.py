"""Requests to a remote store are tried again here, and nowhere else, while the reason may pass."""

import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import TypeVar

import tenacity

from deepspec.errors import TransientError
from deepspec.storage.s3_client import Bucket
from deepspec.storage.s3_errors import Failure

log = logging.getLogger(__name__)

# at least 36 s in all: a server may restart meanwhile
TRIES, FIRST_WAIT_S, LONGEST_WAIT_S, JITTER_S = 12, 0.2, 5.0, 0.3
ResultT = TypeVar("ResultT")


def retried(
    what: str, call: Callable[[], ResultT], bucket: Bucket, *, within_s: float = float("inf")
) -> ResultT:
    """What `call` returns, after at most `TRIES` tries over at least 36 s.

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

    def log_retry(state: tenacity.RetryCallState) -> None:
        reason = state.outcome.exception() if state.outcome else ""
        tries = f"try={state.attempt_number} of={TRIES} next_in_s={state.upcoming_sleep:.1f}"
        log.warning("op=%s %s reason=%s", what, tries, reason)

    retrying = tenacity.Retrying(
        retry=tenacity.retry_if_exception(
            lambda error: isinstance(error, Failure) and error.problem.kind == "transient"
        ),
        wait=tenacity.wait_exponential(multiplier=FIRST_WAIT_S, max=LONGEST_WAIT_S)
        + tenacity.wait_random(0, JITTER_S),
        stop=tenacity.stop_after_attempt(TRIES) | tenacity.stop_after_delay(within_s),
        before_sleep=log_retry,
    )
    try:
        return retrying(once)
    except tenacity.RetryError as error:
        raise TransientError(
            f"the server did not answer: {error.last_attempt.exception()}",
            where=what,
            fix="run the same again once the server is back",
        ) from None


def within(seconds: float, call: Callable[[], ResultT], *, where: str) -> ResultT:
    """What `call` returns, or whatever it raises.

    Raises:
        TransientError: the server cannot be reached, or does not answer in so many seconds (the
            call is then left to itself). Not a StoreError: every child of a lane begins with this
            check, and one that meets a restarting server must be tried again.
    """
    done: Future[ResultT] = Future()

    def run() -> None:
        try:
            done.set_result(call())
        except BaseException as error:  # noqa: BLE001 - raised again in the thread that waits
            done.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    try:
        if not wait([done], seconds).done:
            raise TransientError(f"no answer in {seconds:g} s")
        return done.result()
    except TransientError as error:
        raise TransientError(
            f"cannot reach the store: {error.what}",
            where=where,
            fix="check AWS_ENDPOINT_URL and the network, or choose another with --store",
        ) from None
