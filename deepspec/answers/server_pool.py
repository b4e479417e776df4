"""A pool of servers: each request goes to the one with the fewest in flight, and what a server can
take is found by trying.

Additive increase, multiplicative decrease, as in TCP (Chiu and Jain 1989): a round of good answers
allows one request more, a 429, 503 or time-out halves what is allowed. A server that fails again
and again rests, longer each time, and is then probed with one request. With 8 servers and one dying
every minute, work flows to the other seven.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections import deque
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from deepspec.errors import TransientError

log = logging.getLogger(__name__)

RESTS_AFTER = 3  # failures in a row
REST_S, LONGEST_REST_S = 1.0, 60.0
LOOK_S = 0.05  # between two looks at who rests no longer


class Endpoint:
    """One server, and what is known of it."""

    def __init__(self, url: str, most: int) -> None:
        self.url, self.most = url, most
        self.allowed = float(most)
        self.in_flight, self.failures, self.rests_until = 0, 0, 0.0
        self._halved_at = self._rested_at = 0.0

    @property
    def room(self) -> int:
        """Requests that it may be given now."""
        if time.monotonic() < self.rests_until:
            return 0
        return (1 if self.failures >= RESTS_AFTER else int(self.allowed)) - self.in_flight

    def answered(self) -> None:
        self.failures = 0
        self.allowed = min(self.most, self.allowed + 1 / self.allowed)

    def overloaded(self, began: float, retry_after_s: float = 0.0) -> None:
        """It told a request sent at `began` (monotonic seconds) that it has too much to do, and
        perhaps until when.
        """
        if began >= self._halved_at:  # what was sent before the last halving tells nothing new
            self.allowed, self._halved_at = max(1.0, self.allowed / 2), time.monotonic()
        self.rests_until = max(
            self.rests_until, time.monotonic() + min(retry_after_s, LONGEST_REST_S)
        )

    def failed(self, began: float) -> None:
        """A request sent at `began` (monotonic seconds) failed; those that one outage takes
        down together lengthen no rest.
        """
        if began < self._rested_at:
            return
        self.failures += 1
        if self.failures >= RESTS_AFTER:
            rest_s = min(
                LONGEST_REST_S, REST_S * 2.0 ** (self.failures - RESTS_AFTER)
            ) * random.uniform(0.8, 1.2)
            self._rested_at = time.monotonic()
            self.rests_until = self._rested_at + rest_s
            log.warning(
                "endpoint=%s failed %d times in a row and rests for %.1f s",
                self.url,
                self.failures,
                rest_s,
            )


class Pool:
    """The servers of one stage, for one event loop."""

    def __init__(self, urls: Sequence[str], *, most: int, lost_s: float) -> None:
        self.endpoints = [Endpoint(url, most) for url in urls]
        self.lost_s = lost_s
        self._last_answer, self._lost = time.monotonic(), False
        self._waiting = deque[asyncio.Future[None]]()
        self._look: asyncio.TimerHandle | None = None

    def starts(self) -> None:
        """Work comes after none: how long nobody has answered is counted from now, unless the work
        before ended for it.

        Of a lane's shards only the first then waits for servers that are gone; the others fail at
        once, to be tried later.
        """
        if not self._lost:
            self._last_answer = time.monotonic()

    def answered(self, endpoint: Endpoint) -> None:
        endpoint.answered()
        self._last_answer, self._lost = time.monotonic(), False

    @asynccontextmanager
    async def lent(self) -> AsyncIterator[Endpoint]:
        """The least busy server that takes a request now; waits for one.

        Raises:
            TransientError: none has answered for too long.
        """
        while not (ready := [endpoint for endpoint in self.endpoints if endpoint.room > 0]):
            self.refuse_if_lost()
            await self._next_place()
        endpoint = min(ready, key=lambda found: (found.in_flight, random.random()))
        endpoint.in_flight += 1
        try:
            yield endpoint
        finally:
            endpoint.in_flight -= 1
            self._wake(1)

    async def _next_place(self) -> None:
        """Return when a place may be free: one request has ended, or there is more room than
        before.
        """
        waiting = asyncio.get_running_loop().create_future()
        self._waiting.append(waiting)
        self._look_later()
        await waiting

    def _wake(self, number: int) -> None:
        while number and self._waiting:
            waiting = self._waiting.popleft()
            if not waiting.done():  # it was cancelled otherwise
                waiting.set_result(None)
                number -= 1

    def _look_later(self) -> None:
        """Rests end and limits grow without anybody being told: one look for all who wait, not
        one each.
        """
        if self._look is None:
            self._look = asyncio.get_running_loop().call_later(LOOK_S, self._look_now)

    def _look_now(self) -> None:
        self._look = None
        self._wake(
            len(self._waiting)
            if self._is_lost()
            else sum(max(0, endpoint.room) for endpoint in self.endpoints)
        )
        if self._waiting:
            self._look_later()

    def _is_lost(self) -> bool:
        """Nothing is on its way that may still be answered, and for `lost_s` nothing was."""
        on_its_way = any(endpoint.in_flight for endpoint in self.endpoints)
        return not on_its_way and time.monotonic() - self._last_answer > self.lost_s

    def refuse_if_lost(self) -> None:
        """Raise TransientError where the servers are lost."""
        if self._is_lost():
            self._lost = True
            names = ", ".join(endpoint.url for endpoint in self.endpoints)
            what = f"no server has answered for {self.lost_s:g} s"
            raise TransientError(
                what,
                where=f"resources.servers.endpoints {names}",
                fix="start them again; rows that were answered are kept",
            )
