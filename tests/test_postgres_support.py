"""The PostgreSQL that other tests lean on."""

import asyncpg

from tests.support.postgres import PostgresServer


async def test_a_fresh_database_is_empty(postgres_url: str) -> None:
    connection = await asyncpg.connect(postgres_url)
    try:
        tables = await connection.fetchval(
            "SELECT count(*) FROM pg_tables WHERE schemaname = 'public'"
        )
        assert tables == 0
    finally:
        await connection.close()


async def test_two_databases_do_not_see_each_other(
    postgres_server: PostgresServer, postgres_url: str
) -> None:
    other = postgres_server.fresh_database()
    try:
        one, two = await asyncpg.connect(postgres_url), await asyncpg.connect(other)
        try:
            await one.execute("CREATE TABLE here (id int)")
            assert await two.fetchval("SELECT to_regclass('here')") is None
        finally:
            await one.close()
            await two.close()
    finally:
        postgres_server.drop_database(other)
