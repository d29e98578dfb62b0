import json
import sys

import pytest
import torch

import bpe
import weights
from model import GPT, PRESETS, GPTConfig

# published weights (weights.py)

PARTS_OF_LLAMA = dict(
    vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4
)
SCALED = dict(rope_type="llama3", low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192)
GPT2_PARTS = dict(vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=512)


def scaled(factor):
    rope = SCALED | {"factor": factor, "rope_theta": 500000.0}
    parts = dict(num_hidden_layers=1, num_attention_heads=2)  # 9,000 tokens attend to each other within about a second
    return {"rope_parameters": rope, "max_position_embeddings": 131072} | parts


PUBLISHED_SETTINGS = {
    "gpt2": ("gpt2", {}),
    "gpt2 with an inner size and another activation": ("gpt2", dict(n_inner=80, activation_function="relu2")),
    "gpt2 untied": ("gpt2", dict(tie_word_embeddings=False, activation_function="gelu_pytorch_tanh")),
    "llama 4/4 untied": ("llama", {}),
    "llama 4/2 untied": ("llama", dict(num_key_value_heads=2, rms_norm_eps=1e-5)),
    "llama 4/1 untied": ("llama", dict(num_key_value_heads=1)),
    "llama 4/4 tied": ("llama", dict(tie_word_embeddings=True)),
    "llama 4/2 tied": ("llama", dict(num_key_value_heads=2, tie_word_embeddings=True)),
    "llama head_dim 16": ("llama", dict(head_dim=16, num_key_value_heads=2)),
    "llama attention bias": ("llama", dict(attention_bias=True, num_key_value_heads=2)),
    "llama mlp bias": ("llama", dict(mlp_bias=True, attention_bias=True)),
    "llama scaled by 8": ("llama", scaled(8.0) | dict(num_key_value_heads=2)),
    "llama scaled by 32": ("llama", scaled(32.0) | dict(num_key_value_heads=1, head_dim=32, tie_word_embeddings=True)),
}


def published_model(kind, seed=0, **settings):
    """A random model of transformers, biases and norms included, wide enough apart that a wrong wiring shows."""
    transformers = pytest.importorskip("transformers")
    transformers.logging.set_verbosity_error()
    torch.manual_seed(seed)
    no_stop = dict(initializer_range=0.15, bos_token_id=None, eos_token_id=None)
    if kind == "gpt2":
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**(GPT2_PARTS | no_stop | settings)))
    else:
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**(PARTS_OF_LLAMA | no_stop | settings)))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.15 * torch.randn_like(parameter)
    return model.eval()


@pytest.mark.parametrize("setting", PUBLISHED_SETTINGS)
def test_published_weights_give_the_logits_and_greedy_tokens_of_transformers(setting, tmp_path):
    kind, settings = PUBLISHED_SETTINGS[setting]
    theirs = published_model(kind, **settings)
    theirs.save_pretrained(tmp_path)
    ours = GPT.from_pretrained(tmp_path).eval()
    lengths = [1, 2, 7, 64, 300] + ([9000] if "rope_parameters" in settings else [])
    for T in lengths:
        idx = torch.randint(97, (1, T))
        with torch.no_grad():
            needed, given = theirs(idx).logits, ours(idx)[0]
        assert (needed - given).abs().max() < 1e-4 * needed.abs().max(), f"{T} tokens"  # float32, sums in another order
    prompt = torch.randint(97, (1, 8))
    everything = torch.ones_like(prompt)  # otherwise transformers masks the ids that equal the padding's
    needed = theirs.generate(prompt, attention_mask=everything, max_new_tokens=64, do_sample=False, pad_token_id=0)
    assert ours.generate(prompt, 64, temperature=0).tolist() == needed.tolist()


@pytest.mark.parametrize("setting", PUBLISHED_SETTINGS)
def test_published_weights_come_out_bitwise_as_they_went_in(setting, tmp_path):
    from transformers import AutoModelForCausalLM

    kind, settings = PUBLISHED_SETTINGS[setting]
    theirs = published_model(kind, **settings)
    theirs.save_pretrained(tmp_path / "in")
    GPT.from_pretrained(tmp_path / "in").save_pretrained(tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").eval()
    assert type(again) is type(theirs)
    needed, given = theirs.state_dict(), again.state_dict()
    assert needed.keys() == given.keys() and all(torch.equal(needed[name], given[name]) for name in needed)
    idx = torch.randint(97, (2, 20))
    if settings.get("activation_function") != "gelu_pytorch_tanh":  # comes out as gelu_new, which rounds otherwise
        assert torch.equal(theirs(idx).logits, again(idx).logits)


def test_a_model_without_biases_is_exported_as_gpt2_with_zeros(tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=97, block_size=32, n_layer=2, n_head=4, n_embd=32, bias=False)).eval()
    model.save_pretrained(tmp_path / "out")
    idx = torch.randint(97, (2, 32))
    given = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()(idx).logits
    torch.testing.assert_close(given, model(idx)[0], atol=1e-5, rtol=0)  # float32, sums in another order


