"""What a failed attempt at a server means: whether to try again, and whose fault it was."""

import time
from collections.abc import Iterator
from contextlib import suppress
from email.utils import parsedate_to_datetime
from typing import Literal

import aiohttp
import openai

RETRIED = (408, 409, 425, 429)  # and every 5xx
OVERLOADED = (429, 503)
KEY_REFUSED = (401, 403)
UNREACHABLE = (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError)
HUNG_UP = (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError, aiohttp.ClientPayloadError)


class AttemptFailed(Exception):
    """An attempt at a request failed for a reason that may pass."""


class ServerUnavailable(AttemptFailed):
    """The server was unreachable or overloaded, which does not count against the request."""


def connection_failure(
    error: Exception,
) -> tuple[Literal["unreachable", "timeout", "broken"], BaseException]:
    """How an attempt without a usable reply failed, and the innermost error."""
    causes = list(_causes(error))
    if any(isinstance(cause, UNREACHABLE) for cause in causes):
        return "unreachable", causes[-1]
    hung_up = any(isinstance(cause, HUNG_UP) for cause in causes)
    if isinstance(error, openai.APITimeoutError) and not hung_up:
        return "timeout", causes[-1]
    return "broken", causes[-1]


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """The error and what it was raised from: `openai` raises lost connections as time-outs."""
    while error is not None:
        yield error
        error = error.__cause__


def retry_after_s(header: str | None) -> float:
    """Retry-After in seconds, from either of its forms; 0 where there is none."""
    with suppress(ValueError):
        return max(0.0, float(header or 0))
    with suppress(ValueError):
        return max(0.0, parsedate_to_datetime(header or "").timestamp() - time.time())
    return 0.0
