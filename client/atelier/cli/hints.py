"""Friendly words before the work: does the prompt call the adapter's subject up?"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from atelier.client import Client

# Words that no subject is called up by.
_SMALL = frozenset(["a", "an", "the", "of", "in", "on", "at", "by", "to", "with", "and", "or"])


def rare_words(trigger: str) -> list[str]:
    """The words of a trigger that call the subject up.

    By convention that is a token that means nothing else, written without a vowel or with a digit (sks, zwx,
    v1ct0r); where there is none, any of the trigger's words but the small ones.
    """
    words = [word for word in _words(trigger) if word not in _SMALL]
    made_up = [word for word in words if not re.search("[aeiouy]", word) or re.search("[0-9]", word)]
    return made_up or words


def lacks_trigger(prompt: str, trigger: str) -> bool:
    """Whether the prompt has none of the trigger's rare words. An adapter without a trigger needs none."""
    rare = rare_words(trigger)
    return bool(rare) and not set(rare) & set(_words(prompt))


def missing_triggers(client: Client, prompt: str, references: Sequence[str]) -> Iterator[str]:
    """A sentence for every adapter whose trigger the prompt lacks.

    NotFoundError for an adapter that does not exist; a reference that cannot be read is left to Generate to
    refuse.
    """
    for reference in references:
        adapter = reference.partition(":")[0]
        if re.fullmatch(r"[a-z0-9-]+(@[a-z0-9-]+)?", adapter):
            trigger = client.get_adapter(adapter).trigger
            if lacks_trigger(prompt, trigger):
                yield f"hint: {adapter} was trained with the words {trigger!r}; the prompt has none of " + (
                    f"{', '.join(map(repr, rare_words(trigger)))}"
                )


def _words(text: str) -> list[str]:
    return re.findall(r"[^\W_]+", text.lower())
