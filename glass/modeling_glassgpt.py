"""A model of glassGPT for transformers, where none of its own classes computes the same.

    AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)

An export has this file beside model.py, which is glassGPT's own and computes everything. This gives
it transformers' interface: masks of left-padded rows, its cache, labels.
"""

import dataclasses

import torch
from torch.nn import functional as F
from transformers import DynamicCache, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from .model import GPT, GPTConfig, rope_frequencies

NAMES = {
    "vocab_size": "vocab_size",
    "hidden_size": "n_embd",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "num_key_value_heads": "n_kv_head",
    "head_dim": "head_dim",
    "max_position_embeddings": "block_size",
    "tie_word_embeddings": "tie_weights",
}


class GlassGPTConfig(PretrainedConfig):
    """gpt: GPTConfig's settings, a dict; some of them also by the names that transformers reads."""

    model_type = "glassgpt"

    def __init__(self, gpt=None, **settings):
        self.gpt = gpt or dataclasses.asdict(GPTConfig())
        for theirs, ours in NAMES.items():
            settings[theirs] = self.gpt[ours]
        self.use_cache = settings.pop("use_cache", True)
        super().__init__(**settings)


class Memory:
    """What model.py asks of a cache, kept in one of transformers'."""

    def __init__(self, past, previous_ids):
        self.past, self.previous_ids = past, previous_ids

    def append(self, layer, k, v, positions):
        """Store k, v (B, Hkv, T, D). Gives all keys and values, (B, Hkv, S, D)."""
        return self.past.update(k, v, layer)

    def previous(self, idx, positions):
        """The id before each of idx (B, T); what is before the first one does not matter."""
        return self.previous_ids


class GlassGPTForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = GlassGPTConfig
    base_model_prefix = "gpt"
    _tied_weights_keys = {"gpt.head.weight": "gpt.tok_emb.weight"}

    def __init__(self, config):
        super().__init__(config)
        self.gpt = GPT(GPTConfig(**config.gpt))
        self.post_init()

    def _init_weights(self, module):
        """Nothing: model.py draws its own weights."""

    def get_input_embeddings(self):
        return self.gpt.tok_emb

    def get_output_embeddings(self):
        return self.gpt.head

    def prepare_inputs_for_generation(self, input_ids, **kwargs):
        inputs = super().prepare_inputs_for_generation(input_ids, **kwargs)
        before = F.pad(input_ids[:, :-1], (1, 0))
        return inputs | {"previous_ids": before[:, -inputs["input_ids"].shape[1] :]}

    def forward(
        self,
        input_ids,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        use_cache=None,
        labels=None,
        logits_to_keep=0,
        previous_ids=None,
        **unused,
    ):
        """input_ids (B, T) -> logits (B, T, V) in float32; attention_mask (B, S): 0 for padding.

        previous_ids (B, T): the id before each, which generate gives; without a cache it is not
        needed.
        """
        gpt, (B, T) = self.gpt, input_ids.shape
        if use_cache is None:
            use_cache = not self.training and self.config.use_cache
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache()
        seen = past_key_values.get_seq_length() if past_key_values is not None else 0
        if previous_ids is None:
            if seen and gpt.config.smear:
                raise ValueError("smear needs previous_ids beside a cache: call generate")
            previous_ids = F.pad(input_ids[:, :-1], (1, 0))
        if attention_mask is None:
            attention_mask = input_ids.new_ones(B, seen + T)
        if position_ids is None:
            position_ids = attention_mask.long().cumsum(-1)[:, -T:] - 1
        positions = position_ids.expand(B, T).clamp(min=0)
        slots = torch.arange(seen + T, device=input_ids.device)
        hidden = (slots > slots[seen:, None]) | (attention_mask == 0)[:, None]  # (B, T, S)
        # a row of padding sees nothing, and -inf everywhere would make it NaN
        lowest = torch.finfo(gpt.dtype).min
        mask = torch.zeros(hidden.shape, device=hidden.device).masked_fill(hidden, lowest)[:, None]
        memory = Memory(past_key_values, previous_ids)
        if getattr(gpt.pos_emb, "frequencies", slots).is_meta:  # made while weights were not there
            gpt.pos_emb.frequencies = rope_frequencies(gpt.config)
        embedded = gpt.embed_tokens(gpt.tok_emb, input_ids, positions, memory)
        embedded, rotation = gpt.pos_emb(embedded, positions)
        x = embedded = gpt.dropout(embedded)
        for layer, block in enumerate(gpt.blocks):
            x = gpt.block_input(x, embedded, layer)
            cache = memory if past_key_values is not None else None
            x = block(x, positions, rotation, mask, cache)  # (B, T, C)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = gpt.head(gpt.final_norm(x)[:, kept]).float()
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=past_key_values)
