"""Children: what they say arrives, their errors are raised again, and none of them outlives its
parent.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from contextvars import copy_context
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from deepspec.errors import ChildFailed, ConfigError, ShardsFailed, TransientError
from deepspec.process import scopes
from deepspec.process.launch import RunRequest, run_child
from deepspec.process.scopes import Stopped, scope
from deepspec.process.shard_ranges import deal, parse_shards, shard_list
from deepspec.process.supervisor import is_alive

# A launcher like torchrun: two ranks in sessions of their own, which ignore SIGTERM. Their ids are
# written to argv[1].
LAUNCHER = """
import subprocess, sys, time
rank = (
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
    "print('up', flush=True); time.sleep(600)"
)
command = [sys.executable, "-c", rank]
ranks = [
    subprocess.Popen(command, start_new_session=True, stdout=subprocess.PIPE) for _ in range(2)
]
for one in ranks:
    one.stdout.readline()
open(sys.argv[1] + ".part", "w").write(" ".join(str(one.pid) for one in ranks))
import os; os.rename(sys.argv[1] + ".part", sys.argv[1])
print("ranks are up", file=sys.stderr, flush=True)
time.sleep(600)
"""


def python(code: str, *arguments: object) -> list[str]:
    return [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]


def run(command: list[str], **settings) -> SimpleNamespace:
    heard = SimpleNamespace(events=[], lines=[])
    run_child(command, on_event=heard.events.append, on_line=heard.lines.append, **settings)
    return heard


def wait_for(path: Path, seconds: float = 20) -> list[int]:
    limit = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < limit, f"{path} did not appear"
        time.sleep(0.02)
    return [int(word) for word in path.read_text().split()]


def lives(pid: int) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return is_alive(psutil.Process(pid))
    return False


def assert_gone(pids: list[int], seconds: float = 15) -> None:
    limit = time.monotonic() + seconds
    while left := [pid for pid in pids if lives(pid)]:
        assert time.monotonic() < limit, f"still there: {left}"
        time.sleep(0.02)


@pytest.fixture(autouse=True)
def short_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scopes, "GRACE_S", 0.5)


# What a child says


def test_events_and_lines_arrive_apart_and_the_log_holds_everything(tmp_path: Path):
    log = tmp_path / "logs" / "answers.log"
    heard = run(
        python("""
            import json, sys
            print(json.dumps({"event": "progress", "stage": "answers", "done": 1, "total": 2}))
            print("a library that prints")
            print('{"not": "an event"}')
            sys.stderr.write("10%\\r50%\\r100%\\nloading\\nno newline at the end")
        """),
        log_path=log,
    )
    assert heard.events == [{"event": "progress", "stage": "answers", "done": 1, "total": 2}]
    assert sorted(heard.lines) == sorted(
        ["a library that prints", '{"not": "an event"}', "100%", "loading", "no newline at the end"]
    )
    assert (
        "a library that prints" in log.read_text()
        and "50%" in log.read_text()
        and '"done": 1' in log.read_text()
    )


def test_the_first_error_is_raised_and_its_echo_is_not_handed_on(tmp_path: Path):
    """Other ranks lose their connection to the one that failed, and torchrun adds a stack trace."""
    lines, log = [], tmp_path / "train.log"
    child = python("""
        import json, sys, time
        def fail(error, what):
            event = {"event": "error", "error": error, "what": what, "transient": False}
            print(json.dumps(event), flush=True)
        fail("ConfigError", "the cause")
        time.sleep(0.5)
        fail("ChildFailed", "an echo")
        print("Traceback", file=sys.stderr)
        sys.exit(1)
    """)
    with pytest.raises(ConfigError, match="the cause"):
        run_child(child, on_event=lines.append, on_line=lines.append, log_path=log)
    assert lines == []
    assert "Traceback" in log.read_text()


def test_lines_longer_than_a_pipe_arrive_whole():
    heard = run(python("print('x' * 300_000)"))
    assert [len(line) for line in heard.lines] == [300_000]


def test_a_childs_environment_is_the_parents_with_ours_on_top(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("FROM_PARENT", "a")
    heard = run(
        python("import os; print(os.environ['FROM_PARENT'] + os.environ['OURS'])"),
        env={"OURS": "b"},
    )
    assert heard.lines == ["ab"]


# How it ends


def test_a_reported_error_is_raised_again_as_its_own_class():
    error = {
        "event": "error",
        **ConfigError("no field x", where="--set", fix="say y").to_json(),
        "transient": False,
    }
    with pytest.raises(ConfigError, match="no field x") as caught:
        run(python("import sys; print(sys.argv[1]); sys.exit(2)", json.dumps(error)))
    assert caught.value.where == "--set" and caught.value.fix == "say y"


def test_failed_shards_keep_their_reasons():
    failed = ShardsFailed(
        "2 failed",
        failures={
            3: {"what": "busy", "transient": True},
            5: {"what": "bad row", "transient": False},
        },
    )
    with pytest.raises(ShardsFailed) as caught:
        run(
            python(
                "import sys; print(sys.argv[1]); sys.exit(75)",
                json.dumps({"event": "error", **failed.to_json()}),
            )
        )
    assert caught.value.retryable == [3] and caught.value.failures[5]["what"] == "bad row"


def test_a_transient_error_of_an_unknown_class_stays_transient():
    event = {"event": "error", "error": "EngineBusy", "what": "busy", "transient": True}
    with pytest.raises(TransientError, match="busy"):
        run(python("import sys; print(sys.argv[1]); sys.exit(75)", json.dumps(event)))


def test_a_child_that_dies_without_a_word_is_quoted(tmp_path: Path):
    with pytest.raises(ChildFailed, match=r"(?s)exit code 1.*ValueError: lost") as caught:
        run(python("raise ValueError('lost')"), log_path=tmp_path / "log")
    assert str(tmp_path / "log") in caught.value.where


def test_of_what_a_launcher_of_ranks_writes_the_indented_facts_are_kept():
    written = """
        print("Traceback (most recent call last):", '  File "run.py", line 9', sep="\\n")
        print("    main()")
        print("Root Cause (first observed failure):", "  exitcode  : -9 (pid: 7)", sep="\\n")
        raise SystemExit(1)
    """
    with pytest.raises(ChildFailed) as caught:
        run(python(written))
    assert "  exitcode  : -9 (pid: 7)" in caught.value.what
    assert "run.py" not in caught.value.what and "main()" not in caught.value.what


def test_a_child_killed_by_a_signal_may_be_tried_again():
    with pytest.raises(TransientError, match="SIGKILL"):
        run(python("import os, signal; os.kill(os.getpid(), signal.SIGKILL)"))


def test_a_child_that_is_too_slow_is_ended(tmp_path: Path):
    started = time.monotonic()
    with pytest.raises(TransientError, match="in time"):
        run(python(LAUNCHER, tmp_path / "ranks"), timeout_s=1.5)
    assert time.monotonic() - started < 10
    assert_gone(wait_for(tmp_path / "ranks"), seconds=0.5)


# A child that needs more time to end than others, and reports it
SLOW_TO_END = """
import json, signal, sys, time

