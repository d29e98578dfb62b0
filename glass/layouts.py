"""How others write a model down: config.json and the names of tensors, for each kind they have.

Hugging Face's names occur only in the tables here and in gguf_files.py. `read_config` takes a
config.json to a GPTConfig, `published_config` the other way. A model that no published kind expresses
is written as our own, with the code that computes it: see modeling_glassgpt.py.
"""

import json
import typing
from dataclasses import asdict, dataclass, fields, replace

from glass.settings import check_type
from model import GPTConfig

CONFIG = "config.json"


@dataclass
class Layout:
    """How Hugging Face writes one architecture. In module names, * is the number of the block."""

    architecture: str
    model_type: str
    prefix: str  # of every tensor but the head's; files of the bare model lack it
    modules: dict  # their module: ours; if it names several of ours, theirs joins them
    # their key: (our setting, its value if config.json has none); ... means the key is required
    settings: dict
    # their key: the values that we compute, the default first; None means no such key, or null
    supported: dict
    fixed: dict  # our settings that every model of the kind has
    transposed: tuple = ()  # modules whose weight is stored (in, out)
    ignored: str = r"$^"  # tensors that hold no weights


GPT2 = Layout(
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
    fixed={"bias": True, "norm": "layernorm", "pos": "learned"},
    transposed=("c_attn", "c_proj", "c_fc"),
    ignored=r"h\.\d+\.attn\.(bias|masked_bias)$",  # the causal mask
)

LLAMA = Layout(
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
    fixed={"norm": "rmsnorm", "mlp": "swiglu", "pos": "rope"},
    ignored=r"layers\.\d+\.self_attn\.rotary_emb\.inv_freq$",
)
OF_QWEN = {"hidden_act": ("silu",), "use_sliding_window": (False, None)}
OF_QWEN |= {"quantization_config": (None,)}


def without(settings, *keys):
    return {key: value for key, value in settings.items() if key not in keys}


QWEN2 = replace(  # Llama with biases of q, k and v alone
    LLAMA,
    architecture="Qwen2ForCausalLM",
    model_type="qwen2",
    settings=without(LLAMA.settings, "mlp_bias", "attention_bias"),
    supported=OF_QWEN,
    fixed=LLAMA.fixed | {"bias": False, "qkv_bias": True, "o_bias": False},
)
QWEN3 = replace(  # Llama with QK-norm that has weights; a model without them is written so too
    LLAMA,
    architecture="Qwen3ForCausalLM",
    model_type="qwen3",
    modules=LLAMA.modules
    | {f"layers.*.self_attn.{x}_norm": f"blocks.*.attn.prepare.{x}_norm" for x in "qk"},
    settings=without(LLAMA.settings, "mlp_bias") | {"head_dim": ("head_dim", 128)},
    supported=OF_QWEN,
    fixed=LLAMA.fixed | {"bias": False, "qk_norm": True, "qk_norm_weight": True},
)
# any model of ours: its settings are GPTConfig's, and its tensors have our names after the prefix
OWN = Layout("GlassGPTForCausalLM", "glassgpt", "gpt.", {}, {}, {}, {})
LAYOUTS = (GPT2, LLAMA, QWEN2, QWEN3, OWN)
# the architecture of a config.json that names none
BY_TYPE = {layout.model_type: layout.architecture for layout in LAYOUTS}
LLAMA3_SCALING = (
    "factor",
    "low_freq_factor",
    "high_freq_factor",
    "original_max_position_embeddings",
)


def read_json(path, default=None):
    """The content of a JSON file, or `default` if there is no such file.

    Raises ValueError if the file is not JSON.
    """
    if not path.is_file():
        return default
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}): download it again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is {content!r:.40}, needed is an object: download it again")
    return content


def layout_of(path, found):
    """The Layout for the content of a config.json, `found`.

    Raises ValueError for an architecture that we do not compute.
    """
    architectures = found.get("architectures") or []
    names = architectures or [BY_TYPE.get(found.get("model_type"))]
    for layout in LAYOUTS:
        if layout.architecture in names:
            return layout
    if "out_dir" in found:
        raise ValueError(
            f"{path.parent} is a run without a checkpoint: train it first, or name another folder"
        )
    raise ValueError(
        f"{path} says architectures={architectures} model_type={found.get('model_type')!r}, "
        f"but only {', '.join(layout.architecture for layout in LAYOUTS)} can be computed: "
        "choose such a model"
    )


def read_config(folder):
    """(layout, config): the Layout of a folder, and the GPTConfig of its config.json.

    Raises ValueError for a model that we do not compute.
    """
    path = folder / CONFIG
    found = read_json(path)
    if found is None:
        raise ValueError(
            f"{folder} has no {CONFIG}: "
            "give the folder of a published model, as Hugging Face stores it"
        )
    layout = layout_of(path, found)
    if layout is OWN:
        return layout, own_config(path, found)
    for key, values in layout.supported.items():
        if found.get(key, values[0]) not in values:
            raise ValueError(
                f"{path} says {key}={found[key]!r} but only {values} can be computed: "
                "choose another model"
            )
    required = [key for key, (_, default) in layout.settings.items() if default is ...]
    if missing := [key for key in required if found.get(key) is None]:
        raise ValueError(f"{path} lacks {' '.join(missing)}: download it again")
    settings, types_of = {}, typing.get_type_hints(GPTConfig)
    for key, (ours, default) in layout.settings.items():
        value = default if found.get(key) is None else found[key]
        settings[ours] = check_type(f"{path}: {key}", value, types_of[ours])
    settings |= layout.fixed
    if layout is GPT2:
        mlp = {"relu2": "relu2", "gelu": "gelu_exact"}.get(found.get("activation_function"), "gelu")
        return layout, GPTConfig(**settings, mlp=mlp)
    theta, scaling = read_rope(path, found)
    settings.setdefault("o_bias", settings["qkv_bias"])
    return layout, GPTConfig(**settings, rope_theta=theta, rope_scaling=scaling)


