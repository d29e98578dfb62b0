"""How far from the limit of this machine, measured beside others: `python bench.py PROGRAM`.

Each program is a file in bench/. Whatever is compared runs in turn, A B A B, and the median counts.
"""

import importlib
import os
import sys

from glass.settings import HOME, errors_in_one_line

PROGRAMS = {  # the name of a file in bench/, and what it measures
    "limits": "what this machine can do: matrix products, reading memory",
    "train": "a training step: time, tokens/s, FLOP/s, memory, start-up; beside nanoGPT",
    "recipe": "validation loss against wall-clock, of several configs in one picture",
    "evaluate": "items of multiple choice per second, beside lm-evaluation-harness",
    "generate": "generated tokens/s against the memory bandwidth; beside transformers or nanoGPT",
    "trace": "looking into a model: each part of a trace of 256 tokens",
    "serve": "serve.py under several clients: tokens/s, time to the first token and between tokens",
    "tokenizers": "training and encoding, beside tokenizers, rustbpe and tiktoken",
    "prepare": "prepare.py with several workers, beside tiktoken on one thread",
    "faults": "kill -9 at random moments, resume, and compare the weights to the bit",
    "gpu": "what only a GPU can show: parity, resumption, speed, memory, in under ten minutes",
    "plan": "memory, bytes sent and time of training on N devices, by each way to share a model",
    "facts": "how much of the library a model learns in one time, from ever more of it",
    "docs": "what a model tuned on docs knows, and refuses; beside TF-IDF",
    "fuzz": "wrong settings and damaged files: does each command end well, or say what is wrong",
}


def print_help():
    print("python bench.py PROGRAM [--key=value ...]\n")
    for name, measured in PROGRAMS.items():
        print(f"  {name:12}{measured}")
    print("\npython bench.py PROGRAM --help lists the settings of a program")


def main(argv):
    name = argv[0] if argv else None
    if name in ("-h", "--help"):
        print_help()
        return
    if name not in PROGRAMS:
        raise ValueError(
            f"program={name} must be one of {' '.join(PROGRAMS)}: "
            "python bench.py --help says what each measures"
        )
    os.chdir(HOME)
    sys.argv[0] = f"bench.py {name}"  # what --help says
    importlib.import_module(f"bench.{name}").main(argv[1:])


if __name__ == "__main__":
    with errors_in_one_line():
        main(sys.argv[1:])
