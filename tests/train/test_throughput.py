"""How fast a training goes, counted from where it began in this process."""

import pytest
import torch

from deepspec.train.throughput import Throughput


def test_waiting_for_data_is_told_apart_from_working(monkeypatch: pytest.MonkeyPatch):
    # made; 3 s of waiting, 2 of work; 1, 1; the end; read
    clock = iter([0.0, 0.0, 3.0, 5.0, 6.0, 7.0, 7.0, 10.0])
    monkeypatch.setattr("deepspec.train.throughput.time.perf_counter", lambda: next(clock))
    throughput = Throughput(torch.device("cpu"), first=0, total=1)
    assert list(throughput.waiting(iter(["a", "b"]))) == ["a", "b"]
    pace = throughput.read(1)
    assert pace.data_wait_share == 0.4
    assert pace.peak_memory_bytes > 1e7


def test_the_speed_of_a_resumed_training_counts_only_what_this_process_did(
    monkeypatch: pytest.MonkeyPatch,
):
    clock = iter([100.0, 120.0])
    monkeypatch.setattr("deepspec.train.throughput.time.perf_counter", lambda: next(clock))
    throughput = Throughput(torch.device("cpu"), first=90, total=100)
    throughput.tokens += 4 * 50
    assert throughput.read(94)[:2] == (10.0, 30)
