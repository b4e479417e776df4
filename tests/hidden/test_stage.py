"""Capture: what lies in the cache is what the target computes, and every row is there."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from deepspec.artifacts.run import Run
from deepspec.artifacts.side_files import failures
from deepspec.artifacts.tables import read_table
from deepspec.artifacts.verify import verify_artifact
from deepspec.cache.format import EncodedTensor
from deepspec.cache.index import INDEX
from deepspec.cache.reader import HiddenCache
from deepspec.errors import ArtifactMismatch, DamagedData, FidelityTooLow, OutOfMemory, ShardsFailed
from deepspec.hidden.capture import Capture
from deepspec.hidden.checks import StateChecks, relative_difference
from deepspec.hidden.metadata import metadata_files
from deepspec.hidden.sequences import CaptureRow, capture_rows, token_batches
from deepspec.hidden.stage import HostCopy, run_capture
from deepspec.target.chat import load_chat, target_folder
from deepspec.target.decoding_cache import TargetCache
from deepspec.target.examine import TOKENS
from deepspec.target.loading import load_target
from deepspec.target.model import Target, TargetOutput
from tests.conftest import tiny_run


@pytest.fixture(scope="module")
def cache(captured: Path) -> HiddenCache:
    return HiddenCache(Run(tiny_run(captured)).artifact("hidden"))


def test_every_answer_is_one_sample_with_its_id_and_split(captured: Path, cache: HiddenCache):
    answers = Run(tiny_run(captured)).artifact("answers")
    rows = [
        row
        for record in answers.records().values()
        for row in read_table(answers.fetch_shard(record)).to_pylist()
    ]
    assert sorted(cache.index.sample_id.tolist()) == sorted(row["id"] for row in rows)
    held_out = {row["id"] for row in rows if row["held_out"]}
    assert set(cache.index.sample_id[cache.index.held_out == 1].tolist()) == held_out


def test_cached_states_are_those_of_the_target_run_alone(captured: Path, cache: HiddenCache):
    """No padding, batch or order leaks into a row (trap C3), in bfloat16."""
    config = tiny_run(captured)
    target = load_target(config.target, folder=target_folder(Run(config)))
    for number in range(0, len(cache), 5):
        sample = cache[number]
        alone = target.forward(sample.input_ids.long()[None])
        torch.testing.assert_close(
            sample.context.decode().float(), alone.context[0], atol=2e-2, rtol=1e-2
        )
        kept = np.concatenate(
            [np.arange(start, start + count) for start, count in sample.last_spans.tolist()]
        )
        torch.testing.assert_close(
            sample.last_hidden.decode().float(), alone.last_hidden[0, kept], atol=2e-2, rtol=1e-2
        )


def test_supervised_tokens_are_the_answers(captured: Path, cache: HiddenCache):
    config = tiny_run(captured)
    answers = Run(config).artifact("answers")
    said = {
        row["id"]: row["turns"][0]["token_ids"]
        for record in answers.records().values()
        for row in read_table(answers.fetch_shard(record)).to_pylist()
    }
    for number in range(len(cache)):
        sample = cache[number]
        assert sample.input_ids[sample.loss_mask.bool()].tolist() == said[sample.sample_id]


def test_the_frozen_tensors_lie_beside_the_shards_and_name_no_place(captured: Path):
    artifact = Run(tiny_run(captured)).artifact("hidden")
    manifest = artifact.manifest()
    assert manifest is not None
    assert set(manifest.files) == {*metadata_files(tiny_run(captured).hidden), INDEX}
    assert str(captured) not in artifact.store.read(artifact.path("target/config.json")).decode()


def test_rows_are_cut_at_max_length_and_rows_without_two_supervised_tokens_left_out(captured: Path):
    config = tiny_run(captured, "hidden.max_length=10")
    answers = Run(config).artifact("answers")
    rows = read_table(answers.fetch_shard(next(iter(answers.records().values())))).to_pylist()
    found = capture_rows(rows, load_chat(Run(config)), config.hidden)
    assert found.rows == []
    assert {reject["reason"] for reject in found.rejects} == {"too_little_supervised"}
    assert len(found.rejects) == len(rows)
    config = tiny_run(captured)
    assert len(capture_rows(rows, load_chat(Run(config)), config.hidden).rows) == len(rows)


def test_batches_fit_the_token_budget_once_padded(captured: Path):
    config = tiny_run(captured)
    answers = Run(config).artifact("answers")
    rows = read_table(answers.fetch_shard(next(iter(answers.records().values())))).to_pylist()
    captured_rows = capture_rows(rows, load_chat(Run(config)), config.hidden).rows
    batches = list(token_batches(captured_rows, 150))
    assert [row for batch in batches for row in batch] == captured_rows
    assert all(len(batch) * len(batch[-1].input_ids) <= 150 or len(batch) == 1 for batch in batches)


def test_a_flipped_bit_is_found_named_and_its_shard_captured_again(captured: Path, tmp_path: Path):
    store = tmp_path / "store"
    shutil.copytree(captured, store)
    config = tiny_run(store)
    artifact = Run(config).artifact("hidden")
    before, record = artifact.manifest(), artifact.record(2)
    assert before is not None
    assert record is not None
    path = Path(artifact.store.path(artifact.path(record.file)))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    damaged = HiddenCache(artifact)
    with pytest.raises(DamagedData, match="of shard 2 is damaged"):
        for number in range(len(damaged)):
            damaged[number]
    problems = list(verify_artifact(Run(config).artifact("hidden"), None, num_threads=1))
    assert len(problems) == 1
    assert "shard 2" in problems[0]
    after = run_capture(Run(config)).manifest()
    assert after is not None
    assert after.digest == before.digest
    assert list(verify_artifact(Run(config).artifact("hidden"), None, num_threads=1)) == []


def test_a_damaged_file_beside_the_shards_is_removed_by_verify_and_written_again(
    captured: Path, tmp_path: Path
):
    store = tmp_path / "store"
    shutil.copytree(captured, store)
    config = tiny_run(store)
    artifact = Run(config).artifact("hidden")
    before = artifact.manifest()
    path = Path(artifact.store.path(artifact.path("frozen.safetensors")))
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    assert len(list(verify_artifact(Run(config).artifact("hidden"), None, num_threads=1))) == 1
    after = run_capture(Run(config)).manifest()
    assert before is not None
    assert after is not None
    assert after.digest == before.digest


def test_an_unfinished_cache_is_refused(store: Path):
    with pytest.raises(ArtifactMismatch, match="not finished"):
        HiddenCache(Run(tiny_run(store)).artifact("hidden"))


@pytest.fixture(scope="module")
def answered(captured: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with answers and no hidden states; copy it before capturing."""
    store = tmp_path_factory.mktemp("answered") / "store"
    shutil.copytree(captured, store)
    shutil.rmtree(store / "hidden")
    return store


