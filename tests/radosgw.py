"""A real S3 server on loopback: a Ceph monitor, OSD on a file and gateway, from Debian's packages.

    with Radosgw(folder) as server:  # about 10 s
        with server.environment():  # AWS_* variables, for the standard credential chain
            store = open_store(f"s3://{server.new_bucket()}/prefix")
            server.kill()  # the gateway alone, as an outage; objects survive
            server.restart()

The daemons are children in sessions of their own, out of the reach of Ctrl-C; a small shell kills
them when this process is gone, however it ended, so none is left over. (PR_SET_PDEATHSIG would kill
them with the thread that started them.)
"""

import functools
import http.client
import os
import shutil
import socket
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Self

PROGRAMS = ("ceph-mon", "ceph-osd", "radosgw", "radosgw-admin", "ceph", "monmaptool")
INSTALL = "apt-get install -y --no-install-recommends ceph-mon ceph-osd radosgw ceph-common"
ACCESS_KEY, SECRET_KEY, REGION = (
    "DEEPSPECTESTKEY00001",
    "deepspec-test-secret-of-forty-characters",
    "us-east-1",
)
START_S = 30.0  # of one step; what hangs is begun again from the first one
TRIES = 4
# the last line is what runs now
REAPER = 'while read -r pids; do last=$pids; done; [ -z "$last" ] || kill -9 $last'

CONFIG = """
[global]
fsid = {fsid}
mon host = v1:127.0.0.1:{mon_port}
auth cluster required = none
auth service required = none
auth client required = none
auth allow insecure global id reclaim = true
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 1
osd pool default pg autoscale mode = off
osd crush chooseleaf type = 0
mon warn on pool no redundancy = false
mon allow pool delete = true
mon allow pool size one = true
mon max pg per osd = 2000
run dir = {folder}/run
admin socket = {folder}/run/$name.asok
pid file = {folder}/run/$name.pid
log file = {folder}/log/$name.log
crash dir = {folder}/log
ms bind ipv6 = false
ms bind msgr2 = false
public network = 127.0.0.0/8
public addr = 127.0.0.1
cluster addr = 127.0.0.1
[mon]
mon data = {folder}/mon.a
mon data avail warn = 1
paxos propose interval = 0.02
paxos min wait = 0.01
mon osd min up ratio = 0
mon data avail crit = 1
[osd]
osd data = {folder}/osd.0
osd objectstore = bluestore
bluestore block size = 8589934592
bluestore block create = true
bluestore fsck on mount = false
osd memory target = 1073741824
osd client watch timeout = 4
osd class update on start = false
osd crush update on start = false
osd max object name len = 256
osd max object namespace len = 64
[client.rgw]
rgw data = {folder}/rgw
rgw frontends = beast endpoint=127.0.0.1:{port}
rgw dns name = localhost
rgw enable usage log = false
rgw obj stripe size = 4194304
"""


def ceph_missing() -> str | None:
    """Why no server can be started here and how to change that, or None if one can."""
    missing = [program for program in PROGRAMS if shutil.which(program) is None]
    return (
        f"Ceph is not installed ({', '.join(missing)} missing); install it with: {INSTALL}"
        if missing
        else None
    )


