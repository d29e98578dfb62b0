"""What train.py starts from: a fresh model, a checkpoint's or a published one; and whether it fits."""

import math

import torch

from glass import parallel
from glass.device import choose_dtype, free_memory
from glass.progress import say
from glass.run import resumed_config
from glass.weights import load_tokenizer
from model import GPT, count_parameters, model_config

FRESH = ("scratch", "auto")  # the values of init_from that begin with new weights


def build_model(settings, tokenizer, state, processes):
    """(model, way): fresh, as a checkpoint's state describes it, or with published weights.

    way: how the processes share it; see glass/parallel.py. A model that is shared out is never whole
    in a process.
    """
    s = settings
    dtype = choose_dtype(s.dtype, processes.device)
    if state or s.init_from in FRESH:
        config = resumed_config(state, s) if state else model_config(s, tokenizer.vocab_size)
        return parallel.make_model(config, s, processes)
    way = None

    def make(config):
        nonlocal way
        way = parallel.choose_way(s, count_parameters(config), processes)
        return parallel.empty(config, way, processes, dtype) if way in parallel.SHARED else None

    return published_model(s, tokenizer, make).to(processes.device), way


def published_model(settings, tokenizer, make):
    """A model with the published weights that init_from names, checked against the dataset.

    make: see weights.load_pretrained.
    """
    s = settings
    choices = dict(dropout=s.dropout, attn_dropout=s.attn_dropout)
    choices |= dict(attention=s.attention, loss_chunk=s.loss_chunk, recompute=s.recompute)
    model = GPT.from_pretrained(s.init_from, dtype=torch.float32, make=make, **choices)
    check_tokenizer(s.init_from, tokenizer)
    config, vocab_size = model.config, tokenizer.vocab_size
    if s.block_size > config.block_size or vocab_size > config.vocab_size:
        raise ValueError(
            f"block_size={s.block_size} and vocab_size={vocab_size}, but {s.init_from} takes "
            f"at most block_size={config.block_size} and vocab_size={config.vocab_size}: "
            "lower block_size, or prepare the text with its tokenizer"
        )
    return model


def check_tokenizer(name, tokenizer):
    """ValueError where the dataset's tokens are not those that published weights were trained on."""
    try:
        published = load_tokenizer(name)
    except (OSError, ValueError) as error:
        say(f"the tokenizer of {name} cannot be compared with the dataset's: {error}")
        return
    check_same_tokens(tokenizer, published, name)


def check_same_tokens(tokenizer, published, name):
    """ValueError where an id of the tokenizer is another token in `published`, that of `name`."""

    def as_bytes(tokens):
        return [token if isinstance(token, bytes) else token.encode() for token in tokens]

    ours, theirs = as_bytes(tokenizer.tokens), as_bytes(published.tokens)
    wrong = [i for i, token in enumerate(ours) if i >= len(theirs) or token != theirs[i]]
    if wrong:
        i = wrong[0]
        their_token = theirs[i] if i < len(theirs) else None
        raise ValueError(
            f"token {i} is {ours[i]!r} in the dataset but {their_token!r} in {name}: "
            "prepare the text with the tokenizer of these weights"
        )


def check_dataset(settings, dataset, given, state):
    """ValueError where the dataset does not fit the settings, or is not the checkpoint's."""
    vocab_size = dataset.tokenizer.vocab_size
    if given.get("vocab_size", vocab_size) != vocab_size:
        raise ValueError(
            f"vocab_size={given['vocab_size']} but the tokenizer of {dataset.folder} has "
            f"{vocab_size} tokens: leave the setting out"
        )
    if state and (state["data"], state["tokenizer"]) != (dataset.sha256, dataset.tokenizer_dict):
        raise ValueError(
            f"{dataset.folder} is not the data that {settings.out_dir} was trained on (sha256 or "
            "tokenizer differ): restore it, or start a new run"
        )
    tokens = sum(map(len, dataset.splits["val"]))
    if tokens < 2:
        raise ValueError(
            f"the validation split of {dataset.folder} has {tokens} tokens and 2 are needed: "
            "add text, or raise --val_fraction of prepare.py"
        )


def check_memory(settings, vocab_size, device):
    """ValueError where even the least that a new run needs is more than there is.

    That is 16 bytes a parameter (weight, gradient, two moments), a step's rows, and the logits.
    """
    s, config = settings, model_config(settings, vocab_size)
    rows = s.batch_size * s.gradient_accumulation_steps * s.block_size
    scored_at_once = min(s.loss_chunk or math.inf, s.batch_size * s.block_size)
    needed = 16 * count_parameters(config) + 8 * rows + 4 * scored_at_once * vocab_size
    free = free_memory(device)
    if free is not None and needed > free:
        raise ValueError(
            f"a run of n_layer={s.n_layer} n_embd={s.n_embd} block_size={s.block_size} "
            f"batch_size={s.batch_size} needs at least {needed / 1e9:,.1f} GB, and "
            f"{free / 1e9:,.1f} GB of {device} are free: lower one of them"
        )
