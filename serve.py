"""A model behind OpenAI's API on this machine: `python serve.py`, then any program that speaks it.

The newest run under out/ answers where nothing else is named; a request's "model" may name any run,
RUN@STEP, or a folder of --models. Read downwards: settings, the models, the server with its
routes, start and end.

glass/guard.py decides who may talk to the server. glass/openai_json.py reads requests,
glass/answers.py turns them into texts to grow and these into answers. glass/library.py knows the
models. glass/engine.py is the thread that owns them, and glass/batch.py makes the tokens.
"""

import asyncio
import contextlib
import json
import socket
import sys
import time
import traceback
from dataclasses import dataclass, field, replace
from pathlib import Path

from bpe import END_OF_TEXT, PAD
from glass.answers import MAX_TEXTS, Chat, Completion, known_or_422
from glass.batch import Failed, Made
from glass.checkpoint import saved_steps
from glass.device import choose_device
from glass.engine import Engine
from glass.generate import speed_up
from glass.guard import LOOPBACK, ApiError, Guard
from glass.library import Library, first_source
from glass.loading import ModelSettings, check_classifies, classify, load_model
from glass.openai_json import Fields, check_ids, check_text, wrong
from glass.settings import configure, errors_in_one_line
from model import require

with errors_in_one_line():
    try:
        import uvicorn
        from starlette.applications import Starlette
        from starlette.exceptions import HTTPException
        from starlette.responses import JSONResponse, StreamingResponse
        from starlette.routing import Route

        from glass.page import Page
    except ImportError as error:
        raise ImportError(
            f"serve.py needs the packages starlette and uvicorn ({error}): "
            "pip install starlette uvicorn"
        ) from error

GRACE = 5.0  # seconds that running answers have when the server stops
STOPPING = "the server stops: ask again later"


@dataclass
class Settings(ModelSettings):
    """Which model answers first, and who may ask."""

    # server
    host: str = "127.0.0.1"  # address to listen at; another than this machine's needs api_key
    port: int = 8000  # 0: any free one
    api_key: str | None = None  # what clients must send as their key
    allow_host: list[str] = field(default_factory=list)  # names of this server behind a proxy
    models: list[str] = field(default_factory=list)  # folders of further models
    faq: str | None = None  # a .jsonl or .csv of question and answer, for the page
    max_rows: int = 16  # texts that grow together, at most
    max_queue: int = 256  # texts that grow or wait, at most; beyond, status 429

    def __post_init__(self):
        require(self, "port", lambda value: 0 <= value < 2**16, "lie in [0, 65535]")
        require(self, "max_rows", lambda value: 1 <= value <= 1024, "lie in [1, 1024]")
        require(self, "max_queue", lambda value: value >= 1, "be at least 1")
        if self.api_key is not None and not self.api_key.strip():
            raise ValueError("api_key='' would let everybody in: give a key, or leave it out")
        if self.host not in LOOPBACK and not self.api_key:
            raise ValueError(
                f"host={self.host} lets other machines in and api_key={self.api_key}: "
                "give --api_key=KEY, or leave --host out"
            )
        for folder in self.models:
            if not Path(folder).is_dir():
                raise ValueError(f"models={folder} is no folder: give folders of runs or weights")
            if not (saved_steps(folder) or list(Path(folder).glob("*.safetensors"))):
                raise ValueError(
                    f"models={folder} holds neither checkpoints nor *.safetensors: "
                    "give folders of runs or weights"
                )


# The models.


def make_loader(settings, first):
    """A function that loads a Source as the settings say.

    An adapter is merged into the first model only. Only that one is compiled, since torch keeps
    compiled code by function, and two models share theirs.
    """

    def load(source):
        is_first = first and (source.folder, source.which) == (first.folder, first.which)
        place = dict(init_from="resume", out_dir=source.folder, which=source.which)
        if not source.is_run:
            place = dict(init_from=source.folder, out_dir=None)
        adapter = settings.adapter if is_first else None
        loaded = load_model(replace(settings, **place, adapter=adapter))
        compile = settings.compile and source == first
        loaded.compiled_decode = speed_up(loaded.model, settings.quantize, compile)
        return loaded

    return load


# The server.


class Heard:
    """What the engine says of some rows, on the event loop's thread."""

    def __init__(self, rows):
        self.events, self.running = asyncio.Queue(), set(rows)

    async def all(self):
        """Yields (row, event) until all rows have ended."""
        while self.running:
            row, event = await self.events.get()
            if isinstance(event, Failed) or (isinstance(event, Made) and event.finish):
                self.running.discard(row)
            yield row, event


