"""Blobs in a bucket of S3, or of anything that speaks like it; with the extra ``s3``.

Leans on ``obstore``, which signs, repeats what failed in passing and finds credentials by AWS's own
variables (``AWS_ACCESS_KEY_ID``, ``AWS_SECRET_ACCESS_KEY``, ``AWS_REGION``, ``AWS_ENDPOINT_URL``, or the
machine's role). Refuses to make the bucket.
"""

import os
from collections.abc import AsyncIterator, Awaitable
from datetime import timedelta
from typing import Final, TypeVar

import obstore
from obstore.exceptions import BaseError
from obstore.store import S3Store

from agent_server.domain.base import utcnow
from agent_server.domain.errors import DatabaseUnavailable, StorageFull
from agent_server.storage.blobs import KEY, folder_of, missing

T = TypeVar("T")
RETRIES: Final = 3
_FULL: Final = ("StorageFull", "QuotaExceeded", "InsufficientStorage", "507")


class S3Blobs:
    """See ``blobs.BlobStore``: objects ``prefix/tenant/ab/key``."""

    def __init__(self, bucket: str, prefix: str, timeout_s: float) -> None:
        """``timeout_s`` bounds each request, and each call with what is repeated of it."""
        self.name = f"the bucket s3://{bucket}/{prefix}".rstrip("/")
        timeout = timedelta(seconds=timeout_s)
        plain = os.environ.get("AWS_ENDPOINT_URL", "").startswith("http://")
        self._store = S3Store(
            bucket,
            prefix=prefix or None,
            client_options={"timeout": timeout, "allow_http": plain},
            retry_config={"max_retries": RETRIES, "retry_timeout": timeout},
        )

    async def put(self, tenant: str, key: str, data: bytes) -> None:
        await self._told(obstore.put_async(self._store, _path(tenant, key), data))

    async def get(self, tenant: str, key: str) -> bytes:
        try:
            found = await self._told(obstore.get_async(self._store, _path(tenant, key)))
            return bytes(await self._told(found.bytes_async()))
        except FileNotFoundError:
            raise missing(key) from None

    async def exists(self, tenant: str, key: str) -> bool:
        try:
            await self._told(obstore.head_async(self._store, _path(tenant, key)))
        except FileNotFoundError:
            return False
        return True

    async def delete(self, tenant: str, key: str) -> None:
        await self.discard(_path(tenant, key))

    async def old(self, age: timedelta) -> AsyncIterator[str]:
        before = utcnow() - age
        listed = aiter(obstore.list(self._store))
        while some := await self._told(anext(listed, None)):
            for one in some:
                # Its clock counts whole seconds, and is another one than ours.
                if one["last_modified"] <= before and KEY.fullmatch(one["path"].rpartition("/")[2]):
                    yield one["path"]

    async def discard(self, path: str) -> None:
        try:
            await self._told(obstore.delete_async(self._store, path))
        except FileNotFoundError:
            pass

    async def _told(self, call: Awaitable[T]) -> T:
        try:
            return await call
        except (BaseError, FileNotFoundError) as error:
            if isinstance(error, FileNotFoundError) and "NoSuchBucket" not in str(error):
                raise
            said = str(error).partition("\n")[0][:300]
            if any(word in str(error) for word in _FULL):
                raise StorageFull(f"There is no room left in {self.name}: {said}") from error
            raise DatabaseUnavailable(
                f"{self.name[0].upper()}{self.name[1:]} cannot be used: {said}",
                hint="Check AGENT_SERVER_BLOBS, that the bucket is there, and the AWS_… variables.",
            ) from error


def _path(tenant: str, key: str) -> str:
    if KEY.fullmatch(key) is None:
        raise ValueError(f"{key!r} is not the key of a blob")
    return f"{folder_of(tenant)}/{key[:2]}/{key}"
