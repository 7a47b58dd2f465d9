"""A worker without a device, for contract tests: it speaks the wire and does what prompts tell it to.

Generations: wait (nothing is painted until released),
hold (wait until cancelled or released; alone it is done at once),
release (finish those held), crash (die), crash-once,
image-crash-once (die after the first picture), fail, big (3 MiB pictures), hang-once (alive, and no step
ends), freeze-once (no sign of life). Trainings, by instance prompt:
hold, crash, crash-once, nan, silent-crash-once (publish without saying so, then die), stay (hold after step
1, begun again after step 2, then 3, ...), linger (the same, but after step 1 twice), disk-full-once (no space
for the second checkpoint).
A picture's bytes are JSON that tells what the worker has seen.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import socket
import sys
import threading
import time
from contextlib import suppress
from dataclasses import asdict
from itertools import count
from pathlib import Path

from atelier_server import core, messages, report
from atelier_server.adapters.records import REPORT_FILE
from atelier_server.adapters.store import AdapterStore
from atelier_server.errors import AtelierError
from atelier_server.workers import wire
from tests.fakes import REPORT

BASE = core.BaseInfo(
    reference="fake",
    family="sd1",
    sha256="0" * 64,
    native_width=64,
    native_height=64,
    prediction_type="epsilon",
    default_scheduler="ddim",
    max_prompt_tokens=77,
    num_parameters=1_000_000,
    device="cpu",
    device_description="nothing",
    dtype="float32",
    memory_total_bytes=1000,
    versions=(("atelier", "none"), ("torch", "none")),
)


class FakeWorker:
    def __init__(self, descriptor: int) -> None:
        self.stream = socket.socket(fileno=descriptor).makefile("rwb")
        settings = wire.read(self.stream)
        self.data_dir = Path(settings.data_dir)
        self.store = AdapterStore.at(
            self.data_dir, settings.store, settings.store_cache_bytes, settings.owner
        )
        self.resident: set[core.CheckpointId] = set()
        self.held: dict[str, core.GenerationJob | core.TrainingJob] = {}
        self.seen = {"submitted": 0, "cancelled": 0}
        self.idle = True
        self.lock = threading.Lock()
        if settings.model == "broken":
            self.say(messages.WorkerFailed("UNSUPPORTED_FORMAT", "there is no such model"))
            sys.exit(1)
        self.say(messages.WorkerReady(BASE, settings.slots, core.Costs(0.01, 100.0, 100.0, 10**9)))

    def say(self, *events: messages.Event) -> None:
        with self.lock:
            for event in events:
                self.stream.write(wire.frame(event))
            self.stream.flush()

    def keep_beating(self) -> None:
        while True:
            time.sleep(0.1)
            with suppress(OSError):
                self.beat()

    def die(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def first_time(self, marker: str) -> bool:
        path = self.data_dir / f"{marker}.marker"
        fresh = not path.exists()
        path.touch()
        return fresh

    def run(self) -> None:
        threading.Thread(target=self.keep_beating, daemon=True).start()
        while True:
            match wire.read(self.stream):
                case messages.Submit(core.GenerationJob() as job):
                    self.seen["submitted"] += 1
                    self.generate(job)
                case messages.Submit(core.TrainingJob() as job):
                    self.train(job)
                case messages.Cancel(job_id):
                    self.cancel(job_id)
                case messages.Pause(job_id):
                    self.pause(job_id)
                case messages.Drain():
                    sys.exit(0)
                case call:
                    self.answer(call)

    def cancel(self, job_id: str) -> None:
        job = self.held.pop(job_id, None)
        if isinstance(job, core.GenerationJob):
            self.seen["cancelled"] += 1
            self.say(messages.JobCancelled(job_id))
        elif job is not None:
            step = job.resume_step + 3
            self.publish(job, step)
            self.say(messages.TrainingCompleted(job_id, core.State.CANCELLED, step, 1.0))

    def pause(self, job_id: str) -> None:
        job = self.held.pop(job_id, None)
        if isinstance(job, core.TrainingJob):
            step = job.resume_step + 3
            self.publish(job, step)
            self.say(messages.TrainingPaused(job_id, step))

    # -------------------------------------------------------------------------------------- generations
    def generate(self, job: core.GenerationJob) -> None:
        if job.prompt == "wait":
            self.held[job.id] = job
            self.say(messages.Queued(job.id, 1))
            return
        self.say(messages.Queued(job.id, 0), messages.Progress(job.id, 1, job.num_inference_steps))
        if job.prompt == "hold" and not job.alone:
            self.held[job.id] = job
            return
        if job.prompt == "crash" or (job.prompt == "crash-once" and self.first_time("crash")):
            self.die()
        if job.prompt == "hang-once" and self.first_time("hang"):
            self.idle = False
            signal.pause()
        if job.prompt == "freeze-once" and self.first_time("freeze"):
            os.kill(os.getpid(), signal.SIGSTOP)
        if job.prompt == "fail":
            self.say(messages.JobFailed(job.id, "NONFINITE_IMAGE", "not a number", (("index", "0"),)))
            return
        if job.prompt == "release":
            for held in list(self.held.values()):
                if isinstance(held, core.GenerationJob):
                    self.finish(self.held.pop(held.id))
        self.finish(job)

    def finish(self, job: core.GenerationJob) -> None:
        for step in range(2, job.num_inference_steps + 1):
            self.say(messages.Progress(job.id, step, job.num_inference_steps))
        for i in range(job.num_images):
            facts = {"alone": job.alone, "client": job.client, "priority": job.priority.name}
            data = json.dumps({**self.seen, **facts, "steps": job.num_inference_steps}).encode()
            if job.prompt == "big":
                data = bytes(range(256)) * 4096 * 3
            self.say(messages.ImageReady(job.id, i, job.seed + i, "image/png", data))
            if job.prompt == "image-crash-once" and self.first_time("image"):
                self.die()
        self.say(messages.Sample("images_total", job.num_images))
        self.say(messages.GenerationCompleted(job.id, messages.Timings(total_seconds=1.0), 2))

    # ---------------------------------------------------------------------------------------- trainings
    def train(self, job: core.TrainingJob) -> None:
        recipe, script = job.recipe, job.recipe.instance_prompt
        assert all(Path(image.path).is_file() for image in job.images)
        self.say(messages.TrainingStarted(job.id, job.resume_step))
        last = 0
        if script in ("hold", "stay", "linger"):
            self.held[job.id] = job
            last = next(n for n in count(1) if self.first_time(f"{job.id}-{n}"))
            last = max(1, last - (script == "linger"))
        for step in range(job.resume_step + 1, recipe.max_train_steps + 1):
            self.say(messages.TrainingProgress(job.id, step, recipe.max_train_steps, 0.5, 1e-4, 1.0))
            self.say(messages.Sample("train_step_seconds", 0.5))
            if script == "crash" or (script == "crash-once" and step == 7 and self.first_time("train")):
                self.die()
            second = step == 2 * recipe.checkpointing_steps
            if script == "disk-full-once" and second and self.first_time("disk"):
                last = recipe.checkpointing_steps
                self.say(messages.TrainingPaused(job.id, last, "STORAGE_FULL", "no space left"))
                return
            if script == "nan" and step == 6:
                self.say(messages.JobFailed(job.id, "NONFINITE_LOSS", "loss is NaN", (("step", "6"),)))
                return
            if step % recipe.checkpointing_steps == 0 or step == recipe.max_train_steps:
                silent = script == "silent-crash-once" and self.first_time("silent")
                self.publish(job, step, silent=silent)
                if silent:
                    self.die()
            if (script in ("stay", "linger") and step >= last) or (
                script == "hold" and step == recipe.checkpointing_steps
            ):
                return
        self.say(messages.TrainingCompleted(job.id, core.State.SUCCEEDED, recipe.max_train_steps, 2.0))

    def publish(self, job: core.TrainingJob, step: int, *, silent: bool = False) -> None:
        checkpoint = core.CheckpointId(job.name, job.version, step)
        record = self.store.publish(
            checkpoint,
            lambda folder: (folder / "adapter.safetensors").write_bytes(f"{checkpoint}".encode()) and None,
            loss=0.25,
            rank=job.recipe.rank,
            lora_alpha=job.recipe.lora_alpha,
        )
        if silent:
            return
        self.say(messages.CheckpointPublished(job.id, checkpoint, record.sha256, record.size_bytes, 0.25))
        for i, prompt in enumerate(job.recipe.validation_prompts):
            if (step, i) not in job.sampled:
                self.say(messages.SampleReady(job.id, step, i, prompt, 42, "image/png", b"sample %d" % step))

    # -------------------------------------------------------------------------------------------- calls
    def answer(self, call: messages.Command) -> None:
        match call:
            case messages.LoadAdapter(call_id, use):
                fresh = use.checkpoint not in self.resident
                self.resident.add(use.checkpoint)
                self.beat()
                self.say(messages.AdapterLoaded(call_id, fresh))
            case messages.UnloadAdapter(call_id, checkpoints):
                freed = self.resident & set(checkpoints)
                self.resident -= freed
                self.beat()
                self.say(messages.AdaptersUnloaded(call_id, len(freed)))
            case messages.ImportAdapter(call_id, path, name, new_version, terms):
                self.adopt(call_id, Path(path), name, new_version, terms)
            case messages.ExportAdapter(call_id, use, layout, path):
                if layout == "kohya":
                    self.die()
                shutil.copyfile(use.path, path)
                data = Path(path).read_bytes()
                self.say(messages.AdapterExported(call_id, path, len(data), hashlib.sha256(data).hexdigest()))

    def adopt(
        self, call_id: str, path: Path, name: str, new_version: bool, terms: report.ImportTerms
    ) -> None:
        if path.is_dir():
            path = next(path.rglob("*.safetensors"))
        if path.read_bytes().startswith(b"bad"):
            self.say(messages.CallFailed(call_id, "ADAPTER_MISMATCH", "layer x does not fit"))
            return

        def write(folder: Path) -> None:
            shutil.copyfile(path, folder / "adapter.safetensors")
            (folder / REPORT_FILE).write_text(json.dumps(asdict(REPORT)))

        try:
            record = self.store.publish_version(
                write,
                name=name,
                trigger=terms.trigger,
                base_model="fake",
                base_sha256="0" * 64,
                new_version=new_version,
                rank=4,
                lora_alpha=4.0,
            )
        except AtelierError as error:
            self.say(messages.CallFailed(call_id, error.reason, error.message))
            return
        self.say(messages.AdapterImported(call_id, record.id, REPORT))

    def beat(self) -> None:
        resident = tuple(sorted(self.resident))
        self.say(messages.Heartbeat(0, 0, 0, resident, 10, 20, 30, (("base", 5),), idle=self.idle))


if __name__ == "__main__":
    try:
        FakeWorker(int(sys.argv[1])).run()
    except EOFError:
        sys.exit(0)
