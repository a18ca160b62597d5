"""Edits: good, broken, mended; through a registry that watches real files."""

import asyncio
from pathlib import Path

from .conftest import MakeRegistry, Write

GOOD = "from agents import Agent\nbot = Agent(name='Bot', instructions={text!r})\n"
WAIT_S = 10


async def until(registry, version):  # type: ignore[no-untyped-def]
    return await asyncio.wait_for(registry.wait_version(version), WAIT_S)


async def test_an_edit_is_served_a_broken_one_keeps_the_last_good_and_a_mended_one_clears(
    make: MakeRegistry, write: Write
) -> None:
    file = write("agents.py", GOOD.format(text="one"))
    write("other.py", "from agents import Agent\nother = Agent(name='Other')")
    registry = make("agents.py,other.py", reload=True)
    first = await registry.load()
    await registry.start()
    other = first.agent("other")

    file.write_text(GOOD.format(text="two"))
    second = await until(registry, 2)
    assert second.agent("bot").instructions == "two"
    assert first.agent("bot").instructions == "one", "a run keeps the catalog it started with"

    file.write_text("from agents import Agent\nbot = Agent(name=\n")
    third = await until(registry, 3)
    assert third.agent("bot") is second.agent("bot")
    (error,) = third.errors
    assert (error.source, error.serving_last_good) == ("agents.py", True) and error.line

    file.write_text(GOOD.format(text="four"))
    fourth = await until(registry, 4)
    assert fourth.agent("bot").instructions == "four" and fourth.errors == ()
    assert fourth.agent("other").name == other.name


async def test_only_what_changed_is_loaded_again(make: MakeRegistry, write: Write) -> None:
    file = write("left/a.py", GOOD.format(text="one"))
    write("right/b.py", "from agents import Agent\nb = Agent(name='B')")
    registry = make("left/a.py,right/b.py")
    first = await registry.load()
    file.write_text(GOOD.format(text="two"))
    second = await registry.reload([file])
    assert second.agent("bot").instructions == "two"
    assert second.agent("b") is first.agent("b")


async def test_an_edit_of_a_helper_reloads_what_imports_it(
    make: MakeRegistry, write: Write
) -> None:
    write("agents.py", "from agents import Agent\nfrom parts.names import N\na = Agent(name=N)")
    helper = write("parts/names.py", "N = 'First'")
    registry = make(reload=True)
    await registry.load()
    await registry.start()
    # The same size within the same second: what a byte-code file could not tell apart.
    helper.write_text("N = 'Other'")
    assert list((await until(registry, 2)).agents) == ["other"]
    helper.write_text("N = ")
    broken = await until(registry, 3)
    assert list(broken.agents) == ["other"]
    assert broken.errors[0].serving_last_good and "names.py, line 1" in broken.errors[0].message
    helper.write_text("N = 'Again'")
    mended = await until(registry, 4)
    assert (list(mended.agents), mended.errors) == (["again"], ())


async def test_a_file_that_appears_is_served_and_one_that_goes_is_not(
    make: MakeRegistry, write: Write, tmp_path: Path
) -> None:
    registry = make(reload=True)
    assert dict((await registry.load()).agents) == {}
    await registry.start()
    file = write("agents.py", GOOD.format(text="one"))
    assert list((await until(registry, 2)).agents) == ["bot"]
    file.unlink()
    assert list((await until(registry, 3)).agents) == []


async def test_a_new_file_in_a_served_folder_is_found_through_an_atomic_save(
    make: MakeRegistry, write: Write, tmp_path: Path
) -> None:
    write("team/a.py", "from agents import Agent\na = Agent(name='A')")
    registry = make("team", reload=True)
    await registry.load()
    await registry.start()
    write("b.tmp", "from agents import Agent\nb = Agent(name='B')").rename(tmp_path / "team/b.py")
    assert set((await until(registry, 2)).agents) == {"a", "b"}


async def test_a_helper_that_was_missing_mends_its_importer_when_it_comes(
    make: MakeRegistry, write: Write
) -> None:
    write("agents.py", "from agents import Agent\nimport late_one\na = Agent(name=late_one.N)")
    registry = make(reload=True)
    assert len((await registry.load()).errors) == 1
    await registry.start()
    write("late_one.py", "N = 'Here'")
    catalog = await until(registry, 2)
    assert (list(catalog.agents), catalog.errors) == (["here"], ())


async def test_an_edit_between_load_and_start_is_not_missed(
    make: MakeRegistry, write: Write
) -> None:
    file = write("agents.py", GOOD.format(text="one"))
    registry = make(reload=True)
    await registry.load()
    file.write_text(GOOD.format(text="before the watch"))
    await registry.start()
    assert (await until(registry, 2)).agent("bot").instructions == "before the watch"


async def test_a_broken_file_keeps_its_agents_beside_fresh_ones_of_the_file_it_imports_from(
    make: MakeRegistry, write: Write
) -> None:
    base = write("team/base.py", GOOD.format(text="one"))
    user = write(
        "team/user.py", "from agents import Agent\nfrom base import bot\nu = Agent(name='U')"
    )
    registry = make("team")
    await registry.load()
    base.write_text(GOOD.format(text="two"))
    user.write_text("def (")
    catalog = await registry.reload([base, user])
    assert catalog.agent("bot").instructions == "two"
    assert "u" in catalog.agents
    assert [error.source for error in catalog.errors] == ["team/user.py"]


async def test_without_reload_nothing_is_watched(make: MakeRegistry, write: Write) -> None:
    write("agents.py", GOOD.format(text="one"))
    registry = make()
    await registry.load()
    before = len(asyncio.all_tasks())
    await registry.start()
    assert len(asyncio.all_tasks()) == before


async def test_those_who_ask_are_told_of_each_catalog(make: MakeRegistry, write: Write) -> None:
    write("agents.py", GOOD.format(text="one"))
    registry = make()
    seen: list[int] = []
    registry.on_change(lambda catalog: seen.append(catalog.version))
    await registry.load()
    await registry.reload()
    assert seen == [1, 2] and registry.snapshot.version == 2