def rewrite(path, **changes):
    """Change keys of a JSON file; None as a value removes the key."""
    document = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in document.items() if value is not None}))


def test_older_spellings_of_published_folders_load_alike(tmp_path):
    from safetensors.torch import load_file, save_file

    theirs = published_model("llama", **(scaled(8.0) | dict(num_key_value_heads=2)), tie_word_embeddings=True)
    theirs.save_pretrained(tmp_path / "llama")
    new = GPT.from_pretrained(tmp_path / "llama")
    old_keys = dict(rope_parameters=None, rope_theta=500000.0)
    for name in ("type", "rope_type"):
        scaling = SCALED | {"factor": 8.0}
        rope_type = scaling.pop("rope_type")
        rewrite(tmp_path / "llama/config.json", **old_keys, rope_scaling={name: rope_type} | scaling)
        old = GPT.from_pretrained(tmp_path / "llama")
        assert old.config == new.config and torch.equal(old.frequencies, new.frequencies)

    weights = load_file(tmp_path / "llama/model.safetensors")  # both tied tensors, then only the head's
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    for _ in range(2):
        save_file(weights, tmp_path / "llama/model.safetensors")
        both = GPT.from_pretrained(tmp_path / "llama")
        assert both.head.weight is both.tok_emb.weight and torch.equal(both.tok_emb.weight, new.tok_emb.weight)
        weights.pop("model.embed_tokens.weight", None)

    theirs = published_model("gpt2")
    theirs.save_pretrained(tmp_path / "gpt2")
    prefixed = GPT.from_pretrained(tmp_path / "gpt2").state_dict()
    weights = load_file(tmp_path / "gpt2/model.safetensors")
    weights = {name.removeprefix("transformer."): tensor for name, tensor in weights.items()}
    weights["h.0.attn.bias"] = torch.ones(1, 1, 512, 512)  # the causal mask, as the oldest files hold it
    save_file(weights, tmp_path / "gpt2/model.safetensors")
    bare = GPT.from_pretrained(tmp_path / "gpt2").state_dict()
    assert all(torch.equal(prefixed[name], bare[name]) for name in prefixed)


def test_published_weights_in_shards_any_dtype_and_other_settings(tmp_path):
    theirs = published_model("gpt2").to(torch.bfloat16)
    theirs.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    model = GPT.from_pretrained(tmp_path)
    assert model.dtype == torch.bfloat16 and model.head.weight is model.tok_emb.weight
    assert torch.equal(model.tok_emb.weight, theirs.transformer.wte.weight)
    assert {p.dtype for p in GPT.from_pretrained(tmp_path, dtype="float32").parameters()} == {torch.float32}
    short = GPT.from_pretrained(tmp_path, dtype=torch.float32, block_size=16, dropout=0.1, attention="sdpa")
    assert (short.config.block_size, short.config.dropout, short.config.attention) == (16, 0.1, "sdpa")
    assert torch.equal(short.pos_emb.weight, theirs.transformer.wpe.weight[:16].float())
    for wrong in (dict(n_layer=1), dict(block_size=513), dict(tie_weights=False), dict(layers=2)):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            GPT.from_pretrained(tmp_path, **wrong)


