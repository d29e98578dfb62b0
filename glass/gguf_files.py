"""A model as one GGUF file, which llama.cpp and what is built on it run: `sample.py --export x.gguf`.

GPT-2's, Llama's, Qwen2's and Qwen3's kinds can be written, in float32, bfloat16 or q8_0: int8 with a
scale for each 32 weights. Names and keys are those of llama.cpp's own converter. Needs the package
gguf.
"""

import re
from pathlib import Path

import torch

import bpe
from glass.files import replacing
from glass.layouts import GPT2, LLAMA, OWN, published_config
from glass.weights import published_stop_ids, published_tensors
from model import rope_frequencies

MODULES = {  # Hugging Face's names, with * for the number of the block, to llama.cpp's
    "transformer.wte": "token_embd",
    "transformer.wpe": "position_embd",
    "transformer.h.*.ln_1": "blk.*.attn_norm",
    "transformer.h.*.attn.c_attn": "blk.*.attn_qkv",
    "transformer.h.*.attn.c_proj": "blk.*.attn_output",
    "transformer.h.*.ln_2": "blk.*.ffn_norm",
    "transformer.h.*.mlp.c_fc": "blk.*.ffn_up",
    "transformer.h.*.mlp.c_proj": "blk.*.ffn_down",
    "transformer.ln_f": "output_norm",
    "model.embed_tokens": "token_embd",
    "model.layers.*.input_layernorm": "blk.*.attn_norm",
    "model.layers.*.self_attn.q_proj": "blk.*.attn_q",
    "model.layers.*.self_attn.k_proj": "blk.*.attn_k",
    "model.layers.*.self_attn.v_proj": "blk.*.attn_v",
    "model.layers.*.self_attn.o_proj": "blk.*.attn_output",
    "model.layers.*.self_attn.q_norm": "blk.*.attn_q_norm",
    "model.layers.*.self_attn.k_norm": "blk.*.attn_k_norm",
    "model.layers.*.post_attention_layernorm": "blk.*.ffn_norm",
    "model.layers.*.mlp.gate_proj": "blk.*.ffn_gate",
    "model.layers.*.mlp.up_proj": "blk.*.ffn_up",
    "model.layers.*.mlp.down_proj": "blk.*.ffn_down",
    "model.norm": "output_norm",
    "lm_head": "output",
}
PRE_TOKENIZERS = {"gpt2": "gpt-2", "llama3": "llama-bpe"}  # patterns of bpe.py
WIDTH = 32  # weights that share a scale in q8_0


def save_gguf(model, path, tokenizer=None, quantize=None):
    """Write a model, and its tokenizer if given, as the GGUF file `path`, in the model's dtype.

    quantize='int8' writes matrices as q8_0. Gives lines about what the file lacks. Raises ValueError
    for a model that llama.cpp cannot run, and FileExistsError where there is a file.
    """
    try:
        import gguf
    except ImportError as error:
        raise OSError(f"{path} needs the package gguf: pip install gguf") from error
    path, config = Path(path), model.config
    layout, _ = published_config(config)
    if layout is OWN or config.mlp in ("relu2", "gelu_exact"):
        raise ValueError(
            f"llama.cpp cannot run a model of these parts (mlp={config.mlp} pos={config.pos} "
            f"norm={config.norm} smear={config.smear} embed_skip={config.embed_skip}): "
            "export to a folder, which transformers loads"
        )
    if path.exists():
        raise FileExistsError(f"{path} is there already: remove it, or choose another name")
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = []
    with replacing(path) as partial:
        writer = gguf.GGUFWriter(partial, layout.model_type)
        describe(writer, config, layout, path.stem)
        lines += add_tokenizer(writer, tokenizer, config.vocab_size)
        types, whole = gguf.GGMLQuantizationType, 0
        wanted = types.Q8_0 if quantize else types.BF16 if model.dtype == torch.bfloat16 else None
        files = gguf.LlamaFileType
        kinds = {types.Q8_0: files.MOSTLY_Q8_0, types.BF16: files.MOSTLY_BF16, None: files.ALL_F32}
        writer.add_file_type(kinds[wanted])
        for name, tensor in tensors_of(model, layout):
            array, kind = tensor.float().contiguous().cpu().numpy(), None
            if tensor.ndim == 2 and not name.startswith("position"):
                kind = wanted
                if kind == types.Q8_0 and tensor.shape[1] % WIDTH:
                    kind, whole = None, whole + 1
            if kind is not None:
                array = gguf.quants.quantize(array, kind)
            writer.add_tensor(name, array, raw_dtype=kind)
        if whole:
            lines.append(f"{whole} matrices stay in float32: {WIDTH} does not divide their rows")
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return lines