def capture_with(answered: Path, place: Path, *overrides: str) -> HiddenCache:
    shutil.copytree(answered, place)
    return HiddenCache(run_capture(Run(tiny_run(place, *overrides))))


@pytest.mark.parametrize(
    ("overrides", "error"),
    [
        (["hidden.codec=lossless"], 0.0),
        (["hidden.codec=int8"], 0.015),
        (["hidden.codec=int8", "hidden.compression=zstd", "hidden.last_codec=raw"], 0.015),
        (["hidden.codec=fp8"], 0.04),
    ],
)
def test_each_codec_gives_back_the_states_that_raw_keeps(
    answered: Path, cache: HiddenCache, tmp_path: Path, overrides: list[str], error: float
):
    coded = capture_with(answered, tmp_path / "store", *overrides)
    for number in range(0, len(cache), 4):
        raw, found = cache[number], coded[number]
        assert (found.sample_id, found.input_ids.tolist()) == (
            raw.sample_id,
            raw.input_ids.tolist(),
        )
        assert relative_difference(found.context.decode(), raw.context.decode()) <= error
        last_error = 0.0 if "hidden.last_codec=raw" in overrides else error
        assert (
            relative_difference(found.last_hidden.decode(), raw.last_hidden.decode()) <= last_error
        )
    artifact = Run(tiny_run(tmp_path / "store", *overrides)).artifact("hidden")
    assert list(verify_artifact(artifact, None, num_threads=1)) == []


def test_the_gates_figures_are_kept_in_the_artifact(answered: Path, tmp_path: Path):
    events = []
    shutil.copytree(answered, tmp_path / "store")
    artifact = run_capture(
        Run(tiny_run(tmp_path / "store", "hidden.codec=int8")), report=events.append
    )
    kept = json.loads(artifact.store.read(artifact.path("fidelity.json")))
    assert 0 < kept["relative_error"] < 0.02
    assert kept["argmax_agreement"] > 0.9
    assert next(event["event"] for event in events) == "fidelity"


def test_a_codec_that_loses_too_much_is_refused_before_any_shard_is_written(
    answered: Path, tmp_path: Path
):
    shutil.copytree(answered, tmp_path / "store")
    config = tiny_run(
        tmp_path / "store", "hidden.codec=fp8", "resources.checks.fidelity.max_relative_error=0.001"
    )
    for _ in range(2):  # a second try is no way around it
        with pytest.raises(
            FidelityTooLow, match=r"relative_error is .*, max_relative_error is 0.001"
        ):
            run_capture(Run(config))
    assert Run(config).artifact("hidden").records() == {}


