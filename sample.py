"""Text out of a checkpoint or of published weights: `python sample.py --start "To be"`, or --chat.

The newest run under out/ is taken where none is named. No flag describes the model, since the
checkpoint does. Text appears as it is made.
"""

import contextlib
import json
import math
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch

import bpe
from glass import checkpoint, weights
from glass.chat import encode_for_class, fit_chat, stop_ids, template_for
from glass.device import choose_device, choose_dtype
from glass.generate import TextStream, speed_up, stream
from glass.settings import check_type, configure, errors_in_one_line, parse
from model import require


@dataclass
class Settings:
    """What to load, what to start from, how to draw the next token; named as in nanoGPT."""

    # model
    init_from: str = "resume"  # resume: a checkpoint of out_dir; else gpt2... or a folder
    out_dir: str | None = None  # folder of the run; None: the newest under out/
    adapter: str | None = None  # adapter.safetensors of a LoRA run, to merge into its base
    which: Literal["best", "last"] = "best"  # the lowest validation loss, or the last
    device: str = "auto"  # auto | cpu | cuda | cuda:1 | mps
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # of the weights
    compile: bool = False  # torch.compile the one-token step; the second token waits for it
    quantize: Literal["int8"] | None = None  # int8 weights: a quarter of float32's bytes
    export: str | None = None  # write model and tokenizer to this folder for transformers, and stop
    # text
    classify: str | None = None  # a text whose class to name (finetune.py --task=classify)
    start: str = "\n"  # the prompt; FILE:prompt.txt reads it from a file
    max_new_tokens: int = 500  # tokens of a text, at most
    num_samples: int = 1  # texts
    stop: list[str] = field(default_factory=list)  # strings that end a text
    chat: bool = False  # a conversation in the terminal; /help lists its commands
    template: str = "auto"  # of a chat: markers | alpaca | llama3 | chatml; auto: the model's
    system: str | None = None  # the system message of a chat
    # drawing
    temperature: float = 0.8  # 0: the likeliest token; 1: as the model says; below 1: bolder
    top_k: int | None = 200  # draw among the k likeliest
    top_p: float | None = None  # draw among the fewest that hold this share of probability
    min_p: float | None = None  # draw among those at least this share as likely as the likeliest
    repetition_penalty: float = 1.0  # above 1: tokens that occurred before become less likely
    seed: int = 1337  # the same seed gives the same text
    show_probs: bool = False  # each token with its probability and the runners-up

    def __post_init__(self):
        floats = "temperature top_p min_p repetition_penalty"
        require(self, floats, math.isfinite, "be a finite number")
        require(self, "num_samples top_k", lambda value: value >= 1, "be at least 1")
        most = 10**7
        require(self, "max_new_tokens", lambda value: 1 <= value <= most, "lie in [1, 10,000,000]")
        require(self, "num_samples", lambda value: value <= 10**5, "be at most 100,000")
        require(self, "top_p min_p", lambda value: 1e-6 <= value <= 1, "lie in [0.000001, 1]")
        require(self, "temperature", lambda value: value >= 0, "not be negative")
        smallest = 1e-4  # below, logits divided by it leave float32's range
        require(
            self,
            "temperature",
            lambda value: value == 0 or value >= smallest,
            "be 0, or 0.0001 or more",
        )
        require(self, "repetition_penalty", lambda value: value > 0, "be positive")
        require(self, "seed", lambda value: 0 <= value < 2**63, "lie in [0, 2^63)")


@dataclass
class Loaded:
    """A model that is ready to generate, and what goes with it."""

    model: torch.nn.Module
    tokenizer: bpe.Tokenizer
    ends: list  # the ids that end a text
    state: dict | None  # of the checkpoint; None for published weights
    compiled_decode: object = None  # of glass.generate.speed_up

    @property
    def chat_template(self):
        """The template of the conversations that the model was tuned on, or None.

        A published model whose tokenizer has a template's markers is assumed to be tuned on it.
        """
        template = template_for(self.tokenizer)
        if self.state is None:
            return None if template == "alpaca" else template
        tuned_on = self.state["task"].get("template")
        return template if tuned_on == "auto" else tuned_on


