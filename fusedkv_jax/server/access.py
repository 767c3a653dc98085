"""Around every route: keys, names of requests, and the size of bodies."""

from __future__ import annotations

import base64
import hashlib
import os
import re
import uuid
from collections.abc import Sequence

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fusedkv_jax.server.errors import ApiError

_OPEN = ("/health", "/ready")  # probes have no keys
_NAME = re.compile(r"[\x21-\x7e]{1,128}")


class Access:
    """ASGI middleware: refuses requests without a key, and names those that have one.

    A key comes as `Authorization: Bearer KEY`, or as the password of basic authentication, which is
    what a browser asks for. Each is a tenant of its own; no tenant shares another one's pages.

    Args:
        app: behind it.
        keys: none lets everybody in.
    """

    def __init__(self, app: ASGIApp, keys: Sequence[str] = ()):
        self._app = app
        self._tenants = {_digest(key): _digest(key)[:16] for key in keys}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        name = given if _NAME.fullmatch(given) else uuid.uuid4().hex

        async def named(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["X-Request-Id"] = name
            await send(message)

        tenant = self._tenant(headers.get("authorization", ""))
        if tenant is None and scope["path"] not in _OPEN:
            error = ApiError(
                401,
                "no valid API key; send the header Authorization: Bearer KEY",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Basic" if scope["path"] == "/" else "Bearer"},
            )
            await error.response()(scope, receive, named)
            return
        scope.setdefault("state", {})["tenant"] = tenant or ""
        await self._app(scope, receive, named)

    def _tenant(self, authorization: str) -> str | None:
        """Whose key it is; None for nobody's."""
        if not self._tenants:
            return ""
        scheme, _, key = authorization.partition(" ")
        if scheme.lower() == "basic":
            try:
                key = base64.b64decode(key, validate=True).decode().partition(":")[2]
            except ValueError:  # no base64, or no ASCII, or no UTF-8 inside
                return None
        elif scheme.lower() != "bearer":
            return None
        # A look-up by digest takes no longer for a key that is nearly right.
        return self._tenants.get(_digest(key.strip()))


def environment_keys() -> list[str]:
    """The key that FUSEDKV_API_KEY holds; none where it is not set.

    Raises:
        ValueError: it is set and empty, and everybody would be let in.
    """
    key = os.environ.get("FUSEDKV_API_KEY")
    if key is None:
        return []
    if not key.strip():
        raise ValueError("FUSEDKV_API_KEY is set and empty; give it a key, or unset it")
    return [key.strip()]  # a secret that was a file first often ends with its newline


async def read_json(request: Request, most: int) -> bytes:
    """The body of a request.

    Raises:
        ApiError: it is not said to be JSON, or has more than `most` bytes.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        # Also keeps pages of other sites from asking: browsers let them send no JSON.
        raise ApiError(415, f"Content-Type is {kind!r}; send application/json")
    body = bytearray()
    async for piece in request.stream():
        body += piece
        if len(body) > most:
            raise ApiError(413, f"the body has more than {most:,} bytes; send less")
    return bytes(body)


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()
