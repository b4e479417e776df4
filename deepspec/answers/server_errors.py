"""What a failed attempt at a server means: tried again or not, and whether it was the row's own
fault.
"""

from __future__ import annotations

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
AWAY = (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError)
HUNG_UP = (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError, aiohttp.ClientPayloadError)


class Again(Exception):
    """An attempt that failed in a way that the next one need not."""


class NotItsFault(Again):
    """The server was not there, or had too much to do: no reason ever to give the request up."""


def what_broke(error: Exception) -> tuple[Literal["away", "late", "broken"], BaseException]:
    """Whether the server could not be reached, took too long, or answered wrongly or not to the
    end; and the error beneath.
    """
    reasons = list(_causes(error))
    if any(isinstance(reason, AWAY) for reason in reasons):
        return "away", reasons[-1]
    if isinstance(error, openai.APITimeoutError) and not any(
        isinstance(reason, HUNG_UP) for reason in reasons
    ):
        return "late", reasons[-1]
    return "broken", reasons[-1]


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """The error and what it was raised from: `openai` reports as a time-out what its connection
    calls lost.
    """
    while error is not None:
        yield error
        error = error.__cause__


def retry_after_s(header: str | None) -> float:
    """Retry-After in seconds, from either of its forms; 0 for none."""
    with suppress(ValueError):
        return max(0.0, float(header or 0))
    with suppress(ValueError):
        return max(0.0, parsedate_to_datetime(header or "").timestamp() - time.time())
    return 0.0
