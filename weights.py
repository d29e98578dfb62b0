"""Published weights in and out: Hugging Face folders of the GPT-2 and Llama kinds, with their tokenizers.

    model = GPT.from_pretrained("llama3.2-1b")           # a preset, a name on the hub, or a folder
    tokenizer = load_tokenizer("llama3.2-1b")
    model.save_pretrained("out/export", tokenizer)       # a folder that transformers loads

A folder holds config.json and model.safetensors, or the shards that model.safetensors.index.json names. GPT-2's kind is
GPT2LMHeadModel, Llama's LlamaForCausalLM (Llama 3, SmolLM2, TinyLlama ...). Anything else is refused by name: a model
that loads is the published model. The tables on top are the only home of Hugging Face's names.
"""

import difflib
import json
import os
import re
import shutil
import tempfile
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

import bpe
import checkpoint
from model import GPT, GPTConfig, choose_device, choose_dtype

HUB = {  # where the presets of model.py are published
    "gpt2": "openai-community/gpt2",
    "gpt2-medium": "openai-community/gpt2-medium",
    "gpt2-large": "openai-community/gpt2-large",
    "gpt2-xl": "openai-community/gpt2-xl",
    "llama3-8b": "meta-llama/Meta-Llama-3-8B",
    "llama3-70b": "meta-llama/Meta-Llama-3-70B",
    "llama3.1-8b": "meta-llama/Llama-3.1-8B",
    "llama3.1-70b": "meta-llama/Llama-3.1-70B",
    "llama3.2-1b": "meta-llama/Llama-3.2-1B",
    "llama3.2-3b": "meta-llama/Llama-3.2-3B",
}
CONFIG, INDEX, SINGLE = "config.json", "model.safetensors.index.json", "model.safetensors"
GENERATION, TOKENIZER, TOKENIZER_CONFIG = "generation_config.json", "tokenizer.json", "tokenizer_config.json"
DOWNLOADED = [CONFIG, INDEX, "model*.safetensors", GENERATION, TOKENIZER, TOKENIZER_CONFIG, "chat_template.jinja"]


@dataclass
class Kind:
    """How one architecture of Hugging Face is written. Names of tensors: * is the block; several of ours are rows of one."""

    architecture: str
    model_type: str
    prefix: str  # of every tensor but the head's; files of the bare model lack it
    modules: dict  # their module: ours
    settings: dict  # their key: (ours, its value where config.json has none); ... means that it must be there
    supported: dict  # their key: the values that we compute, the default first; None is an absent key or null
    transposed: tuple = ()  # modules whose weight is stored (in, out)
    ignored: str = r"$^"  # tensors that hold no weights


GPT2 = Kind(
    architecture="GPT2LMHeadModel",
    model_type="gpt2",
    prefix="transformer.",
    modules={
        "wte": "tok_emb",
        "wpe": "pos_emb",
        "h.*.ln_1": "blocks.*.attn_norm",
        "h.*.attn.c_attn": "blocks.*.attn.q_proj blocks.*.attn.k_proj blocks.*.attn.v_proj",
        "h.*.attn.c_proj": "blocks.*.attn.o_proj",
        "h.*.ln_2": "blocks.*.mlp_norm",
        "h.*.mlp.c_fc": "blocks.*.mlp.up_proj",
        "h.*.mlp.c_proj": "blocks.*.mlp.down_proj",
        "ln_f": "final_norm",
        "lm_head": "head",
    },
    settings={
        "vocab_size": ("vocab_size", ...),
        "n_positions": ("block_size", 1024),
        "n_embd": ("n_embd", ...),
        "n_layer": ("n_layer", ...),
        "n_head": ("n_head", ...),
        "n_inner": ("n_inner", None),
        "layer_norm_epsilon": ("norm_eps", 1e-5),
        "tie_word_embeddings": ("tie_weights", True),
    },
    supported={
        "activation_function": ("gelu_new", "gelu_pytorch_tanh", "gelu", "relu2"),
        "scale_attn_weights": (True, None),
        "scale_attn_by_inverse_layer_idx": (False, None),
        "add_cross_attention": (False, None),
        "quantization_config": (None,),
    },
    transposed=("c_attn", "c_proj", "c_fc"),
    ignored=r"h\.\d+\.attn\.(bias|masked_bias)$",  # the causal mask
)

