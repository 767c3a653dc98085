"""Which requests of the engine are being answered; the end of a server waits for them."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fusedkv_jax.serving import AsyncEngine


class Running:
    """Names of the engine's requests that are being answered.

    Attributes:
        open: whether more are taken.
    """

    def __init__(self, engine: AsyncEngine):
        self.open = True
        self._engine = engine
        self._names: set[str] = set()
        self._none = asyncio.Event()
        self._none.set()

    def __len__(self) -> int:
        return len(self._names)

    def enter(self, name: str) -> None:
        """One more."""
        self._names.add(name)
        self._none.clear()

    def leave(self, name: str) -> None:
        """One less."""
        self._names.discard(name)
        if not self._names:
            self._none.set()

    async def drain(self, seconds: float, grace: float = 5.0) -> None:
        """Take no more, wait for those that are here, then end them with `abort`.

        Args:
            seconds: to wait.
            grace: seconds in which the aborted ones' clients are told.
        """
        self.open = False
        if not await self._ended(seconds):
            for name in tuple(self._names):
                self._engine.abort(name)
            await self._ended(grace)

    async def _ended(self, seconds: float) -> bool:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._none.wait()
        return self._none.is_set()
