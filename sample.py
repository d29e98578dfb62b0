"""Text out of a checkpoint or of published weights: `python sample.py --start "To be"`, or --chat.

The newest run under out/ is taken where none is named. No flag describes the model, since the
checkpoint does. Text appears as it is made.
"""

import contextlib
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch

import bpe
from glass.chat import TEMPLATE_STOPS, Template, encode_chat, fit_chat
from glass.files import write_json
from glass.generate import TextStream, speed_up, stream
from glass.loading import (
    Drawing,
    ModelSettings,
    check_classifies,
    check_known,
    classify,
    encode_prompt,
    load_model,
)
from glass.settings import check_type, errors_in_one_line, parse, read_arguments
from model import require

ROWS = 64  # texts that grow together, at most


@dataclass
class Settings(Drawing, ModelSettings):
    """What to load, what to start from, how to draw the next token; named as in nanoGPT."""

    show_probs: bool = False  # each token with its probability and the runners-up
    show_lens: bool = False  # what would come next after each part of the model, and stop
    show_attention: str | None = None  # draw every head's attention to this .png file, and stop
    temperature: float | None = None  # None: 0.8; 0 in a chat that was tuned on exact answers
    # text
    export: str | None = None  # write model and tokenizer to this folder, or FILE.gguf, and stop
    classify: str | None = None  # a text, or FILE:name, whose class to name
    start: str = "\n"  # the prompt; FILE:prompt.txt reads it from a file
    max_new_tokens: int = 500  # tokens of a text, at most
    num_samples: int = 1  # texts
    stop: list[str] = field(default_factory=list)  # strings that end a text
    draft: Literal["prompt"] | None = None  # guess ahead: faster where the text repeats itself
    chat: bool = False  # a conversation in the terminal; /help lists its commands
    template: Template = "auto"  # of a chat; auto: the one that the model was tuned on
    system: str | None = None  # the system message of a chat

    def __post_init__(self):
        super().__post_init__()
        most = 10**7
        require(self, "max_new_tokens", lambda value: 1 <= value <= most, "lie in [1, 10,000,000]")
        if "" in self.stop:
            raise ValueError("stop='' would end every text at once: give a string, or leave it out")
        require(self, "num_samples", lambda value: 1 <= value <= 10**5, "lie in [1, 100,000]")
        if self.draft and self.num_samples > 1:
            raise ValueError(
                f"draft={self.draft} is for one text, found num_samples={self.num_samples}: "
                "leave one of them out"
            )


def read_prompt(settings, loaded):
    """The ids of the prompt. Raises ValueError if it is missing, too long, or has unknown
    characters.
    """
    text, tokenizer, config = settings.start, loaded.tokenizer, loaded.model.config
    if text.startswith("FILE:"):
        if text == "FILE:":
            raise ValueError("start=FILE: names no file: write --start FILE:prompt.txt")
        text = bpe.read_text(text.removeprefix("FILE:"))
    if settings.start == Settings.start and tokenizer.unknown_characters(text):
        text = ""  # a text without line breaks was learnt: begin with whatever can begin one
    check_known(tokenizer, text, settings.start)
    ids = encode_prompt(tokenizer, text)
    if len(ids) > config.block_size:
        raise ValueError(
            f"the prompt has {len(ids)} tokens but block_size={config.block_size}: shorten --start"
        )
    return ids


def show_token(tokenizer, token, logprobs):
    """Print one line: the token, its probability, and the likeliest others."""

    def entry(i):
        return f"{tokenizer.decode([i])!r} {logprobs[i].exp():.1%}"

    likeliest = logprobs.topk(min(6, len(logprobs))).indices.tolist()
    others = [i for i in likeliest if i != token][:5]
    print(f"{entry(token):20} | {'  '.join(map(entry, others))}")


def drawing(settings, loaded):
    """How to draw, as glass.generate.stream takes it."""
    return settings.filters() | {
        "repetition_penalty": settings.repetition_penalty,
        "stop": loaded.ends,
        "generator": torch.Generator().manual_seed(settings.seed),
        "compiled_decode": loaded.compiled_decode,
        "draft": settings.draft,
    }


def write_samples(settings, loaded):
    """Print num_samples texts, the first as it is made, and how many tokens a second that was."""
    s, ids, block_size = settings, read_prompt(settings, loaded), loaded.model.config.block_size
    if len(ids) + s.max_new_tokens > block_size:
        print(f"(past {block_size} tokens the older half is forgotten)", file=sys.stderr)
    started_at, n_made, options = time.perf_counter(), 0, drawing(s, loaded)
    for first in range(0, s.num_samples, ROWS):
        n_rows = min(ROWS, s.num_samples - first)
        n_made += write_batch(s, loaded, ids, n_rows, options, is_first=first == 0)
    seconds = time.perf_counter() - started_at
    print(f"{n_made} tokens, {n_made / seconds:.0f} a second", file=sys.stderr)


