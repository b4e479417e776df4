"""An evaluation by servers: scripted ones, asked over HTTP, their counters read."""

import json
import os
import shutil
import sys
from pathlib import Path

import pytest

from deepspec.artifacts.run import Run
from deepspec.artifacts.status import results
from deepspec.artifacts.verify import verify_artifact
from deepspec.config.run import RunConfig
from deepspec.errors import ArtifactMismatch, ChildFailed, ConfigError, DeepSpecError, ShardsFailed
from deepspec.evaluate import served_stage
from deepspec.evaluate.engine_counters import EngineCounts, Rounds, read_counts
from deepspec.evaluate.prompts import render_turns
from deepspec.evaluate.results import read_rows
from deepspec.evaluate.stage import run_evaluate
from deepspec.serving.engine_version import require_version
from deepspec.target.chat import load_chat
from deepspec.train.loop import run_train
from tests.conftest import made_once, tiny_run, write_jsonl
from tests.engine_server import BLOCK, EngineServer, engine_server

MATH = ("evaluate.benchmarks=[{name: demo/math}]", "evaluate.temperatures=[0.0]")
SCRIPTED = [sys.executable, "-m", "tests.engine_server", "{port}", "{name}", "{model}"]


@pytest.fixture(scope="module")
def drafted(captured: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with a tiny draft; copy it."""

    def make(store: Path) -> None:
        shutil.copytree(captured, store)
        run_train(Run(tiny_run(store)))

    return made_once(tmp_path_factory, "drafted-store", make)


@pytest.fixture
def ready(drafted: Path, tmp_path: Path) -> Path:
    shutil.copytree(drafted, tmp_path / "ready")
    return tmp_path / "ready"


def target_of(store: Path) -> str:
    return str(Run(tiny_run(store)).artifact("demo").fetch_folder("target"))


def given(store: Path, plain: EngineServer, draft: EngineServer, *settings: str) -> RunConfig:
    servers = (
        "evaluate.engine=openai",
        f"resources.servers.plain_endpoint={plain.url}",
        f"resources.servers.draft_endpoint={draft.url}",
        "resources.servers.lost_s=5",
    )
    return tiny_run(store, *MATH, "evaluate.concurrencies=[1, 2]", *servers, *settings)


def started(store: Path, *settings: str, command: list[str] = SCRIPTED) -> RunConfig:
    servers = (
        "evaluate.engine=vllm",
        f"resources.servers.start_command={json.dumps(command)}",
        "resources.devices.type=cpu",
    )
    return tiny_run(store, *MATH, "evaluate.concurrencies=[1, 2]", *servers, *settings)


def test_servers_that_were_started_by_hand_give_rows_as_the_decoding_here(ready: Path):
    folder, slow = target_of(ready), {"latency_s": 0.05}
    with (
        engine_server(folder, **slow) as plain,
        engine_server(folder, drafts=True, **slow) as draft,
    ):
        artifact = run_evaluate(Run(given(ready, plain, draft)))
    rows = read_rows(artifact)
    assert len(rows) == 2 * 3 and all(row["identical"] for row in rows)
    for row in rows:
        assert row["seconds"] > 0 and row["plain_seconds"] > 0
        assert row["request_seconds"] > 0 and row["plain_request_seconds"] > 0
        if row["batch_size"] == 1:
            assert set(row["proposed"]) == {BLOCK} and set(row["accepted"]) == {2}
            assert len(row["proposed"]) == -(-(row["num_tokens"] - 1) // 3)
    together = [row for row in rows if row["batch_size"] == 2]
    assert [bool(row["proposed"]) for row in together] == [True, False, False]
    assert {row["group"] for row in together} == {0}
    assert sum(len(row["proposed"]) for row in together) == sum(
        len(row["proposed"]) for row in rows if row["batch_size"] == 1
    )
    assert (plain.most_in_flight, draft.most_in_flight) == (2, 2)
    body = draft.bodies[-1]
    assert body["temperature"] == 0 and body["return_token_ids"] and body["max_tokens"] == 12
    assert len({body["cache_salt"] for body in draft.bodies}) == len(draft.bodies)
    found = results(Run(given(ready, plain, draft)))
    assert [speed.batch_size for speed in found.batch_sizes] == [1, 2]
    served_by = json.loads(artifact.read("engine.json"))
    assert served_by == {
        "engine": "openai",
        "version": "0.32.0",
        "num_speculative_tokens": BLOCK,
        "draft_sampling": "greedy",
    }
    assert list(verify_artifact(artifact, None, num_threads=1)) == []


def test_a_conversation_continues_with_the_plain_answers_at_both_servers(
    ready: Path, tmp_path: Path
):
    turns = [{"turns": ["one", "two", "three"]}, {"turns": ["a"]}, {"turns": ["b", "c"]}]
    path = write_jsonl(tmp_path / "mine.jsonl", turns)
    benchmark = f"evaluate.benchmarks=[{{name: {path}, turns: all}}]"
    folder = target_of(ready)
    with engine_server(folder) as plain, engine_server(folder, drafts=True) as draft:
        run = Run(given(ready, plain, draft, benchmark))
        rows = read_rows(run_evaluate(run))
    chat = load_chat(run)
    for size in (1, 2):
        of_size = {(row["prompt"], row["turn"]): row for row in rows if row["batch_size"] == size}
        assert sorted(of_size) == [(0, 0), (0, 1), (0, 2), (1, 0), (2, 0), (2, 1)]
        answers = []
        for turn, text in enumerate(turns[0]["turns"]):
            prompt = render_turns(chat, tuple(turns[0]["turns"]), answers)
            row = of_size[0, turn]
            assert row["prompt_digest"] == prompt.digest and row["identical"], text
            answers.append(chat.decode(row["token_ids"], chat.stop_ids()))
    first = [[message["role"] for message in body["messages"]] for body in draft.bodies]
    assert ["user", "assistant", "user", "assistant", "user"] in first


@pytest.mark.slow
def test_with_gpus_for_both_the_servers_run_side_by_side_each_on_its_own(
    ready: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """What each was started with: its GPU, and the draft's settings, drawn above temperature 0."""
    monkeypatch.setattr(served_stage, "visible_gpus", lambda: ["4", "GPU-b"])
    script = """
import json, os, subprocess, sys
drafts = "--speculative-config" in sys.argv
seen = [os.environ["CUDA_VISIBLE_DEVICES"], sys.argv[-1]]
code = subprocess.call([sys.executable, "-m", "tests.engine_server", *sys.argv[1:]])
"""
    note = f"""
with open(os.path.join({str(tmp_path)!r}, "draft" if drafts else "plain"), "w") as file:
    json.dump(seen, file)
"""
    script = script.replace("code = ", f"{note}\ncode = ")
    command = [sys.executable, "-c", script, "{port}", "{name}", "{model}"]
    more = ("resources.devices.type=auto", "evaluate.temperatures=[1.0]")
    artifact = run_evaluate(Run(started(ready, *more, command=command)))
    assert artifact.manifest() is not None
    plain, draft = (json.loads((tmp_path / side).read_text()) for side in ("plain", "draft"))
    assert (plain[0], draft[0]) == ("4", "GPU-b")
    settings = json.loads(draft[1])
    assert settings["method"] == "dspark" and settings["draft_sample_method"] == "probabilistic"
    assert settings["num_speculative_tokens"] == 7
    assert not Path(settings["model"]).exists(), "the export is removed with the servers"
    assert json.loads(artifact.read("engine.json"))["draft_sampling"] == "probabilistic"


def test_a_key_that_is_refused_is_named_and_not_shown(ready: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-wrong")
    folder = target_of(ready)
    with engine_server(folder) as plain, engine_server(folder, drafts=True) as draft:
        plain.key = "sk-right"
        with pytest.raises(ConfigError, match="OPENAI_API_KEY is refused") as raised:
            run_evaluate(Run(given(ready, plain, draft)))
        assert "sk-" not in str(raised.value)
        monkeypatch.setenv("OPENAI_API_KEY", "sk-right")
        assert run_evaluate(Run(given(ready, plain, draft))).manifest() is not None


@pytest.mark.slow
def test_the_stage_starts_one_server_after_the_other_and_goes_on_where_it_was(ready: Path):
    """The draft's server dies at load in the first run: its plain answers are there in the next
    one, which needs no plain server, and commits.
    """
    with pytest.raises(ChildFailed, match="a draft of another kind"):
        run_evaluate(Run(started(ready, command=dying("--speculative-config' in"))))
    artifact = Run(started(ready)).artifact("evaluate")
    plain = Path(artifact.store.root, artifact.folder, "plain")
    assert len(list(plain.glob("*.json"))) == 2 and not artifact.records()
    run_evaluate(Run(started(ready, command=dying("--speculative-config' not in"))))
    assert artifact.manifest() is not None and not list(plain.glob("*"))
    logs = list(Path(artifact.store.root, artifact.folder, "logs").glob("serve-*.log"))
    assert len(logs) == 3


@pytest.mark.slow
def test_a_server_that_dies_amid_a_unit_is_started_again_and_the_group_is_made_anew(ready: Path):
    dies = Path(target_of(ready), "dies")
    dies.touch()
    artifact = run_evaluate(Run(started(ready)))
    assert artifact.manifest() is not None and not dies.exists()
    rows = read_rows(artifact)
    assert len(rows) == 6 and all(row["identical"] for row in rows)


def dying(when: str) -> list[str]:
    """The command of a server that ends at load where its options are such."""
    script = f"""
import subprocess, sys
if '{when} sys.argv:
    sys.exit("a draft of another kind")
sys.exit(subprocess.call([sys.executable, "-m", "tests.engine_server", *sys.argv[1:]]))
"""
    return [sys.executable, "-c", script, "{port}", "{name}", "{model}"]


@pytest.mark.parametrize(
    ("plain_wrong", "draft_wrong", "error", "says"),
    [
        ("", "metrics", ConfigError, "with the draft has no metrics to read"),
        ("metrics", "", ConfigError, "of the target alone has no metrics to read"),
        ("", "model", ConfigError, "with the draft serves another, not demo"),
        ("template", "", ArtifactMismatch, "renders prompts in another way: from token"),
        ("", "tokens", DeepSpecError, "does not return the tokens"),
        ("drafts", "", ConfigError, "has a draft, so that it shows no plain decoding"),
        ("", "no drafts", ConfigError, "does not draft: it has no vllm:spec_decode_num_drafts"),
    ],
)
def test_a_server_that_lacks_what_is_asked_for_is_one_error_before_the_first_prompt(
    ready: Path, plain_wrong: str, draft_wrong: str, error: type[DeepSpecError], says: str
):
    folder = target_of(ready)
    wrong = [frozenset({name}) for name in (plain_wrong, draft_wrong)]
    with (
        engine_server(folder, drafts=plain_wrong == "drafts", wrong=wrong[0]) as plain,
        engine_server(folder, drafts=draft_wrong != "no drafts", wrong=wrong[1]) as draft,
    ):
        with pytest.raises(error, match=says) as raised:
            run_evaluate(Run(given(ready, plain, draft)))
        assert raised.value.fix and "127.0.0.1" in raised.value.where
        assert max(len(plain.bodies), len(draft.bodies)) <= 1
        assert not Run(given(ready, plain, draft)).artifact("evaluate").records()


def test_requests_that_fail_once_are_made_again_and_those_of_others_are_noticed(ready: Path):
    folder = target_of(ready)
    with engine_server(folder) as plain, engine_server(folder, drafts=True) as draft:
        config = given(ready, plain, draft)
        draft.failures = [503, 500, 0]  # the last one first: the check before the first prompt
        assert run_evaluate(Run(config)).manifest() is not None
    others = frozenset({"others"})
    with engine_server(folder) as plain, engine_server(folder, drafts=True, wrong=others) as draft:
        with pytest.raises(ShardsFailed, match="or others use it as well") as raised:
            run_evaluate(Run(given(ready, plain, draft, "evaluate.seed=5")))
        assert raised.value.transient


def test_units_of_another_version_are_not_mixed_in(ready: Path):
    folder = target_of(ready)
    with engine_server(folder) as plain, engine_server(folder, drafts=True) as draft:
        run_evaluate(Run(given(ready, plain, draft)), shards=[0])
        plain.version = draft.version = "0.33.0"
        with pytest.raises(ArtifactMismatch, match=r"version: 0\.32\.0, now 0\.33\.0"):
            run_evaluate(Run(given(ready, plain, draft)))
        plain.version = "0.31.0"
        with pytest.raises(ConfigError, match="not of one version"):
            run_evaluate(Run(given(ready, plain, draft)))


def test_prompts_that_a_server_has_no_room_for_are_left_out_with_the_reason(ready: Path):
    folder = target_of(ready)
    with engine_server(folder) as plain, engine_server(folder, drafts=True) as draft:
        draft.max_len = 20
        with pytest.raises(DeepSpecError, match="not one prompt was decoded"):
            run_evaluate(Run(given(ready, plain, draft)))
        records = Run(given(ready, plain, draft)).artifact("evaluate").records()
        assert [record.rejected for record in records.values()] == [3, 3]


def test_an_engine_that_is_not_installed_or_too_old_is_refused_before_it_is_started(
    ready: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    with pytest.raises(ConfigError, match="no program 'no-such-engine'"):
        run_evaluate(Run(started(ready, command=["no-such-engine", "serve", "{model}"])))
    program = tmp_path / "vllm"
    package = tmp_path / "vllm-0.9.2.post2.dist-info"
    package.mkdir()
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0.9.2.post2\n")
    program.write_text(f"#!{sys.executable}\nraise SystemExit('it was started')\n")
    program.chmod(0o755)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    old = ["/usr/bin/env", "A=b", str(program), "serve", "{model}"]
    with pytest.raises(ConfigError, match=r"vLLM 0\.9\.2\.post2 does not serve") as raised:
        run_evaluate(Run(started(ready, command=old)))
    assert raised.value.fix == "install vLLM 0.25.0 or newer"
    require_version("0.25.0", method="dspark", where="here")
    with pytest.raises(ConfigError, match="'eagle3'"):
        require_version("0.23.1", method="eagle3", where="here")
    assert not Run(started(ready)).artifact("evaluate").record_shards()


def test_a_port_in_use_is_what_the_error_names(ready: Path):
    with engine_server(target_of(ready)) as other:
        port = str(other.server_address[1])
        command = [port if word == "{port}" else word for word in SCRIPTED]
        with pytest.raises(ChildFailed, match="Address already in use"):
            run_evaluate(Run(started(ready, command=command)))


def test_a_draft_of_another_target_is_refused_before_a_server_is_started(ready: Path):
    artifact = Run(started(ready)).artifact("train")
    described = json.loads(artifact.read("draft/config.json"))
    artifact.store.write(
        artifact.path("draft/config.json"), json.dumps({**described, "hidden_size": 64}).encode()
    )
    with pytest.raises(ArtifactMismatch, match="hidden size: draft 64, target 32"):
        run_evaluate(Run(started(ready)))


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (["evaluate.engine=openai"], "plain_endpoint"),
        (["evaluate.engine=vllm", "evaluate.verify=threshold"], "cuts blocks in process only"),
        (["evaluate.concurrencies=[8, 8]"], "repeated"),
    ],
)
def test_settings_that_cannot_be_are_refused(tmp_path: Path, settings: list[str], says: str):
    with pytest.raises(ConfigError, match=says):
        tiny_run(tmp_path, *settings)


def test_a_result_in_process_has_the_fingerprint_that_it_had_and_a_served_one_its_own(
    tmp_path: Path,
):
    def key(*settings: str) -> str:
        return Run(tiny_run(tmp_path, *settings)).artifact("evaluate").key.fingerprint

    assert key() == key("evaluate.concurrencies=[4]", "evaluate.draft_sampling=greedy")
    served = key("evaluate.engine=vllm")
    assert len({key(), served, key("evaluate.engine=vllm", "evaluate.concurrencies=[4]")}) == 3
    assert served == key("evaluate.engine=vllm", "evaluate.batch_sizes=[3]")
    assert served != key("evaluate.engine=vllm", "evaluate.draft_sampling=greedy")


def test_counters_are_summed_over_engines_and_become_rounds():
    text = """
# TYPE vllm:spec_decode_num_drafts counter
vllm:spec_decode_num_drafts_total{engine="0"} 3.0
vllm:spec_decode_num_drafts_total{engine="1"} 2.0
vllm:spec_decode_num_draft_tokens_total{engine="0"} 9.0
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",position="0"} 3.0
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="1",position="0"} 1.0
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",position="1"} 1.0
"""
    counts, missing = read_counts(text)
    assert counts == EngineCounts(0, 5, 9, (4, 1))
    assert missing == ["vllm:request_success_total"]
    rounds = counts.rounds()
    assert rounds == Rounds([2, 2, 2, 2, 1], [2, 1, 1, 1, 0])
    # 10 tokens in 5 rounds; of answers of 1 + 8 tokens that ended on a stop token two were behind
    assert rounds.committed([9], stopped=False) == [3, 2, 2, 2, 1]
    assert rounds.committed([9], stopped=True) == [1, 2, 2, 2, 1]