def test_final_states_are_left_out_by_setting(answered: Path, tmp_path: Path):
    cache = capture_with(
        answered,
        tmp_path / "store",
        "hidden.last_hidden=none",
        "draft.algorithm=dflash",
        "draft.markov=null",
        "draft.confidence=null",
        "loss.ce=1",
        "loss.tv=0",
    )
    assert cache[0].last_hidden.decode().shape == (0, 32)
    assert int(cache.index.num_last.sum()) == 0


def test_rows_packed_into_one_are_those_computed_alone(captured: Path, cache: HiddenCache):
    """Trap C3 for the path that flash-attention takes, here with PyTorch's own kernel:
    documents do not see each other.
    """
    config = tiny_run(captured)
    target = load_target(config.target, folder=target_folder(Run(config)))
    sequences = [cache[number].input_ids.tolist() for number in (0, 5, 9, 14)]
    for ids, packed in zip(sequences, target.forward_packed(sequences), strict=True):
        alone = target.forward(torch.tensor([ids]))
        torch.testing.assert_close(packed.context, alone.context[0], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(packed.last_hidden, alone.last_hidden[0], atol=1e-5, rtol=1e-4)


@torch.inference_mode()
def spoil(kind: str, rows, states):
    """What a broken kernel, a wrong mask or a bad weight would hand to capture."""
    found = list(states)
    if kind == "rows mixed up":
        row, output = found[-1]
        found[-1] = (row, TargetOutput(output.context.flip(0), output.last_hidden.flip(0)))
    elif kind == "not finite":
        found[1][1].context[0, 0] = float("nan")
    elif kind == "an empty row":
        found[1][1].context[0] = 0
    return iter(found)


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("rows mixed up", "captured by itself"),
        ("not finite", "not finite"),
        ("an empty row", "no hidden state"),
    ],
)
def test_a_shard_of_wrong_states_is_set_aside_and_the_others_are_captured(
    answered: Path, tmp_path: Path, monkeypatch, kind: str, said: str
):
    shutil.copytree(answered, tmp_path / "store")
    original, calls = Capture.states, iter(range(100))
    monkeypatch.setattr(
        Capture,
        "states",
        lambda self, rows: spoil(kind if next(calls) == 2 else "", rows, original(self, rows)),
    )
    config = tiny_run(tmp_path / "store")
    with pytest.raises(ShardsFailed, match=f"shard 2: .*{said}"):
        run_capture(Run(config))
    artifact = Run(config).artifact("hidden")
    assert list(artifact.records()) == [0, 1, 3, 4, 5]
    assert artifact.store.names(artifact.path("quarantine")) == ["00002.arrow"]
    monkeypatch.undo()
    assert run_capture(Run(config)).manifest() is not None
    assert failures(artifact) == {}


def test_the_final_norm_left_out_is_found_by_the_targets_own_predictions(
    captured: Path, cache: HiddenCache
):
    """Trap C2: the states before the norm predict other tokens."""
    config = tiny_run(captured)
    target = load_target(config.target, folder=target_folder(Run(config)))
    # what a target's own norm does, this tiny one has learnt nothing
    target.decoder.norm.weight.data *= torch.linspace(-3, 3, 32)
    checks = StateChecks(target, config.resources.checks)
    ids = [token for number in range(12) for token in cache[number].input_ids.tolist()][:400]
    row = CaptureRow(1, False, ids, [True] * len(ids))
    states = target.forward(torch.tensor([ids]))
    unnormed = states.last_hidden[0] / target.decoder.norm.weight
    layout = cache.layout
    sample = cache[0]._replace(
        context=EncodedTensor(layout.context, layout.context.quantize(states.context[0])),
        last_hidden=EncodedTensor(layout.last_hidden, layout.last_hidden.quantize(unnormed)),
        last_spans=torch.tensor([[0, len(ids)]]),
    )
    checks.begin(1)
    checks.add(row, TargetOutput(states.context[0], states.last_hidden[0]), sample)
    with pytest.raises(DamagedData, match="of the target's predictions come back"):
        checks.finish()