class Stream(StreamingResponse):
    """A streamed answer that holds on to its model and rows until it ends, however it does."""

    def __init__(self, content, held):
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(content, media_type="text/event-stream", headers=headers)
        self.held = held  # an AsyncExitStack

    async def __call__(self, scope, receive, send):
        async with self.held:
            await super().__call__(scope, receive, send)


class Server:
    """The routes and what they share: the models, the engine, and how many texts grow."""

    def __init__(self, settings):
        self.settings = s = settings
        self.loop, self.n_rows, self.is_stopping = None, 0, False
        self.page = Page(self, s.faq)
        name, source = first_source(s)
        load = make_loader(s, source)
        loaded = load(source) if source else None
        device = loaded.model.device if loaded else choose_device(s.device)
        self.engine, first = Engine(self.deliver, log), (name, source)
        self.library = Library(load, self.engine, first, s.models, s.max_rows, loaded, device)

    def deliver(self, events):
        """Hand (row, event) pairs to whom they concern; called on the engine's thread."""

        def put():
            for row, event in events:
                row.listener.events.put_nowait((row, event))

        if events:
            with contextlib.suppress(RuntimeError):  # the event loop has ended
                self.loop.call_soon_threadsafe(put)

    @contextlib.contextmanager
    def growing(self, served, rows):
        """Let rows grow -> Heard. What has not ended with the context leaves before a step."""
        if len(rows) > self.settings.max_queue:
            raise ApiError(
                400,
                f"{len(rows)} texts are more than max_queue={self.settings.max_queue}: ask for fewer",
            )
        if self.n_rows + len(rows) > self.settings.max_queue:
            raise ApiError(
                429,
                f"{self.n_rows} texts grow or wait, {len(rows)} more are over "
                f"max_queue={self.settings.max_queue}: ask again later",
                "queue_full",
            )
        heard = Heard(rows)
        for row in rows:
            row.listener = heard
        self.n_rows += len(rows)
        try:
            self.engine.submit(served.batch, rows)
            yield heard
        finally:
            self.n_rows -= len(rows)
            for row in heard.running:
                row.cancelled = True

    @contextlib.asynccontextmanager
    async def using(self, *names):
        """The Served models of some names; None is the first one. Raises ApiError."""
        if self.is_stopping:
            raise ApiError(503, STOPPING)
        names = [self.library.first[0] if name is None else name for name in names]
        if None in names:
            raise ApiError(404, "there is no model: train one, and name it", "model_not_found")
        async with contextlib.AsyncExitStack() as stack:
            try:
                models = await stack.enter_async_context(self.library.use(*names))
            except KeyError as error:
                raise unknown_model(error.args[0]) from None
            except (ValueError, OSError) as error:
                raise ApiError(503, f"the model cannot be loaded: {error}") from None
            yield models

    # OpenAI's routes.

    async def list_models(self, request):
        sources = await asyncio.to_thread(self.library.sources)
        cards = [self.card(name, source) for name, source in sources.items()]
        return JSONResponse({"object": "list", "data": cards})

    async def show_model(self, request):
        name, sources = request.path_params["name"], await asyncio.to_thread(self.library.sources)
        if name not in sources:
            raise unknown_model(name)
        return JSONResponse(self.card(name, sources[name]))

    def card(self, name, source):
        """A model as /v1/models lists it."""
        is_loaded = self.library.find(source) is not None
        card = {"id": name, "object": "model", "created": int(source.changed_at)}
        return card | {"owned_by": "glassgpt", "loaded": is_loaded}

    async def completions(self, request):
        return await self.generate(request, Completion)

    async def chat_completions(self, request):
        return await self.generate(request, Chat)

    async def generate(self, request, kind):
        """Answer with text: kind is Completion or Chat."""
        fields = Fields(await request.body())
        async with contextlib.AsyncExitStack() as held:
            name = fields.take("model", str, self.library.first[0])
            [served] = await held.enter_async_context(self.using(name))
            answer = await asyncio.to_thread(kind, fields, served, name)
            rows = [choice.row for choice in answer.choices]
            heard = held.enter_context(self.growing(served, rows))
            if answer.streams:
                return Stream(server_sent_events(answer, heard), held.pop_all())
            async for row, event in heard.all():
                answer.choices[row.index].hear(event)
            return JSONResponse(answer.document())

    async def classify(self, request):
        """The classes of a text or of texts: label, and the probability of each label."""
        fields = Fields(await request.body())
        async with self.using(fields.take("model", str)) as [served]:
            texts = fields.left.pop("input", None)
            texts = [texts] if isinstance(texts, str) else texts
            is_list = isinstance(texts, list) and 0 < len(texts) <= MAX_TEXTS
            if not is_list or not all(isinstance(text, str) and text.strip() for text in texts):
                raise wrong("input", texts, f"a text, or 1 to {MAX_TEXTS} texts, none empty")
            fields.end()
            answers = [await self.classify_text(served, text) for text in texts]
            data = [answer | {"index": i} for i, answer in enumerate(answers)]
            return JSONResponse({"object": "list", "model": served.name, "data": data})

    async def classify_text(self, served, text):
        """The class of one text, as JSON."""
        check_text("input", text)
        known_or_422(served.loaded.tokenizer, text)
        try:
            check_classifies(served.loaded, f"model={served.name}")
        except ValueError as error:
            raise ApiError(422, str(error), "no_classes", "model") from None
        labels, probs = await self.on_model_thread(lambda: classify(served.loaded, text))
        label = labels[probs.index(max(probs))]
        return {"label": label, "probs": probs, "labels": labels, "num_classes": len(labels)}

    def on_model_thread(self, work):
        """What work() gives, run between two steps."""
        return asyncio.wrap_future(self.engine.call(work))

    # The tokenizer, as lm-evaluation-harness asks for it.

    async def tokenizer_info(self, request):
        async with self.using(request.query_params.get("model")) as [served]:
            tokenizer, config = (
                served.loaded.tokenizer,
                getattr(served.loaded.tokenizer, "config", {}),
            )
            bos_id, ends = getattr(tokenizer, "bos_id", None), served.loaded.ends
            eos = END_OF_TEXT if END_OF_TEXT in tokenizer.special_tokens else None
            if eos is None and ends:
                eos = tokenizer.decode(ends[:1])
            info = {
                "tokenizer_class": type(tokenizer).__name__,
                "vocab_size": tokenizer.vocab_size,
                "model_max_length": served.batch.longest,
                "eos_token": eos,
                "bos_token": None if bos_id is None else tokenizer.decode([bos_id]),
                "pad_token": PAD if PAD in tokenizer.special_tokens else None,
                "chat_template": config.get("chat_template"),
            }
            return JSONResponse(info)

    async def tokenize(self, request):
        """The ids of a text, in which the strings of special tokens are these tokens."""
        fields = Fields(await request.body())
        async with self.using(fields.take("model", str)) as [served]:
            tokenizer, text = served.loaded.tokenizer, fields.take("prompt", str)
            adds_special = fields.take("add_special_tokens", bool, True)
            fields.end()
            if text is None:
                raise wrong("prompt", text, "a text")
            ids = await asyncio.to_thread(tokenizer.encode, text, "all")
            bos_id = getattr(tokenizer, "bos_id", None)
            if adds_special and bos_id is not None:
                ids = [bos_id, *ids]
            answer = {"tokens": ids, "count": len(ids), "max_model_len": served.batch.longest}
            return JSONResponse(answer)

    async def detokenize(self, request):
        fields = Fields(await request.body())
        async with self.using(fields.take("model", str)) as [served]:
            tokenizer, ids = served.loaded.tokenizer, fields.left.pop("tokens", None)
            fields.end()
            if ids != []:
                check_ids("tokens", ids, tokenizer.vocab_size)
            return JSONResponse({"prompt": await asyncio.to_thread(tokenizer.decode, ids)})

    async def health(self, request):
        if self.is_stopping:
            raise ApiError(503, STOPPING)
        served = [each.name for each in self.library.served]
        return JSONResponse({"status": "ok", "loaded": served, "texts": self.n_rows})

    # Start and end.

    def stop(self):
        """Take no more requests; running answers have GRACE seconds to end, waiting ones none."""
        self.is_stopping = True
        self.engine.fail_waiting(STOPPING)
        self.loop.call_later(GRACE, self.engine.fail_all, STOPPING)

    def app(self, hosts):
        """The ASGI app, behind its guard."""
        routes = [
            Route("/v1/models", self.list_models),
            Route("/v1/models/{name:path}", self.show_model),
            Route("/v1/completions", self.completions, methods=["POST"]),
            Route("/v1/chat/completions", self.chat_completions, methods=["POST"]),
            Route("/v1/classify", self.classify, methods=["POST"]),
            Route("/tokenizer_info", self.tokenizer_info),
            Route("/tokenize", self.tokenize, methods=["POST"]),
            Route("/detokenize", self.detokenize, methods=["POST"]),
            Route("/health", self.health),
            *self.page.routes(),
        ]
        handlers = {ApiError: answer_error, HTTPException: answer_error, Exception: answer_error}
        app = Starlette(routes=routes, exception_handlers=handlers)
        app.router.redirect_slashes = False
        return Guard(app, hosts, self.settings.api_key)


