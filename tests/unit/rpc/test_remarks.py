"""What is said of pictures and captions: twins, small ones, captions without the token, masks."""

from __future__ import annotations

from dataclasses import replace

import pytest

from atelier_server.core import Recipe
from atelier_server.errors import InvalidRequest
from atelier_server.rpc.remarks import Received, check_pictures, remarks

RECIPE = Recipe("a <otto> plush", 64)
TOKENS = replace(RECIPE, method="pivotal", placeholder_tokens=("<otto>",))
GOOD = Received("good.png", "", 64, 80, transparent=False)


def reasons(recipe: Recipe, *pictures: Received) -> dict[str, str]:
    return {warned.reason: warned.message for warned in remarks(recipe, pictures)}


def test_nothing_is_said_of_good_pictures() -> None:
    assert reasons(RECIPE, GOOD) == {}
    assert reasons(TOKENS, GOOD, replace(GOOD, caption="<otto> at sea")) == {}


def test_twins_and_small_ones_are_named() -> None:
    found = reasons(RECIPE, GOOD, replace(GOOD, filename="b.png", twin="good.png"), replace(GOOD, width=40))
    assert "'b.png' as 'good.png'" in found["DUPLICATE_IMAGES"]
    assert "resolution 64" in found["SMALL_IMAGES"]
    assert "(40 x 80)" in found["SMALL_IMAGES"]


def test_captions_without_the_token_are_named_where_a_token_is_learned() -> None:
    without = replace(GOOD, filename="c.png", caption="a plush at sea")
    assert reasons(RECIPE, GOOD, without) == {}
    assert reasons(TOKENS, GOOD, without) == {
        "CAPTION_WITHOUT_TOKEN": "captions without <otto> teach no token: 'c.png'"
    }


def test_many_are_counted() -> None:
    (message,) = reasons(RECIPE, *[replace(GOOD, width=8, filename=f"{i}.png") for i in range(23)]).values()
    assert message.endswith("and 3 more")
    assert "20.png" not in message


def test_a_mask_that_is_none_is_told() -> None:
    masked = replace(RECIPE, masked_loss=True)
    assert "NO_MASK" in reasons(masked, GOOD)
    assert reasons(masked, GOOD, replace(GOOD, transparent=True)) == {}


@pytest.mark.parametrize(("rate", "told"), [(1.0, False), (0.5, False), (1e-4, True)])
def test_prodigy_is_warned_of_a_rate_far_from_one(rate: float, told: bool) -> None:
    recipe = Recipe("x", 64, optimizer="prodigy", learning_rate=rate)
    assert ("UNUSUAL_LEARNING_RATE" in reasons(recipe, GOOD)) is told


def test_a_token_in_no_caption_is_refused() -> None:
    check_pictures(TOKENS, [GOOD])
    with pytest.raises(InvalidRequest) as caught:
        check_pictures(replace(TOKENS, placeholder_tokens=("<otto>", "<bolt>", "<zoe>")), [GOOD])
    assert [v.field for v in caught.value.violations] == [f"recipe.placeholder_tokens[{i}]" for i in (1, 2)]


def test_output_preservation_needs_the_instance_prompt_in_every_caption() -> None:
    recipe = replace(RECIPE, output_preservation_weight=1.0, class_prompt="a plush")
    check_pictures(recipe, [GOOD, replace(GOOD, caption="a <otto> plush at sea")])
    with pytest.raises(InvalidRequest) as caught:
        check_pictures(recipe, [GOOD, replace(GOOD, caption="otto")])
    assert [v.field for v in caught.value.violations] == ["images[1].caption"]


def test_of_a_single_picture_nothing_can_be_held_out() -> None:
    split = replace(RECIPE, validation_split=0.5)
    check_pictures(split, [GOOD, replace(GOOD, caption="x")])
    with pytest.raises(InvalidRequest, match="single picture"):
        check_pictures(split, [GOOD, replace(GOOD, twin="good.png")])