def write_batch(settings, loaded, ids, n_rows, options, is_first):
    """Print n_rows texts that begin with ids -> the number of tokens made.

    They grow together. Of the first batch, the first text is printed as it is made.
    """
    s, model, tokenizer, n_made = settings, loaded.model, loaded.tokenizer, 0
    idx = torch.tensor([ids] * n_rows, device=model.device)  # (n_rows, T)
    streams = [TextStream(tokenizer, s.stop) for _ in range(n_rows)]
    texts = [tokenizer.decode(ids)] * n_rows
    open_rows = set(range(n_rows))
    if is_first:
        print(texts[0], end="\n" if s.show_probs else "", flush=True)
    for made in stream(model, idx, s.max_new_tokens, logprobs=s.show_probs, **options):
        new, logprobs = made if s.show_probs else (made, None)
        for row, token in enumerate(new.tolist()):
            if row not in open_rows:
                continue
            if token in loaded.ends:
                open_rows.remove(row)
                continue
            n_made += 1
            text = streams[row].add(token)
            texts[row] += text
            if is_first and row == 0 and s.show_probs:
                show_token(tokenizer, token, logprobs[row])
            elif is_first and row == 0:
                print(text, end="", flush=True)
            if streams[row].stopped:
                open_rows.remove(row)
        if not open_rows:
            break
    if is_first:
        print("" if s.show_probs else streams[0].rest())
    for text, held_back in list(zip(texts, streams, strict=True))[is_first:]:
        print(f"---------------\n{text}{held_back.rest()}")
    return n_made


def print_classes(settings, loaded):
    """Print the classes of a text, the likeliest first, each with its probability."""
    check_classifies(loaded, loaded.name)
    text = settings.classify
    if text.startswith("FILE:"):
        text = bpe.read_text(text.removeprefix("FILE:"))
    labels, probs = classify(loaded, text)
    by_probability = sorted(zip(probs, labels, strict=True), reverse=True)
    for p, label in by_probability:
        print(f"{label:20} {p:.1%}")


def look_inside(settings, loaded):
    """Print the logit lens of the prompt, or draw the attention of every head."""
    from glass import pictures

    idx = torch.tensor(read_prompt(settings, loaded), device=loaded.model.device)
    if settings.show_lens:
        print("\n".join(pictures.lens_lines(loaded.model, loaded.tokenizer, idx)))
    if settings.show_attention is not None:
        path = settings.show_attention
        pictures.draw_attention(loaded.model, loaded.tokenizer, idx, path)
        print(f"{path} shows the attention of every head")


HELP = """/reset  forget the conversation        /temp 0.7  another temperature
/save FILE  write it as JSON           /sure  how sure the model is of each reply, on or off
/help  this list                       /quit, or Ctrl-D"""


