"""Published weights, in and out: Hugging Face folders of GPT-2's and Llama's kinds, and tokenizers.

    model = GPT.from_pretrained("llama3.2-1b")           # a preset, a name on the hub, or a folder
    tokenizer = load_tokenizer("llama3.2-1b")
    model.save_pretrained("out/export", tokenizer)       # a folder that transformers loads

A folder holds config.json and model.safetensors, or the shards that model.safetensors.index.json
names. The kinds are in layouts.py: GPT2LMHeadModel, LlamaForCausalLM (Llama 3, SmolLM2, TinyLlama
...), Qwen2ForCausalLM, Qwen3ForCausalLM, and our own. Anything else is refused by name, so a model
that loads computes what the published one does.
"""

import difflib
import hashlib
import json
import math
import os
import re
import shlex
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import NamedTuple

import torch

import bpe
from glass import checkpoint, sharded
from glass.device import choose_device, choose_dtype
from glass.files import first_line, reading, replacing
from glass.hf_tokenizer import TOKENIZER, TOKENIZER_CONFIG, HuggingFaceTokenizer, tokenizer_files
from glass.layouts import (
    CONFIG,
    GPT2,
    OWN,
    QWEN3,
    published_config,
    read_config,
    read_json,
    tensor_names,
)
from glass.parallel import is_shard, shard_like, whole
from model import GPT, GPTConfig

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
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
GENERATION = "generation_config.json"
HERE = Path(__file__).parent
CODE = (HERE / "modeling_glassgpt.py", HERE.parent / "model.py")  # of a model of our own kind
DOWNLOADED = [
    CONFIG,
    INDEX,
    "model*.safetensors",
    GENERATION,
    TOKENIZER,
    TOKENIZER_CONFIG,
    "chat_template.jinja",
]


# The weights mean something else under other values of these settings, so a loaded model keeps
# them.
ARCHITECTURE = set(
    "vocab_size n_layer n_head n_kv_head n_embd head_dim n_inner bias qkv_bias o_bias".split()
)
ARCHITECTURE |= set("norm mlp pos qk_norm qk_norm_weight tie_weights smear embed_skip".split())


def load_model(name_or_folder, which="best", dtype=None):
    """(model, tokenizer, checkpoint state) of a run's folder or of published weights.

    For a run, the model is float32 with LoRA merged. which: its 'best' or 'last' checkpoint, or a
    step; the last if there is no best one. For published weights, the state is None and the dtype
    is chosen as in `load_pretrained`.
    """
    if checkpoint.checkpoint_files(name_or_folder):
        return load_run(name_or_folder, which)
    folder = find_folder(name_or_folder)
    return load_pretrained(folder, dtype=dtype), load_tokenizer(folder), None


def load_run(folder, which="best"):
    """(model, tokenizer, checkpoint state) of a run's folder; see `load_model`."""
    state = checkpoint.load(folder, which)
    model = GPT(GPTConfig(**state["model_config"]))
    model.load_state_dict(state["model"])
    model.merge_lora()
    return model, load_tokenizer(state["tokenizer"]), state


class Base(NamedTuple):
    """A model to go on from, of which nothing is in memory yet."""

    config: GPTConfig
    tokenizer: object
    state: dict | None  # of its checkpoint
    tensors: Callable  # tensors(own) yields (name, tensor); own: parameters, maybe shards


def open_model(name_or_folder):
    """The Base in a run's folder, its best checkpoint, or in a folder of published weights.

    A model with LoRA is merged, and thus whole in memory.
    """
    if not checkpoint.checkpoint_files(name_or_folder):
        folder = find_folder(name_or_folder)
        config, parts = open_published(folder)
        return Base(config, load_tokenizer(folder), None, lambda own: parts())
    state = checkpoint.load(name_or_folder, "best", whole=False)
    config, tokenizer = GPTConfig(**state["model_config"]), load_tokenizer(state["tokenizer"])
    if config.lora_rank is not None:
        model = load_run(name_or_folder)[0]
        return Base(model.config, tokenizer, state, lambda own: model.state_dict().items())
    stored = {key: state[key] for key in ("model", "shards", "path") if key in state}

    def tensors(own):
        like = {f"model.{name}": tensor for name, tensor in own.items() if is_shard(tensor)}
        return sharded.filled(stored, like)["model"].items()

    return Base(config, tokenizer, state, tensors)


