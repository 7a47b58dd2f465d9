"""Who has the peer's pipeline, and when."""

from __future__ import annotations

import asyncio
from contextlib import AbstractAsyncContextManager

from benchmarks.diffusers_server import Turns


async def test_a_change_waits_for_the_picture_in_hand_alone() -> None:
    turns = Turns()
    order: list[str] = []

    async def have(name: str, turn: AbstractAsyncContextManager[None]) -> None:
        async with turn:
            order.append(name)
            for _ in range(3):
                await asyncio.sleep(0)
            order.append(f"{name} ends")

    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(have("one", turns.picture()))
        tasks.create_task(have("two", turns.picture()))
        await asyncio.sleep(0)
        assert order == ["one"]
        tasks.create_task(have("change", turns.change()))
        tasks.create_task(have("three", turns.picture()))
    assert order == [f"{name}{end}" for name in ("one", "change", "two", "three") for end in ("", " ends")]


async def test_who_goes_away_while_waiting_is_passed_over() -> None:
    turns = Turns()
    order: list[str] = []

    async def have(name: str, turn: AbstractAsyncContextManager[None]) -> None:
        async with turn:
            order.append(name)

    async with turns.picture():
        gone = [asyncio.create_task(have("gone", turn)) for turn in (turns.picture(), turns.change())]
        stays = asyncio.create_task(have("stays", turns.picture()))
        await asyncio.sleep(0)
        for task in gone:
            task.cancel()
        await asyncio.wait(gone)
    await stays
    assert order == ["stays"]