LLAMA = Kind(
    architecture="LlamaForCausalLM",
    model_type="llama",
    prefix="model.",
    modules={
        "embed_tokens": "tok_emb",
        "layers.*.input_layernorm": "blocks.*.attn_norm",
        "layers.*.self_attn.q_proj": "blocks.*.attn.q_proj",
        "layers.*.self_attn.k_proj": "blocks.*.attn.k_proj",
        "layers.*.self_attn.v_proj": "blocks.*.attn.v_proj",
        "layers.*.self_attn.o_proj": "blocks.*.attn.o_proj",
        "layers.*.post_attention_layernorm": "blocks.*.mlp_norm",
        "layers.*.mlp.gate_proj": "blocks.*.mlp.gate_proj",
        "layers.*.mlp.up_proj": "blocks.*.mlp.up_proj",
        "layers.*.mlp.down_proj": "blocks.*.mlp.down_proj",
        "norm": "final_norm",
        "lm_head": "head",
    },
    settings={
        "vocab_size": ("vocab_size", ...),
        "max_position_embeddings": ("block_size", 2048),
        "hidden_size": ("n_embd", ...),
        "num_hidden_layers": ("n_layer", ...),
        "num_attention_heads": ("n_head", ...),
        "num_key_value_heads": ("n_kv_head", None),
        "head_dim": ("head_dim", None),
        "intermediate_size": ("n_inner", ...),
        "rms_norm_eps": ("norm_eps", 1e-6),
        "mlp_bias": ("bias", False),
        "attention_bias": ("qkv_bias", False),
        "tie_word_embeddings": ("tie_weights", False),
    },
    supported={
        "hidden_act": ("silu", "swish", None),
        "sliding_window": (None,),
        "quantization_config": (None,),
    },
    ignored=r"layers\.\d+\.self_attn\.rotary_emb\.inv_freq$",
)
KINDS = (GPT2, LLAMA)
BY_TYPE = {kind.model_type: kind.architecture for kind in KINDS}  # for a config.json that names no architecture
LLAMA3_SCALING = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
# settings that say what the weights mean: a loaded model keeps them
ARCHITECTURE = set("vocab_size n_layer n_head n_kv_head n_embd head_dim n_inner bias qkv_bias o_bias norm mlp pos".split())
ARCHITECTURE |= {"qk_norm", "tie_weights", "smear", "embed_skip"}


def load_model(name_or_folder, which="best", dtype=None):
    """(model, tokenizer, checkpoint state) of a run's folder, in float32 and with LoRA merged, or of published weights.

    which: the 'best' or the 'last' checkpoint of a run; a run without a best one gives the last. The state is None for
    published weights. dtype is theirs only: see `load_pretrained`.
    """
    if checkpoint.saved_steps(name_or_folder):
        return load_run(name_or_folder, which)
    folder = find_folder(name_or_folder)
    return load_pretrained(folder, dtype=dtype), load_tokenizer(folder), None


def load_run(folder, which="best"):
    """(model, tokenizer, checkpoint state) of a run's folder: see `load_model`."""
    state = checkpoint.load(folder, which if (Path(folder) / "best.pt").exists() else "last")
    model = GPT(GPTConfig(**state["model_config"]))
    model.load_state_dict(state["model"])
    model.merge_lora()
    return model, load_tokenizer(state["tokenizer"]), state


def find_folder(name_or_folder):
    """The local folder of a published model: the one given, or that of a preset or hub name, downloaded once.

    Raises ValueError for a name that is neither, OSError where it cannot be fetched.
    """
    name = str(name_or_folder)
    if Path(name).is_dir():
        return Path(name)
    if name not in HUB and not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name):
        nearest = difflib.get_close_matches(name.lower(), HUB, n=1, cutoff=0)[0]
        what = f"{name!r} is no folder, no preset and no owner/name on the hub"
        raise ValueError(f"{what}: did you mean {nearest}? Presets: {' '.join(HUB)}")
    hub_name = HUB.get(name, name)
    advice = f"or download {hub_name} elsewhere and give the folder"
    try:
        import huggingface_hub
    except ImportError as error:
        what = f"{name!r} is no folder here, and the hub needs a package"
        raise OSError(f"{what}: pip install huggingface_hub, {advice}") from error
    try:
        return Path(huggingface_hub.snapshot_download(hub_name, allow_patterns=DOWNLOADED))
    except (OSError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        what = f"{name!r} is no folder here and could not be downloaded ({reason})"
        raise OSError(f"{what}: check name and network, {advice}") from error


def read_json(path, default=None):
    """What a JSON file holds; `default` where there is no such file. Raises ValueError where it is not JSON."""
    if not path.is_file():
        return default
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}): download it again") from error


