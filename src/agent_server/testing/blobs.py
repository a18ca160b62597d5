"""The contract suite of places for blobs: what every ``storage.blobs.BlobStore`` must hold.

Subclass ``BlobStoreContract`` in a test module whose fixture ``store`` gives an empty store.
Leans on pytest with asyncio in ``auto`` mode; refuses to know how the store is built.
"""

import asyncio
from datetime import timedelta

import pytest

from agent_server.domain.errors import NotFound
from agent_server.storage.blobs import BlobStore, check, new_key

TENANTS = ("acme", "..", "a/b", "", "Ünï\ncode", "x" * 300)


async def strays(store: BlobStore, age: timedelta = timedelta(0)) -> list[str]:
    return [path async for path in store.old(age)]


class BlobStoreContract:
    """One test for each promise."""

    async def test_what_was_put_is_read_as_it_was(self, store: BlobStore) -> None:
        for data in (b"", b"\x00\xff" * 10, b"x" * 3_000_000):
            key = new_key(data)
            await store.put("acme", key, data)
            assert await store.get("acme", key) == data
            assert await store.exists("acme", key)

    @pytest.mark.parametrize("tenant", TENANTS)
    async def test_a_tenant_may_be_called_anything(self, store: BlobStore, tenant: str) -> None:
        key = new_key(b"hello")
        await store.put(tenant, key, b"hello")
        assert await store.get(tenant, key) == b"hello"
        await store.delete(tenant, key)
        assert not await store.exists(tenant, key)

    async def test_nobody_else_reads_or_deletes_a_tenants_blob(self, store: BlobStore) -> None:
        key = new_key(b"mine")
        await store.put("acme", key, b"mine")
        with pytest.raises(NotFound):
            await store.get("other", key)
        assert not await store.exists("other", key)
        await store.delete("other", key)
        assert await store.get("acme", key) == b"mine"

    async def test_what_is_not_there_is_said_to_be_missing(self, store: BlobStore) -> None:
        key = new_key(b"never")
        with pytest.raises(NotFound, match=key):
            await store.get("acme", key)
        assert not await store.exists("acme", key)
        await store.delete("acme", key)

    async def test_deleting_one_leaves_another_of_the_same_content(self, store: BlobStore) -> None:
        one, other = new_key(b"same"), new_key(b"same")
        await asyncio.gather(*(store.put("acme", key, b"same") for key in (one, other)))
        await store.delete("acme", one)
        assert not await store.exists("acme", one)
        assert await store.get("acme", other) == b"same"

    async def test_what_no_row_knows_is_found_by_its_age_and_discarded(
        self, store: BlobStore
    ) -> None:
        keys = {new_key(bytes([number])) for number in range(20)}
        for key in keys:
            await store.put("acme", key, b"stray")
        assert await strays(store, timedelta(hours=1)) == []
        found = await strays(store)
        assert {path.rpartition("/")[2] for path in found} == keys
        await store.discard(found[0])
        left = {path.rpartition("/")[2] for path in await strays(store)}
        assert left == keys - {found[0].rpartition("/")[2]}

    async def test_many_at_once_do_not_disturb_each_other(self, store: BlobStore) -> None:
        bodies = [f"{number}".encode() * 1_000 for number in range(50)]
        keys = [new_key(body) for body in bodies]
        await asyncio.gather(*(store.put("acme", k, b) for k, b in zip(keys, bodies, strict=True)))
        assert await asyncio.gather(*(store.get("acme", key) for key in keys)) == bodies

    async def test_a_check_leaves_nothing_behind(self, store: BlobStore) -> None:
        await check(store)
        assert await strays(store) == []
