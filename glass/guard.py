"""Who may talk to the server: the Host and Origin of a request, its key, and its size.

A web page elsewhere can make a browser send requests to 127.0.0.1. It cannot forge Origin; and with
a name that it first lets point at itself and then at 127.0.0.1 (DNS rebinding), Host is that name.
"""

import asyncio
import contextlib
import hmac
import json
from urllib.parse import urlsplit

MAX_BODY = 8 << 20  # bytes of a request
MAX_DRAINED = 1 << 30  # bytes of a body too large that are read before the answer
LOOPBACK = ("127.0.0.1", "localhost", "::1")
OPEN_PATHS = ("/", "/health")  # need no key: they tell nothing, and a browser cannot send one


class ApiError(Exception):
    """An error as OpenAI's API answers it. code: a word for programs; param: the field at fault."""

    def __init__(self, status, message, code=None, param=None):
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param

    def document(self):
        """The answer's JSON."""
        kinds = {401: "authentication_error", 429: "rate_limit_error", 503: "server_error"}
        kind = kinds.get(self.status, "invalid_request_error")
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": error}


def hostname_of(host):
    """The name in a Host header, without port and brackets, or None if it is none."""
    try:
        return urlsplit(f"//{host}").hostname
    except ValueError:
        return None


class Guard:
    """ASGI middleware that lets through what may talk to the server, with its body read whole.

    hosts: names that Host may have. key: what Authorization must bear; None: nothing.
    """

    def __init__(self, app, hosts, key=None):
        self.app, self.hosts, self.key = app, set(hosts), key

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            return
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        try:
            self.check(scope["path"], headers)
            body = await read_body(headers, receive)
        except ApiError as error:
            await answer(error, send)
            return
        except TimeoutError:
            await answer(ApiError(400, "the body did not arrive within 60 s: send it again"), send)
            return
        if body is not None:
            await until_gone(self.app, scope, body, receive, send)

    def check(self, path, headers):
        """ApiError for a request that may not talk to the server."""
        host, origin = headers.get(b"host", ""), headers.get(b"origin")
        if hostname_of(host) not in self.hosts:
            raise ApiError(403, "this Host is not served: start serve.py with --allow_host=NAME")
        if origin is not None and urlsplit_or_none(origin) != host:
            raise ApiError(403, "a page of another Origin may not use this server")
        is_open = path in OPEN_PATHS or path.startswith("/lesson/")
        if self.key is None or is_open:
            return
        given = headers.get(b"authorization", "").removeprefix("Bearer ")
        if not hmac.compare_digest(given.encode("latin-1"), self.key.encode()):
            raise ApiError(
                401,
                "the key is missing or wrong: send Authorization: Bearer KEY",
                "invalid_api_key",
            )


def urlsplit_or_none(origin):
    """The host and port of an Origin header, or None if it is no address."""
    try:
        return urlsplit(origin).netloc
    except ValueError:
        return None


async def read_body(headers, receive):
    """The body of a request, or None if the client has gone. ApiError if it is too large.

    A body too large is read to its end, but not kept, so that the client is there for the answer.
    """
    parts, size = [], 0
    async with asyncio.timeout(60):
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            part = message.get("body", b"")
            size += len(part)
            if size > MAX_BODY:
                parts.clear()
            else:
                parts.append(part)
            if not message.get("more_body") or size > MAX_DRAINED:
                break
    if size > MAX_BODY:
        raise ApiError(413, f"the body has more than {MAX_BODY} bytes: send less at once")
    return b"".join(parts)


async def until_gone(app, scope, body, receive, send):
    """Let the app answer a request; if the client goes away before, the app is cancelled."""
    is_given = False

    async def give_body():
        nonlocal is_given
        if is_given:
            await asyncio.Event().wait()  # nothing more comes, and leaving cancels the app
        is_given = True
        return {"type": "http.request", "body": body, "more_body": False}

    async def wait_until_gone():
        while (await receive())["type"] != "http.disconnect":
            pass

    answering = asyncio.create_task(app(scope, give_body, send))
    gone = asyncio.create_task(wait_until_gone())
    try:
        await asyncio.wait({answering, gone}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        gone.cancel()
        answering.cancel()  # does nothing where it is done
    with contextlib.suppress(asyncio.CancelledError):
        await answering


async def answer(error, send):
    """Send an ApiError as the whole answer."""
    body = json.dumps(error.document()).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