def read_config(folder):
    """The Kind of a folder and the GPTConfig of its config.json. Raises ValueError for whatever we do not compute."""
    path = folder / CONFIG
    found = read_json(path)
    if found is None:
        raise ValueError(f"{folder} has no {CONFIG}: give a folder of a published model, as Hugging Face stores it")
    architectures = found.get("architectures") or []
    kinds = [kind for kind in KINDS if kind.architecture in (architectures or [BY_TYPE.get(found.get("model_type"))])]
    if not kinds:
        names = " or ".join(kind.architecture for kind in KINDS)
        what = f"architectures={architectures} model_type={found.get('model_type')!r}"
        raise ValueError(f"{path} says {what} but {names} is needed: choose such a model")
    kind = kinds[0]
    for key, values in kind.supported.items():
        if found.get(key, values[0]) not in values:
            raise ValueError(f"{path} says {key}={found[key]!r} but only {values} can be computed: choose another model")
    if missing := [key for key, (_, default) in kind.settings.items() if default is ... and found.get(key) is None]:
        raise ValueError(f"{path} lacks {' '.join(missing)}: download it again")
    settings = {}
    for key, (ours, default) in kind.settings.items():
        settings[ours] = default if found.get(key) is None else found[key]
    if kind is GPT2:
        mlp = {"relu2": "relu2", "gelu": "gelu_exact"}.get(found.get("activation_function"), "gelu")
        return kind, GPTConfig(**settings, bias=True, mlp=mlp, norm="layernorm", pos="learned")
    theta, scaling = read_rope(path, found)
    parts = dict(mlp="swiglu", norm="rmsnorm", pos="rope", rope_theta=theta, rope_scaling=scaling)
    return kind, GPTConfig(**settings, o_bias=settings["qkv_bias"], **parts)


def read_rope(path, found):
    """rope_theta and rope_scaling, from the new key rope_parameters or from the older two."""
    rope = found.get("rope_parameters") or found.get("rope_scaling") or {}
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type not in ("default", "llama3") or rope.get("partial_rotary_factor", 1) != 1:
        what = f"{path} says rope_type={rope_type!r} in {rope}"
        raise ValueError(f"{what} but only 'default' and 'llama3', over whole heads, can be computed: choose another model")
    theta = float(rope.get("rope_theta") or found.get("rope_theta") or 10000.0)
    if rope_type == "default":
        return theta, None
    if missing := [key for key in LLAMA3_SCALING if key not in rope]:
        raise ValueError(f"{path} lacks {' '.join(missing)} of rope_type='llama3': download it again")
    return theta, {key: rope[key] for key in LLAMA3_SCALING}


def tensor_files(folder):
    """The file that holds each tensor, by the tensor's name. Raises ValueError where one is missing or not whole."""
    index = read_json(folder / INDEX)
    if (folder / SINGLE).is_file():
        paths = [folder / SINGLE]
    elif index is not None:
        paths = [folder / name for name in sorted(set(index["weight_map"].values()))]
    elif pickles := sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern)):
        reason = "a pickle, which can run any code when it is read"
        raise ValueError(f"{folder} holds its weights as {pickles[0]}, {reason}: get {SINGLE}, or convert it with safetensors")
    else:
        raise ValueError(f"{folder} has neither {SINGLE} nor {INDEX}: download the weights into it")
    files = {}
    for path in paths:
        if not path.is_file():
            raise ValueError(f"{path} is missing but {INDEX} names it: download this shard again")
        try:
            with safe_open(path, framework="pt") as file:
                files.update(dict.fromkeys(file.keys(), path))
        except SafetensorError as error:
            raise ValueError(f"{path} is not a whole safetensors file ({error}): download it again") from error
    return files