def test_predictions_of_a_long_sample_are_compared_in_parts(
    captured: Path, cache: HiddenCache, monkeypatch: pytest.MonkeyPatch
):
    """Logits of 4,096 tokens at once are gigabytes, beside a batch that fits just so."""
    config = tiny_run(captured)
    target = load_target(config.target, folder=target_folder(Run(config)))
    checks, logits, sizes = StateChecks(target, config.resources.checks), target.logits, []

    def noted(states: torch.Tensor) -> torch.Tensor:
        sizes.append(len(states))
        return logits(states)

    monkeypatch.setattr(target, "logits", noted)
    monkeypatch.setattr("deepspec.hidden.checks.LOGIT_TOKENS", 100)
    ids = [token for number in range(12) for token in cache[number].input_ids.tolist()][:250]
    row = CaptureRow(1, False, ids, [True] * len(ids))
    states = target.forward(torch.tensor([ids]))
    exact = TargetOutput(states.context[0], states.last_hidden[0])
    sample = cache[0]._replace(
        context=EncodedTensor(cache.layout.context, cache.layout.context.quantize(exact.context)),
        last_hidden=EncodedTensor(
            cache.layout.last_hidden, cache.layout.last_hidden.quantize(exact.last_hidden)
        ),
        last_spans=torch.tensor([[0, len(ids)]]),
    )
    checks.begin(1)
    checks.add(row, exact, sample)
    assert sizes == [100, 100, 100, 100, 50, 50]
    assert checks._positions == 250 and checks._agreeing > 200


@pytest.mark.parametrize("place", ["sampling", "checks"])
def test_memory_that_ends_beside_a_batch_names_the_sample(
    answered: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
):
    """The passes that make no batch: the codec's samples, and a row computed again by itself."""
    shutil.copytree(answered, tmp_path / "store")
    config = tiny_run(tmp_path / "store", "hidden.codec=int8")

    forward = Target.forward

    def too_large(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

    def of_few_tokens(self: Target, input_ids: torch.Tensor, *cache: TargetCache) -> TargetOutput:
        if input_ids.shape[1] > TOKENS:  # those of the checks as the target is loaded fit
            too_large()
        return forward(self, input_ids, *cache)

    if place == "sampling":
        monkeypatch.setattr(Target, "forward", of_few_tokens)
    else:
        monkeypatch.setattr(StateChecks, "_compare_alone", too_large)
    with pytest.raises((OutOfMemory, ShardsFailed)) as caught:
        run_capture(Run(config))
    failed = list(caught.value.failures.values()) or [caught.value.to_json()]
    for failure in failed:
        assert failure["error"] == "OutOfMemory" and "Tried to allocate" in failure["what"]
        assert "lower hidden.max_length" in failure["fix"]
        assert failure["where"].startswith("sample ")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_states_come_to_the_host_while_the_gpu_goes_on(cache: HiddenCache):
    host = HostCopy(torch.device("cuda"))
    states = torch.randn(64, cache.layout.context.width, device="cuda")
    stored = EncodedTensor(cache.layout.context, cache.layout.context.quantize(states))
    ready = host.ready()
    torch.randn(4096, 4096, device="cuda") @ torch.randn(4096, 4096, device="cuda")
    assert torch.equal(host.bring(stored, ready).parts[0], stored.parts[0].cpu())


def test_shards_are_never_read_with_other_scales_than_they_were_encoded_with(
    answered: Path, tmp_path: Path
):
    """Without the very scales an int8 shard means something else, and no checksum of its own
    bytes would tell.
    """
    shutil.copytree(answered, tmp_path / "store")
    config = tiny_run(tmp_path / "store", "hidden.codec=int8")
    artifact = run_capture(Run(config), shards=[0, 1, 2])
    path = Path(artifact.store.path(artifact.path("scales.safetensors")))
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(DamagedData, match="encoded with other channel scales"):
        run_capture(Run(config))
    path.unlink()  # lost: made again from the same samples, they come out the same here
    assert run_capture(Run(config)).manifest() is not None
    assert path.read_bytes() == whole
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(DamagedData, match=r"scales.safetensors is damaged"):
        HiddenCache(artifact)


def test_the_longest_sample_of_every_shard_is_looked_at(
    captured: Path, monkeypatch: pytest.MonkeyPatch
):
    config = tiny_run(captured)
    checks = StateChecks(
        load_target(config.target, folder=target_folder(Run(config))), config.resources.checks
    )
    compared: list[int] = []
    monkeypatch.setattr(
        checks, "_compare_alone", lambda row, states: compared.append(row.sample_id)
    )
    monkeypatch.setattr(checks, "_compare_stored", lambda row, states, sample: None)
    states = TargetOutput(torch.ones(1, 4), torch.ones(1, 4))
    checks.begin(130)
    for number in range(130):
        checks.add(CaptureRow(number, False, [1], [True]), states, None)  # type: ignore[arg-type]
    assert compared == [1, 65, 129]
