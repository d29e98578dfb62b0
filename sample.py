"""Text out of a checkpoint or of published weights: `python sample.py --start "To be"`, or a conversation with --chat.

The checkpoint is self-sufficient: the newest run under out/ is taken where none is named, and no flag describes the
model. Text appears as it is made.
"""

import contextlib
import json
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch

import bpe
import checkpoint
import config
import weights
from decode import speed_up
from model import choose_device, choose_dtype


@dataclass
class Settings:
    """What to load, what to start from, how to draw the next token. Names are nanoGPT's where it has one."""

    # model
    init_from: str = "resume"  # resume: a checkpoint of out_dir; else published weights, gpt2... or a folder
    out_dir: str | None = None  # folder of the run; None: the newest under out/
    adapter: str | None = None  # an adapter.safetensors of finetune.py --train=lora, to merge into the model it was trained on
    which: Literal["best", "last"] = "best"  # the checkpoint with the lowest validation loss, or the last
    device: str = "auto"  # auto | cpu | cuda | cuda:1 | mps
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # of the weights
    compile: bool = False  # torch.compile of the one-token step: faster, but the second token waits for the compiler
    quantize: Literal["int8"] | None = None  # int8 weights: a quarter of float32's bytes
    export: str | None = None  # write the model and its tokenizer to this folder for transformers, and stop
    # text
    classify: str | None = None  # a text whose class to name, with a model that finetune.py --task=classify made
    start: str = "\n"  # the prompt; FILE:prompt.txt reads it from a file
    max_new_tokens: int = 500  # tokens of a text, at most
    num_samples: int = 1  # texts
    stop: list[str] = field(default_factory=list)  # strings that end a text
    chat: bool = False  # a conversation in the terminal; /help lists its commands
    template: str = "auto"  # how chat turns are written: markers | alpaca | llama3 | chatml; auto: what the tokenizer has
    system: str | None = None  # the system message of a chat
    # drawing
    temperature: float = 0.8  # 0 takes the likeliest token; 1 draws as the model says; below 1 is bolder
    top_k: int | None = 200  # draw among the k likeliest
    top_p: float | None = None  # draw among the fewest that hold this share of probability
    min_p: float | None = None  # draw among those at least this share as likely as the likeliest
    repetition_penalty: float = 1.0  # above 1 makes tokens that were there less likely
    seed: int = 1337  # the same seed gives the same text
    show_probs: bool = False  # each token with its probability and the runners-up

    def __post_init__(self):
        for name in ("max_new_tokens", "num_samples", "top_k"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        for name in ("top_p", "min_p"):
            if getattr(self, name) is not None and not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} must lie in (0, 1]")
        if self.temperature < 0 or self.repetition_penalty <= 0:
            found = f"temperature={self.temperature} and repetition_penalty={self.repetition_penalty}"
            raise ValueError(f"{found}: the first must not be negative, the second must be positive")