def find_folder(name_or_folder):
    """The local folder of a published model.

    It is the folder given, or the download of a preset or hub name, made once. Raises ValueError
    for a name that is neither, and OSError if the download fails.
    """
    name = str(name_or_folder)
    if Path(name).is_dir():
        return Path(name)
    if Path(name).is_file():
        raise ValueError(f"{name} is a file: name its folder, {Path(name).parent}")
    if Path(name).parts[:1] == ("out",):  # where runs go, and no owner on the hub
        raise ValueError(f"{name} holds no run yet: train it first, or name another folder")
    if name not in HUB and not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name):
        nearest = difflib.get_close_matches(name.lower(), HUB, n=1, cutoff=0)[0]
        raise ValueError(
            f"{name!r} is no folder, no preset and no owner/name on the hub: "
            f"did you mean {nearest}? Presets: {' '.join(HUB)}"
        )
    hub_name = HUB.get(name, name)
    try:
        import huggingface_hub
    except ImportError as error:
        raise OSError(
            f"{name!r} is no folder here, and the hub needs the package huggingface_hub: "
            "pip install huggingface_hub, "
            f"or download {hub_name} elsewhere and give the folder"
        ) from error
    try:
        return Path(huggingface_hub.snapshot_download(hub_name, allow_patterns=DOWNLOADED))
    except (OSError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise OSError(
            f"{name!r} is no folder here and cannot be downloaded ({reason}): "
            "check the name and the network, "
            f"or download {hub_name} elsewhere and give the folder"
        ) from error


def tensor_files(folder):
    """A dict from the name of each tensor to the file that holds it.

    Raises ValueError if a file is missing or not whole.
    """
    index = read_json(folder / INDEX)
    pickles = [path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern)]
    if (folder / SINGLE).is_file():
        paths = [folder / SINGLE]
    elif index is not None:
        paths = index_paths(folder, index)
    elif pickles:
        raise ValueError(
            f"{folder} holds its weights as {min(pickles)}, a pickle, which can run any code when "
            f"it is read: get {SINGLE}, or convert it with safetensors"
        )
    else:
        raise ValueError(f"{folder} has neither {SINGLE} nor {INDEX}: download the weights into it")
    import safetensors

    files = {}
    for path in paths:
        if not path.is_file():
            raise ValueError(f"{path} is missing but {INDEX} names it: download this shard again")
        try:
            with safetensors.safe_open(path, framework="pt") as file:
                files.update(dict.fromkeys(file.keys(), path))
        except safetensors.SafetensorError as error:
            raise ValueError(
                f"{path} is not a whole safetensors file ({error}): download it again"
            ) from error
    return files


def index_paths(folder, index):
    """The files that an index names. Raises ValueError for a name that leads out of the folder."""
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    names = set(weight_map.values()) if isinstance(weight_map, dict) else set()
    if not names:
        raise ValueError(f"{folder / INDEX} names no files in weight_map: download it again")
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise ValueError(f"{folder / INDEX} names {name!r}, which is no file of the folder")
    return [folder / name for name in sorted(names)]


def as_stored(tensors, is_transposed):
    """Our tensors as one of their file: joined by rows (out, in), or transposed to (in, out)."""
    tensor = tensors[0] if len(tensors) == 1 else torch.cat(tensors)
    return tensor.T if is_transposed else tensor


def check_overrides(folder, config, overrides):
    """Raise ValueError for settings that no model has, or that change what the weights mean."""
    if unknown := overrides.keys() - {field.name for field in fields(GPTConfig)}:
        raise ValueError(
            f"{' '.join(sorted(unknown))} is no setting of a model: see GPTConfig in model.py"
        )
    for name in ARCHITECTURE & overrides.keys():
        if overrides[name] != getattr(config, name):
            raise ValueError(
                f"{name}={overrides[name]!r} but the weights of {folder} have "
                f"{getattr(config, name)!r}: leave it out"
            )
    if config.pos == "learned" and overrides.get("block_size", 0) > config.block_size:
        raise ValueError(
            f"block_size={overrides['block_size']} but {folder} has {config.block_size} learned "
            "positions: choose at most these"
        )


