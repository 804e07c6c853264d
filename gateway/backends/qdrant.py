"""Whether Qdrant answers: one question, asked again and again over one client."""

import asyncio
from importlib import import_module
from typing import Any


class QdrantCheck:
    """Ask Qdrant for its collections; that it answers is all that counts.

    The client is loaded at the first call, in a thread, for that takes a second and more.

    Args:
        url: of its HTTP interface, ``http://qdrant:6333``.
        timeout: seconds for an answer.
    """

    def __init__(self, url: str, *, timeout: float = 0.5) -> None:
        self.url = url
        self.timeout = timeout
        self._client: Any = None

    async def __call__(self) -> bool:
        """True where Qdrant answered in time; whatever its client raises otherwise.

        Raises:
            ImportError: the extra ``qdrant`` is not installed.
            TimeoutError: it did not answer in time.
        """
        if self._client is None:
            library = await asyncio.to_thread(import_module, "qdrant_client")
            # Asking for the server's version is a request of its own, and may print a warning.
            self._client = library.AsyncQdrantClient(url=self.url, check_compatibility=False)
        async with asyncio.timeout(self.timeout):
            await self._client.get_collections()
        return True

    async def aclose(self) -> None:
        """Let go of the connection; a later call makes a new one."""
        client, self._client = self._client, None
        if client is not None:
            await client.close()
