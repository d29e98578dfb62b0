"""What the page asks of the server beside OpenAI's API: traces, runs, sources, and a file of answers.

The page itself is glass/page.html, one file of HTML, CSS and JavaScript.
"""

import asyncio
import functools
import inspect
import math
import re
import secrets
from collections import Counter
from pathlib import Path

import numpy as np
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse
from starlette.routing import Route

import model
from glass import generate, looking, matches, records, sources, trace
from glass.guard import ApiError
from glass.library import describe_runs
from glass.openai_json import Fields, check_text, wrong
from glass.settings import HOME

HTML = Path(__file__).resolve().parent / "page.html"
FAQ_SCORE = 0.6  # similarity from which the page shows the file's answer
FAQ_LOGPROB = -1.5  # below this mean log-probability the model counts as unsure
FAQ_UNSURE_SCORE = 0.2  # similarity from which the page shows the file's answer then
SOURCES_OF = {  # of a view: the functions that make its numbers
    "talk": [generate.stream, generate.sample],
    "tokens": [looking.merged_words],
    "surprise": [trace.surprise],
    "next": [trace.likeliest, generate.sample],
    "attention": [model.attention_weights, trace.Trace.attention],
    "lens": [trace.lens],
    "pushes": [trace.pushes, trace.direction, trace.switched_off],
    "badges": [trace.head_badges],
    "training": [model.GPT.forward],
    "compare": [trace.surprise],
    "matches": [matches.longest_matches, matches.sort_suffixes],
}


class Faq:
    """Questions with answers from a file, found again by TF-IDF over words.

    A row has question and answer, or instruction and output, as data for finetune.py has; of a
    conversation, the first question and its answer count.
    """

    def __init__(self, path):
        self.rows = []
        for where, row in sources.read_table(path):
            if "instruction" in row:
                sources.check_keys(where, row, ("instruction", "output"))
                row = {"question": row["instruction"], "answer": row["output"]}
            elif "messages" in row:
                records.check_messages(where, row["messages"])
                asked, said = [message["content"] for message in row["messages"]][:2]
                row = {"question": asked, "answer": said}
            sources.check_keys(where, row, ("question", "answer"))
            self.rows.append(row)
        if not self.rows:
            raise ValueError(f"faq={path} holds no question: add rows with question and answer")
        counts = [Counter(self.words(row["question"])) for row in self.rows]
        n_rows_with = Counter(word for words in counts for word in words)
        n_rows = len(self.rows)
        self.weight = {w: math.log((1 + n_rows) / (1 + n)) + 1 for w, n in n_rows_with.items()}
        found = {word: ([], []) for word in n_rows_with}
        for row, words in enumerate(counts):
            for word, value in self.vector(words).items():
                found[word][0].append(row)
                found[word][1].append(value)
        self.places = {  # of each word: the rows that hold it, and its value in them
            word: (np.array(rows, np.int32), np.array(values, np.float32))
            for word, (rows, values) in found.items()
        }

    @property
    def nbytes(self):
        """The bytes of the table."""
        return sum(rows.nbytes + values.nbytes for rows, values in self.places.values())

    @staticmethod
    def words(text):
        return re.findall(r"\w+", text.lower())

    def vector(self, counts):
        """The words with their weights, scaled to length 1, a dict."""
        values = {word: n * self.weight.get(word, 0.0) for word, n in counts.items()}
        length = math.sqrt(sum(value * value for value in values.values())) or 1.0
        return {word: value / length for word, value in values.items()}

    def find(self, question):
        """(score, row): the row whose question is most like this one, by cosine, 0 to 1."""
        scores = np.zeros(len(self.rows), np.float32)
        for word, value in self.vector(Counter(self.words(question))).items():
            if word in self.places:
                rows, values = self.places[word]
                scores[rows] += np.float32(value) * values
        best = int(scores.argmax())
        return float(scores[best]), self.rows[best]