def plan_tensors(folder, layout, config, state):
    """The tensors to read, a list of (their name, our names, is_transposed, file).

    Raises ValueError if the files lack a tensor, or hold one that the model lacks.
    """
    files = tensor_files(folder)
    has_prefix = any(name.startswith(layout.prefix) for name in files)
    names = list(tensor_names(layout, state, layout.prefix if has_prefix else ""))
    named = {ours[0]: theirs for theirs, ours, _ in names}
    embedding, head = named["tok_emb.weight"], named["head.weight"]
    stored_as = {}  # the name in the file, if it is another
    if config.tie_weights:
        names = [entry for entry in names if entry[0] != head]
        if head in files and embedding not in files:
            files[embedding], stored_as[embedding] = files[head], head
        elif head in files:
            tied = [read_tensor(files[name], name) for name in (head, embedding)]
            if not torch.equal(*tied):
                raise ValueError(
                    f"{folder} says tie_word_embeddings=True but {head} differs from {embedding}: "
                    f"correct {CONFIG}"
                )
    needed = {name for name, _, _ in names}
    if missing := needed - files.keys():
        raise ValueError(
            f"{folder} lacks {len(missing)} tensors, such as {min(missing)}, "
            f"that {CONFIG} describes: download both again"
        )
    known = needed | {head} if config.tie_weights else needed
    extra = [name for name in files.keys() - known if not re.search(layout.ignored, name)]
    if extra:
        raise ValueError(
            f"{folder} also holds {len(extra)} tensors, such as {min(extra)}, "
            f"that {CONFIG} does not describe: download both again"
        )
    return [(stored_as.get(theirs, theirs), *rest, files[theirs]) for theirs, *rest in names]


@torch.no_grad()
def load_pretrained(name_or_folder, dtype=None, device="cpu", make=None, **overrides):
    """The published model of a folder, preset or hub name, as a GPT.

    dtype None keeps the dtype of the file; training wants torch.float32. overrides are settings
    that do not change what the weights mean: dropout (0 unless given), attention, block_size
    (learned positions are cropped) ... Maps and copies one tensor at a time. So peak memory is the
    weights plus the largest tensor, and the files may change afterwards. make: gives a model of the
    config to be filled, whose weights are shards, so that each process reads its own rows; or None.
    Raises ValueError for anything that does not fit.
    """
    folder = find_folder(name_or_folder)
    config, parts = open_published(folder)
    check_overrides(folder, config, overrides)
    device = choose_device(str(device))
    dtype = choose_dtype(dtype, device) if isinstance(dtype, str) else dtype
    if "dropout" in overrides:
        overrides.setdefault("attn_dropout", None)  # then derived from dropout
    config = replace(config, **overrides)
    model = make(config) if make else None
    own, state = model.state_dict() if model else {}, {}
    for name, part in parts():
        part = part[: config.block_size] if name == "pos_emb.weight" else part
        if model:
            own[name].copy_(shard_like(part, own[name]))
            continue
        dtype = part.dtype if dtype is None else dtype
        state[name] = part.to(device, dtype, copy=True, memory_format=torch.contiguous_format)
    if model:
        return model
    with torch.device("meta"):
        model = GPT(config)
    if config.tie_weights:
        state["head.weight"] = state["tok_emb.weight"]
    model.load_state_dict(state, assign=True)
    if config.tie_weights:  # assign=True makes two parameters of one tensor
        model.head.weight = model.tok_emb.weight
    return model


def open_published(folder):
    """(config, parts): parts() yields (name of a parameter, tensor as it is in its mapped file).

    Raises ValueError for anything that does not fit.
    """
    if checkpoint.checkpoint_files(folder):
        raise ValueError(
            f"{folder} is a run's folder, and published weights are needed: go on with "
            f"--init_from=resume --out_dir={shlex.quote(str(folder))}, or tune it with finetune.py"
        )
    with reading(folder / CONFIG, "download it again"):
        layout, config = read_config(folder)
    if config.n_layer > len(
        tensor_files(folder)
    ):  # a model of a million layers takes minutes to make
        raise ValueError(
            f"{folder / CONFIG} says {config.n_layer} layers but the files hold only "
            f"{len(tensor_files(folder))} tensors: download both again"
        )
    with torch.device("meta"):
        state = GPT(config).state_dict()
    plan = plan_tensors(folder, layout, config, state)

    def parts():
        for theirs, ours, is_transposed, path in plan:
            tensor = read_tensor(path, theirs)
            shape = tuple(as_stored([state[name] for name in ours], is_transposed).shape)
            if tuple(tensor.shape) != shape:
                raise ValueError(
                    f"{theirs} in {folder} has shape {tuple(tensor.shape)} but {CONFIG} asks for "
                    f"{shape}: download both again"
                )
            pieces = (tensor.T if is_transposed else tensor).chunk(len(ours))
            yield from zip(ours, pieces, strict=True)
            del tensor, pieces  # unmaps the file before the next tensor

    return config, parts


