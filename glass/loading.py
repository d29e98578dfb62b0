"""A model that is ready to generate: which one, how its tokens are drawn, and what goes with it.

sample.py and serve.py share this.
"""

import math
import sys
from dataclasses import dataclass
from typing import Literal

import torch

import bpe
from glass import checkpoint, weights
from glass.chat import encode_for_class, stop_ids, template_for
from glass.device import choose_device, choose_dtype
from model import require


@dataclass
class ModelSettings:
    """What to load, and how it computes; named as in nanoGPT."""

    # model
    init_from: str = "resume"  # resume: a checkpoint of out_dir; else gpt2... or a folder
    out_dir: str | None = None  # folder of the run; None: the newest under out/
    adapter: str | None = None  # adapter.safetensors of a LoRA run, to merge into its base
    which: Literal["best", "last"] | int = "best"  # the lowest validation loss, the last, or a step
    device: str = "auto"  # auto | cpu | cuda | cuda:1 | mps
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # of the weights
    compile: bool = False  # torch.compile the one-token step, where kernels.c does not do it
    quantize: Literal["int8"] | None = None  # int8 weights: a quarter of float32's bytes


@dataclass
class Drawing:
    """How the next token is drawn."""

    # drawing
    temperature: float = 0.8  # 0: the likeliest token; 1: as the model says; below 1: bolder
    top_k: int | None = 200  # draw among the k likeliest
    top_p: float | None = None  # draw among the fewest that hold this share of probability
    min_p: float | None = None  # draw among those at least this share as likely as the likeliest
    repetition_penalty: float = 1.0  # above 1: tokens that occurred before become less likely
    seed: int = 1337  # the same seed gives the same text

    def __post_init__(self):
        floats = "temperature top_p min_p repetition_penalty"
        require(self, floats, math.isfinite, "be a finite number")
        require(self, "top_k", lambda value: value >= 1, "be at least 1")
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

    def filters(self):
        """How to draw from logits, as glass.generate.sample takes it, a dict."""
        names = ("temperature", "top_k", "top_p", "min_p")
        return {name: getattr(self, name) for name in names}


@dataclass
class Loaded:
    """A model that is ready to generate, and what goes with it."""

    model: torch.nn.Module
    tokenizer: bpe.Tokenizer
    ends: list  # the ids that end a text
    state: dict | None  # of the checkpoint; None for published weights
    name: str = "the model"  # the folder that it is from
    compiled_decode: object = None  # of glass.generate.speed_up
    last_trace: object = None  # the glass.trace.Trace of the text last looked into

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

    @property
    def answers_exactly(self):
        """Whether the model was tuned on answers of which one alone is right."""
        return bool(self.state and self.state["task"].get("compares_answers"))

    @property
    def sure_above(self):
        """The mean log-probability above which nearly all of its right answers lie, or None."""
        return self.state and self.state["task"].get("sure_above")


def load_model(settings, dtype=None):
    """The Loaded model of a run or of published weights; dtype overrides that of the settings."""
    s, device = settings, choose_device(settings.device)
    dtype = dtype or choose_dtype(s.dtype, device)
    if s.dtype == "auto" and s.quantize and not s.compile:
        dtype = torch.float32  # with eager int8 it was 13% faster on a CPU
    source = s.init_from
    if s.out_dir and s.init_from != "resume":
        raise ValueError(
            f"out_dir={s.out_dir} and init_from={s.init_from} name two models: leave one out"
        )
    if s.init_from == "resume":
        source = s.out_dir or checkpoint.newest_run()
        model, tokenizer, state = weights.load_run(source, s.which)
        print(f"{source}, step {state['step']}", file=sys.stderr)
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
    model = model.to(device, dtype).eval()
    with torch.no_grad():
        gives_numbers = model(torch.zeros(1, 1, dtype=torch.int64, device=device))[0].isfinite()
    if not bool(gives_numbers.all()):
        raise ValueError(
            f"the logits of {source} are not finite, so the run has diverged: train again with a "
            "lower learning_rate, or take an earlier checkpoint"
        )
    return Loaded(model, tokenizer, stop_ids(tokenizer), state, name=str(source))


def check_known(tokenizer, text, name="the text"):
    """ValueError where the tokenizer does not know some of the text's characters."""
    if unknown := tokenizer.unknown_characters(text):
        shown = " ".join(map(repr, unknown[:10]))
        raise ValueError(f"the tokenizer does not know {shown} of {name[:200]!r}: leave them out")


def encode_prompt(tokenizer, text):
    """The ids of a text that the model is to continue; never none.

    The string of the token that ends a text becomes that token. Where the model expects a token
    first, it is put there.
    """
    allowed = {bpe.END_OF_TEXT} & tokenizer.special_tokens.keys()
    ids = tokenizer.encode(text or "".join(allowed) or "\n", allowed_special=allowed)
    bos_id = getattr(tokenizer, "bos_id", None)
    return ids if bos_id is None else [bos_id, *ids]


def check_classifies(loaded, name):
    """ValueError where the model `name` has no classes."""
    if not (loaded.state and loaded.state["task"].get("labels")):
        raise ValueError(
            f"{name} has no classification head: train one with finetune.py --task=classify"
        )


@torch.no_grad()
def classify(loaded, text):
    """(labels, their probabilities) of a text, two lists; the model must have classes.

    Raises ValueError for an empty text.
    """
    if not text.strip():
        raise ValueError("classify='' has no token: give a text")
    check_known(loaded.tokenizer, text, "the text to classify")
    model, state = loaded.model, loaded.state
    longest = min(state["settings"]["block_size"], model.config.block_size)  # as in training
    ids, _ = encode_for_class(loaded.tokenizer, text, longest)
    idx = torch.tensor([ids], device=model.device)  # (1, T)
    lengths = torch.tensor([len(ids)], device=model.device)  # (1,)
    probs = model.classify(idx, lengths)[0].softmax(-1)  # (n_classes,)
    return state["task"]["labels"], probs.tolist()
