"""Requests, records and bytes: what both transports share."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st

import atelier
from atelier import codec, errors, fields, transfer, wire
from atelier.v1 import adapter_pb2, generation_pb2, server_pb2, training_pb2

Response = generation_pb2.GenerateResponse


# ---------------------------------------------------------------------------------------------- requests
def test_the_tables_have_every_field_of_the_contract() -> None:
    request = set(generation_pb2.GenerateRequest.DESCRIPTOR.fields_by_name)
    assert set(fields.GenerateFields.__annotations__) == request - {"prompt", "adapters", "request_id"}
    recipe = set(training_pb2.TrainingRecipe.DESCRIPTOR.fields_by_name)
    assert set(fields.RecipeFields.__annotations__) == recipe - {"name", "instance_prompt", "num_images"}


def test_unknown_keywords_are_named_with_their_nearest() -> None:
    with pytest.raises(TypeError, match=r"generate\(\).*'steps_inference'|did you mean"):
        codec.generate_request("x", (), None, {"inference_steps": 3})
    with pytest.raises(TypeError, match="did you mean 'learning_rate'"):
        train_start(learningrate=1)
    with pytest.raises(TypeError, match="known: negative_prompt"):
        codec.generate_request("x", (), None, {"qqqqqq": 3})


@pytest.mark.parametrize(
    ("values", "error", "text"),
    [
        ({"width": "wide"}, TypeError, "width='wide'"),
        ({"num_images": 2**40}, ValueError, "num_images=1099511627776: is not between"),
        ({"seed": -1}, ValueError, "seed=-1: is not between 0 and 18446744073709551615"),
        ({"image_format": "gif"}, ValueError, "'gif' is none of png, jpeg, webp"),
    ],
)
def test_values_that_do_not_fit_are_named(
    values: dict[str, object], error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        codec.generate_request("x", (), None, values)


def test_pictures_come_from_paths_bytes_and_what_was_painted(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(b"file")
    painted = atelier.Image(0, "image/png", b"painted", 7)
    for image, expected in ((path, b"file"), (str(path), b"file"), (b"raw", b"raw"), (painted, b"painted")):
        assert codec.generate_request("x", (), None, {"image": image}).image == expected
    with pytest.raises(ValueError, match=r"mask_image=.*nothing\.png.*No such file"):
        codec.generate_request("x", (), None, {"mask_image": tmp_path / "nothing.png"})


def test_what_is_none_is_not_sent_and_zero_is() -> None:
    request = codec.generate_request("x", (), "id", {"width": None, "guidance_scale": 0.0, "seed": 0})
    assert not request.HasField("width")
    assert request.HasField("guidance_scale")
    assert request.HasField("seed")
    assert request.request_id == "id"


def test_enums_are_words() -> None:
    request = codec.generate_request("x", (), None, {"reproducibility": "strict", "image_format": "webp"})
    assert request.reproducibility == generation_pb2.REPRODUCIBILITY_STRICT
    assert request.image_format == generation_pb2.IMAGE_FORMAT_WEBP
    assert codec.export_request("otto", "peft").format == adapter_pb2.ADAPTER_FORMAT_PEFT


def test_one_validation_prompt_may_be_a_plain_string() -> None:
    assert list(train_start(validation_prompts="a cat").recipe.validation_prompts) == ["a cat"]


def train_start(**values: object) -> training_pb2.TrainRequest.Start:
    named = {"name": "n", "instance_prompt": "p", **values}
    return codec.train_start(1, source=None, request_id=None, cancel_on_disconnect=True, values=named)


# ----------------------------------------------------------------------------------------------- records
def test_every_record_has_the_fields_of_its_message() -> None:
    more = {"data", "path", "seq", "training", "create_time"}
    for record, message in wire.MESSAGES.items():
        names = set(record.__dataclass_fields__)
        assert names - set(message.DESCRIPTOR.fields_by_name) <= more, record


@given(
    seed=st.integers(0, 2**64 - 1),
    weights=st.lists(st.floats(allow_nan=False), max_size=3),
    versions=st.dictionaries(st.text(max_size=5), st.text(max_size=5), max_size=3),
    seconds=st.integers(0, 2**33),
)
def test_records_go_there_and_back(
    seed: int, weights: list[float], versions: dict[str, str], seconds: int
) -> None:
    receipt = generation_pb2.Receipt(
        adapters=[generation_pb2.Receipt.Adapter(name="otto", weight=weight) for weight in weights],
        versions=versions,
        reproducibility=generation_pb2.REPRODUCIBILITY_STRICT,
        seed=seed,
    )
    receipt.create_time.FromSeconds(seconds)
    message = Response.Completed(seed=seed, receipt=receipt)
    completed = wire.decode(atelier.Completed, message)
    assert completed.receipt.reproducibility == "strict"
    assert completed.receipt.create_time == datetime.fromtimestamp(seconds, UTC)
    again = wire.encode(completed)
    message.timings.SetInParent()
    assert again == message
    assert wire.decode(atelier.Completed, again) == completed


def test_a_training_goes_there_and_back_with_its_recipe() -> None:
    recipe = training_pb2.TrainingRecipe(
        name="otto", rank=0, validation_prompts=["a", "b"], learning_rate=1e-3
    )
    message = training_pb2.Training(id="otto-k3f9", state=training_pb2.TRAINING_STATE_FAILED, recipe=recipe)
    record = wire.decode(atelier.Training, message)
    assert record.recipe["rank"] == 0
    assert record.end_time is None
    assert wire.encode(record) == message


def test_an_enum_value_from_the_future_is_unspecified() -> None:
    record = wire.decode(atelier.Training, training_pb2.Training(state=99))  # type: ignore[arg-type]
    assert record.state is atelier.TrainingState.UNSPECIFIED


def test_an_adapter_that_was_trained_here_has_no_report_of_an_import() -> None:
    trained = adapter_pb2.Adapter(name="otto", version=1)
    assert wire.decode(atelier.Adapter, trained).report is None
    trained.report.format = "kohya"
    report = wire.decode(atelier.Adapter, trained).report
    assert report is not None
    assert report.format == "kohya"


def test_server_info_of_an_empty_answer_is_whole() -> None:
    info = wire.decode(atelier.ServerInfo, server_pb2.GetServerInfoResponse())
    assert not info.ready
    assert info.limits.max_width == 0
    assert info.slots.adapters == ()


# ------------------------------------------------------------------------------------------------- bytes
@given(
    files=st.lists(st.binary(min_size=1, max_size=300), min_size=1, max_size=4), length=st.integers(1, 300)
)
def test_pictures_are_put_together_from_any_pieces(files: list[bytes], length: int) -> None:
    assembler = transfer.ImageAssembler()
    for index, data in enumerate(files):
        whole = None
        for offset in range(0, len(data), length):
            assert whole is None
            part = data[offset : offset + length]
            last = offset + length >= len(data)
            whole = assembler.add(
                Response.Image(index=index, data=part, offset=offset, size=len(data), last=last, seed=index)
            )
        assert whole is not None
        assert (whole.index, whole.data) == (index, data)


@given(data=st.binary(min_size=3, max_size=50), drop=st.integers(0, 2))
def test_a_missing_piece_is_noticed(data: bytes, drop: int) -> None:
    assembler = transfer.ImageAssembler()
    third = len(data) // 3
    bounds = [(0, third), (third, 2 * third), (2 * third, len(data))]
    kept = [bound for number, bound in enumerate(bounds) if number != drop]
    pieces = [
        Response.Image(data=data[begin:end], offset=begin, size=len(data), last=end == len(data))
        for begin, end in kept
    ]
    with pytest.raises(atelier.DataLossError):
        list(map(assembler.add, [*pieces, Response.Image(index=1, data=b"x", size=1, last=True)]))


def test_a_picture_that_claims_another_size_is_refused() -> None:
    with pytest.raises(atelier.DataLossError, match="3 bytes instead of 4"):
        transfer.ImageAssembler().add(Response.Image(data=b"abc", size=4, last=True))


@given(st.binary(max_size=64))
def test_chunks_put_together_are_the_data(data: bytes) -> None:
    assert b"".join(transfer.chunks(data)) == data


def test_a_folder_is_read_by_name_with_captions(folder: Path) -> None:
    images = transfer.read_folder(folder)
    assert [(image.filename, image.caption) for image in images] == [
        ("a.PNG", ""),
        ("b.png", "a sks octopus"),
    ]


def test_folders_without_pictures_are_told(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no pictures \(\.png"):
        transfer.read_folder(tmp_path)
    with pytest.raises(NotADirectoryError, match="is not a folder"):
        transfer.read_folder(tmp_path / "none")
    with pytest.raises(TypeError, match="either images or folder"):
        codec.training_images(None, None)


# ------------------------------------------------------------------------------------------------ errors
def test_every_status_code_has_its_exception() -> None:
    assert {code.name for code in grpc.StatusCode} - {code.name for code in errors.BY_CODE} == {
        "OK",
        "UNKNOWN",
        "OUT_OF_RANGE",
    }
    for code, kind in errors.BY_CODE.items():
        assert kind("x").code is code


def test_the_tree_is_the_one_in_the_docstring() -> None:
    drawn = [line.split()[1] for line in (errors.__doc__ or "").splitlines() if line.startswith("+-- ")]
    assert drawn == [
        kind.__name__ for kind in errors.AtelierError.__subclasses__() if kind in errors.BY_CODE.values()
    ]


def test_garbage_instead_of_details_leaves_the_code_and_the_message() -> None:
    metadata = grpc.aio.Metadata(("grpc-status-details-bin", b"\xff\xff\xff"))
    error = grpc.aio.AioRpcError(grpc.StatusCode.NOT_FOUND, grpc.aio.Metadata(), metadata, "no otto")
    made = errors.from_rpc(error)
    assert isinstance(made, atelier.NotFoundError)
    assert (made.message, made.reason) == ("no otto", "")
    assert errors.from_rpc(grpc.RpcError("odd")).code is grpc.StatusCode.UNKNOWN


# ------------------------------------------------------------------------------------------------ jupyter
def test_jupyter_shows_pictures(make_picture: Callable[..., bytes], tmp_path: Path) -> None:
    image = atelier.Image(0, "image/png", make_picture(), 7)
    assert image._repr_png_() == image.data
    assert image._repr_mimebundle_(include=None, exclude=None)["image/png"].startswith("iVBOR")
    assert atelier.Image(0, "image/jpeg", b"x", 7)._repr_png_() is None
    assert image.save(tmp_path / "x.png").read_bytes() == image.data
    assert "data" not in repr(image)
    receipt = wire.decode(atelier.Receipt, generation_pb2.Receipt(prompt='a "b"'))
    page = atelier.GenerationResult((image,), 7, atelier.Timings(), 2, receipt)._repr_html_()
    assert 'src="data:image/png;base64,iVBOR' in page
    assert "a &quot;b&quot;" in page


# ------------------------------------------------------------------------------------------------- import
def test_importing_the_package_is_fast_and_light() -> None:
    program = (
        "import sys, time; begun = time.process_time(); import atelier; "
        "print(time.process_time() - begun); "
        "print(sorted({'torch', 'PIL', 'rich', 'typer', 'atelier_server'} & set(sys.modules)))"
    )
    runs = [_run(program) for _ in range(3)]
    assert {heavy for _, heavy in runs} == {"[]"}
    assert min(float(seconds) for seconds, _ in runs) < 0.5


def _run(program: str) -> list[str]:
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def test_everything_public_exists() -> None:
    assert all(hasattr(atelier, name) for name in atelier.__all__)
    assert list(atelier.__all__) == sorted(atelier.__all__)
