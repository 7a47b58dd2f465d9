"""A scripted server: the four services on a real channel, stopped and started on one port."""

# ruff: noqa: N802 -- gRPC's methods have gRPC's names

from __future__ import annotations

import io
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import grpc
from google.protobuf import any_pb2, timestamp_pb2
from google.rpc import status_pb2
from grpc_status import rpc_status
from PIL import Image

from atelier.v1 import adapter_pb2, generation_pb2, server_pb2, training_pb2
from atelier.v1.adapter_pb2_grpc import AdapterServiceServicer, add_AdapterServiceServicer_to_server
from atelier.v1.generation_pb2_grpc import GenerationServiceServicer, add_GenerationServiceServicer_to_server
from atelier.v1.server_pb2_grpc import ServerServiceServicer, add_ServerServiceServicer_to_server
from atelier.v1.training_pb2_grpc import TrainingServiceServicer, add_TrainingServiceServicer_to_server

STEPS = 6
Response = generation_pb2.GenerateResponse


def picture(color: tuple[int, int, int] = (40, 90, 200), size: int = 16) -> bytes:
    """A plain PNG file."""
    buffer = io.BytesIO()
    Image.new("RGB", (size, size), color).save(buffer, "PNG")
    return buffer.getvalue()


def refusal(code: grpc.StatusCode, message: str, *details: Any) -> grpc.Status:
    """A status with google.rpc details, as the server makes them."""
    packed = []
    for detail in details:
        item = any_pb2.Any()
        item.Pack(detail)
        packed.append(item)
    return rpc_status.to_status(status_pb2.Status(code=code.value[0], message=message, details=packed))


def training_events(name: str = "otto") -> list[training_pb2.TrainingEvent]:
    """accepted, STEPS of progress, a checkpoint, a sample, completed: numbered from 1."""
    kinds = training_pb2.TrainingEvent
    told: list[dict[str, Any]] = [
        {"accepted": kinds.Accepted(training=f"{name}-k3f9", adapter=name, version=1, estimated_seconds=75)}
    ]
    told += [
        {"progress": kinds.Progress(step=step, max_train_steps=STEPS, loss=1 / step)}
        for step in range(1, STEPS + 1)
    ]
    told.append({"checkpoint": kinds.CheckpointPublished(step=STEPS, adapter=f"{name}@{STEPS}", loss=0.2)})
    told.append({"sample": kinds.Sample(step=STEPS, prompt="p", mime_type="image/png", data=picture())})
    told.append(
        {"completed": kinds.Completed(state="TRAINING_STATE_SUCCEEDED", step=STEPS, adapter=f"{name}@6")}
    )
    return [
        kinds(seq=seq, training=f"{name}-k3f9", create_time={"seconds": 1_800_000_000 + seq}, **kind)
        for seq, kind in enumerate(told, 1)
    ]


