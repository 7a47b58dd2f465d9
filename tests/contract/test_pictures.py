"""People's pictures over a real channel: twins, small and broken ones, captions; and that they go."""

from __future__ import annotations

from pathlib import Path

from atelier.v1 import training_pb2
from tests.contract.harness import Service, Start, picture, refused

STEPS = {"max_train_steps": 4, "checkpointing_steps": 2}


def messages(pictures: dict[str, tuple[bytes, str]], **recipe: object) -> list[training_pb2.TrainRequest]:
    """By name, data and caption."""
    fields = {
        "name": "otto",
        "instance_prompt": "a sks plush",
        "num_images": len(pictures),
        **STEPS,
        **recipe,
    }
    start = training_pb2.TrainRequest.Start(recipe=training_pb2.TrainingRecipe(**fields))
    chunks = [
        training_pb2.TrainRequest.ImageChunk(
            index=i, filename=name, caption=caption, size_bytes=len(data), data=data
        )
        for i, (name, (data, caption)) in enumerate(pictures.items())
    ]
    return [training_pb2.TrainRequest(start=start), *(training_pb2.TrainRequest(image=c) for c in chunks)]


async def train(
    service: Service, pictures: dict[str, tuple[bytes, str]], **recipe: object
) -> list[training_pb2.TrainingEvent]:
    call = service.trainings.Train(iter(messages(pictures, **recipe)))
    return [response.event async for response in call]


async def test_twins_are_learned_once_and_small_ones_are_told(service: Service, tmp_path: Path) -> None:
    red, large = picture(), picture(size=(64, 80), color="blue")
    events = await train(
        service, {"a.png": (red, ""), "b.png": (large, ""), "c.png": (red, ""), "d.png": (red, "at sea")}
    )
    warned = {e.warning.reason: e.warning.message for e in events if e.WhichOneof("event") == "warning"}
    assert events[0].WhichOneof("event") == "accepted"
    assert [e.seq for e in events] == list(range(1, len(events) + 1))
    assert "'c.png' as 'a.png'" in warned["DUPLICATE_IMAGES"]
    assert "'d.png'" not in warned["DUPLICATE_IMAGES"]
    assert "'a.png' (16 x 12)" in warned["SMALL_IMAGES"]
    assert "b.png" not in warned["SMALL_IMAGES"]
    kept = tmp_path / "data" / "trainings" / events[0].training / "images"
    assert len(list(kept.iterdir())) == 3
    told = await service.trainings.GetTraining(training_pb2.GetTrainingRequest(training="otto"))
    assert told.training.recipe.num_images == 3


async def test_a_repeat_with_twins_is_the_same_training(service: Service) -> None:
    sent = messages({"a.png": (picture(), ""), "b.png": (picture(), "")})
    sent[0].start.request_id = "6f1b8f7e-8c1e-4a2b-9c4d-1f2e3a4b5c6d"
    first = [r.event async for r in service.trainings.Train(iter(sent))]
    again = [r.event async for r in service.trainings.Train(iter(sent))]
    assert first == again


async def test_all_broken_pictures_are_named_and_nothing_is_written(service: Service, tmp_path: Path) -> None:
    good, cut = picture(), picture()[:50]
    refusal = await refused(
        train(
            service, {"a.png": (good, ""), "b.png": (cut, ""), "c.png": (good, ""), "d.png": (b"GIF89a", "")}
        )
    )
    assert set(refusal.violations) == {"images[1]", "images[3]"}
    assert "b.png" in refusal.violations["images[1]"]
    assert not list((tmp_path / "data" / "trainings").glob("*"))
    assert not list((tmp_path / "data" / "uploads").glob("*"))


async def test_captions_without_the_token(service: Service) -> None:
    tokens: dict[str, object] = {"method": "pivotal", "placeholder_tokens": ["<otto>"]}
    pictures = {"a.png": (picture(), "<otto> at sea"), "b.png": (picture(color="blue"), "at sea")}
    events = await train(service, pictures, **tokens)
    warned = {e.warning.reason: e.warning.message for e in events if e.WhichOneof("event") == "warning"}
    assert warned["CAPTION_WITHOUT_TOKEN"].endswith("'b.png'")
    refusal = await refused(train(service, {"a.png": (picture(), "")}, **tokens, name="bolt"))
    assert set(refusal.violations) == {"recipe.placeholder_tokens[0]"}


async def test_pictures_go_after_the_end_and_there_is_no_way_back(start: Start, tmp_path: Path) -> None:
    service = await start(training_retention=0)
    call = service.trainings.Train(iter(messages({"a.png": (picture(), "")}, instance_prompt="hold")))
    async for response in call:
        if response.event.WhichOneof("event") == "checkpoint":
            await service.trainings.CancelTraining(training_pb2.CancelTrainingRequest(training="otto"))
    training = response.event.training
    await service.application._retention.sweep()
    assert not (tmp_path / "data" / "trainings" / training / "images").exists()
    refusal = await refused(
        service.trainings.ResumeTraining(training_pb2.ResumeTrainingRequest(training=training))
    )
    assert refusal.code == "FAILED_PRECONDITION"
    assert "--training-retention" in refusal.message