def describe(writer, config, layout, name):
    """Write the shape of a model under llama.cpp's keys."""
    writer.add_name(name)
    writer.add_context_length(config.block_size)
    writer.add_embedding_length(config.n_embd)
    writer.add_block_count(config.n_layer)
    writer.add_feed_forward_length(config.n_inner)
    writer.add_head_count(config.n_head)
    writer.add_vocab_size(config.vocab_size)
    if layout is GPT2:
        writer.add_layer_norm_eps(config.norm_eps)
        return
    writer.add_head_count_kv(config.n_kv_head)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.norm_eps)


def tensors_of(model, layout):
    """Yield (llama.cpp's name, tensor) of a model. Matrices are (out, in)."""
    config = model.config
    for name, tensor in published_tensors(model, layout).items():
        module, _, leaf = name.rpartition(".")
        layer = re.search(r"\.(\d+)\.", module)
        known = MODULES[module.replace(layer[0], ".*.") if layer else module]
        if layout is GPT2 and re.search("c_attn|c_proj|c_fc", name) and leaf == "weight":
            tensor = tensor.T
        if layout is LLAMA and re.search("[qk]_proj", name):
            heads = config.n_head if "q_proj" in name else config.n_kv_head
            tensor = in_pairs(tensor, heads)
        yield f"{known.replace('*', layer[1]) if layer else known}.{leaf}", tensor
    if config.pos == "rope" and config.rope_scaling:
        plain = config.rope_theta ** -(torch.arange(0, config.head_dim, 2) / config.head_dim)
        yield "rope_freqs.weight", plain / rope_frequencies(config)


def in_pairs(tensor, heads):
    """Rows of a projection (out, in), or its bias (out,), so that RoPE turns neighbouring rows.

    Hugging Face's turn rows i and i + D / 2 of each head; Llama's kind in llama.cpp 2 i and 2 i + 1.
    """
    halves = tensor.view(heads, 2, -1, *tensor.shape[1:])  # (H, 2, D / 2, in)
    return halves.transpose(1, 2).reshape(tensor.shape)


def add_tokenizer(writer, tokenizer, vocab_size):
    """Write a tokenizer of byte-level BPE. Gives lines about what cannot be written."""
    import gguf

    try:
        document = tokenizer.saved if hasattr(tokenizer, "saved") else tokenizer.to_huggingface()
        known = bpe.BPETokenizer.from_huggingface(document)
        pre_tokenizer = PRE_TOKENIZERS[known.pattern]
    except (AttributeError, KeyError, ValueError):
        writer.add_tokenizer_model("none")
        return ["llama.cpp has no tokenizer of this kind: the file takes and gives ids"]
    special = {token["content"] for token in document["added_tokens"] if token["special"]}
    vocabulary = document["model"]["vocab"] | {
        token["content"]: token["id"] for token in document["added_tokens"]
    }
    tokens = [f"[unused{i}]" for i in range(vocab_size)]
    types = [gguf.TokenType.UNUSED] * vocab_size
    for text, i in vocabulary.items():
        tokens[i] = text
        types[i] = gguf.TokenType.CONTROL if text in special else gguf.TokenType.NORMAL
    merges = document["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre_tokenizer)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([each if isinstance(each, str) else " ".join(each) for each in merges])
    begin, stop = getattr(tokenizer, "bos_id", None), published_stop_ids(tokenizer)
    writer.add_add_bos_token(begin is not None)
    if begin is not None or stop:
        writer.add_bos_token_id(begin if begin is not None else stop[0])
    if stop:
        writer.add_eos_token_id(stop[0])
    return []