def tensor_names(kind, state, prefix):
    """(their name, our names, transposed?) of every tensor of a model whose state_dict is `state`."""
    n_layer = len({name.split(".")[1] for name in state if name.startswith("blocks.")})
    for theirs, ours in kind.modules.items():
        for layer in range(n_layer) if "*" in theirs else [0]:
            for leaf in ("weight", "bias"):
                names = [f"{name}.{leaf}".replace("*", str(layer)) for name in ours.split()]
                if names[0] in state:
                    name = f"{'' if theirs == 'lm_head' else prefix}{theirs}.{leaf}".replace("*", str(layer))
                    yield name, names, leaf == "weight" and theirs.split(".")[-1] in kind.transposed


def join(tensors, transposed):
    """One tensor as it is stored, from ours: rows under each other, then transposed where the file has (in, out)."""
    tensor = tensors[0] if len(tensors) == 1 else torch.cat(tensors)
    return tensor.T if transposed else tensor


def load_pretrained(name_or_folder, dtype=None, device="cpu", **overrides):
    """The published model of a folder, preset or hub name, as a GPT.

    dtype None keeps that of the file (training wants torch.float32). overrides are settings that leave the weights what
    they are: dropout, block_size (learned positions are cropped), attention ... Dropout is 0 unless given. One tensor at a
    time is mapped and copied, so peak memory is that of the weights plus the largest tensor, and the files may change
    afterwards. Raises ValueError for whatever does not fit.
    """
    folder = find_folder(name_or_folder)
    kind, config = read_config(folder)
    if unknown := overrides.keys() - {field.name for field in fields(GPTConfig)}:
        raise ValueError(f"{' '.join(sorted(unknown))} is no setting of a model: see GPTConfig in model.py")
    for name in ARCHITECTURE & overrides.keys():
        if overrides[name] != getattr(config, name):
            given = f"{name}={overrides[name]!r}"
            raise ValueError(f"{given} but the weights of {folder} have {getattr(config, name)!r}: leave it out")
    if config.pos == "learned" and overrides.get("block_size", 0) > config.block_size:
        given = f"block_size={overrides['block_size']}"
        raise ValueError(f"{given} but {folder} has {config.block_size} learned positions: choose at most these")
    files = tensor_files(folder)
    with torch.device("meta"):
        model = GPT(config)

    # what the file must hold, and does it?
    state = model.state_dict()
    prefix = kind.prefix if any(name.startswith(kind.prefix) for name in files) else ""
    names = list(tensor_names(kind, state, prefix))
    embedding, head = names[0][0], "lm_head.weight"
    if config.tie_weights:
        names = [entry for entry in names if entry[0] != head]
        if head in files and embedding not in files:
            files[embedding] = None  # read under the head's name
        elif head in files and not torch.equal(read_tensor(files, head), read_tensor(files, embedding)):
            raise ValueError(f"{folder} says tie_word_embeddings=True but {head} differs from {embedding}: correct {CONFIG}")
    needed = {name for name, _, _ in names}
    extra = [name for name in files.keys() - needed - {head if config.tie_weights else ""} if not re.search(kind.ignored, name)]
    for problem, bad in (("lacks", needed - files.keys()), ("also holds", extra)):
        if bad:
            what = f"{folder} {problem} {len(bad)} tensors, such as {min(bad)}"
            raise ValueError(f"{what}, but needs those that {CONFIG} describes: download both again")

    device = choose_device(str(device))
    dtype = choose_dtype(dtype, device) if isinstance(dtype, str) else dtype
    config = replace(config, **overrides)
    for theirs, ours, transposed in names:
        tensor = read_tensor(files, theirs if files[theirs] else head)
        shape = tuple(join([state[name] for name in ours], transposed).shape)
        if tuple(tensor.shape) != shape:
            what = f"{theirs} in {folder} has shape {tuple(tensor.shape)}"
            raise ValueError(f"{what} but {CONFIG} asks for {shape}: download both again")
        dtype = tensor.dtype if dtype is None else dtype
        for name, part in zip(ours, (tensor.T if transposed else tensor).chunk(len(ours)), strict=True):
            part = part[: config.block_size] if name == "pos_emb.weight" else part
            state[name] = part.to(device, dtype, copy=True, memory_format=torch.contiguous_format)
        del tensor, part  # and with them the mapping, before the next one
    with torch.device("meta"):
        model = GPT(config)
    if config.tie_weights:
        state["head.weight"] = state["tok_emb.weight"]
    model.load_state_dict(state, assign=True)
    if config.tie_weights:  # assign=True makes two parameters of one tensor
        model.head.weight = model.tok_emb.weight
    return model


