"""The error that a stage ends with: every missing shard, its reason, and how to resume."""

from deepspec.errors import ChildFailed, ConfigError, ShardsFailed, TransientError
from deepspec.process.launch import RunRequest
from flows.stage_failures import MAX_NAMED, StageFailures
from tests.flows.test_stage_progress import status

REQUEST = RunRequest("run.yaml")
BAD = {"what": "bad", "transient": False}


def test_of_shards_that_failed_some_are_named_and_the_others_counted():
    failures = StageFailures("answers", sharded=True, allowed=100)
    failures.add(dict.fromkeys(range(30), BAD))
    error = failures.final_error(status("answers", 0, 30), REQUEST)
    assert isinstance(error, ShardsFailed) and error.failures == dict.fromkeys(range(30), BAD)
    assert error.what.startswith("30 of 30 shards of the stage 'answers' failed: shard 0: bad; ")
    assert error.what.endswith(f"shard {MAX_NAMED - 1}: bad; and {30 - MAX_NAMED} more")
    assert "`python -m deepspec answers run.yaml --shards 0-29`" in error.fix


def test_where_too_many_failed_the_rest_was_not_begun_and_may_be_tried():
    failures = StageFailures("answers", sharded=True, allowed=0)
    failures.add({1: BAD})
    assert failures.too_many
    error = failures.final_error(status("answers", 0, 4), REQUEST)
    assert isinstance(error, ShardsFailed) and error.retryable == [0, 2, 3]
    assert error.failures[0]["what"] == "it was not begun"
    assert "1 of 4 shards" in error.what and "; 3 were not begun, because " in error.what


def test_the_error_of_a_child_that_failed_as_a_whole_is_the_stages_own_with_all_missing_shards():
    failures = StageFailures("answers", sharded=True, allowed=10)
    error = ConfigError("the engine cannot be imported")
    failures.add_group(error, [0, 1], retried=False)
    failures.give_up([0, 1], error)
    assert failures.final_error(status("answers", 0, 3), REQUEST) is error
    reasons = [failure["what"] for failure in error.failures.values()]
    assert reasons == [error.what, error.what, "its task did not end; see the flow run's log"]
    assert failures.lost == {0} and failures.given_up == {0, 1}


def test_a_child_that_was_killed_too_often_is_no_reason_of_its_own_where_there_are_shards():
    killed = TransientError("killed")
    failures = StageFailures("answers", sharded=True, allowed=10)
    failures.add_group(killed, [0], retried=True)
    failures.give_up([0], killed)
    assert failures.error is None and failures.lost == set() and failures.given_up == {0}
    whole = StageFailures("train", sharded=False, allowed=10)
    whole.give_up([0], killed)
    assert whole.final_error(status("train", 0, 1), REQUEST) is killed


def test_a_stage_without_shards_that_ends_without_an_error_names_no_shard():
    """It named `python -m deepspec train RUN --shards 0`, which there is not."""
    failures = StageFailures("train", sharded=False, allowed=0)
    error = failures.final_error(status("train", 0, 1), REQUEST)
    assert isinstance(error, ChildFailed)
    assert "shard" not in error.what + error.fix and error.failures == {}