def refusal(folder, **overrides):
    with pytest.raises((ValueError, OSError)) as caught:
        GPT.from_pretrained(folder, **overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_settings_of_published_models_that_are_not_computed_are_refused_by_name(tmp_path):
    published_model("llama").save_pretrained(tmp_path / "llama")
    published_model("gpt2").save_pretrained(tmp_path / "gpt2")
    cases = [
        ("llama", dict(architectures=["MistralForCausalLM"]), "MistralForCausalLM"),
        ("llama", dict(architectures=None, model_type="mamba"), "mamba"),
        ("llama", dict(hidden_act="gelu"), "hidden_act='gelu'"),
        ("llama", dict(rope_parameters=dict(rope_type="yarn", factor=4.0)), "yarn"),
        ("llama", dict(rope_parameters=None, rope_scaling=dict(type="linear", factor=2.0)), "linear"),
        ("llama", dict(rope_parameters=dict(rope_type="llama3", factor=4.0)), "low_freq_factor"),
        ("llama", dict(sliding_window=64), "sliding_window=64"),
        ("llama", dict(quantization_config=dict(bits=4)), "quantization_config"),
        ("llama", dict(hidden_size=None), "hidden_size"),
        ("gpt2", dict(activation_function="gelu"), "activation_function='gelu'"),
        ("gpt2", dict(scale_attn_by_inverse_layer_idx=True), "scale_attn_by_inverse_layer_idx"),
    ]
    for kind, changes, named in cases:
        path = tmp_path / kind / "config.json"
        before = path.read_text()
        rewrite(path, **changes)
        assert named in refusal(tmp_path / kind)
        path.write_text(before)
    (tmp_path / "gpt2/config.json").write_text("{")
    assert "not JSON" in refusal(tmp_path / "gpt2")


def test_damaged_folders_of_published_models_are_refused_in_one_line(tmp_path):
    from safetensors.torch import load_file, save_file

    published_model("llama").save_pretrained(tmp_path, max_shard_size="20KB")
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    shard.rename(tmp_path / "elsewhere")
    assert shard.name in refusal(tmp_path) and "missing" in refusal(tmp_path)
    shard.write_bytes((tmp_path / "elsewhere").read_bytes()[:-100])
    assert shard.name in refusal(tmp_path) and "not a whole safetensors file" in refusal(tmp_path)
    shard.write_bytes((tmp_path / "elsewhere").read_bytes())
    GPT.from_pretrained(tmp_path)

    rewrite(tmp_path / "config.json", intermediate_size=64)
    assert "(48, 32)" in refusal(tmp_path) and "(64, 32)" in refusal(tmp_path) and "_proj.weight" in refusal(tmp_path)
    rewrite(tmp_path / "config.json", intermediate_size=48, num_hidden_layers=3)
    assert "lacks 9 tensors, such as model.layers.2" in refusal(tmp_path)
    rewrite(tmp_path / "config.json", num_hidden_layers=1)
    assert "also holds 9 tensors, such as model.layers.1" in refusal(tmp_path)
    rewrite(tmp_path / "config.json", num_hidden_layers=2, tie_word_embeddings=True)
    assert "lm_head.weight differs from" in refusal(tmp_path)

    single = tmp_path / "single"
    published_model("gpt2").save_pretrained(single)
    weights = load_file(single / "model.safetensors")
    name = "transformer.h.0.attn.c_attn.weight"
    save_file(weights | {name: weights[name].T.contiguous()}, single / "model.safetensors")
    assert name in refusal(single) and "(96, 32)" in refusal(single)
    (single / "model.safetensors").rename(single / "pytorch_model.bin")
    assert "pytorch_model.bin" in refusal(single) and "pickle" in refusal(single)
    (single / "pytorch_model.bin").unlink()
    assert "neither model.safetensors nor" in refusal(single)
    (single / "config.json").unlink()
    assert "no config.json" in refusal(single)


def test_names_of_published_models_lead_to_the_hub_or_to_one_clear_line(monkeypatch):
    assert weights.HUB.keys() == PRESETS.keys()
    assert "did you mean llama3.2-1b" in refusal("lama3.2-1b")
    assert "did you mean gpt2" in refusal("/nowhere/gpt2/out")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert "pip install huggingface_hub" in refusal("gpt2")
    asked = []

    class Hub:
        @staticmethod
        def snapshot_download(name, allow_patterns):
            asked.append(name)
            raise OSError("no network\nand much more")

    monkeypatch.setitem(sys.modules, "huggingface_hub", Hub)
    assert "(no network)" in refusal("llama3.2-1b") and "(no network)" in refusal("HuggingFaceTB/SmolLM2-135M")
    assert asked == ["meta-llama/Llama-3.2-1B", "HuggingFaceTB/SmolLM2-135M"]


def test_exports_name_what_they_cannot_express_and_never_overwrite_other_work(tmp_path, monkeypatch):
    shape = dict(vocab_size=97, block_size=32, n_layer=1, n_head=4, n_embd=32)
    rope = dict(norm="rmsnorm", mlp="swiglu", pos="rope")
    refused = [dict(qk_norm=True), dict(n_kv_head=2), dict(norm="rmsnorm"), dict(mlp="swiglu"), dict(head_dim=16)]
    refused += [rope | wrong for wrong in (dict(mlp="gelu"), dict(norm="layernorm"), dict(o_bias=True), dict(qk_norm=True))]
    for settings in refused:
        name = list(settings)[-1] if "o_bias" in settings or "qk_norm" in settings else next(reversed(settings))
        name = {"pos": "mlp" if settings.get("mlp") == "gelu" else "norm"}.get(name, name)
        with pytest.raises(ValueError, match=f"{name}="):
            GPT(GPTConfig(**shape, **settings)).save_pretrained(tmp_path / "out")
    assert not list(tmp_path.iterdir())

    model = GPT(GPTConfig(**shape))
    model.save_pretrained(tmp_path / "out")
    model.save_pretrained(tmp_path / "out")  # an earlier export makes room
    (tmp_path / "out/notes.txt").write_text("mine")
    with pytest.raises(FileExistsError):
        model.save_pretrained(tmp_path / "out")
    published_model("gpt2").save_pretrained(tmp_path / "theirs")
    with pytest.raises(FileExistsError):
        model.save_pretrained(tmp_path / "theirs")

    def full_disk(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(weights, "save_file", full_disk)
    with pytest.raises(OSError):
        model.save_pretrained(tmp_path / "new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "theirs"]


@pytest.mark.parametrize("kind", ["char", "word"])
def test_exported_tokenizers_encode_alike_in_transformers_and_come_back(kind, tmp_path):
    transformers = pytest.importorskip("transformers")
    text = "To be, or not to be:\n  that is — the question…\t42nd é_x\r\n"
    tokenizer = {"char": bpe.CharTokenizer, "word": bpe.WordTokenizer}[kind].train(text)
    model = GPT(GPTConfig(vocab_size=tokenizer.vocab_size, block_size=32, n_layer=1, n_head=2, n_embd=8))
    model.save_pretrained(tmp_path / "out", tokenizer)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    ours = weights.load_tokenizer(tmp_path / "out")
    again = weights.load_tokenizer(json.loads(json.dumps(ours.to_dict())))
    for sample_text in (text, text[5:30], "Ωne be\n"):
        ids = tokenizer.encode(sample_text)
        assert theirs(sample_text)["input_ids"] == ids == ours.encode(sample_text) == again.encode(sample_text)
        assert theirs.decode(ids) == tokenizer.decode(ids) == ours.decode(ids)
    assert ours.unknown_characters("Ωne be") == tokenizer.unknown_characters("Ωne be")
    assert ours.special_tokens == tokenizer.special_tokens and ours.vocab_size == tokenizer.vocab_size
    assert theirs.eos_token_id == tokenizer.special_tokens[bpe.END_OF_TEXT] == weights.stop_ids(tmp_path / "out")[0]


def byte_level_tokenizer(texts):
    """A small Llama-3-like tokenizers.Tokenizer, which puts <|begin|> before a text."""
    tokenizers = pytest.importorskip("tokenizers")
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|begin|>", "<|eot|>"], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(texts, trainer)
    begin = [("<|begin|>", backend.token_to_id("<|begin|>"))]
    backend.post_processor = tokenizers.processors.TemplateProcessing(single="<|begin|> $A", special_tokens=begin)
    return backend


def test_the_tokenizer_of_a_published_model_follows_our_protocol(tmp_path, monkeypatch):
    text = "the question is the question — is it? 你好\n"
    backend = byte_level_tokenizer([text] * 5)
    backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 7}))
    assert weights.stop_ids(tmp_path) == [7]
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 1]}))
    tokenizer = weights.load_tokenizer(tmp_path)
    assert tokenizer.stop_ids == weights.stop_ids(tmp_path) == [0, 1]
    ids = backend.encode(text).ids
    assert [tokenizer.bos_id, *tokenizer.encode(text)] == ids  # encode itself adds no beginning
    assert tokenizer.decode(ids[1:]) == text and tokenizer.decode_bytes(ids[-5:]) == tokenizer.decode(ids[-5:]).encode()
    assert tokenizer.special_tokens == {"<|begin|>": 0, "<|eot|>": 1} and tokenizer.vocab_size == backend.get_vocab_size()
    assert tokenizer.encode("is<|eot|>", allowed_special="all") == [*tokenizer.encode("is"), 1]
    assert 1 not in tokenizer.encode("is<|eot|>") and tokenizer.decode(tokenizer.encode("is<|eot|>")) == "is<|eot|>"
    assert tokenizer.unknown_characters(text) == []

    model = GPT(GPTConfig(vocab_size=300, block_size=32, n_layer=1, n_head=2, n_embd=8))
    model.save_pretrained(tmp_path / "out", tokenizer)
    assert weights.load_tokenizer(tmp_path / "out").to_dict() == tokenizer.to_dict()
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(OSError, match="pip install tokenizers"):
        weights.load_tokenizer(tmp_path)
