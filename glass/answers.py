"""Requests for text, as rows of a batch, and their answers as OpenAI's JSON, whole or in chunks.

`Completion` is /v1/completions, `Chat` is /v1/chat/completions.
"""

import secrets
import time
from dataclasses import dataclass, field, replace

from glass.batch import Failed, Row, Scored
from glass.chat import TEMPLATE_STOPS, encode_chat
from glass.generate import TextStream
from glass.guard import ApiError
from glass.loading import check_known, encode_prompt
from glass.openai_json import MAX_TOP, Offsets, chat_logprobs, completion_logprobs, wrong

MAX_TEXTS = 128  # of a request: prompts times n
MAX_CHARACTERS = 200  # of a prompt, for each position that the model has


@dataclass
class Choice:
    """A text of an answer, as far as it is known."""

    row: Row
    prompt: list  # its ids
    text: str = ""
    finish: str | None = None
    entries: list = field(
        default_factory=list
    )  # (id, Likely or None) of prompt, if asked, and text
    offsets: Offsets = field(default_factory=Offsets)  # of the entries in the text

    def hear(self, event):
        """Take in what the engine says -> (new text, new entries). ApiError if the row failed."""
        if isinstance(event, Failed):
            raise ApiError(503, event.reason)
        if isinstance(event, Scored):
            new = list(zip(self.prompt, event.likely, strict=True))
            self.entries += new
            return "", new
        new = [(event.token, event.likely)] if self.row.max_new_tokens else []
        self.entries += new
        self.text, self.finish = self.text + event.text, event.finish
        return event.text, new


class Answer:
    """A request for text from the model `name`, and its answer.

    Raises ApiError for fields that cannot be.
    """

    def __init__(self, fields, served, name):
        self.name, self.tokenizer = name, served.loaded.tokenizer
        self.longest = served.batch.longest
        self.n = fields.take("n", int, 1, 1, MAX_TEXTS)
        self.streams = fields.take("stream", bool, False)
        options = fields.left.pop("stream_options", None) or {}
        self.includes_usage = isinstance(options, dict) and bool(options.get("include_usage"))
        self.drawing, self.stops = fields.take_drawing(), fields.take_stops()
        self.n_top, self.echo, self.prompts = None, False, []  # the two kinds set them
        self.id, self.created = secrets.token_hex(12), int(time.time())
        self.choices = []

    def make_choices(self, max_tokens):
        """Make a Choice for each prompt and each of its n texts.

        The i-th text of a prompt is drawn with seed + i.
        """
        if len(self.prompts) * self.n > MAX_TEXTS:
            raise wrong("n", self.n, f"such that prompts times n is at most {MAX_TEXTS}")
        for ids in self.prompts:
            n_new = self.room_for(ids, max_tokens)
            for i in range(self.n):
                drawing = replace(self.drawing, seed=(self.drawing.seed + i) % 2**63)
                text, index = TextStream(self.tokenizer, self.stops), len(self.choices)
                scores = self.echo and self.n_top is not None
                row = Row(list(ids), n_new, drawing, text, self.n_top, scores, index)
                self.choices.append(Choice(row, ids))

    def room_for(self, ids, max_tokens):
        """How many tokens the text of a prompt may get: max_tokens, or what is left of the block.

        None stands for all that is left.
        """
        room = self.longest - len(ids)
        if room < (max_tokens != 0):
            raise ApiError(
                400,
                f"the prompt has {len(ids)} tokens but a text may have {self.longest}, "
                "one new token included: shorten it",
                "context_length_exceeded",
                "prompt",
            )
        return room if max_tokens is None else min(room, max_tokens)

    def encode(self, text):
        """The ids of a prompt that is a text."""
        if len(text) > MAX_CHARACTERS * self.longest:
            raise ApiError(
                400,
                f"the prompt has {len(text)} characters but a text may have {self.longest} tokens: "
                "shorten it",
                "context_length_exceeded",
                "prompt",
            )
        known_or_422(self.tokenizer, text)
        return encode_prompt(self.tokenizer, text)

    def usage(self):
        """The tokens read and made: an end token counts, and a prompt counts once for all n."""
        n_prompt = sum(map(len, self.prompts))
        n_made = sum(c.row.n_made for c in self.choices if c.row.max_new_tokens)
        total = {"total_tokens": n_prompt + n_made}
        return {"prompt_tokens": n_prompt, "completion_tokens": n_made} | total

    def header(self, kind):
        """The fields that each JSON object of the answer has."""
        return {
            "id": f"{self.prefix}-{self.id}",
            "object": kind,
            "created": self.created,
            "model": self.name,
            "system_fingerprint": None,
        }

    def document(self):
        """The whole answer."""
        choices = [self.whole(choice) for choice in self.choices]
        return self.header(self.kind) | {"choices": choices, "usage": self.usage()}

    def chunk(self, choices):
        """A piece of a streamed answer."""
        document = self.header(self.chunk_kind) | {"choices": choices}
        return document | ({"usage": None} if self.includes_usage else {})

    def usage_chunk(self):
        """The last piece, for those who asked for the usage."""
        return self.header(self.chunk_kind) | {"choices": [], "usage": self.usage()}


