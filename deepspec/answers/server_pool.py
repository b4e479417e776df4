"""A pool of servers: requests go to the least busy one; what each can take is found by trying.

Additive increase, multiplicative decrease, as in TCP (Chiu and Jain 1989): a round of good answers
allows one request more, a 429, 503 or time-out halves what is allowed. A server that fails again
and again rests, longer each time, and is then probed with one request; one that was found away
while it rested, as soon as it is back. With 8 servers and one dying every minute, work flows to
the other seven.
"""

import asyncio
import logging
import math
import random
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Sequence
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
        self.max_model_len: float | None = math.inf
        """Tokens of prompt and answer that it takes; None until it was reached."""
        self.answered_at = time.monotonic()
        self.is_lost = False
        self.is_away = False  # at the last look
        self._halved_at = 0.0
        self._pause_began = 0.0

    @property
    def room(self) -> int:
        """How many more requests it may be given now."""
        if self.max_model_len is None or time.monotonic() < self.paused_until:
            return 0
        probed = self.failures >= FAILURES_BEFORE_PAUSE
        return (1 if probed else int(self.allowed)) - self.in_flight

    @property
    def is_to_be_looked_at(self) -> bool:
        """Whether it gets no requests for now, not because it asked for that, but as it failed."""
        rests = self.failures >= FAILURES_BEFORE_PAUSE and time.monotonic() < self.paused_until
        return rests or self.max_model_len is None

    def note_look(self, *, is_up: bool, max_model_len: float | None) -> None:
        """A look found it so; one that was away and is back has rested long enough."""
        if is_up and self.is_away:
            log.info("endpoint=%s is back", self.url)
            self.paused_until = 0.0
        self.is_away = not is_up
        self.max_model_len = max_model_len

    def note_answer(self) -> None:
        """It answered: it may be given a little more."""
        self.answered_at = time.monotonic()
        self.is_lost = self.is_away = False
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
        # one for each set of servers that requests are long enough to need
        self._queues: dict[int, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._freed = asyncio.Event()

    @property
    def longest(self) -> float:
        """Tokens of prompt and answer that the roomiest of the servers reached so far takes."""
        known = (found.max_model_len for found in self.servers if found.max_model_len is not None)
        return max(known, default=math.inf)

    def _for(self, num_tokens: int) -> Sequence[PooledServer]:
        """The servers that take a prompt and answer of so many tokens."""
        fitting = [found for found in self.servers if (found.max_model_len or 0) >= num_tokens]
        return fitting or self.servers

    def note_idle(self) -> None:
        """There was no work until now, so the time without an answer is counted from here.

        Not so where a server was already lost: of many shards only the first one then waits for it,
        and the others fail at once, to be tried later.
        """
        for server in self.servers:
            if not server.is_lost:
                server.answered_at = time.monotonic()

    @asynccontextmanager
    async def lease(self, num_tokens: int) -> AsyncIterator[PooledServer]:
        """The least busy server that takes a request of so many tokens, as soon as there is one.

        Raises:
            TransientError: all such servers are lost.
        """
        # one request at a time waits for room, the others for their turn
        async with self._queues[len(self._for(num_tokens))]:
            while not (ready := [found for found in self._for(num_tokens) if found.room > 0]):
                self.refuse_if_lost(num_tokens)
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

    def refuse_if_lost(self, num_tokens: int) -> None:
        """Raise TransientError where all servers for so many tokens are lost.

        They are where no request is in flight that may still be answered, and for `lost_s` none
        was.
        """
        servers, now = self._for(num_tokens), time.monotonic()
        if any(found.in_flight or now - found.answered_at <= self.lost_s for found in servers):
            return
        for server in servers:
            server.is_lost = True
        urls = ", ".join(server.url for server in servers)
        raise TransientError(
            f"no server has answered for {self.lost_s:g} s",
            where=f"resources.servers.endpoints {urls}",
            fix="start them again; rows that were answered are kept",
        )