class TextStream:
    """Ids in, text out as soon as it is certain: an unfinished UTF-8 character or stop string is held back."""

    def __init__(self, tokenizer, stop):
        self.tokenizer, self.stop, self.stopped = tokenizer, stop, False
        self.ids, self.shown = [], 0  # the last ids, and how many characters of their text are out

    def add(self, token):
        """The text that this id makes certain. Sets `stopped` once a stop string is complete; it is not part of the text."""
        self.ids.append(token)
        text = self.tokenizer.decode(self.ids)
        for stop in self.stop:
            if stop in text[self.shown :]:
                self.stopped, text = True, text[: text.index(stop, self.shown)]
        certain = max(self.shown, len(text) if self.stopped else len(text) - self.held_back(text))
        new, self.shown = text[self.shown : certain], certain
        if len(self.ids) > 256 and certain == len(text):  # decode a bounded number of ids each time
            self.ids = self.ids[-16:]
            self.shown = len(self.tokenizer.decode(self.ids))
        return new

    def held_back(self, text):
        """How many characters at the end may still change."""
        if text.endswith("\ufffd"):
            return 1
        return max((n for stop in self.stop for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)

    def rest(self):
        """What was held back when nothing follows."""
        return "" if self.stopped else self.tokenizer.decode(self.ids)[self.shown :]


def load_model(settings):
    """(model, tokenizer, ids that end a text, checkpoint state) of a run or of published weights, ready to generate."""
    device = choose_device(settings.device)
    dtype = choose_dtype(settings.dtype, device)
    if settings.dtype == "auto" and (settings.export or settings.quantize and not settings.compile):
        dtype = torch.float32  # an export loses nothing; beside eager int8 products float32 was 13% faster on a CPU
    if settings.init_from == "resume":
        folder = settings.out_dir or checkpoint.newest_run()
        model, tokenizer, state = weights.load_run(folder, settings.which)
        print(f"{folder}, step {state['step']}", file=sys.stderr)
    else:
        model, tokenizer, state = weights.load_model(settings.init_from, settings.which, dtype)
    if settings.adapter:
        weights.load_adapter(model, settings.adapter)
    return model.to(device, dtype).eval(), tokenizer, bpe.stop_ids(tokenizer), state


def read_prompt(settings, model, tokenizer):
    """The prompt's ids. Raises ValueError for a missing file, unknown characters, or a prompt that does not fit."""
    text = settings.start
    if text.startswith("FILE:"):
        path = Path(text.removeprefix("FILE:"))
        if not path.is_file():
            raise ValueError(f"the prompt file {path} does not exist: name one that does")
        text = bpe.read_text(path)
    if unknown := tokenizer.unknown_characters(text):
        raise ValueError(f"the tokenizer does not know {' '.join(map(repr, unknown[:10]))} of the prompt: leave them out")
    allowed = {bpe.END_OF_TEXT} & tokenizer.special_tokens.keys()
    ids = tokenizer.encode(text or "".join(allowed) or "\n", allowed_special=allowed)
    if getattr(tokenizer, "bos_id", None) is not None:
        ids = [tokenizer.bos_id, *ids]
    if len(ids) > model.config.block_size:
        raise ValueError(f"the prompt has {len(ids)} tokens but block_size={model.config.block_size}: shorten it")
    return ids


def show_token(tokenizer, token, logprobs):
    """One line: the token, its probability, and the likeliest others."""
    likeliest = [other for other in logprobs.topk(min(6, len(logprobs))).indices.tolist() if other != token][:5]

    def entry(i):
        return f"{tokenizer.decode([i])!r} {logprobs[i].exp():.1%}"

    print(f"{entry(token):20} | " + "  ".join(map(entry, likeliest)))


def drawing(settings, model, ends, compiled_decode):
    """The settings of drawing, as model.stream takes them."""
    s = settings
    return dict(
        temperature=s.temperature,
        top_k=s.top_k,
        top_p=s.top_p,
        min_p=s.min_p,
        repetition_penalty=s.repetition_penalty,
        stop=ends,
        generator=torch.Generator(model.device).manual_seed(s.seed),
        compiled_decode=compiled_decode,
    )


def write_samples(settings, model, tokenizer, ends, compiled_decode):
    """Print num_samples texts: the first as it is made, the others, made in the same batch, after it."""
    s = settings
    ids = read_prompt(s, model, tokenizer)
    idx = torch.tensor([ids] * s.num_samples, device=model.device)  # (num_samples, T)
    streams = [TextStream(tokenizer, s.stop) for _ in range(s.num_samples)]
    texts = [tokenizer.decode(ids)] * s.num_samples
    open_rows = set(range(s.num_samples))
    if len(ids) + s.max_new_tokens > model.config.block_size:
        print(f"(past {model.config.block_size} tokens the older half is forgotten)", file=sys.stderr)
    print(texts[0], end="\n" if s.show_probs else "", flush=True)
    started_at, made = time.perf_counter(), 0
    for new in model.stream(idx, s.max_new_tokens, logprobs=s.show_probs, **drawing(s, model, ends, compiled_decode)):
        new, logprobs = new if s.show_probs else (new, None)
        for row, token in enumerate(new.tolist()):
            if row not in open_rows:
                continue
            if token in ends:
                open_rows.remove(row)
                continue
            made += 1
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
    for text, stream in list(zip(texts, streams, strict=True))[1:]:
        print(f"---------------\n{text}{stream.rest()}")
    print(f"{made} tokens, {made / seconds:.0f} a second", file=sys.stderr)


def print_classes(settings, model, tokenizer, state):
    """Print the classes of a text, the likeliest first, each with its probability."""
    if not model.config.n_classes or not state:
        raise ValueError(f"{settings.out_dir or settings.init_from} has no classification head: finetune.py --task=classify")
    if not settings.classify.strip():
        raise ValueError("classify='' has no token: give a text")
    longest = min(state["settings"]["block_size"], model.config.block_size)  # as in training
    ids, _ = bpe.encode_for_class(tokenizer, settings.classify, longest)
    with torch.no_grad():
        idx = torch.tensor([ids], device=model.device)
        probs = model.classify(idx, torch.tensor([len(ids)], device=model.device))[0].softmax(-1).tolist()
    for label, p in sorted(zip(state["labels"], probs, strict=True), key=lambda pair: -pair[1]):
        print(f"{label:20} {p:.1%}")


HELP = """/reset  forget the conversation        /temp 0.7  another temperature
/save FILE  write it as JSON           /help  this list        /quit, or Ctrl-D"""


def fit_chat(tokenizer, messages, template, room):
    """The ids of a conversation that waits for a reply; its oldest turns are dropped until it fits into `room` tokens."""
    messages = list(messages)
    while True:
        ids, _ = bpe.encode_chat(tokenizer, messages, template, reply=True)
        first = 1 if messages[0]["role"] == "system" else 0
        if len(ids) <= room or len(messages) <= first + 1:
            return ids[-room:]
        del messages[first : first + 2]


def chat(settings, model, tokenizer, ends, compiled_decode):
    """A conversation in the terminal: the replies stream, Ctrl-C ends a reply, Ctrl-D the conversation."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 (gives input() its history and editing)
    s, template = settings, settings.template
    if template == "auto":
        template = bpe.template_for(tokenizer)
    options = drawing(s, model, ends, compiled_decode)
    beginning = [{"role": "system", "content": s.system}] if s.system else []
    messages = list(beginning)
    room = max(1, model.config.block_size - min(s.max_new_tokens, model.config.block_size // 2))
    print(f"template {template}, temperature {s.temperature}; /help lists the commands", file=sys.stderr)
    while True:
        try:
            line = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        command, _, argument = line.partition(" ")
        if command == "/quit":
            return
        if command == "/reset":
            messages = list(beginning)
        elif command == "/temp":
            try:
                options["temperature"] = max(0.0, float(argument))
            except ValueError:
                print(f"temperature={argument!r} must be a number: /temp 0.7")
        elif command == "/save":
            path = Path(argument or "chat.json")
            if path.exists():
                print(f"{path} is there already: /save ANOTHER_NAME")
            else:
                try:
                    path.write_text(json.dumps(messages, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
                    print(f"saved to {path}")
                except OSError as error:
                    print(f"not saved: {error}")
        elif command.startswith("/"):
            print(HELP)
        elif line:
            if unknown := tokenizer.unknown_characters(line):
                print(f"the tokenizer does not know {' '.join(map(repr, unknown[:10]))}: leave them out")
                continue
            messages.append({"role": "user", "content": line})
            ids = fit_chat(tokenizer, messages, template, room)
            stream = TextStream(tokenizer, [*s.stop, "### Instruction:"] if template == "alpaca" else s.stop)
            reply = ""
            with contextlib.suppress(KeyboardInterrupt):
                for new in model.stream(torch.tensor([ids], device=model.device), s.max_new_tokens, **options):
                    if int(new) in ends:
                        break
                    text = stream.add(int(new))
                    print(text, end="", flush=True)
                    reply += text
                    if stream.stopped:
                        break
            print(stream.rest())
            messages.append({"role": "assistant", "content": reply + stream.rest()})


def main(argv):
    settings = config.configure(Settings, argv)
    model, tokenizer, ends, state = load_model(settings)
    if settings.export:
        model.save_pretrained(settings.export, tokenizer)
        print(f"{settings.export} is a folder that transformers loads")
        return
    if settings.classify is not None:
        return print_classes(settings, model, tokenizer, state)
    compiled_decode = speed_up(model, settings.quantize, settings.compile)
    talk = chat if settings.chat else write_samples
    talk(settings, model, tokenizer, ends, compiled_decode)


if __name__ == "__main__":
    with config.errors_in_one_line():
        main(sys.argv[1:])