def read_tensor(files, name):
    """A tensor as it is stored, mapped from its file until it is dropped."""
    with safe_open(files[name], framework="pt") as file:
        return file.get_tensor(name)


def published_config(config):
    """The Kind that computes the same as a GPTConfig, and its config.json. Raises ValueError naming what it cannot express."""
    kind = LLAMA if config.pos == "rope" else GPT2
    asked = {"qk_norm": False, "smear": False, "embed_skip": False, "lora_rank": None, "n_classes": None}
    if kind is LLAMA:
        asked |= {"norm": "rmsnorm", "mlp": "swiglu", "o_bias": config.qkv_bias}
    else:
        asked |= {"norm": "layernorm", "n_kv_head": config.n_head, "head_dim": config.n_embd / config.n_head}
        asked["mlp"] = "gelu" if config.mlp == "swiglu" else config.mlp
    wrong = [f"{name}={getattr(config, name)}" for name, value in asked.items() if getattr(config, name) != value]
    if kind is LLAMA and config.n_embd % config.n_head:
        wrong.append(f"n_head={config.n_head} that does not divide n_embd={config.n_embd}")
    if config.n_layer == 0:
        wrong.append("n_layer=0")
    if wrong:
        raise ValueError(f"{kind.architecture} cannot express {', '.join(wrong)}: such a model stays a checkpoint of glassGPT")
    written = {"architectures": [kind.architecture], "model_type": kind.model_type}
    written |= {theirs: getattr(config, ours) for theirs, (ours, _) in kind.settings.items()}
    if kind is GPT2:
        written |= {"activation_function": {"gelu": "gelu_new", "gelu_exact": "gelu", "relu2": "relu2"}[config.mlp]}
        written |= dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), config.dropout)
    else:  # the older keys of RoPE, which every reader knows
        scaling = config.rope_scaling and {"rope_type": "llama3", **config.rope_scaling}
        written |= {"hidden_act": "silu", "rope_theta": config.rope_theta, "rope_scaling": scaling}
    return kind, written


def save_pretrained(model, folder, tokenizer=None):
    """Write a folder that transformers' AutoModelForCausalLM, and with a tokenizer AutoTokenizer, load.

    Biases that GPT-2 has and the model lacks are written as zeros, which computes the same. The folder appears whole or not
    at all; one that holds anything but an earlier export is left alone. Raises ValueError for settings that no published
    class expresses, FileExistsError for a folder in use.
    """
    folder = Path(folder).resolve()
    kind, config = published_config(model.config)
    ours = {SINGLE, CONFIG, GENERATION, TOKENIZER, TOKENIZER_CONFIG, "chat_template.jinja"}
    files = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if folder.is_file() or files and (files - ours or "exported_by" not in read_json(folder / CONFIG, {})):
        raise FileExistsError(f"{folder} is in use and is no export of glassGPT: choose another folder")

    state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    if model.config.tie_weights:
        del state["head.weight"]
    if kind is GPT2:
        for name in [name for name in state if not re.match("tok_emb|pos_emb|head", name) and name.endswith("weight")]:
            weight = state[name]
            state.setdefault(name.removesuffix("weight") + "bias", weight.new_zeros(len(weight)))
    names = list(tensor_names(kind, state, kind.prefix))
    if left := state.keys() - {name for _, ours, _ in names for name in ours}:
        what = f"{kind.architecture} has no place for {len(left)} tensors, such as {min(left)}"
        raise ValueError(f"{what}: merge or convert them first")
    tensors = {theirs: join([state[name] for name in ours], transposed).contiguous() for theirs, ours, transposed in names}

    special = tokenizer.special_tokens if tokenizer else {}
    stop = getattr(tokenizer, "stop_ids", None) or [special[name] for name in (bpe.END_OF_TEXT, bpe.END) if name in special]
    tokens = {"bos_token_id": getattr(tokenizer, "bos_id", None), "eos_token_id": stop[0] if len(stop) == 1 else stop or None}
    config |= tokens | {"torch_dtype": str(model.dtype).removeprefix("torch."), "exported_by": "glassGPT"}
    documents = {CONFIG: config, GENERATION: tokens} | (tokenizer_files(tokenizer, model.config) if tokenizer else {})

    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        save_file(tensors, partial / SINGLE, metadata={"format": "pt"})
        for name, document in documents.items():
            (partial / name).write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        partial.chmod(0o755)  # mkdtemp lets only its owner in
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def save_adapter(model, path):
    """Write the LoRA matrices alone, with what they need to be merged again: a few MB of safetensors."""
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items() if ".lora_" in name}
    config = {name: getattr(model.config, name) for name in ("lora_rank", "lora_alpha", "lora_targets")}
    save_file(tensors, path, metadata={"format": "pt", "lora": json.dumps(config)})