class Completion(Answer):
    """The answer of /v1/completions."""

    prefix, kind, chunk_kind = "cmpl", "text_completion", "text_completion"

    def __init__(self, fields, served, name):
        super().__init__(fields, served, name)
        n_ids = min(self.tokenizer.vocab_size, served.loaded.model.config.vocab_size)
        prompts = fields.take_prompts(n_ids)
        self.echo = fields.take("echo", bool, False)
        self.n_top = fields.take("logprobs", int, None, 0, MAX_TOP)
        max_tokens = fields.take("max_tokens", int, 16, 0)
        fields.end()
        self.prompts = [each if isinstance(each, list) else self.encode(each) for each in prompts]
        self.make_choices(max_tokens)

    def first_chunks(self):
        """What a stream begins with: the prompts, where they are to be echoed."""
        if not self.echo:
            return []
        return [
            self.chunk([self.described(c, self.tokenizer.decode(c.prompt), [])])
            for c in self.choices
        ]

    def chunks(self, choice, text, entries):
        """The pieces of a stream for what was heard of a choice."""
        if not (text or choice.finish or (entries and self.n_top is not None)):
            return []
        return [self.chunk([self.described(choice, text, entries)])]

    def whole(self, choice):
        text = self.tokenizer.decode(choice.prompt) if self.echo else ""
        return self.described(choice, text + choice.text, choice.entries)

    def described(self, choice, text, entries):
        logprobs = None
        if self.n_top is not None:
            offsets = choice.offsets
            logprobs = completion_logprobs(self.tokenizer, entries, self.n_top, offsets)
        return {
            "index": choice.row.index,
            "text": text,
            "logprobs": logprobs,
            "finish_reason": choice.finish,
        }


class Chat(Answer):
    """The answer of /v1/chat/completions."""

    prefix, kind, chunk_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(self, fields, served, name):
        super().__init__(fields, served, name)
        messages = fields.take_messages()
        max_tokens = fields.take("max_tokens", int, None, 1)
        max_tokens = fields.take("max_completion_tokens", int, max_tokens, 1)
        n_top = fields.take("top_logprobs", int, None, 0, MAX_TOP)
        if fields.take("logprobs", bool, False):
            self.n_top = n_top or 0
        elif n_top is not None:
            raise wrong("top_logprobs", n_top, "left out, or logprobs be true")
        fields.end()
        template = served.loaded.chat_template
        self.stops = [*self.stops, *TEMPLATE_STOPS.get(template, [])]
        self.prompts = [self.encode_messages(messages, template)]
        self.make_choices(max_tokens)

    def encode_messages(self, messages, template):
        """The ids of a conversation; a model without a template continues its text."""
        text = "".join(message["content"] for message in messages)
        ids = self.encode(text)  # checks the text
        if template is None:
            return ids
        return encode_chat(self.tokenizer, messages, template, reply=True)[0]

    def first_chunks(self):
        """What a stream begins with: who speaks."""
        delta = {"role": "assistant", "content": ""}
        return [self.chunk([self.described(c, {"delta": delta}, [], None)]) for c in self.choices]

    def chunks(self, choice, text, entries):
        """The pieces of a stream for what was heard of a choice."""
        pieces = []
        if text or (entries and self.n_top is not None):
            delta = {"delta": {"content": text}}
            pieces.append(self.chunk([self.described(choice, delta, entries, None)]))
        if choice.finish:
            pieces.append(self.chunk([self.described(choice, {"delta": {}}, [], choice.finish)]))
        return pieces

    def whole(self, choice):
        message = {"role": "assistant", "content": choice.text, "refusal": None}
        return self.described(choice, {"message": message}, choice.entries, choice.finish)

    def described(self, choice, content, entries, finish):
        logprobs = None
        if self.n_top is not None and (entries or "message" in content):
            logprobs = chat_logprobs(self.tokenizer, entries, self.n_top)
        return {
            "index": choice.row.index,
            **content,
            "logprobs": logprobs,
            "finish_reason": finish,
        }


def known_or_422(tokenizer, text):
    """ApiError for a text with characters that the tokenizer does not know."""
    try:
        check_known(tokenizer, text)
    except ValueError as error:
        raise ApiError(422, str(error), "unknown_characters") from None