def read_tensor(path, name):
    """A tensor as it is stored. It is mapped from its file until it is dropped."""
    import safetensors

    with safetensors.safe_open(path, framework="pt") as file:
        return file.get_tensor(name)


def published_tensors(model, layout):
    """A dict of the model's tensors under their names.

    Biases that GPT-2 has and the model lacks become zeros. Raises ValueError for a tensor that the
    layout lacks.
    """
    state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    if model.config.tie_weights:
        del state["head.weight"]
    if layout is GPT2:
        for name in list(state):
            has_bias = name.endswith("weight") and not re.match("tok_emb|pos_emb|head", name)
            if has_bias:
                zeros = state[name].new_zeros(len(state[name]))
                state.setdefault(name.removesuffix("weight") + "bias", zeros)
    if layout is QWEN3 and not model.config.qk_norm_weight:
        scale_for_qwen3(state, model.config)
    names = list(tensor_names(layout, state, layout.prefix))
    if left := state.keys() - {name for _, ours, _ in names for name in ours}:
        raise ValueError(
            f"{layout.architecture} has no place for {len(left)} tensors, such as {min(left)}: "
            "merge or convert them first"
        )
    tensors = {}
    for theirs, ours, is_transposed in names:
        tensor = as_stored([state[name] for name in ours], is_transposed)
        tensors[theirs] = tensor.contiguous()
    return tensors


def scale_for_qwen3(state, config):
    """Give a state dict what Qwen3's QK-norm has: weights, and one eps for all norms.

    x / sqrt(mean x^2 + e) is unchanged by a factor of x, but for e: ours is torch's, theirs norm_eps.
    So queries and keys are multiplied by a power of two, which rounds nothing and brings the two
    within a factor of two of each other.
    """
    ratio = config.norm_eps / torch.finfo(torch.float32).eps
    factor = 2.0 ** round(math.log2(ratio) / 2)
    for name in list(state):
        if re.search(r"\.[qk]_proj\.", name):
            state[name] = state[name] * factor
    for layer in range(config.n_layer):
        for x in "qk":
            ones = state["tok_emb.weight"].new_ones(config.head_dim)
            state[f"blocks.{layer}.attn.prepare.{x}_norm.weight"] = ones


