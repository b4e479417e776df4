"""A pool of servers: requests go to the least busy one; what each can take is found by trying.

Additive increase, multiplicative decrease, as in TCP (Chiu and Jain 1989): a round of good answers
allows one request more, a 429, 503 or time-out halves what is allowed. A server that fails again
and again is paused, longer each time, and then probed with one request. With 8 servers and one
dying every minute, work flows to the other seven.
"""

import asyncio
import logging
import random
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

from deepspec.config.servers import ServersConfig
from deepspec.errors import TransientError

log = logging.getLogger(__name__)

FAILURES_BEFORE_PAUSE = 3  # in a row
PAUSE_S = 1.0  # the first one; doubled each time
LONGEST_PAUSE_S = 60.0
RECHECK_S = 0.05  # between two looks at whether a pause is over


class PooledServer:
    """One server: what it is working on, and what it may be given. Times are monotonic seconds."""

    def __init__(self, url: str, most: int) -> None:
        self.url = url
        self.most = most
        self.allowed = float(most)
        self.in_flight = 0
        self.failures = 0  # in a row
        self.paused_until = 0.0
        self._halved_at = 0.0
        self._pause_began = 0.0

    @property
    def room(self) -> int:
        """How many more requests it may be given now."""
        if time.monotonic() < self.paused_until:
            return 0
        probed = self.failures >= FAILURES_BEFORE_PAUSE
        return (1 if probed else int(self.allowed)) - self.in_flight

    def note_answer(self) -> None:
        """It answered: it may be given a little more."""
        self.failures = 0
        self.allowed = min(self.most, self.allowed + 1 / self.allowed)

    def note_overload(self, began: float, retry_after_s: float = 0.0) -> None:
        """It was too busy for a request sent at `began`: it may be given half as much.

        Requests sent before the last halving show nothing new and do not halve it again.
        """
        now = time.monotonic()
        if began >= self._halved_at:
            self.allowed = max(1.0, self.allowed / 2)
            self._halved_at = now
        self.paused_until = max(self.paused_until, now + min(retry_after_s, LONGEST_PAUSE_S))

    def note_failure(self, began: float) -> None:
        """A request sent at `began` failed; many that one outage ends together count as one."""
        if began < self._pause_began:
            return
        self.failures += 1
        doublings = self.failures - FAILURES_BEFORE_PAUSE
        if doublings >= 0:
            pause_s = min(LONGEST_PAUSE_S, PAUSE_S * 2.0**doublings) * random.uniform(0.8, 1.2)
            self._pause_began = time.monotonic()
            self.paused_until = self._pause_began + pause_s
            log.warning(
                "endpoint=%s failed %d times in a row; paused for %.1f s",
                self.url,
                self.failures,
                pause_s,
            )


class ServerPool:
    """The servers of one stage, for one event loop."""

    def __init__(self, settings: ServersConfig) -> None:
        """After `lost_s` seconds without an answer all are lost."""
        self.servers = [PooledServer(url, settings.requests) for url in settings.endpoints]
        self.lost_s = settings.lost_s
        self._last_answer = time.monotonic()
        self._lost = False
        self._queue = asyncio.Lock()
        self._freed = asyncio.Event()

    def note_idle(self) -> None:
        """There was no work until now, so the time without an answer is counted from here.

        Not so where the servers were already lost: of many shards only the first one then waits for
        them, and the others fail at once, to be tried later.
        """
        if not self._lost:
            self._last_answer = time.monotonic()

    def note_answer(self, server: PooledServer) -> None:
        """The server answered, so the servers are not lost."""
        server.note_answer()
        self._last_answer = time.monotonic()
        self._lost = False

    @asynccontextmanager
    async def lease(self) -> AsyncIterator[PooledServer]:
        """The least busy server that takes a request, as soon as there is one.

        Raises:
            TransientError: all servers are lost.
        """
        async with self._queue:  # one request at a time waits for room, the others for their turn
            while not (ready := [server for server in self.servers if server.room > 0]):
                self.refuse_if_lost()
                self._freed.clear()
                with suppress(TimeoutError):  # pauses end without an event
                    await asyncio.wait_for(self._freed.wait(), RECHECK_S)
            server = min(ready, key=lambda found: (found.in_flight, random.random()))
            server.in_flight += 1
        try:
            yield server
        finally:
            server.in_flight -= 1
            self._freed.set()

    def refuse_if_lost(self) -> None:
        """Raise TransientError where all servers are lost.

        They are where no request is in flight that may still be answered, and for `lost_s` none
        was.
        """
        in_flight = any(server.in_flight for server in self.servers)
        if not in_flight and time.monotonic() - self._last_answer > self.lost_s:
            self._lost = True
            urls = ", ".join(server.url for server in self.servers)
            raise TransientError(
                f"no server has answered for {self.lost_s:g} s",
                where=f"resources.servers.endpoints {urls}",
                fix="start them again; rows that were answered are kept",
            )