class Chat:
    """A conversation in the terminal: replies stream, Ctrl-C ends a reply, Ctrl-D the conversation.

    A model that was not tuned on conversations gets no template: it continues the text so far.
    """

    def __init__(self, settings, loaded):
        self.settings, self.loaded = settings, loaded
        self.template = loaded.chat_template if settings.template == "auto" else settings.template
        self.options = drawing(settings, loaded)
        check_known(loaded.tokenizer, settings.system or "", "--system")
        self.beginning = [{"role": "system", "content": settings.system}] if settings.system else []
        self.messages = list(self.beginning)
        self.shows_sureness = False
        block_size = loaded.model.config.block_size
        self.room = max(1, block_size - min(settings.max_new_tokens, block_size // 2))

    def run(self):
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 (gives input() its history and editing)
        if self.template is None:
            print(
                "this model was not tuned on conversations: it continues your text", file=sys.stderr
            )
        else:
            print(f"template {self.template}, ", end="", file=sys.stderr)
        print(
            f"temperature {self.options['temperature']}; /help lists the commands", file=sys.stderr
        )
        while True:
            try:
                line = input("> ").strip()
            except (EOFError, KeyboardInterrupt):
                print()
                return
            if line == "/quit":
                return
            if line.startswith("/"):
                name, *rest = line.split(maxsplit=1)
                self.command(name, *rest)
            elif line:
                self.reply(line)

    def command(self, name, argument=""):
        if name == "/reset":
            self.messages = list(self.beginning)
        elif name == "/temp":
            self.set_temperature(argument)
        elif name == "/save":
            self.save(Path(argument or "chat.json"))
        elif name == "/sure":
            self.shows_sureness = not self.shows_sureness
        elif name == "/help":
            print(HELP)
        else:
            print(f"there is no command {name}:\n{HELP}")

    def set_temperature(self, text):
        try:
            temperature = check_type("temperature", parse(text, float), float)
            self.settings = replace(self.settings, temperature=temperature)
            self.options["temperature"] = temperature
        except ValueError as error:
            print(f"{error}: /temp 0.7")

    def save(self, path):
        try:
            if path.exists():
                print(f"{path} is there already: /save ANOTHER_NAME")
                return
            write_json(path, self.messages)
            print(f"saved to {path}")
        except (OSError, ValueError) as error:  # ValueError: a NUL in the name
            print(f"not saved: {error}")

    def prompt(self):
        """The ids of the conversation so far."""
        tokenizer, template = self.loaded.tokenizer, self.template
        if template is not None:
            last = self.messages[-1:]
            if len(encode_chat(tokenizer, last, template, reply=True)[0]) > self.room:
                print(f"(longer than {self.room} tokens: only its end is read)")
            return fit_chat(tokenizer, self.messages, template, self.room)
        text = "".join(message["content"] for message in self.messages)
        return self.loaded.tokenizer.encode(text)[-self.room :]

    def reply(self, line):
        """Print the model's answer as it is made, and keep both."""
        loaded, s = self.loaded, self.settings
        try:
            check_known(loaded.tokenizer, line)
        except ValueError as error:
            print(error)
            return
        self.messages.append({"role": "user", "content": line})
        idx = torch.tensor([self.prompt()], device=loaded.model.device)
        stops = [*s.stop, *TEMPLATE_STOPS.get(self.template, [])]
        text_stream, reply, logprobs = TextStream(loaded.tokenizer, stops), "", []
        with contextlib.suppress(KeyboardInterrupt):
            for new, logprob in stream(
                loaded.model, idx, s.max_new_tokens, logprobs=True, **self.options
            ):
                logprobs.append(logprob[0, int(new)].item())
                if int(new) in loaded.ends:
                    break
                text = text_stream.add(int(new))
                print(text, end="", flush=True)
                reply += text
                if text_stream.stopped:
                    break
        rest = text_stream.rest()
        print(rest)
        self.messages.append({"role": "assistant", "content": reply + rest})
        self.say_sureness(sum(logprobs) / max(1, len(logprobs)))

    def say_sureness(self, mean):
        """Say how sure the model was of its reply, if asked, or if that is less than usual.

        mean: the mean log-probability of the reply's tokens. finetune.py finds on the validation
        rows what is usual.
        """
        least = self.loaded.sure_above
        if least is not None and mean < least:
            print(
                f"(not sure: mean log-probability {mean:.3f}; right answers lie above {least:.3f})"
            )
        elif self.shows_sureness:
            print(f"(mean log-probability {mean:.3f})")


# what only one way of working reads: the setting that chooses it, and the others
READ_BY = {
    "chat": {"template", "system"},
    "text": {"start", "num_samples", "show_probs", "max_new_tokens", "stop", "draft"},
}


def check_given(given):
    """ValueError for settings that what is asked for would not read."""
    given = {name: value for name, value in given.items() if value not in (None, False)}
    ways = ("export", "classify", "show_lens", "show_attention", "chat")
    way = next((name for name in ways if name in given), "text")
    read = READ_BY.get(way, set())
    if way == "chat":
        read = read | {"max_new_tokens", "stop", "draft"}
    elif way in ("show_lens", "show_attention"):
        read = {"start"}
    idle = given.keys() & set.union(*READ_BY.values(), {"chat"} if way != "chat" else set()) - read
    if idle and way == "text":
        raise ValueError(f"{' '.join(sorted(idle))} would do nothing without --chat: add it")
    if idle:
        raise ValueError(
            f"{' '.join(sorted(idle))} would do nothing with --{way}: leave one of them out"
        )


def main(argv):
    given = read_arguments(Settings, argv).given
    check_given(given)
    settings = Settings(**given)
    exact = settings.export and settings.dtype == "auto"  # an export loses nothing
    loaded = load_model(settings, torch.float32 if exact else None)
    if settings.export == "":
        raise ValueError("export='' names no folder: give one")
    is_gguf = (settings.export or "").lower().endswith(".gguf")
    if settings.export and settings.quantize and not is_gguf:
        raise ValueError(
            f"quantize={settings.quantize} does nothing to an export but a .gguf: "
            "leave one of them out"
        )
    if settings.temperature is None:
        is_exact = settings.chat and loaded.answers_exactly
        settings = replace(settings, temperature=0.0 if is_exact else Drawing.temperature)
    if is_gguf:
        from glass.gguf_files import save_gguf

        lines = save_gguf(loaded.model, settings.export, loaded.tokenizer, settings.quantize)
        print("\n".join([f"{settings.export} is a file that llama.cpp runs", *lines]))
    elif settings.export:
        loaded.model.save_pretrained(settings.export, loaded.tokenizer)
        has_code = (Path(settings.export) / "modeling_glassgpt.py").exists()
        how = ", with trust_remote_code=True: it holds our own code" if has_code else ""
        print(f"{settings.export} is a folder that transformers loads{how}")
    elif settings.classify is not None:
        print_classes(settings, loaded)
    elif settings.show_lens or settings.show_attention is not None:
        look_inside(settings, loaded)
    else:
        loaded.compiled_decode = speed_up(loaded.model, settings.quantize, settings.compile)
        if settings.chat:
            Chat(settings, loaded).run()
        else:
            write_samples(settings, loaded)


if __name__ == "__main__":
    with errors_in_one_line():
        main(sys.argv[1:])