def end(number, frame):
    time.sleep(2)
    open(sys.argv[1], "w").write("saved")
    sys.exit(75)

signal.signal(signal.SIGTERM, end)
for seconds in json.loads(sys.argv[2]):
    print(json.dumps({"event": "stop_time", "seconds": seconds}))
print("working", file=sys.stderr)
time.sleep(600)
"""


@pytest.mark.parametrize(("granted", "saved"), [([8], True), ([1, 8], True), ([], False)])
def test_a_child_has_the_time_to_end_that_it_asked_for(tmp_path: Path, granted, saved):
    heard = SimpleNamespace(events=[])
    command = python(SLOW_TO_END, tmp_path / "saved", json.dumps(granted))
    with pytest.raises(Stopped), scope() as owner:
        run_child(
            command,
            on_event=heard.events.append,
            on_line=lambda _: threading.Thread(target=owner.close).start(),
        )
    assert (tmp_path / "saved").exists() is saved
    assert [event["seconds"] for event in heard.events] == granted, "and passes it on"


def test_a_child_whose_parent_was_killed_has_the_time_to_end_that_it_asked_for(tmp_path: Path):
    code = f"""
        import sys
        from deepspec.process import launch, scopes
        scopes.GRACE_S = 0.5
        command = [sys.executable, "-c", {SLOW_TO_END!r}, sys.argv[1], "[8]"]
        launch.run_child(command, on_event=print, on_line=lambda line: print(line, flush=True))
    """
    parent = subprocess.Popen(python(code, tmp_path / "saved"), stdout=subprocess.PIPE)
    while b"working" not in parent.stdout.readline():
        assert parent.poll() is None
    (guard,) = psutil.Process(parent.pid).children()
    time.sleep(0.5)  # the two pipes of a child are read in any order
    parent.kill()
    parent.communicate()
    assert_gone([guard.pid])
    assert (tmp_path / "saved").exists()


# That nothing outlives its parent


def test_helpers_left_behind_by_a_finished_child_are_swept_up(tmp_path: Path):
    code = (
        "import subprocess, sys; "
        "print(subprocess.Popen(['sleep', '600'], start_new_session=True).pid)"
    )
    started = time.monotonic()
    heard = run(python(code))
    assert time.monotonic() - started < 5
    assert_gone([int(heard.lines[0])], seconds=0.5)


def test_an_error_in_a_callback_ends_the_child(tmp_path: Path):
    def fail(line: str) -> None:
        raise RuntimeError(line)

    with pytest.raises(RuntimeError, match="ranks are up"):
        run_child(python(LAUNCHER, tmp_path / "ranks"), on_event=print, on_line=fail)
    assert_gone(wait_for(tmp_path / "ranks"), seconds=0.5)


def test_leaving_the_scope_ends_the_children_of_all_its_threads(tmp_path: Path):
    caught: list[BaseException] = []

    def work(number: int) -> None:
        try:
            run(python(LAUNCHER, tmp_path / f"ranks{number}"))
        except Stopped as stopped:
            caught.append(stopped)

    with contextlib.suppress(KeyboardInterrupt), scope() as owner:
        threads = [
            threading.Thread(target=copy_context().run, args=(work, number)) for number in range(2)
        ]
        for thread in threads:
            thread.start()
        ranks = [pid for number in range(2) for pid in wait_for(tmp_path / f"ranks{number}")]
        raise KeyboardInterrupt
    assert_gone(ranks, seconds=0.5)
    for thread in threads:
        thread.join(5)
    assert len(caught) == 2
    with pytest.raises(Stopped):
        owner.start(["true"], {})


def test_a_closed_scope_leaves_later_children_alone():
    with scope():
        pass
    run(python("pass"))


@pytest.mark.parametrize("victim", ["parent", "guard", "launcher"])
def test_sigkill_of_any_of_them_leaves_no_rank_behind(tmp_path: Path, victim: str):
    code = f"""
        import sys
        from deepspec.process import launch, scopes
        scopes.GRACE_S = 0.5
        command = [sys.executable, "-c", {LAUNCHER!r}, sys.argv[1]]
        launch.run_child(command, on_event=print, on_line=print)
    """
    parent = subprocess.Popen(
        python(code, tmp_path / "ranks"), stderr=subprocess.PIPE, stdout=subprocess.DEVNULL
    )
    ranks = wait_for(tmp_path / "ranks")
    guard = psutil.Process(parent.pid).children()[0]
    launcher = guard.children()[0]
    everyone = [parent.pid, guard.pid, launcher.pid, *ranks]
    assert all(psutil.pid_exists(pid) for pid in everyone)
    os.kill(
        {"parent": parent.pid, "guard": guard.pid, "launcher": launcher.pid}[victim], signal.SIGKILL
    )
    started = time.monotonic()
    said = parent.communicate(timeout=20)[1].decode() if victim != "parent" else ""
    parent.wait()
    assert_gone(everyone)
    assert time.monotonic() - started < 10
    assert victim == "parent" or "TransientError" in said


def test_without_prctl_a_child_still_ends_with_its_parent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """As on a system that is not Linux: no subreaper and no PDEATHSIG, the lifeline alone."""
    code = """
        import sys
        from deepspec.process import supervisor
        supervisor.find_prctl = lambda: (lambda option, value: None)
        sys.exit(supervisor.supervise(0.5, sys.argv[1:]))
    """
    child = subprocess.Popen(python(code, "sleep", "600"), stdin=subprocess.PIPE)
    limit = time.monotonic() + 20
    while not (children := psutil.Process(child.pid).children()):
        assert time.monotonic() < limit
        time.sleep(0.02)
    sleeper = children[0].pid
    child.stdin.close()
    assert child.wait(10) == 128 + signal.SIGTERM
    assert_gone([sleeper], seconds=0.5)


# Command lines and groups


def test_groups_are_consecutive_and_hold_every_shard_once():
    assert deal([0, 1, 4, 7, 9], 2) == [[0, 1], [4, 7], [9]]
    assert deal([], 3) == []


@pytest.mark.parametrize(
    ("shards", "text"), [([], ""), ([17], "17"), ([0, 1, 2, 9, 40, 41], "0-2,9,40-41")]
)
def test_a_shard_list_is_read_back_as_it_was(shards: list[int], text: str):
    assert shard_list(shards) == text
    assert parse_shards(text) == shards


def test_a_request_becomes_one_command_line():
    request = RunRequest("demo", ("train.lr=3e-4", "target.layer_ids=[1, 2]"), "/some where")
    assert request.command("answers", [3, 4])[1:] == [
        "-m",
        "deepspec",
        "answers",
        "demo",
        "--set",
        "train.lr=3e-4",
        "--set",
        "target.layer_ids=[1, 2]",
        "--store",
        "/some where",
        "--shards",
        "3-4",
    ]
    assert request.shown("train") == (
        "python -m deepspec train demo --set train.lr=3e-4 "
        "--set 'target.layer_ids=[1, 2]' --store '/some where'"
    )


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no such device here")
def test_a_child_whose_log_finds_no_room_goes_on():
    """On a full disk a stage waits until there is more; its own words about that, in a log on
    the same disk, ended it.
    """
    heard = run(
        python("import time; print('paused', flush=True); time.sleep(0.1); print('done')"),
        log_path=Path("/dev/full"),
    )
    assert [line.partition(" from here on")[0] for line in heard.lines] == [
        "launch WARNING /dev/full misses lines",
        "paused",
        "done",
    ]
