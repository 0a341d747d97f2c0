"""Nothing of a vLLM server of ours is for anybody else: not even its state, by which weights are updated.

vLLM asks for the key before `/v1` alone. This is an ASGI middleware, which the server is told to load.
"""

import hmac
import json
import os
from collections.abc import Awaitable, Callable
from typing import Any

KEY = "VLLM_API_KEY"
"""Environment variable with the key of the server."""
OPEN = "/health"
"""Asked before the server can know anybody."""


class RequireKey:
    """Answers 401 to whoever does not have the key."""

    def __init__(self, app: Callable[..., Awaitable[None]]) -> None:
        self._app = app
        self._wanted = f"Bearer {os.environ[KEY]}".encode()

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        """Pass on what is allowed."""
        given = dict(scope.get("headers", ())).get(b"authorization", b"")
        known = hmac.compare_digest(given, self._wanted)
        if scope["type"] not in ("http", "websocket") or scope["path"] == OPEN or known:
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            body = json.dumps({"error": "Unauthorized"}).encode()
            headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
            await send({"type": "http.response.start", "status": 401, "headers": headers})
            await send({"type": "http.response.body", "body": body})
