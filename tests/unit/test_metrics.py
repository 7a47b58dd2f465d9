"""The table of metrics is the contract's."""

from __future__ import annotations

import logging

import pytest
from prometheus_client import Counter, Gauge, Histogram, generate_latest

from atelier_server.core import State
from atelier_server.messages import Sample
from atelier_server.metrics import TABLE, Metrics

CONTRACT = {
    "request_duration_seconds": (Histogram, ("method", "code")),
    "queue_wait_seconds": (Histogram, ("kind",)),
    "time_to_first_step_seconds": (Histogram, ()),
    "denoise_step_seconds": (Histogram, ()),
    "train_step_seconds": (Histogram, ()),
    "batch_rows": (Histogram, ()),
    "queue_depth": (Gauge, ("kind",)),
    "images_total": (Counter, ()),
    "train_steps_total": (Counter, ()),
    "training_jobs": (Gauge, ("state",)),
    "adapter_load_seconds": (Histogram, ("source",)),
    "adapters_resident": (Gauge, ("tier",)),
    "adapter_lookups_total": (Counter, ("result",)),
    "adapter_evictions_total": (Counter, ()),
    "vram_bytes": (Gauge, ("device", "kind")),
    "vram_component_bytes": (Gauge, ("component",)),
    "worker_restarts_total": (Counter, ("reason",)),
    "out_of_memory_total": (Counter, ("phase",)),
}


def test_the_table_is_the_contract() -> None:
    assert {metric.name: (metric.kind, metric.labels) for metric in TABLE} == CONTRACT


def test_samples_reach_their_metric_under_its_full_name() -> None:
    metrics = Metrics()
    metrics.observe(Sample("batch_rows", 5))
    metrics.observe(Sample("adapter_lookups_total", 2, ("hit",)))
    metrics.training_states({State.RUNNING: 3})
    text = generate_latest(metrics.registry).decode()
    assert "atelier_batch_rows_sum 5.0" in text
    assert 'atelier_adapter_lookups_total{result="hit"} 2.0' in text
    assert 'atelier_training_jobs{state="running"} 3.0' in text
    assert 'atelier_training_jobs{state="paused"} 0.0' in text


@pytest.mark.parametrize("sample", [Sample("nothing", 1), Sample("images_total", 1, ("otto",))])
def test_a_wrong_sample_is_logged_and_dropped(sample: Sample, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR):
        Metrics().observe(sample)
    assert sample.metric in caplog.text