class Radosgw:
    """A running server; `endpoint` answers once the constructor returns."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port, self.mon_port = free_port(), free_port()
        self.endpoint = f"http://127.0.0.1:{self.port}"
        self.daemons: dict[str, subprocess.Popen[bytes]] = {}
        self.reaper = subprocess.Popen(
            ["sh", "-c", REAPER], stdin=subprocess.PIPE, start_new_session=True
        )
        try:
            self._start()
        except BaseException:  # Ctrl-C included: no daemon may outlive the attempt
            self.stop()
            raise

    @classmethod
    def start(cls, folder: Path) -> Self:
        """A server that is up; tried again because another Ceph on this machine may take a port
        between finding and using it.
        """
        for attempt in range(TRIES - 1):
            with suppress(RuntimeError):
                return cls(folder / str(attempt))
        return cls(folder / str(TRIES - 1))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def variables(self) -> dict[str, str]:
        """The environment by which any S3 client finds this server."""
        keys = {"AWS_ACCESS_KEY_ID": ACCESS_KEY, "AWS_SECRET_ACCESS_KEY": SECRET_KEY}
        return {**keys, "AWS_ENDPOINT_URL": self.endpoint, "AWS_DEFAULT_REGION": REGION}

    @contextmanager
    def environment(self) -> Iterator[None]:
        before = dict(os.environ)
        os.environ.update(self.variables())
        try:
            yield
        finally:
            os.environ.clear()
            os.environ.update(before)

    @functools.cached_property
    def client(self):
        """A plain botocore client, for what the code under test must not be trusted with."""
        from botocore.session import Session

        where = {"region_name": REGION, "endpoint_url": self.endpoint}
        return Session().create_client(
            "s3", aws_access_key_id=ACCESS_KEY, aws_secret_access_key=SECRET_KEY, **where
        )

    def new_bucket(self) -> str:
        """The name of a fresh, empty bucket."""
        name = f"test-{uuid.uuid4().hex[:12]}"
        self.client.create_bucket(Bucket=name)
        return name

    def kill(self) -> None:
        """`kill -9` the gateway: connections break, objects stay."""
        gateway = self.daemons.pop("radosgw")
        gateway.kill()
        gateway.wait()
        self._tell_reaper()

    def restart(self) -> None:
        """Start the gateway again at the same port and wait until it answers."""
        self._daemon("radosgw", "-n", "client.rgw")
        self._wait(self._answers, "the gateway")

    def stop(self) -> None:
        """End every daemon, gateway first, and wait for it."""
        for process in reversed(list(self.daemons.values())):
            process.kill()  # nothing here is kept, so there is nothing to shut down in order
        for process in self.daemons.values():
            process.wait()
        self.daemons.clear()
        self._tell_reaper()
        self.reaper.communicate()
        (self.folder / "osd.0" / "block").unlink(missing_ok=True)

    def _start(self) -> None:
        for name in ("mon.a", "osd.0", "run", "log", "rgw"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        fsid, osd_id = str(uuid.uuid4()), str(uuid.uuid4())
        config = CONFIG.format(
            fsid=fsid, mon_port=self.mon_port, port=self.port, folder=self.folder
        )
        (self.folder / "ceph.conf").write_text(config, encoding="utf-8")
        monitors = self.folder / "monmap"
        self._run(
            "monmaptool",
            "--create",
            "--clobber",
            "--fsid",
            fsid,
            "--addv",
            "a",
            f"[v1:127.0.0.1:{self.mon_port}]",
            str(monitors),
        )
        self._run("ceph-mon", "--mkfs", "-i", "a", "--monmap", str(monitors))
        self._daemon("ceph-mon", "-i", "a")
        self._run("ceph", "--connect-timeout", "30", "osd", "new", osd_id, "0")
        # Not left to the OSD: where it asks before the monitor told it the cluster's id, it is
        # refused ("wrong fsid") and ends.
        self._run("ceph", "osd", "crush", "add", "0", "1.0", "root=default", "host=localhost")
        self._run("ceph-osd", "-i", "0", "--mkfs", "--osd-uuid", osd_id)
        self._daemon("ceph-osd", "-i", "0")
        who = [
            "--uid",
            "test",
            "--display-name",
            "test",
            "--access-key",
            ACCESS_KEY,
            "--secret-key",
            SECRET_KEY,
        ]
        self._run("radosgw-admin", "user", "create", *who)
        self.restart()

    def _run(self, program: str, *arguments: str) -> None:
        config = str(self.folder / "ceph.conf")
        log = self.folder / "log" / f"{program}.run"
        with (
            log.open("wb") as output,
            subprocess.Popen(
                [program, *arguments, "-c", config], stdout=output, stderr=output
            ) as process,
        ):
            try:
                self._wait(lambda: process.poll() is not None, program)
            finally:
                process.kill()
        if process.returncode:
            raise RuntimeError(
                f"{program} {' '.join(arguments)} failed: "
                f"{log.read_text(errors='replace').strip()[-2000:]}"
            )

    def _daemon(self, program: str, *arguments: str) -> None:
        log = (self.folder / "log" / f"{program}.out").open("ab")
        command = [program, "-f", *arguments, "-c", str(self.folder / "ceph.conf")]
        with log:
            self.daemons[program] = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        self._tell_reaper()

    def _tell_reaper(self) -> None:
        if self.reaper.stdin:
            self.reaper.stdin.write(
                " ".join(str(process.pid) for process in self.daemons.values()).encode() + b"\n"
            )
            self.reaper.stdin.flush()

    def _answers(self) -> bool:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=2)
        try:
            connection.request("GET", "/")
            return connection.getresponse().status < 500
        except OSError:
            return False
        finally:
            connection.close()

    def _wait(self, ready: Callable[[], bool], what: str) -> None:
        """Raises RuntimeError also where a daemon ended."""
        deadline = time.monotonic() + START_S
        while not ready():
            ended = [name for name, process in self.daemons.items() if process.poll() is not None]
            if ended or time.monotonic() > deadline:
                raise RuntimeError(
                    f"{what} did not come up or to its end ({ended} ended); see {self.folder}/log"
                )
            time.sleep(0.05)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
