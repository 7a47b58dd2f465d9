"""The table of metrics is the contract's, and no label takes what a client writes."""

from __future__ import annotations

import logging

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import Counter, Gauge, Histogram, generate_latest

from atelier_server.core import BaseInfo, CheckpointId, State
from atelier_server.messages import Heartbeat, Sample, Timings
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
BESIDE = {
    "adapters_pinned",
    "requests_in_progress",
    "phase_seconds",
    "queue_limit",
    "images_in_progress",
    "worker_ready",
    "build_info",
}
NEVER_A_LABEL = {"adapter", "name", "training", "tenant", "prompt", "request_id", "job", "user", "client"}
BASE = BaseInfo(
    "pocket", "sd1", "0", 64, 64, "epsilon", "ddim", 77, 1, "cpu", "x", "float32", 1000, (("torch", "2"),)
)  # fmt: skip


def text(metrics: Metrics) -> str:
    return generate_latest(metrics.registry).decode()


def series(metrics: Metrics) -> set[str]:
    return {line.rsplit(" ", 1)[0] for line in text(metrics).splitlines() if not line.startswith("#")}


def test_the_table_is_the_contract() -> None:
    table = {metric.name: (metric.kind, tuple(metric.labels)) for metric in TABLE}
    assert {name: table[name] for name in CONTRACT} == CONTRACT
    assert set(table) - set(CONTRACT) == BESIDE


def test_no_label_names_what_is_unbounded() -> None:
    assert not {label for metric in TABLE for label in metric.labels} & NEVER_A_LABEL


def test_samples_reach_their_metric_under_its_full_name() -> None:
    metrics = Metrics()
    metrics.observe(Sample("batch_rows", 5))
    metrics.observe(Sample("adapter_lookups_total", 2, ("hit",)))
    metrics.training_states({State.RUNNING: 3})
    scraped = text(metrics)
    assert "atelier_batch_rows_sum 5.0" in scraped
    assert 'atelier_adapter_lookups_total{result="hit"} 2.0' in scraped
    assert 'atelier_training_jobs{state="running"} 3.0' in scraped
    assert 'atelier_training_jobs{state="paused"} 0.0' in scraped


def test_series_of_known_labels_exist_before_anything_happens() -> None:
    present = series(Metrics())
    assert 'atelier_out_of_memory_total{phase="train"}' in present
    assert 'atelier_worker_restarts_total{reason="signal"}' in present
    assert 'atelier_phase_seconds_count{phase="text_encode"}' in present


def test_the_phases_of_a_generation_are_told_apart() -> None:
    metrics = Metrics()
    metrics.generation_completed(Timings(0.25, 0.5, 4.0, 0.125, 0.0625, 5.0))
    scraped = text(metrics)
    for phase, seconds in (("queue", 0.25), ("text_encode", 0.5), ("denoise", 4.0), ("decode", 0.125)):
        assert f'atelier_phase_seconds_sum{{phase="{phase}"}} {seconds}' in scraped
    assert 'atelier_phase_seconds_sum{phase="image_encode"} 0.0625' in scraped


def test_nothing_is_left_of_a_worker_that_has_gone() -> None:
    metrics = Metrics()
    metrics.worker_ready()
    resident = (CheckpointId("otto", 1, 100),)
    metrics.heartbeat(Heartbeat(1, 2, 1, resident, 10, 20, 30, (("base", 5), ("training", 3))), BASE)
    assert 'atelier_vram_bytes{device="cpu",kind="peak"} 30.0' in text(metrics)
    metrics.worker_gone(BASE)
    scraped = text(metrics)
    for gone in (
        "atelier_worker_ready",
        "atelier_images_in_progress",
        'atelier_adapters_resident{tier="device"}',
        'atelier_vram_bytes{device="cpu",kind="allocated"}',
        'atelier_vram_component_bytes{component="base"}',
        'atelier_vram_component_bytes{component="training"}',
    ):
        assert f"{gone} 0.0" in scraped
    assert 'atelier_vram_bytes{device="cpu",kind="total"} 1000.0' in scraped


@pytest.mark.parametrize(
    "sample",
    [
        Sample("nothing", 1),
        Sample("images_total", 1, ("otto",)),
        Sample("queue_depth", 1),
        Sample("adapter_load_seconds", 1, ("otto",)),
        Sample("vram_component_bytes", 1, ("otto@100",)),
        Sample("request_duration_seconds", 1, ("Generate", 'OK"} 1')),
    ],
)
def test_a_wrong_sample_is_logged_and_dropped(sample: Sample, caplog: pytest.LogCaptureFixture) -> None:
    metrics = Metrics()
    before = series(metrics)
    with caplog.at_level(logging.ERROR):
        metrics.observe(sample)
    assert sample.metric in caplog.text
    assert series(metrics) == before


LISTED = [metric.name for metric in TABLE if metric.labels and all(metric.labels.values())]
METRICS = Metrics()


@settings(max_examples=30)
@given(st.sampled_from(LISTED), st.lists(st.text(max_size=20), max_size=3))
def test_no_words_of_others_become_a_series(name: str, labels: list[str]) -> None:
    before = series(METRICS)
    METRICS.observe(Sample(name, 1.0, tuple(labels)))
    assert series(METRICS) == before