class Page:
    """The routes of the page, on a Server of serve.py."""

    def __init__(self, server, faq_path):
        self.server, self.faq = server, Faq(faq_path) if faq_path else None

    def routes(self):
        return [
            Route("/", self.page),
            Route("/info", self.info),
            Route("/runs", self.runs),
            Route("/source/{view}", self.source),
            Route("/lesson/{number:int}", self.lesson),
            Route("/trace", self.trace, methods=["POST"]),
            Route("/faq", self.answer, methods=["POST"]),
        ]

    async def page(self, request):
        """The page, with a policy that lets it run and load nothing but its own."""
        nonce = secrets.token_urlsafe(16)
        text = HTML.read_text(encoding="utf-8").replace("{{nonce}}", nonce)
        own = f"'self' 'nonce-{nonce}'"
        policy = f"default-src 'self'; script-src {own}; style-src {own}; img-src 'self' data:"
        policy += "; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
        return HTMLResponse(text, headers={"Content-Security-Policy": policy})

    async def info(self, request):
        """What the page must know of a model: its shape, and whether it chats or classifies."""
        name = request.query_params.get("model", self.server.library.first[0])
        if name is None:
            nothing = {"model": None, "faq": self.faq is not None, "sources": []}
            return JSONResponse(nothing)
        async with self.server.using(name) as [served]:
            loaded, config = served.loaded, served.loaded.model.config
            task = loaded.state["task"] if loaded.state else {}
            shape = "n_layer n_head n_kv_head vocab_size block_size"
            answer = {name: getattr(config, name) for name in shape.split()}
            answer |= {
                "model": served.name,
                "parameters": loaded.model.parameter_count(),
                "chat": None if config.n_classes else loaded.chat_template,
                "answers_exactly": loaded.answers_exactly,
                "labels": task.get("labels") if config.n_classes else None,
                "faq": self.faq is not None,
                "sources": list(SOURCES_OF),
            }
            return JSONResponse(answer)

    async def runs(self, request):
        described = await asyncio.to_thread(describe_runs, self.server.library.root)
        return JSONResponse({"runs": described})

    async def source(self, request):
        """The lines of the functions that make the numbers of a view."""
        view = request.path_params["view"]
        if view not in SOURCES_OF:
            raise ApiError(404, f"view={view[:40]} must be one of {' '.join(SOURCES_OF)}")
        found = []
        for function in SOURCES_OF[view]:
            function = inspect.unwrap(function)
            lines, first = inspect.getsourcelines(function)
            name = Path(inspect.getsourcefile(function)).name
            where = f"{name}, lines {first} to {first + len(lines) - 1}"
            found.append({"where": where, "lines": "".join(lines)})
        return JSONResponse({"sources": found})

    async def lesson(self, request):
        """A lesson as text: the Python file of this number in lessons/."""
        number = request.path_params["number"]
        found = sorted((HOME / "lessons").glob(f"{number:02}_*.py"))
        if not found:
            raise ApiError(404, f"lesson={number} is not in lessons/: see lessons/README.md")
        return PlainTextResponse(found[0].read_text(encoding="utf-8"))

    async def trace(self, request):
        """What glass/looking.py gives for the request, on the models that it names."""
        fields = Fields(await request.body())
        names = [fields.take("model", str)]
        if (other := fields.take("other", str)) is not None:
            names.append(other)
        async with self.server.using(*names) as models:
            loaded = [served.loaded for served in models]
            try:
                work = functools.partial(looking.respond, loaded[0], fields.document, *loaded[1:])
                return JSONResponse(await self.server.on_model_thread(work))
            except ValueError as error:
                raise ApiError(400, str(error)) from None

    async def answer(self, request):
        """The file's answer to the question that is most like the one asked, with its score."""
        if self.faq is None:
            raise ApiError(404, "this server has no file of answers: start it with --faq=FILE")
        fields = Fields(await request.body())
        question = fields.take("question", str)
        fields.end()
        if not question:
            raise wrong("question", question, "a text")
        check_text("question", question)
        score, row = await asyncio.to_thread(self.faq.find, question)
        thresholds = {"threshold": FAQ_SCORE, "logprob_threshold": FAQ_LOGPROB}
        thresholds["unsure_threshold"] = FAQ_UNSURE_SCORE
        found = {"question": row["question"], "answer": row["answer"], "score": score}
        return JSONResponse(found | thresholds)
