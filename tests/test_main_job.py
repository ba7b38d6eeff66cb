"""The main job, end to end: real model, real Valkey, real sockets, scripted upstream."""

from __future__ import annotations

import pytest

from tests.conftest import World

pytestmark = pytest.mark.live


async def test_ask_ask_again_ask_in_other_words(world: World) -> None:
    """The second asking costs upstream nothing, nor does the third in other words."""
    first = await world.ask("What is the capital of France?")
    again = await world.ask("What is the capital of France?")
    reworded = await world.ask("What's the capital city of France?")

    assert world.kinds == ["miss", "hit", "hit"]
    assert (again.tier, reworded.tier) == ("exact", "semantic")
    assert first.text == again.text == reworded.text
    assert world.upstream.calls == 1
