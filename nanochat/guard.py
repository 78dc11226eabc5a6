"""What stands between the network and the app: bounds on bodies, security headers, the names the server answers to, and
the key. ASGI middleware (https://asgi.readthedocs.io), which sees every response as it is sent."""

import asyncio
import hmac
import json
import time

from starlette.exceptions import HTTPException

MAX_BODY_BYTES = 1 << 20  # 32,000 characters take at most 384 KB as JSON, all of them escaped
BODY_SECONDS = 30  # for a request to arrive
OPEN_PATHS = ("/", "/health")
LOCAL_NAMES = ("127.0.0.1", "localhost", "::1")
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; "
        "trusted-types 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-cache",
}


def error_body(message: str, status: int, param: str | None = None, code: str | None = None) -> dict:
    """An error as OpenAI's clients read it."""
    kind = "server_error" if status >= 500 else "rate_limit_error" if status == 429 else "invalid_request_error"
    message = message.encode("utf-8", "replace").decode()  # it may quote half a character pair
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


async def refuse(send, status: int, message: str, code: str | None = None, headers=()) -> None:
    body = json.dumps(error_body(message, status, code=code)).encode()
    lines = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode()), *headers]
    await send({"type": "http.response.start", "status": status, "headers": lines})
    await send({"type": "http.response.body", "body": body})


def header(scope, name: bytes) -> str:
    return next((value for key, value in scope["headers"] if key == name), b"").decode("latin-1")


def host_name(address: str) -> str:
    """Of a Host header, without the port."""
    name, colon, port = address.rpartition(":")
    if not colon or not port.isdecimal():
        name = address
    return name.removeprefix("[").removesuffix("]").lower() if name.startswith("[") else name.lower()


class Guard:
    """Around the whole app. names: the hosts that a browser may call the server by; None: any.

    A page of another site can point its own name at this machine and ask as if it were from here (DNS rebinding); it
    then still calls the server by that name.
    """

    def __init__(self, app, names: tuple[str, ...] | None = None):
        self.app, self.names = app, names
        self.headers = [(name.lower().encode(), value.encode()) for name, value in HEADERS.items()]

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        received, complete, started = 0, False, False
        deadline = time.monotonic() + BODY_SECONDS

        async def bounded_receive():
            nonlocal received, complete
            try:
                message = await (receive() if complete else asyncio.wait_for(receive(), deadline - time.monotonic()))
            except asyncio.TimeoutError as error:
                raise HTTPException(408, f"the request did not arrive within {BODY_SECONDS} seconds") from error
            received += len(message.get("body", b""))
            complete = not message.get("more_body", False)
            if received > MAX_BODY_BYTES:
                raise HTTPException(413, f"the request is longer than {MAX_BODY_BYTES} bytes")
            return message

        async def guarded_send(message):
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                message = {**message, "headers": [*message.get("headers", []), *self.headers]}
            await send(message)

        if self.names is not None and host_name(header(scope, b"host")) not in self.names:
            message = f"this server answers to {', '.join(self.names)}; chat_web --host lets other names in"
            return await refuse(guarded_send, 403, message)
        try:
            await self.app(scope, bounded_receive, guarded_send)
        except Exception:
            if not started:
                await refuse(guarded_send, 500, "the server made a mistake; its terminal shows which")
            raise  # uvicorn logs it


class KeyCheck:
    """Lets nobody ask without the key. The page and /health need none, nor does a browser's preflight, which CORS
    answers before."""

    def __init__(self, app, key: str):
        self.app, self.key = app, key.encode()

    async def __call__(self, scope, receive, send):
        if scope["type"] == "http" and not (scope["path"] in OPEN_PATHS or scope["path"].startswith("/ui/")):
            scheme, _, given = header(scope, b"authorization").partition(" ")
            right = hmac.compare_digest(given.strip().encode("latin-1"), self.key)
            if scheme.lower() != "bearer" or not right:
                message = "this server wants its API key: Authorization: Bearer KEY"
                return await refuse(send, 401, message, "invalid_api_key", [(b"www-authenticate", b"Bearer")])
        await self.app(scope, receive, send)
