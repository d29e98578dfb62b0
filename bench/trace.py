"""How long it takes to look into a model: each part of a trace of 256 tokens.

    python bench.py trace --model=gpt2

Random weights; model=recipe has the shape of config/shakespeare_char.py. The lens of GPT-2's shape
is of 32 positions, as a request may have.
"""

import runpy
import statistics
import time
from dataclasses import dataclass, fields

import torch

from bench.common import in_turn
from glass import looking
from glass.loading import Loaded
from glass.settings import HOME, configure
from model import GPT, PRESETS, GPTConfig

PARTS = ("surprise", "likeliest", "thumbnails", "attention", "pushes", "switched_off", "badges")


@dataclass
class Settings:
    model: str = "recipe"  # recipe, or a preset such as gpt2
    tokens: int = 256  # of the text
    rounds: int = 5  # how often each part is measured


class Numbers:
    """A tokenizer whose tokens are numbers, for models without one."""

    special_tokens = {}

    def decode(self, ids):
        return " ".join(map(str, ids))


def main(argv):
    s = configure(Settings, argv)
    torch.manual_seed(1)
    if s.model == "recipe":
        given = runpy.run_path(str(HOME / "config" / "shakespeare_char.py"))
        names = {field.name for field in fields(GPTConfig)}
        config = GPTConfig(**{"vocab_size": 72} | {n: v for n, v in given.items() if n in names})
    else:
        config = PRESETS[s.model]
    model = GPT(config).eval()
    loaded = Loaded(model, Numbers(), [], None)
    ids = torch.randint(config.vocab_size, (s.tokens,)).tolist()
    mask = [[True] + [False] * config.n_head] * config.n_layer
    n_positions = 32 if config.vocab_size > looking.LARGE_VOCABULARY else s.tokens

    def look(*parts):
        body = {"ids": ids, "parts": list(parts)}
        if "switched_off" in parts:
            body["mask"] = mask
        if "lens" in parts:
            body["positions"] = list(range(s.tokens - n_positions, s.tokens))

        def measure():
            loaded.last_trace = None  # a text that was not looked at before
            started_at = time.perf_counter()
            looking.respond(loaded, body)
            return time.perf_counter() - started_at

        return measure

    def plain():
        started_at = time.perf_counter()
        with torch.no_grad():
            model(torch.tensor([ids]))
        return time.perf_counter() - started_at

    contestants = {"one forward pass": plain, "all but the lens": look(*PARTS)}
    contestants |= {part: look(part) for part in PARTS}
    contestants[f"lens of {n_positions} positions"] = look("lens")
    for name, seconds in in_turn(contestants, s.rounds).items():
        print(f"{name:24} {1e3 * statistics.median(seconds):8.1f} ms")
