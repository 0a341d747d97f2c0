"""ASGI middleware that protects all paths of our vLLM servers with a key, including those that update weights.

vLLM itself only protects `/v1`. The server loads the middleware by its command line.
"""

import hmac
import json
import os
from collections.abc import Awaitable, Callable
from typing import Any

KEY = "VLLM_API_KEY"
"""Environment variable with the server's key."""
HEALTH_PATH = "/health"
"""The only path that needs no key: the health check."""


class RequireKey:
    """Answers requests without the key with 401."""

    def __init__(self, app: Callable[..., Awaitable[None]]) -> None:
        self._app = app
        self._wanted = f"Bearer {os.environ[KEY]}".encode()

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        """Pass a request on if it has the key or needs none."""
        given = dict(scope.get("headers", ())).get(b"authorization", b"")
        known = hmac.compare_digest(given, self._wanted)
        if scope["type"] not in ("http", "websocket") or scope["path"] == HEALTH_PATH or known:
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            body = json.dumps({"error": "Unauthorized"}).encode()
            headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
            await send({"type": "http.response.start", "status": 401, "headers": headers})
            await send({"type": "http.response.body", "body": body})