def unknown_model(name):
    return ApiError(
        404,
        f"model={name!r:.100} is not here: GET /v1/models lists what is",
        "model_not_found",
        "model",
    )


async def answer_error(request, error):
    """Any error as OpenAI's JSON. One that is our fault is logged by its place alone."""
    if isinstance(error, HTTPException):
        error = ApiError(error.status_code, f"{error.detail}: see README.md for the routes")
    if not isinstance(error, ApiError):
        place = traceback.extract_tb(error.__traceback__)[-1]
        log(f"BUG: {type(error).__name__} at {place.filename}:{place.lineno}")
        error = ApiError(500, "the server has a bug, its log says where", "internal_error")
    headers = {"Retry-After": "1"} if error.status in (429, 503) else None
    return JSONResponse(error.document(), status_code=error.status, headers=headers)


async def server_sent_events(answer, heard):
    """Yields a streamed answer as lines of server-sent events."""
    try:
        for chunk in answer.first_chunks():
            yield event_line(chunk)
        async for row, event in heard.all():
            choice = answer.choices[row.index]
            for chunk in answer.chunks(choice, *choice.hear(event)):
                yield event_line(chunk)
        if answer.includes_usage:
            yield event_line(answer.usage_chunk())
    except ApiError as error:
        yield event_line(error.document())
    yield "data: [DONE]\n\n"


