"""Items of multiple choice per second, beside lm-evaluation-harness on the same weights.

    python bench.py evaluate --items=200 --peer=PYTHON

PYTHON is an interpreter that can import lm_eval and transformers. The items are synthetic: four
endings of 20 tokens after a context of 100, random ids, for a model of GPT-2's shape with random
weights. Both get the same ids, so no tokenizer's time counts.
"""

import json
import random
import shutil
import statistics
import subprocess
import time
from dataclasses import dataclass

import torch

from bench.common import SCRATCH, in_turn
from glass import score
from glass.settings import configure
from model import GPT, PRESETS

PEER = """
import json, sys, time, torch
from lm_eval.models.huggingface import HFLM
folder, path, batch_size, dtype = sys.argv[1:]
lm = HFLM(pretrained=folder, dtype=dtype, device="cpu", batch_size=int(batch_size))
pairs = json.load(open(path))
started_at = time.perf_counter()
found = lm._loglikelihood_tokens([(("", ""), c, e) for c, e in pairs], disable_tqdm=True)
print(json.dumps([time.perf_counter() - started_at, [float(value) for value, _ in found]]))
"""


@dataclass
class Settings:
    items: int = 200  # of four endings each
    context: int = 100  # tokens
    ending: int = 20  # tokens
    dtype: str = "float32"  # of the weights
    rounds: int = 3  # how often each contestant runs
    peer: str | None = None  # a Python with lm_eval; None: glassGPT alone
    peer_batch: int = 16  # its rows of one forward pass


def main(argv):
    s, rng = configure(Settings, argv), random.Random(1)
    torch.manual_seed(1)
    config = PRESETS["gpt2"]
    model = GPT(config).to(getattr(torch, s.dtype)).eval()
    pairs = []
    for _ in range(s.items):
        context = rng.choices(range(config.vocab_size), k=s.context)
        for _ in range(4):
            pairs.append((context, rng.choices(range(config.vocab_size), k=s.ending)))
    found = {}

    def ours():
        started_at = time.perf_counter()
        found["glassGPT"] = [one.logprob for one in score.score_endings(model, pairs)]
        return time.perf_counter() - started_at

    contestants = {"glassGPT": ours}
    if s.peer:
        shutil.rmtree(SCRATCH, ignore_errors=True)
        SCRATCH.mkdir(parents=True)
        folder, path = SCRATCH / "gpt2", SCRATCH / "pairs.json"
        import bpe

        model.save_pretrained(folder, bpe.BPETokenizer.from_gpt2())
        path.write_text(json.dumps(pairs))
        command = [s.peer, "-c", PEER, str(folder), str(path), str(s.peer_batch), s.dtype]

        def peer():
            ended = subprocess.run(command, capture_output=True, text=True, check=True)
            seconds, found["lm_eval"] = json.loads(ended.stdout.splitlines()[-1])
            return seconds

        contestants["lm_eval"] = peer
    seconds = in_turn(contestants, s.rounds)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    for name, median in medians.items():
        print(f"{name:10} {s.items / median:8.2f} items/s")
    if s.peer:
        ratio = medians["lm_eval"] / medians["glassGPT"]
        both = zip(found["glassGPT"], found["lm_eval"], strict=True)
        largest = max(abs(a - b) / abs(b) for a, b in both)
        print(f"{ratio:.2f} times its rate; log-likelihoods differ by {largest:.1e} at most")
        shutil.rmtree(SCRATCH)
