"""Recipe files: the same as flags and keywords, and every mistake in them told at once."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner, Result

import atelier
from atelier import codec, recipe
from atelier.cli import cli
from atelier.v1 import training_pb2

ROOT = Path(__file__).parents[3]


def _value(kind: Any) -> st.SearchStrategy[Any]:
    if get_origin(kind) is Literal:
        return st.sampled_from(get_args(kind))
    plain: dict[Any, st.SearchStrategy[Any]] = {
        bool: st.booleans(),
        int: st.integers(0, 2**31 - 1),
        float: st.floats(allow_nan=False),
        str: st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12),
    }
    return plain[kind] if kind in plain else st.lists(plain[str], min_size=1, max_size=3)


recipes = st.fixed_dictionaries({}, optional={name: _value(kind) for name, kind in recipe.KINDS.items()})


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(recipes)
@example({"instance_prompt": '\x7f"\\\u2028 \x00', "learning_rate": 1e-05, "lr_power": float("inf")})
def test_a_file_gives_back_what_was_written(tmp_path: Path, values: dict[str, Any]) -> None:
    file = tmp_path / "otto.toml"
    file.write_text(recipe.dump(values), encoding="utf-8", newline="")
    assert recipe.load(file) == values


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(recipes)
def test_flags_to_a_file_to_flags(tmp_path: Path, values: dict[str, Any]) -> None:
    printed = CliRunner().invoke(cli, ["train", *_flags(values), "--print-recipe"])
    assert printed.exit_code == 0, printed.output
    file = tmp_path / "otto.toml"
    file.write_bytes(printed.stdout_bytes)
    assert recipe.load(file) == values
    again = CliRunner().invoke(cli, ["train", "--recipe", str(file), "--print-recipe"])
    assert again.stdout_bytes == printed.stdout_bytes
    told = CliRunner().invoke(cli, ["train", *_flags(values), "--print-recipe", "--json"])
    assert json.loads(told.stdout) == values


def _flags(values: dict[str, Any]) -> list[str]:
    words: list[str] = []
    for name, value in values.items():
        flag = f"--{name.replace('_', '-')}"
        if isinstance(value, bool):
            words.append(flag if value else f"--no-{flag[2:]}")
        else:
            words += [f"{flag}={item}" for item in (value if isinstance(value, list) else [value])]
    return words


@pytest.fixture
def run(server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    monkeypatch.setenv("ATELIER_SERVER", server.address)
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: CliRunner().invoke(cli, [str(argument) for argument in arguments])


def test_a_recipe_is_sent_and_flags_go_first(
    run: Callable[..., Result], server: Any, tmp_path: Path, folder: Path
) -> None:
    text = '[recipe]\nname = "otto"\ninstance-prompt = "a sks"\nrank = 4\nvalidation_prompts = ["a", "b"]\n'
    (tmp_path / "otto.toml").write_text(text)
    done = run("train", folder, "--recipe", "otto.toml", "--rank", 16, "--use-ema", "--priority", "high")
    assert done.exit_code == 0, done.output
    sent = server.script.uploads[-1][0].start.recipe
    assert (sent.name, sent.instance_prompt, sent.rank, sent.use_ema) == ("otto", "a sks", 16, True)
    assert (list(sent.validation_prompts), sent.priority) == (["a", "b"], 3)


def test_the_sdk_takes_a_file_or_a_mapping(server: Any, folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "otto.toml"
    file.write_text('name = "otto"\ninstance_prompt = "a sks"\nrank = 4\n')
    with atelier.Client(server.address) as client:
        list(client.train(folder=folder, recipe=file, rank=2))
        list(client.train("bolt", folder=folder, recipe={"instance_prompt": "x", "learning_rate": 1}))
        with pytest.raises(TypeError, match="instance_prompt"):
            list(client.train("bolt", folder=folder))
    first, second = [upload[0].start.recipe for upload in server.script.uploads[-2:]]
    assert (first.name, first.rank) == ("otto", 2)
    assert (second.name, second.learning_rate) == ("bolt", 1.0)


async def test_the_async_sdk_takes_a_recipe_too(server: Any, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "otto.toml").write_text('name = "otto"\ninstance_prompt = "a sks"\nrank = 4\n')
    async with atelier.AsyncClient(server.address) as client:
        async for _ in client.train(folder=folder, recipe=tmp_path / "otto.toml", use_ema=True):
            pass
        assert (await client.pause_training("otto")).state is atelier.TrainingState.PAUSED
    sent = server.script.uploads[-1][0].start.recipe
    assert (sent.name, sent.rank, sent.use_ema) == ("otto", 4, True)


def test_everything_wrong_with_a_file_is_told_with_its_line(
    run: Callable[..., Result], tmp_path: Path
) -> None:
    (tmp_path / "bad.toml").write_text(
        'name = "otto"\nlearningrate = 1e-4\n\nrank = "eight"\n'
        'use_ema = 1\nvalidation_prompts = [1]\nmethod = "lore"\nmax_train_steps = true\nqqqqq = 1\n'
    )
    done = run("train", ".", "--recipe", "bad.toml")
    assert done.exit_code == 2
    assert done.stderr.splitlines() == [
        "error: bad.toml, line 2: there is no field 'learningrate'; did you mean learning_rate?",
        "error: bad.toml, line 4: rank = 'eight' is not a whole number",
        "error: bad.toml, line 5: use_ema = 1 is not true or false",
        "error: bad.toml, line 6: validation_prompts = [1] is not a list of strings",
        "error: bad.toml, line 7: method = 'lore' is not one of lora, dreambooth, textual_inversion, pivotal",
        "error: bad.toml, line 8: max_train_steps = True is not a whole number",
        "error: bad.toml, line 9: there is no field 'qqqqq'",
    ]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("rank = ", "not TOML"),
        ("rank = 1\n[recipe]\nrank = 2\n", "rank stands both above and in [recipe]"),
        ("recipe = 3\n", "no field 'recipe'"),
        ("[other]\nrank = 2\n", "line 1: there is no field 'other'"),
    ],
)
def test_files_that_are_no_recipes(run: Callable[..., Result], tmp_path: Path, text: str, told: str) -> None:
    (tmp_path / "bad.toml").write_text(text)
    done = run("train", ".", "--recipe", "bad.toml")
    assert done.exit_code == 2
    assert told in done.stderr


def test_what_is_missing_is_told(run: Callable[..., Result], tmp_path: Path) -> None:
    assert "DIR" in run("train", "--name", "otto").stderr
    assert "--instance-prompt" in run("train", ".", "--name", "otto").stderr
    assert run("train", ".", "--recipe", "nowhere.toml").exit_code == 1


def test_a_trainings_recipe_can_be_used_again(run: Callable[..., Result], tmp_path: Path) -> None:
    done = run("trainings", "show", "otto", "--toml")
    assert done.exit_code == 0, done.output
    (tmp_path / "again.toml").write_text(done.stdout)
    assert recipe.load(tmp_path / "again.toml") == {"name": "otto", "rank": 8, "validation_prompts": ["p"]}


def test_a_training_can_be_paused(run: Callable[..., Result]) -> None:
    done = run("trainings", "pause", "otto", "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["state"] == "TRAINING_STATE_PAUSED"


@pytest.mark.parametrize("file", sorted((ROOT / "examples" / "recipes").glob("*.toml")), ids=lambda p: p.name)
def test_the_examples_are_recipes(file: Path) -> None:
    start = codec.train_start(1, source=file, request_id=None, cancel_on_disconnect=False, values={})
    assert isinstance(start.recipe, training_pb2.TrainingRecipe)