def event_line(document):
    text = json.dumps(document, ensure_ascii=False, separators=(",", ":"))
    return f"data: {text}\n\n"


def log(text):
    """Write a line to stderr, with the time. No line holds a prompt, a text or a key."""
    print(time.strftime("%H:%M:%S"), text, file=sys.stderr, flush=True)


class Process(uvicorn.Server):
    """uvicorn's server, which tells ours at once when it is to stop."""

    def __init__(self, config, server):
        super().__init__(config)
        self.server = server

    async def serve(self, sockets=None):
        self.server.loop = asyncio.get_running_loop()
        await super().serve(sockets)

    def handle_exit(self, sig, frame):
        if not self.server.is_stopping:
            self.server.loop.call_soon_threadsafe(self.server.stop)
        super().handle_exit(sig, frame)


def start(settings):
    """(process, socket) of a server whose model, if any, is loaded; process.run([socket]) serves.

    Raises ValueError if the port is taken.
    """
    s = settings
    family = socket.AF_INET6 if ":" in s.host else socket.AF_INET
    try:
        listening = socket.create_server((s.host, s.port), family=family, backlog=256)
    except OSError as error:
        raise ValueError(
            f"host={s.host} port={s.port} cannot be listened at ({error.strerror}): "
            "choose another --port or --host"
        ) from error
    server = Server(s)
    hosts = {*LOOPBACK, s.host, *s.allow_host}
    config = uvicorn.Config(
        server.app(hosts),
        log_level="warning",
        access_log=False,
        server_header=False,
        lifespan="off",
        ws="none",
        limit_concurrency=512,  # connections; beyond, status 503
        timeout_graceful_shutdown=int(GRACE) + 5,
    )
    return Process(config, server), listening


def main(argv):
    settings = configure(Settings, argv)
    process, listening = start(settings)
    host, port = listening.getsockname()[:2]
    who = f"no run yet, {settings.faq} alone"
    for first in process.server.library.served:
        model = first.loaded.model
        shape = f"{model.parameter_count():,} parameters, {model.dtype} on {model.device}"
        who = f"{first.name} ({shape})".replace("torch.", "")
    print(f"{who} answers at http://{host}:{port}/v1; Ctrl-C ends it", flush=True)
    with contextlib.suppress(KeyboardInterrupt):
        process.run([listening])
    process.server.engine.close()


if __name__ == "__main__":
    with errors_in_one_line():
        main(sys.argv[1:])