def save_pretrained(model, folder, tokenizer=None):
    """Write a model, and its tokenizer if given, as a folder that transformers loads.

    Where no published kind computes the same, the folder holds our own code too, and transformers
    needs trust_remote_code=True. Biases that GPT-2 has and the model lacks are written as zeros. The
    folder appears whole or not at all. A folder that holds anything but an earlier export is left
    alone. Raises ValueError for LoRA that is not merged and for classifiers, and FileExistsError for
    a folder in use.
    """
    folder = Path(folder).resolve()
    layout, config = published_config(model.config)
    ours = {SINGLE, CONFIG, GENERATION, TOKENIZER, TOKENIZER_CONFIG, "chat_template.jinja"}
    ours |= {path.name for path in CODE}
    files = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    is_export = not (files - ours) and "exported_by" in read_json(folder / CONFIG, {})
    if folder.is_file() or (files and not is_export):
        raise FileExistsError(
            f"{folder} is in use and is not an export of glassGPT: choose another folder"
        )
    tensors = published_tensors(model, layout)
    stop = [] if tokenizer is None else published_stop_ids(tokenizer)
    tokens = {
        "bos_token_id": getattr(tokenizer, "bos_id", None),
        "eos_token_id": stop[0] if len(stop) == 1 else stop or None,
    }
    dtype = str(model.dtype).removeprefix("torch.")
    config |= tokens | {"torch_dtype": dtype, "exported_by": "glassGPT"}
    documents = {CONFIG: config, GENERATION: tokens}
    if tokenizer is not None:
        documents |= tokenizer_files(tokenizer, model.config)

    import safetensors.torch

    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        safetensors.torch.save_file(tensors, partial / SINGLE, metadata={"format": "pt"})
        for name, document in documents.items():
            text = json.dumps(document, indent=2, ensure_ascii=False) + "\n"
            (partial / name).write_text(text, encoding="utf-8")
        for path in CODE if layout is OWN else ():
            shutil.copy(path, partial)
        partial.chmod(0o755)  # mkdtemp gives access to the owner only
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(partial, folder)
    except (OSError, safetensors.SafetensorError) as error:
        raise OSError(
            f"{folder} cannot be written ({first_line(error)}): make room, or name another folder"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def published_stop_ids(tokenizer):
    """The ids that end a text, as a list: those of a published model, or else our own.

    Of ours, end-of-text comes first.
    """
    special = tokenizer.special_tokens
    ours = [special[name] for name in (bpe.END_OF_TEXT, bpe.END) if name in special]
    return getattr(tokenizer, "stop_ids", None) or ours


def save_adapter(model, path, writes=True):
    """Write only the LoRA matrices, and what merging needs to know, as safetensors of a few MB.

    All processes that share a model call it, and one of them writes.
    """
    import safetensors.torch

    lora = {name: tensor for name, tensor in model.state_dict().items() if ".lora_" in name}
    lora, base_sha256 = whole(lora, kept=writes), blocks_sha256(model)
    if not writes:
        return
    tensors = {name: tensor.contiguous() for name, tensor in lora.items()}
    names = ("lora_rank", "lora_alpha", "lora_targets")
    config = {name: getattr(model.config, name) for name in names}
    config["base_sha256"] = base_sha256
    with replacing(path) as partial:
        safetensors.torch.save_file(
            tensors, partial, metadata={"format": "pt", "lora": json.dumps(config)}
        )


def weights_sha256(module):
    """The sha256 of a module's weights in float32, except LoRA's."""
    digest = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        if ".lora_" not in name:
            digest.update(whole(tensor.detach()).float().contiguous().cpu().numpy().tobytes())
    return digest.hexdigest()


def blocks_sha256(model):
    """The sha256 of a model's blocks, which training LoRA keeps equal."""
    return weights_sha256(model.blocks)


def load_adapter(model, path):
    """Merge the LoRA matrices of a file into the model they were trained on.

    Raises ValueError if they do not fit.
    """
    if not Path(path).is_file():
        raise ValueError(
            f"adapter={path} is not a file: give the one that finetune.py --trainable=lora wrote"
        )
    with reading(path, "give the file that finetune.py --trainable=lora wrote"):
        merge_adapter(model, path)


def merge_adapter(model, path):
    """What `load_adapter` does; a file that is not as it should be raises errors of any kind."""
    import safetensors

    with safetensors.safe_open(path, framework="pt") as file:
        lora = json.loads((file.metadata() or {}).get("lora", "null"))
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    if not lora or not tensors:
        raise ValueError(
            f"adapter={path} holds no LoRA matrices: "
            "give the file that finetune.py --trainable=lora wrote"
        )
    if lora.get("base_sha256", blocks_sha256(model)) != blocks_sha256(model):
        raise ValueError(
            f"adapter={path} was trained on other weights than these (or is merged into them "
            "already): give the model it was trained on with --out_dir or --init_from"
        )
    weights, products = dict(model.named_parameters()), {}
    scale = lora["lora_alpha"] / lora["lora_rank"]
    for name in tensors:
        if name.endswith("lora_b"):
            product = tensors[name] @ tensors[name.replace("lora_b", "lora_a")]
            products[name.replace("lora_b", "weight")] = product * scale
    for name, product in products.items():
        if name not in weights or weights[name].shape != product.shape:
            raise ValueError(
                f"adapter={path} has no place for {name}: "
                "give the model it was trained on with --out_dir or --init_from"
            )
    with torch.no_grad():
        for name, product in products.items():
            weights[name].copy_(weights[name].float() + product)


def load_tokenizer(source):
    """The tokenizer of a published model (folder, preset or hub name), or of a saved dict.

    The dict is what `to_dict` of any tokenizer gave. Raises ValueError if the folder has none.
    """
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
            with reading(template, "download it again"):
                config["chat_template"] = template.read_text(encoding="utf-8")
        ends = stop_ids(folder)
        with reading(folder / TOKENIZER, "download it again"):
            return HuggingFaceTokenizer(saved, config, ends)
    layout, shape = read_config(folder)
    if layout is GPT2 and shape.vocab_size == 50257:
        return bpe.BPETokenizer.from_gpt2()
    raise ValueError(f"{folder} has no {TOKENIZER}: download it into the folder")


def stop_ids(name_or_folder):
    """The ids that end a text, as a list: from generation_config.json, else from config.json.

    It is empty if neither names one.
    """
    folder = find_folder(name_or_folder)
    for name in (GENERATION, CONFIG):
        ids = read_json(folder / name, {}).get("eos_token_id")
        if ids is not None:
            ids = ids if isinstance(ids, list) else [ids]
            if not all(type(i) is int for i in ids):
                raise ValueError(
                    f"{folder / name} says eos_token_id={ids!r:.40}, needed are ids: download it again"
                )
            return ids
    return []