def load_model(settings):
    """The Loaded model of a run or of published weights."""
    s, device = settings, choose_device(settings.device)
    dtype = choose_dtype(s.dtype, device)
    if s.dtype == "auto" and (s.export or (s.quantize and not s.compile)):
        dtype = torch.float32  # an export loses nothing; with eager int8 it was 13% faster on a CPU
    source = s.init_from
    if s.init_from == "resume":
        source = folder = s.out_dir or checkpoint.newest_run()
        model, tokenizer, state = weights.load_run(folder, s.which)
        print(f"{folder}, step {state['step']}", file=sys.stderr)
    else:
        load_dtype = torch.float32 if s.adapter else dtype  # an adapter knows its base by its bits
        model, tokenizer, state = weights.load_model(s.init_from, s.which, load_dtype)
    if s.adapter:
        weights.load_adapter(model, s.adapter)
    for name, parameter in model.named_parameters():
        if not bool(parameter.isfinite().all()):
            raise ValueError(
                f"{name} of {s.adapter or source} holds NaN or infinity, so the run has "
                "diverged: train again with a lower learning_rate, or take an earlier checkpoint"
            )
    return Loaded(model.to(device, dtype).eval(), tokenizer, stop_ids(tokenizer), state)


def check_known(tokenizer, text, name="the text"):
    """ValueError where the tokenizer does not know some of the text's characters."""
    if unknown := tokenizer.unknown_characters(text):
        shown = " ".join(map(repr, unknown[:10]))
        raise ValueError(f"the tokenizer does not know {shown} of {name[:200]!r}: leave them out")


def read_prompt(settings, loaded):
    """The ids of the prompt. Raises ValueError if it is missing, too long, or has unknown
    characters.
    """
    text, tokenizer, config = settings.start, loaded.tokenizer, loaded.model.config
    if text.startswith("FILE:"):
        text = bpe.read_text(text.removeprefix("FILE:"))
    if settings.start == Settings.start and tokenizer.unknown_characters(text):
        text = ""  # a text without line breaks was learnt: begin with whatever can begin one
    check_known(tokenizer, text, settings.start)
    allowed = {bpe.END_OF_TEXT} & tokenizer.special_tokens.keys()
    ids = tokenizer.encode(text or "".join(allowed) or "\n", allowed_special=allowed)
    if getattr(tokenizer, "bos_id", None) is not None:
        ids = [tokenizer.bos_id, *ids]
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
    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
    return {name: getattr(settings, name) for name in names} | {
        "stop": loaded.ends,
        "generator": torch.Generator().manual_seed(settings.seed),
        "compiled_decode": loaded.compiled_decode,
    }


def write_samples(settings, loaded):
    """Print num_samples texts: the first as it is made, then the others of the same batch."""
    s, model, tokenizer = settings, loaded.model, loaded.tokenizer
    ids = read_prompt(s, loaded)
    idx = torch.tensor([ids] * s.num_samples, device=model.device)  # (num_samples, T)
    streams = [TextStream(tokenizer, s.stop) for _ in range(s.num_samples)]
    texts = [tokenizer.decode(ids)] * s.num_samples
    open_rows = set(range(s.num_samples))
    if len(ids) + s.max_new_tokens > model.config.block_size:
        print(
            f"(past {model.config.block_size} tokens the older half is forgotten)", file=sys.stderr
        )
    print(texts[0], end="\n" if s.show_probs else "", flush=True)
    started_at, n_made, options = time.perf_counter(), 0, drawing(s, loaded)
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
            if row == 0 and s.show_probs:
                show_token(tokenizer, token, logprobs[row])
            elif row == 0:
                print(text, end="", flush=True)
            if streams[row].stopped:
                open_rows.remove(row)
        if not open_rows:
            break
    seconds = time.perf_counter() - started_at
    print("" if s.show_probs else streams[0].rest())
    for text, held_back in list(zip(texts, streams, strict=True))[1:]:
        print(f"---------------\n{text}{held_back.rest()}")
    print(f"{n_made} tokens, {n_made / seconds:.0f} a second", file=sys.stderr)


