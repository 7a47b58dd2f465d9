"""Phases of a job are told as spans where its call is traced, and nowhere else."""

from __future__ import annotations

from queue import SimpleQueue

from atelier_server.engine.loop import Loop, Message
from atelier_server.engine.samples import SampleDefaults
from atelier_server.messages import Event, GenerationCompleted, Span, Submit, TrainingCompleted
from atelier_server.origin import NOWHERE, Origin
from tests.fakes import FakeRunner, generation, training

TRACED = Origin("call-1", "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01", "vendor=1")
UNSAMPLED = Origin("call-1", TRACED.traceparent[:-1] + "0")


def spans(job: Submit) -> list[Span]:
    inbox: SimpleQueue[Message] = SimpleQueue()
    events: list[Event] = []
    defaults = SampleDefaults(64, 64, "ddim")
    loop = Loop(runner=FakeRunner(), inbox=inbox, emit=events.append, slots=4, sample_defaults=defaults)
    inbox.put(job)
    while not any(isinstance(event, GenerationCompleted | TrainingCompleted) for event in events):
        loop.turn()
    return [event for event in events if isinstance(event, Span)]


def test_a_generation_tells_its_phases() -> None:
    told = spans(Submit(generation("a", num_images=2), TRACED))
    names = [span.name for span in told]
    assert names.count("queue") == names.count("denoise") == 1
    assert names.count("text_encode") == names.count("decode") == names.count("image_encode") == 2
    assert all(span.origin == TRACED and span.start_ns <= span.end_ns for span in told)
    assert {dict(span.attributes)["job"] for span in told} == {"a"}
    starts = {span.name: span.start_ns for span in told}
    clock = 1_000_000  # two clocks are read one after the other
    assert starts["queue"] - clock <= starts["text_encode"] <= starts["denoise"] + clock


def test_a_training_tells_its_stretches_and_its_samples() -> None:
    job = training("otto-1", max_train_steps=4, checkpointing_steps=2, validation_prompts=("p",))
    told = spans(Submit(job, TRACED))
    stretches = [dict(span.attributes) for span in told if span.name == "train"]
    assert [(s["from_step"], s["to_step"]) for s in stretches] == [(0, 2), (2, 4)]
    names = [span.name for span in told]
    assert names.count("prepare") == 1
    assert names.count("publish") == names.count("denoise") == 2
    assert all(span.origin == TRACED for span in told)


def test_nobody_pays_for_what_nobody_traces() -> None:
    assert spans(Submit(generation("a"), NOWHERE)) == []
    assert spans(Submit(generation("a"), UNSAMPLED)) == []
    assert spans(Submit(training("otto-1", max_train_steps=2), NOWHERE)) == []
