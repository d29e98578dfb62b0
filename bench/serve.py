"""serve.py under several clients at once: tokens/s, time to the first token, and between tokens.

    python bench.py serve --model=gpt2 --dtype=bfloat16
    python bench.py serve --model=char --clients 1 8
    python bench.py serve --url=http://127.0.0.1:8080/v1      # another server with the same API

The server runs in a process of its own, on random weights, since speed depends on the shape of a
model alone. Each client asks for one text after another, each streamed. Beside it: the rate of
glass.generate.stream in this process, without a server, in turn with one client.
"""

import http.client
import json
import random
import re
import signal
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Literal
from urllib.parse import urlsplit

import torch

import bpe
from bench.common import SCRATCH
from bench.generate import config_of, timed_tokens
from glass import checkpoint
from glass.generate import speed_up, stream
from glass.loading import ModelSettings, load_model
from glass.settings import HOME, configure
from model import GPT


@dataclass
class Settings:
    model: str = "gpt2"  # a preset, or char (10.65M parameters, block 256)
    dtype: str = "float32"  # float32 | bfloat16, of the weights
    quantize: Literal["int8"] | None = None  # int8 weights
    compile: bool = False  # the one-token step
    context: int = 16  # tokens of a prompt
    new_tokens: int = 64  # tokens of a text
    texts: int = 3  # of each client, one after another
    clients: list[str] = field(default_factory=lambda: ["1", "2", "4", "8", "16"])  # at once
    url: str | None = None  # measure the server at this address instead of starting ours


def main(argv):
    s = configure(Settings, argv)
    config = config_of(s.model)
    if s.url:
        measure(s, config, s.url, alone=None)
        return
    folder = save_random_run(s.model, config)
    alone = make_stream(s, config, folder)
    options = [f"--{name}={getattr(s, name)}" for name in ("dtype", "quantize", "compile")]
    command = [sys.executable, "serve.py", f"--out_dir={folder}", "--port=0", *options]
    with subprocess.Popen(command, cwd=HOME, stdout=subprocess.PIPE, text=True) as child:
        try:
            line = child.stdout.readline()
            if not (found := re.search(r"(http\S+/v1)", line)):
                raise ValueError(f"serve.py did not start ({line.strip()}): see its words above")
            print(line.strip())
            measure(s, config, found[1], alone)
        finally:
            child.send_signal(signal.SIGINT)


def save_random_run(name, config):
    """The folder of a run with random weights, whose tokens are words and never end a text."""
    folder = SCRATCH / "serve" / name
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    words = [f" {i}" for i in range(config.vocab_size - 1)]
    tokenizer = bpe.WordTokenizer(words, [bpe.UNKNOWN])
    state = {"model": GPT(config).state_dict(), "model_config": asdict(config), "optimizer": []}
    state |= {"tokenizer": tokenizer.to_dict(), "task": {}, "settings": {}}
    checkpoint.save(folder, 1, state)
    return folder


def make_stream(settings, config, folder):
    """A function that makes a text without a server -> tokens a second after the first."""
    s = settings
    place = dict(out_dir=str(folder), which="last", dtype=s.dtype, quantize=s.quantize)
    loaded = load_model(ModelSettings(**place, compile=s.compile))
    decode = speed_up(loaded.model, s.quantize, s.compile)

    def alone():
        idx = torch.randint(config.vocab_size, (1, s.context), device=loaded.model.device)
        options = dict(temperature=0.8, top_k=200, compiled_decode=decode)
        _, rest = timed_tokens(stream(loaded.model, idx, s.new_tokens, **options))
        return (s.new_tokens - 1) / rest

    return alone


def measure(settings, config, url, alone):
    """Print the figures of each number of clients."""
    s = settings
    print(f"{s.model}, {s.context} + {s.new_tokens} tokens, {s.texts} texts a client, at {url}")
    run_clients(s, config, url, 1)  # warms up
    if alone is not None:
        alone()
        pairs = [(alone(), rate_of(run_clients(s, config, url, 1))) for _ in range(3)]
        without, with_server = map(statistics.median, zip(*pairs, strict=True))
        print(
            f"one text after its first token: {without:,.1f} tokens/s without a server, "
            f"{with_server:,.1f} with it ({with_server / without:.2f})"
        )
    for n_clients in map(int, s.clients):
        started_at = time.perf_counter()
        texts = run_clients(s, config, url, n_clients)
        seconds = time.perf_counter() - started_at
        n_tokens = sum(len(times) for _, times in texts)
        first = [1e3 * (times[0] - asked_at) for asked_at, times in texts]
        between = [
            1e3 * (b - a) for _, times in texts for a, b in zip(times, times[1:], strict=False)
        ]
        print(
            f"{n_clients:3} clients: {n_tokens / seconds:8,.1f} tokens/s; first token after "
            f"{percentiles(first)} ms; between tokens {percentiles(between)} ms (median, 95%)"
        )


def rate_of(texts):
    """Median tokens a second of texts, each counted from its first token."""
    rates = [(len(times) - 1) / (times[-1] - times[0]) for _, times in texts]
    return statistics.median(rates)


def percentiles(values):
    """The median and the value that 95% do not exceed, as text."""
    ordered = sorted(values)
    return f"{statistics.median(ordered):,.1f}, {ordered[int(0.95 * (len(ordered) - 1))]:,.1f}"


def run_clients(settings, config, url, n_clients):
    """All texts of n_clients at once: a list of (seconds when asked, seconds of each token)."""

    def ask_for_texts(number):
        rng = random.Random(number)
        texts = []
        for _ in range(settings.texts):
            prompt = [rng.randrange(config.vocab_size - 1) for _ in range(settings.context)]
            texts.append(ask_for_text(url, prompt, settings.new_tokens))
        return texts

    with ThreadPoolExecutor(n_clients) as pool:
        return [text for texts in pool.map(ask_for_texts, range(n_clients)) for text in texts]


def ask_for_text(url, prompt, new_tokens):
    """(seconds when asked, seconds when each token came) of one streamed text."""
    address = urlsplit(url)
    body = {"prompt": prompt, "max_tokens": new_tokens, "temperature": 0.8, "top_k": 200}
    connection = http.client.HTTPConnection(address.hostname, address.port, timeout=600)
    asked_at, times = time.perf_counter(), []
    connection.request("POST", f"{address.path}/completions", json.dumps(body | {"stream": True}))
    answer = connection.getresponse()
    if answer.status != 200:
        raise ValueError(f"{url} answers with status {answer.status}: {answer.read(200)!r}")
    for line in answer:
        if line.startswith(b"data: {"):
            times.append(time.perf_counter())
    connection.close()
    return asked_at, times