def image_chunks(index: int, data: bytes, seed: int, parts: int = 2) -> list[Response]:
    """A picture in `parts` chunks."""
    length = -(-len(data) // parts)
    return [
        Response(
            image=Response.Image(
                index=index,
                mime_type="image/png",
                data=data[offset : offset + length],
                offset=offset,
                size=len(data),
                last=offset + length >= len(data),
                seed=seed,
            )
        )
        for offset in range(0, len(data), length)
    ]


@dataclass
class Script:
    """What the server is to do, and what it has been asked."""

    refuse: grpc.Status | None = None
    pause_after: int | None = None  # Train, Watch: wait for `stop` after so many events of the stream
    pause_generate: bool = False  # after the first picture's chunks
    paused: threading.Event = field(default_factory=threading.Event)
    stopping: threading.Event = field(default_factory=threading.Event)
    ready: bool = True
    uploads: list[list[training_pb2.TrainRequest]] = field(default_factory=list)
    watches: list[training_pb2.WatchTrainingRequest] = field(default_factory=list)
    generates: list[generation_pb2.GenerateRequest] = field(default_factory=list)
    imports: list[list[adapter_pb2.ImportAdapterRequest]] = field(default_factory=list)
    calls: list[Any] = field(default_factory=list)
    held: int = 0
    export: bytes = b"weights"
    export_digest: str = ""
    events: list[training_pb2.TrainingEvent] = field(default_factory=training_events)

    def check(self, context: grpc.ServicerContext) -> None:
        if self.refuse is not None:
            context.abort_with_status(self.refuse)

    def pause(self) -> None:
        """Holds a stream open until the server is stopped under it."""
        self.paused.set()
        self.stopping.wait(20)


REPORT = adapter_pb2.AdapterReport(
    format="kohya",
    confidence=0.875,
    software="OneTrainer",
    family="sdxl",
    evidence="its cross-attention is 2048 wide",
    base_family="sdxl",
    matched=["unet.a", "unet.b"],
    unmatched=[adapter_pb2.AdapterReport.Unmatched(name="lora_unet_c", reason="no such module")] * 12,
    coverage=0.25,
    kinds=[adapter_pb2.AdapterReport.Kind(kind="dora", modules=2)],
    ranks=[adapter_pb2.AdapterReport.Rank(rank=4, modules=2)],
    alphas=[
        adapter_pb2.AdapterReport.Alpha(alpha=0.5, modules=1),
        adapter_pb2.AdapterReport.Alpha(alpha=8, modules=1),
    ],
    tokens=[adapter_pb2.AdapterReport.Token(placeholder="<zoe>", vectors=2, encoders=["text_encoder"])],
    triggers=["zoe"],
    metadata={"ss_epoch": "3"},
    norms=[adapter_pb2.AdapterReport.BlockNorm(block="unet.mid_block", norm=1.5)],
    probe=0.125,
)


class Generation(GenerationServiceServicer):
    def __init__(self, script: Script) -> None:
        self.script = script

    def Generate(self, request: Any, context: Any) -> Iterator[Response]:
        self.script.generates.append(request)
        self.script.check(context)
        total = request.num_images or 1
        yield Response(queued=Response.Queued(position=0))
        yield Response(progress=Response.Progress(step=1, total=total))
        if request.preview_steps:
            step, data = request.preview_steps, picture(size=8)
            yield Response(preview=Response.Preview(index=0, step=step, mime_type="image/png", data=data))
        for index in range(total):
            yield from image_chunks(index, picture((index * 40, 90, 200)), request.seed + index)
            if self.script.pause_generate:
                self.script.pause_generate = False
                self.script.pause()
        receipt = generation_pb2.Receipt(
            base_model="pocket", prompt=request.prompt, versions={"atelier": "0.1.0"}
        )
        yield Response(completed=Response.Completed(seed=request.seed, batch_bucket=2, receipt=receipt))


class Trainings(TrainingServiceServicer):
    def __init__(self, script: Script) -> None:
        self.script = script

    def Train(self, request_iterator: Any, context: Any) -> Iterator[training_pb2.TrainResponse]:
        self.script.uploads.append(list(request_iterator))
        self.script.check(context)
        for event in self._events(0):
            yield training_pb2.TrainResponse(event=event)

    def WatchTraining(self, request: Any, context: Any) -> Iterator[training_pb2.WatchTrainingResponse]:
        self.script.watches.append(request)
        self.script.check(context)
        for event in self._events(request.after_seq):
            yield training_pb2.WatchTrainingResponse(event=event)

    def _events(self, after_seq: int) -> Iterator[training_pb2.TrainingEvent]:
        for event in self.script.events[after_seq:]:
            if self.script.pause_after == event.seq - 1:
                self.script.pause_after = None
                self.script.pause()
            yield event

    def GetTraining(self, request: Any, context: Any) -> training_pb2.GetTrainingResponse:
        self.script.calls.append(request)
        self.script.check(context)
        recipe = training_pb2.TrainingRecipe(name="otto", rank=8, validation_prompts=["p"])
        return training_pb2.GetTrainingResponse(
            training=training_pb2.Training(id="otto-k3f9", adapter="otto", version=1, state=2, recipe=recipe)
        )

    def ListTrainings(self, request: Any, context: Any) -> training_pb2.ListTrainingsResponse:
        self.script.calls.append(request)
        return training_pb2.ListTrainingsResponse(trainings=[training_pb2.Training(id="otto-k3f9", state=4)])

    def CancelTraining(self, request: Any, context: Any) -> training_pb2.CancelTrainingResponse:
        return training_pb2.CancelTrainingResponse(training=training_pb2.Training(id="otto-k3f9", state=6))

    def PauseTraining(self, request: Any, context: Any) -> training_pb2.PauseTrainingResponse:
        return training_pb2.PauseTrainingResponse(training=training_pb2.Training(id="otto-k3f9", state=3))

    def ResumeTraining(self, request: Any, context: Any) -> training_pb2.ResumeTrainingResponse:
        return training_pb2.ResumeTrainingResponse(training=training_pb2.Training(id="otto-k3f9", state=1))

    def DeleteTraining(self, request: Any, context: Any) -> training_pb2.DeleteTrainingResponse:
        return training_pb2.DeleteTrainingResponse()


class Adapters(AdapterServiceServicer):
    """Three adapters, two a page."""

    def __init__(self, script: Script) -> None:
        self.script = script

    def adapter(self, name: str) -> adapter_pb2.Adapter:
        checkpoint = adapter_pb2.Checkpoint(step=6, sha256="ab" * 32, size_bytes=1536, loss=0.25)
        return adapter_pb2.Adapter(
            name=name,
            version=1,
            checkpoints=[checkpoint],
            recommended_step=6,
            rank=8,
            trigger="a sks blue plush octopus",
            thumbnail=picture() if name != "bolt" else b"",
            tier="ADAPTER_TIER_DISK",
            size_bytes=2048,
        )

    def ListAdapters(self, request: Any, context: Any) -> adapter_pb2.ListAdaptersResponse:
        self.script.calls.append(request)
        pages = {"": (["bolt", "otto"], "2"), "2": (["zoe"], "")}
        names, token = pages[request.page_token]
        return adapter_pb2.ListAdaptersResponse(
            adapters=[self.adapter(name) for name in names], next_page_token=token
        )

    def GetAdapter(self, request: Any, context: Any) -> adapter_pb2.GetAdapterResponse:
        self.script.check(context)
        return adapter_pb2.GetAdapterResponse(adapter=self.adapter(request.adapter.partition("@")[0]))

    def LoadAdapter(self, request: Any, context: Any) -> adapter_pb2.LoadAdapterResponse:
        return adapter_pb2.LoadAdapterResponse(adapter=f"{request.adapter}@6", loaded=True)

    def UnloadAdapter(self, request: Any, context: Any) -> adapter_pb2.UnloadAdapterResponse:
        return adapter_pb2.UnloadAdapterResponse(unloaded=2)

    def DeleteAdapter(self, request: Any, context: Any) -> adapter_pb2.DeleteAdapterResponse:
        return adapter_pb2.DeleteAdapterResponse(expire_time=timestamp_pb2.Timestamp(seconds=2_000_000_000))

    def UndeleteAdapter(self, request: Any, context: Any) -> adapter_pb2.UndeleteAdapterResponse:
        self.script.calls.append(request)
        return adapter_pb2.UndeleteAdapterResponse(adapters=[self.adapter(request.adapter)])

    def QueryUpload(self, request: Any, context: Any) -> adapter_pb2.QueryUploadResponse:
        self.script.calls.append(request)
        return adapter_pb2.QueryUploadResponse(offset=self.script.held)

    def TagAdapter(self, request: Any, context: Any) -> adapter_pb2.TagAdapterResponse:
        self.script.calls.append(request)
        return adapter_pb2.TagAdapterResponse(adapter=self.adapter("otto"), previous="v1@3")

    def UntagAdapter(self, request: Any, context: Any) -> adapter_pb2.UntagAdapterResponse:
        self.script.calls.append(request)
        return adapter_pb2.UntagAdapterResponse(previous="v1@6")

    def AnnotateAdapter(self, request: Any, context: Any) -> adapter_pb2.AnnotateAdapterResponse:
        adapter = self.adapter(request.adapter)
        adapter.note = request.note
        return adapter_pb2.AnnotateAdapterResponse(adapter=adapter)

    def MergeAdapters(self, request: Any, context: Any) -> adapter_pb2.MergeAdaptersResponse:
        self.script.calls.append(request)
        self.script.check(context)
        return adapter_pb2.MergeAdaptersResponse(adapter=self.adapter(request.name), kept=0.75)

    def ExtractAdapter(self, request: Any, context: Any) -> Iterator[adapter_pb2.ExtractAdapterResponse]:
        self.script.calls.append(request)
        self.script.check(context)
        message = adapter_pb2.ExtractAdapterResponse
        for layer in range(3):
            yield message(progress=message.Progress(layer=layer, total=2))
        if request.name != "cut-off":
            yield message(completed=message.Completed(adapter=self.adapter(request.name), kept=0.5))

    def DiffAdapters(self, request: Any, context: Any) -> adapter_pb2.DiffAdaptersResponse:
        self.script.check(context)
        message = adapter_pb2.DiffAdaptersResponse
        return message(
            a=f"{request.a}@6",
            b=f"{request.b}@6",
            only_a=[f"unet.{n}" for n in range(12)],
            common=2,
            differing=[message.Module(name="unet.x", kind_a="lora", rank_a=4, alpha_a=2, kind_b="full")],
            blocks=[message.Block(block="unet.mid_block", norm_a=1, norm_b=2, norm_difference=3, cosine=-1)],
            whole=message.Block(norm_a=1),
        )

    def ImportAdapter(self, request_iterator: Any, context: Any) -> adapter_pb2.ImportAdapterResponse:
        self.script.imports.append(list(request_iterator))
        return adapter_pb2.ImportAdapterResponse(
            adapter=self.adapter("zoe"), detected_format="kohya", matched_modules=32, report=REPORT
        )

    def ExportAdapter(self, request: Any, context: Any) -> Iterator[adapter_pb2.ExportAdapterResponse]:
        self.script.calls.append(request)
        message = adapter_pb2.ExportAdapterResponse
        data = self.script.export
        metadata = message.Metadata(adapter="otto@6", size_bytes=len(data), sha256=self.script.export_digest)
        yield message(metadata=metadata)
        yield message(chunk=data[:3])
        yield message(chunk=data[3:])


class Server(ServerServiceServicer):
    def __init__(self, script: Script) -> None:
        self.script = script

    def GetServerInfo(self, request: Any, context: Any) -> server_pb2.GetServerInfoResponse:
        return server_pb2.GetServerInfoResponse(
            ready=self.script.ready,
            message="" if self.script.ready else "loading pocket",
            base_model=server_pb2.BaseModel(
                reference="pocket",
                family="sd1",
                native_width=64,
                native_height=64,
                training_methods=["lora", "pivotal"],
                training_precisions=["no"],
            ),
            versions={"torch": "2.13.0"},
            schedulers=["ddim", "euler"],
        )


class _Tokens(grpc.ServerInterceptor):
    """Notes what calls show in `authorization`."""

    def __init__(self, seen: list[str]) -> None:
        self._seen = seen

    def intercept_service(self, continuation: Any, handler_call_details: Any) -> Any:
        metadata = handler_call_details.invocation_metadata
        self._seen += [value for key, value in metadata if key == "authorization"]
        return continuation(handler_call_details)


class ScriptedServer:
    """One script, one port, as many lives as a test wants; `tokens` is what calls showed."""

    def __init__(self, script: Script) -> None:
        self.script = script
        self.tokens: list[str] = []
        self.port = 0
        self._server: grpc.Server | None = None

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def start(self) -> None:
        self.script.stopping.clear()
        server = grpc.server(ThreadPoolExecutor(8), interceptors=(_Tokens(self.tokens),))
        add_GenerationServiceServicer_to_server(Generation(self.script), server)
        add_TrainingServiceServicer_to_server(Trainings(self.script), server)
        add_AdapterServiceServicer_to_server(Adapters(self.script), server)
        add_ServerServiceServicer_to_server(Server(self.script), server)
        self.port = server.add_insecure_port(self.address)
        server.start()
        self._server = server

    def stop(self) -> None:
        """At once, as if killed: streams are cut."""
        if self._server is not None:
            stopped = self._server.stop(None)
            self.script.stopping.set()
            stopped.wait(10)
            self._server = None

    def restart_when_paused(self) -> threading.Thread:
        """Waits until a stream pauses, kills the server under it and starts it again on the same port."""

        def run() -> None:
            assert self.script.paused.wait(20)
            self.stop()
            self.start()

        thread = threading.Thread(target=run)
        thread.start()
        return thread