def print_classes(settings, loaded):
    """Print the classes of a text, the likeliest first, each with its probability."""
    model, state = loaded.model, loaded.state
    if not model.config.n_classes or not state:
        raise ValueError(
            f"{settings.out_dir or settings.init_from} has no classification head: "
            "train one with finetune.py --task=classify"
        )
    if not settings.classify.strip():
        raise ValueError("classify='' has no token: give a text")
    longest = min(state["settings"]["block_size"], model.config.block_size)  # as in training
    ids, _ = encode_for_class(loaded.tokenizer, settings.classify, longest)
    idx, lengths = (
        torch.tensor([ids], device=model.device),
        torch.tensor([len(ids)], device=model.device),
    )
    with torch.no_grad():
        probs = model.classify(idx, lengths)[0].softmax(-1).tolist()
    by_probability = sorted(zip(probs, state["task"]["labels"], strict=True), reverse=True)
    for p, label in by_probability:
        print(f"{label:20} {p:.1%}")


HELP = """/reset  forget the conversation        /temp 0.7  another temperature
/save FILE  write it as JSON           /help  this list        /quit, or Ctrl-D"""


class Chat:
    """A conversation in the terminal: replies stream, Ctrl-C ends a reply, Ctrl-D the conversation.

    A model that was not tuned on conversations gets no template: it continues the text so far.
    """

    def __init__(self, settings, loaded):
        self.settings, self.loaded = settings, loaded
        self.template = loaded.chat_template if settings.template == "auto" else settings.template
        self.options = drawing(settings, loaded)
        self.beginning = [{"role": "system", "content": settings.system}] if settings.system else []
        self.messages = list(self.beginning)
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
                self.command(*line.partition(" ")[::2])
            elif line:
                self.reply(line)

    def command(self, name, argument):
        if name == "/reset":
            self.messages = list(self.beginning)
        elif name == "/temp":
            self.set_temperature(argument)
        elif name == "/save":
            self.save(Path(argument or "chat.json"))
        else:
            print(HELP)

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
            text = json.dumps(self.messages, indent=1, ensure_ascii=False)
            path.write_text(text + "\n", encoding="utf-8")
            print(f"saved to {path}")
        except (OSError, ValueError) as error:  # ValueError: a NUL in the name
            print(f"not saved: {error}")

    def prompt(self):
        """The ids of the conversation so far."""
        if self.template is not None:
            return fit_chat(self.loaded.tokenizer, self.messages, self.template, self.room)
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
        stops = [*s.stop, "### Instruction:"] if self.template == "alpaca" else s.stop
        text_stream, reply = TextStream(loaded.tokenizer, stops), ""
        with contextlib.suppress(KeyboardInterrupt):
            for new in stream(loaded.model, idx, s.max_new_tokens, **self.options):
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


def main(argv):
    settings = configure(Settings, argv)
    loaded = load_model(settings)
    if settings.export and settings.quantize:
        raise ValueError(
            f"quantize={settings.quantize} does nothing to an export: leave one of them out"
        )
    if settings.export:
        loaded.model.save_pretrained(settings.export, loaded.tokenizer)
        print(f"{settings.export} is a folder that transformers loads")
    elif settings.classify is not None:
        print_classes(settings, loaded)
    else:
        loaded.compiled_decode = speed_up(loaded.model, settings.quantize, settings.compile)
        if settings.chat:
            Chat(settings, loaded).run()
        else:
            write_samples(settings, loaded)


if __name__ == "__main__":
    with errors_in_one_line():
        main(sys.argv[1:])
