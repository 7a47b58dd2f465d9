"""A training's recipe, told by the server as a file, gives the same weights again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from atelier.cli import cli
from tests.process.server import Server

pytestmark = pytest.mark.process

OTTO = Path(__file__).parents[2] / "examples" / "otto"
RECIPE = """\
[recipe]
name = "otto"
instance-prompt = "a sks blue plush octopus"
method = "pivotal"
placeholder_tokens = ["sks"]
max_train_steps = 4
checkpointing_steps = 2
train_batch_size = 2
rank = 2
priority = "high"
"""


def atelier(server: Server, *words: str) -> Result:
    done = CliRunner().invoke(cli, [*words, "--server", server.address])
    assert done.exit_code == 0, done.output
    return done


def checkpoints(result: Result) -> dict[int, str]:
    told = [json.loads(line) for line in result.stdout.splitlines()]
    return {e["checkpoint"]["step"]: e["checkpoint"]["sha256"] for e in told if "checkpoint" in e}


def test_the_recipe_of_a_training_trains_the_same_again(server: Server, tmp_path: Path) -> None:
    (tmp_path / "otto.toml").write_text(RECIPE)
    first = atelier(server, "train", str(OTTO), "--recipe", str(tmp_path / "otto.toml"), "--json")
    told = atelier(server, "trainings", "show", "otto", "--toml").stdout
    assert 'method = "pivotal"' in told
    (tmp_path / "again.toml").write_text(told)
    words = ("train", str(OTTO), "--recipe", str(tmp_path / "again.toml"))
    again = atelier(server, *words, "--name", "otto-again", "--json")
    assert len(checkpoints(first)) == 2
    assert checkpoints(again) == checkpoints(first)
    # As short as it was written or as long as it was told: it is the same.
    assert atelier(server, "trainings", "show", "otto-again", "--toml").stdout == told.replace(
        '"otto"', '"otto-again"'
    )