def own_config(path, found):
    """The GPTConfig of a model of our own kind."""
    settings = found.get("gpt")
    known = {field.name for field in fields(GPTConfig)}
    if not isinstance(settings, dict) or settings.keys() - known:
        raise ValueError(f"{path} has no settings of a model in gpt: export it again")
    types_of = typing.get_type_hints(GPTConfig)
    checked = {
        name: check_type(f"{path}: {name}", each, types_of[name]) for name, each in settings.items()
    }
    return GPTConfig(**checked)


def read_rope(path, found):
    """(rope_theta, rope_scaling), from the new key rope_parameters or from the two older keys.

    Raises ValueError for a kind of scaling that we do not compute.
    """
    rope = found.get("rope_parameters") or found.get("rope_scaling") or {}
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type not in ("default", "llama3") or rope.get("partial_rotary_factor", 1) != 1:
        raise ValueError(
            f"{path} says rope_type={rope_type!r} in {rope}, "
            "but only 'default' and 'llama3', over whole heads, can be computed: "
            "choose another model"
        )
    theta = float(rope.get("rope_theta") or found.get("rope_theta") or 10000.0)
    if rope_type == "default":
        return theta, None
    if missing := [key for key in LLAMA3_SCALING if key not in rope]:
        raise ValueError(
            f"{path} lacks {' '.join(missing)}, which rope_type='llama3' needs: download it again"
        )
    return theta, {key: rope[key] for key in LLAMA3_SCALING}


def tensor_names(layout, state, prefix):
    """Yield (their name, our names, is_transposed) for each tensor of a model.

    state: the model's state_dict.
    """
    if layout is OWN:
        yield from ((prefix + name, [name], False) for name in state)
        return
    n_layer = len({name.split(".")[1] for name in state if name.startswith("blocks.")})
    for theirs, ours in layout.modules.items():
        is_transposed = theirs.split(".")[-1] in layout.transposed
        full = theirs if theirs == "lm_head" else prefix + theirs
        layers = range(n_layer) if "*" in theirs else [0]
        for layer in layers:
            for leaf in ("weight", "bias"):
                names = [f"{name}.{leaf}".replace("*", str(layer)) for name in ours.split()]
                if names[0] in state:
                    name = f"{full}.{leaf}".replace("*", str(layer))
                    yield name, names, leaf == "weight" and is_transposed


def published_config(config):
    """(layout, config): the Layout that computes the same as a GPTConfig, and its config.json.

    Raises ValueError, by name, for settings that no kind expresses.
    """
    if config.lora_rank is not None or config.n_classes is not None:
        named = f"lora_rank={config.lora_rank} n_classes={config.n_classes}"
        raise ValueError(f"{named} cannot be exported: keep this model as a checkpoint of glassGPT")
    layout = next((each for each in (GPT2, LLAMA, QWEN2, QWEN3) if expresses(each, config)), OWN)
    written = {"architectures": [layout.architecture], "model_type": layout.model_type}
    if layout is OWN:
        code = "modeling_glassgpt.GlassGPT"
        written["auto_map"] = {"AutoConfig": f"{code}Config"}
        written["auto_map"]["AutoModelForCausalLM"] = f"{code}ForCausalLM"
        return layout, written | {"gpt": asdict(config)}
    written |= {theirs: getattr(config, ours) for theirs, (ours, _) in layout.settings.items()}
    if layout is GPT2:
        activations = {"gelu": "gelu_new", "gelu_exact": "gelu", "relu2": "relu2"}
        written |= {"activation_function": activations[config.mlp]}
        written |= {"n_ctx": config.block_size}  # the old name of n_positions; llama.cpp reads it
        written |= dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), config.dropout)
    else:  # the older keys of RoPE, because every reader knows them
        scaling = config.rope_scaling and {"rope_type": "llama3", **config.rope_scaling}
        written |= {"hidden_act": "silu", "rope_theta": config.rope_theta, "rope_scaling": scaling}
    return layout, written


def expresses(layout, config):
    """Whether models of a kind compute what this GPTConfig says."""
    if config.n_layer == 0 or config.smear or config.embed_skip:
        return False
    needed = {"qk_norm": False} | without(
        layout.fixed, "bias" if layout is GPT2 else "", "qk_norm_weight"
    )
    if layout is GPT2:  # biases that a model lacks are written as zeros
        needed |= {"n_kv_head": config.n_head, "head_dim": config.n_embd / config.n_head}
        return config.mlp != "swiglu" and has(config, needed)
    needed.setdefault("o_bias", config.qkv_bias)
    return config.n_embd % config.n_head == 0 and has(config, needed)


def has(config, needed):
    return all(getattr(config, name) == value for name, value in needed.items())
