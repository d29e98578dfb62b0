"""The model that finetune.py trains: what it starts from, and which of its parameters are trained."""

from dataclasses import replace
from fnmatch import fnmatch

import torch

import bpe
from glass import parallel, weights
from glass.chat import MARKERS
from glass.progress import say
from glass.run import resumed_config
from glass.settings import with_role
from glass.stage import labels_of
from model import GPTConfig

LORA = {"lora_rank", "lora_alpha", "lora_targets"}
# the settings of the model that fine-tuning chooses; all others come with the model that is tuned
CHOOSABLE = with_role(GPTConfig, "tunable") | with_role(GPTConfig, "free") | LORA


def build_model(settings, records, state, processes):
    """(model, tokenizer, way): as the checkpoint's state says, or the base with what the stage adds.

    way: how the processes share it; see glass/parallel.py. A stage may add LoRA, a classification
    head, and the tokens of its template. It keeps a head that was trained on the same labels.
    """
    s = settings
    if state:
        model, way = parallel.make_model(resumed_config(state, s), s, processes)
        return model, weights.load_tokenizer(state["tokenizer"]), way
    base = weights.open_model(s.init_from)
    tokenizer = base.tokenizer
    if s.template == "markers" and s.task != "classify":
        tokenizer = bpe.with_special_tokens(tokenizer, (*MARKERS.values(), bpe.END))
    labels = labels_of(records) if s.task == "classify" else None
    old_labels = base.state["task"].get("labels") if base.state else None
    changed = {name: getattr(s, name) for name in CHOOSABLE}
    changed["n_classes"] = len(labels) if labels else None
    changed["vocab_size"] = max(base.config.vocab_size, tokenizer.vocab_size)
    model, way = parallel.make_model(replace(base.config, **changed), s, processes)
    fill_from(base, model, keeps_head=labels is not None and old_labels == labels)
    return model, tokenizer, way


@torch.no_grad()
def fill_from(base, model, keeps_head):
    """Give a model the weights of a Base, each process its rows. Others stay as they were drawn.

    New rows, those of tokens that the base has not, begin as the mean of its rows.
    """
    own = model.state_dict()
    missing = set(own)
    for name, tensor in base.tensors(own):
        if name.startswith("classifier") and not keeps_head:
            continue
        if n_new := len(own[name]) - len(tensor):
            tensor = tensor.float()
            tensor = torch.cat([tensor, tensor.mean(0, keepdim=True).expand(n_new, -1)])
        own[name].copy_(parallel.shard_like(tensor, own[name]))
        missing.discard(name)
    if model.config.tie_weights:
        missing.discard("head.weight")
    assert all("lora_" in name or name.startswith("classifier") for name in missing), missing


def freeze(model, settings):
    """Freeze every parameter outside of --trainable, and those that match --freeze."""
    s = settings
    last_block = f"blocks.{len(model.blocks) - 1}."
    head = ("head.", "tok_emb.", "final_norm.")  # a tied head goes by the name of tok_emb
    if s.task == "classify":
        head = ("classifier.", "final_norm.")
        if not model.config.tie_weights and not s.lm_weight:
            model.head.weight.requires_grad_(False)  # class logits come from the classifier
    prefixes = {
        "all": ("",),  # every name starts with the empty string
        "head": head,
        "last_block": (last_block, *head),
        "lora": ("classifier.",),
    }[s.trainable]
    for name, parameter in model.named_parameters():
        is_lora = s.trainable == "lora" and ".lora_" in name
        is_frozen = any(fnmatch(name, pattern) for pattern in s.freeze.split())
        if is_frozen or not (is_lora or name.startswith(prefixes)):
            parameter.requires_grad_(False)
    n = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = model.parameter_count()
    if not n:
        raise ValueError(
            f"trainable={s.trainable} freeze={s.freeze!r} leave nothing to train: freeze less"
        )
    for pattern in s.freeze.split():
        if not any(fnmatch(name, pattern) for name, _ in model.named_parameters()):
            raise ValueError(
                f"freeze={pattern!r} matches no parameter: see model.named_parameters()"
            )
    say(f"{n:,} of {total:,} parameters are trained ({n / total:.1%})")