def load_adapter(model, path):
    """Merge the LoRA matrices of a file into the model they were trained on. Raises ValueError where they do not fit."""
    try:
        with safe_open(path, framework="pt") as file:
            lora = json.loads((file.metadata() or {}).get("lora", "null"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no dict)
    except (SafetensorError, OSError) as error:
        what = f"adapter={path} is no safetensors file ({error})"
        raise ValueError(f"{what}: give the one that finetune.py --train=lora wrote") from error
    state, scale = dict(model.named_parameters()), lora and lora["lora_alpha"] / lora["lora_rank"]
    products = {}
    for name in (name for name in tensors if name.endswith("lora_b")):
        products[name.replace("lora_b", "weight")] = tensors[name] @ tensors[name.replace("lora_b", "lora_a")] * (scale or 0)
    wrong = [name for name, product in products.items() if name not in state or state[name].shape != product.shape]
    if not lora or not products or wrong:
        what = f"adapter={path} has no place for {wrong[0]}" if wrong else f"adapter={path} holds no LoRA matrices"
        raise ValueError(f"{what}: give the model it was trained on with --out_dir or --init_from")
    with torch.no_grad():
        for name, product in products.items():
            state[name].copy_(state[name].float() + product)


def tokenizer_files(tokenizer, config):
    """tokenizer.json and tokenizer_config.json of any of our tokenizers, as dicts by file name."""
    if tokenizer.vocab_size > config.vocab_size:
        what = f"the tokenizer has {tokenizer.vocab_size} ids but vocab_size={config.vocab_size}"
        raise ValueError(f"{what}: give the tokenizer that the model was trained with")
    if isinstance(tokenizer, HuggingFaceTokenizer):
        return {TOKENIZER: tokenizer.saved, TOKENIZER_CONFIG: tokenizer.config}
    special = tokenizer.special_tokens
    roles = {"unk_token": bpe.UNKNOWN, "pad_token": bpe.PAD, "eos_token": bpe.END_OF_TEXT}
    written = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": config.block_size}
    written |= {"clean_up_tokenization_spaces": False} | {role: token for role, token in roles.items() if token in special}
    if hasattr(tokenizer, "to_huggingface"):
        return {TOKENIZER: tokenizer.to_huggingface(), TOKENIZER_CONFIG: written}
    patterns = {bpe.CharTokenizer: r"[\s\S]", bpe.WordTokenizer: r" ?[\p{L}\p{N}_]+| ?[^\p{L}\p{N}_\s]|\s"}
    if type(tokenizer) not in patterns:
        raise ValueError(f"a {type(tokenizer).__name__} cannot be written as {TOKENIZER}: export without a tokenizer")
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    document = {
        "version": "1.0",
        "added_tokens": [{"id": i, "content": token, **flags} for token, i in special.items()],
        "pre_tokenizer": {
            "type": "Split",
            "pattern": {"Regex": patterns[type(tokenizer)]},
            "behavior": "Isolated",
            "invert": False,
        },
        "decoder": {"type": "Fuse"},
        "model": {
            "type": "WordLevel",
            "vocab": {token: i for i, token in enumerate(tokenizer.tokens)},
            "unk_token": bpe.UNKNOWN,
        },
    }
    document |= dict.fromkeys(("truncation", "padding", "normalizer", "post_processor"))
    return {TOKENIZER: document, TOKENIZER_CONFIG: written}


class HuggingFaceTokenizer(bpe.Tokenizer):
    """A published tokenizer.json behind the protocol of bpe.py, through the package tokenizers.

    `encode` adds nothing to the text. `bos_id` is the id that the model expects before it, None where there is none;
    `config` is tokenizer_config.json (its chat_template, for one).
    """

    def __init__(self, saved, config, stop_ids=()):
        try:
            import tokenizers
        except ImportError as error:
            raise OSError(f"{TOKENIZER} of a published model needs a package: pip install tokenizers") from error
        self.saved, self.config, self.stop_ids = saved, config, list(stop_ids)
        self.backend = tokenizers.Tokenizer.from_str(json.dumps(saved))
        self.backend.encode_special_tokens = True  # the string of a special token is text; Tokenizer.encode finds the allowed
        self.special_tokens = {token["content"]: token["id"] for token in saved["added_tokens"] if token["special"]}
        self.unknown_id = self.backend.token_to_id(saved["model"].get("unk_token") or "")
        before = self.backend.encode("").ids
        bos = config.get("bos_token") if config.get("add_bos_token") else None
        bos = bos["content"] if isinstance(bos, dict) else bos
        self.bos_id = before[0] if before else self.special_tokens.get(bos)
        self.tokens = self.bytes_of_tokens()

    def bytes_of_tokens(self):
        """The bytes of every id: from GPT-2's printable bytes, or from text with ▁ for a space and <0x0A> for a byte."""
        byte_of = {character: byte for byte, character in bpe.printable_bytes().items()}
        byte_level = '"ByteLevel"' in json.dumps(self.saved["decoder"])
        metaspace = "▁" in json.dumps(self.saved["decoder"], ensure_ascii=False)
        vocabulary = self.backend.get_vocab(with_added_tokens=True)
        added = {token["content"] for token in self.saved["added_tokens"]}
        tokens = [b""] * (1 + max(vocabulary.values()))
        for text, i in vocabulary.items():
            if text in added:
                tokens[i] = text.encode("utf-8")
            elif byte_level:
                tokens[i] = bytes(byte_of[character] for character in text)
            elif metaspace and re.fullmatch("<0x[0-9A-F]{2}>", text):
                tokens[i] = bytes([int(text[3:5], 16)])
            else:
                tokens[i] = (text.replace("▁", " ") if metaspace else text).encode("utf-8")
        return tokens

    def encode_ordinary(self, text):
        return self.backend.encode(text, add_special_tokens=False).ids

    def unknown_characters(self, text):
        encoding = self.backend.encode(text, add_special_tokens=False)
        places = [place for i, place in zip(encoding.ids, encoding.offsets, strict=True) if i == self.unknown_id]
        return list(dict.fromkeys(text[start:end] for start, end in places))

    def to_dict(self):
        return {"type": "huggingface", "tokenizer": self.saved, "config": self.config, "stop_ids": self.stop_ids}


def load_tokenizer(source):
    """The tokenizer of a published model (folder, preset or hub name), or of a dict that `to_dict` of any tokenizer gave."""
    if isinstance(source, dict):
        if source.get("type") != "huggingface":
            return bpe.load_tokenizer(source)
        return HuggingFaceTokenizer(source["tokenizer"], source["config"], source["stop_ids"])
    if HUB.get(str(source), str(source)).startswith("openai-community/gpt2"):
        return bpe.BPETokenizer.from_gpt2()
    folder = find_folder(source)
    saved, config = read_json(folder / TOKENIZER), read_json(folder / TOKENIZER_CONFIG, {})
    if saved is not None:
        template = folder / "chat_template.jinja"
        if template.is_file():
            config["chat_template"] = template.read_text(encoding="utf-8")
        return HuggingFaceTokenizer(saved, config, stop_ids(folder))
    kind, shape = read_config(folder)
    if kind is GPT2 and shape.vocab_size == 50257:
        return bpe.BPETokenizer.from_gpt2()
    raise ValueError(f"{folder} has no {TOKENIZER}: download it into the folder")


def stop_ids(name_or_folder):
    """The ids that end a text, from generation_config.json, else from config.json: a list, empty where neither names one."""
    folder = find_folder(name_or_folder)
    for name in (GENERATION, CONFIG):
        ids = read_json(folder / name, {}).get("eos_token_id")
        if ids is not None:
            return list(ids) if isinstance(ids, list) else [ids]
    return []
