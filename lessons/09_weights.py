# %% [markdown]
# # 09 Other people's weights
#
# After this lesson you can
# - read a published model's files byte by byte, and say which tensor becomes which of ours,
# - find what differs between layouts: names, joined and transposed matrices, the order of RoPE's channels,
# - prove that a loaded model computes what the published one does, and tell from the size of a difference what is
#   wrong.
#
# You need lessons 04 (RoPE) and 05 (the block). Time: 40 minutes, exercises included.
#
# Letters, as in the code: T positions, C channels, H heads, D channels of a head, V vocabulary.

# %%
import json
import math
import struct
import tempfile
from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from desk import check, hint, picture, source  # noqa: F401
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from glass import weights
from model import GPT, apply_rope

torch.manual_seed(0)

# %% [markdown]
# ## What is published
#
# A model on the Hugging Face hub is a folder: `config.json` says the shape, `model.safetensors` holds the weights,
# and `tokenizer.json` the tokenizer. Here we make such a folder ourselves, with a GPT-2 of two blocks and random
# weights, so that nothing has to be downloaded. The names and shapes are those that `transformers` writes.

# %%
V, C, H, L, T_MAX = 50, 32, 4, 2, 16
shapes = {"wte.weight": (V, C), "wpe.weight": (T_MAX, C)}  # embeddings of tokens and positions
for layer in range(L):
    for name, shape in (
        ("ln_1", (C,)),
        ("attn.c_attn", (C, 3 * C)),  # queries, keys and values in one matrix
        ("attn.c_proj", (C, C)),
        ("ln_2", (C,)),
        ("mlp.c_fc", (C, 4 * C)),
        ("mlp.c_proj", (4 * C, C)),
    ):
        shapes[f"h.{layer}.{name}.weight"] = shape
        shapes[f"h.{layer}.{name}.bias"] = shape[-1:]
shapes |= {"ln_f.weight": (C,), "ln_f.bias": (C,)}

published = {}
for name, shape in shapes.items():
    is_norm = "ln_" in name and name.endswith("weight")
    published[f"transformer.{name}"] = 0.2 * torch.randn(shape) + is_norm

folder = Path(tempfile.mkdtemp())
save_file(published, folder / "model.safetensors")
config = {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "vocab_size": V}
config |= {"n_positions": T_MAX, "n_embd": C, "n_layer": L, "n_head": H}
(folder / "config.json").write_text(json.dumps(config))
for path in sorted(folder.iterdir()):
    print(f"{path.name:20} {path.stat().st_size:7,} bytes")

# %% [markdown]
# ## The file, byte by byte
#
# A safetensors file begins with a number of 8 bytes, little-endian: the length of a header. The header is JSON: for
# each tensor its type, its shape, and where its bytes begin and end, counted from the end of the header. Then come the
# numbers. There is nothing in it that could run, unlike in a pickle (`pytorch_model.bin`), which can run any code
# while it is read.

# %%
data = (folder / "model.safetensors").read_bytes()
(n_header,) = struct.unpack("<Q", data[:8])
header = json.loads(data[8 : 8 + n_header])
for name in list(header)[:5]:
    print(name, header[name])

# %% [markdown]
# **Exercise 9.1** Write `read_tensor(data, name)`: the tensor `name` of a file whose content is `data` (bytes), for
# tensors of type F32. `torch.frombuffer(bytearray(part), dtype=torch.float32)` makes a tensor of bytes.


# %% tags=["9.1"]
def read_tensor(data, name):
    return None


check("9.1", read_tensor)

# %% [markdown]
# ## The same model under other names
#
# Everyone names the parts of a model differently. The tables in `glass/layouts.py` say which module of theirs is which
# of ours; `*` is the number of a block. Hugging Face's names occur only here and in the table that leads on to
# llama.cpp's, in `glass/gguf_files.py`.

# %%
for theirs, ours in weights.GPT2.modules.items():
    print(f"{theirs:16} {ours}")

# %% [markdown]
# **Exercise 9.2** Which shapes have the weights of *our* q_proj, o_proj and up_proj of block 0, and of our token
# embedding? (`torch.nn.Linear(n_in, n_out)` keeps its weight as (out, in); GPT-2's authors kept theirs as (in, out),
# see the shapes in the first cell.) Give a tuple for each.

# %% tags=["9.2"]
our_shapes = None

check("9.2", our_shapes)

# %% [markdown]
# **Exercise 9.3** Write `split_qkv(c_attn)`: from the published weight (C, 3C) the three weights of our q_proj, k_proj
# and v_proj, each (C, C) as nn.Linear keeps it. In the file the columns of the queries come first, then those of the
# keys, then those of the values.


# %% tags=["9.3"]
def split_qkv(c_attn):
    return None


check("9.3", split_qkv)

# %% [markdown]
# ## Parity: the same numbers
#
# A model that loads without an error may still be wrong. The only proof is to compute the same logits in two ways. So
# here is GPT-2's forward pass written from the published tensors alone, as its authors' code has it, without a part of
# ours.


# %%
def published_forward(ids, w):
    """The logits (T, V) of a published GPT-2: ids (T,), w a dict from its names to tensors."""
    w = {name.removeprefix("transformer."): tensor for name, tensor in w.items()}

    def norm(x, name):
        return F.layer_norm(x, (C,), w[f"{name}.weight"], w[f"{name}.bias"])

    def linear(x, name):
        return x @ w[f"{name}.weight"] + w[f"{name}.bias"]  # the weight is (in, out)

    T = len(ids)
    x = w["wte.weight"][ids] + w["wpe.weight"][:T]  # (T, C)
    hidden = torch.triu(torch.ones(T, T, dtype=torch.bool), diagonal=1)
    for layer in range(L):
        h = f"h.{layer}"
        q, k, v = linear(norm(x, f"{h}.ln_1"), f"{h}.attn.c_attn").chunk(3, dim=1)
        q, k, v = (each.view(T, H, C // H).transpose(0, 1) for each in (q, k, v))  # (H, T, D)
        scores = (q @ k.transpose(1, 2) / math.sqrt(C // H)).masked_fill(hidden, -math.inf)
        y = (scores.softmax(dim=-1) @ v).transpose(0, 1).reshape(T, C)
        x = x + linear(y, f"{h}.attn.c_proj")
        inner = F.gelu(linear(norm(x, f"{h}.ln_2"), f"{h}.mlp.c_fc"), approximate="tanh")
        x = x + linear(inner, f"{h}.mlp.c_proj")
    return norm(x, "ln_f") @ w["wte.weight"].T  # the head is the embedding


ids = torch.randint(V, (T_MAX,))
model = GPT.from_pretrained(folder).eval()
with torch.no_grad():
    ours = model(ids[None])[0][0]  # (T, V)
theirs = published_forward(ids, published)
difference = (ours - theirs).abs().max().item()
assert difference < 1e-4, difference
print(f"largest logit {theirs.abs().max():.1f}, largest difference {difference:.1e}")

# %% [markdown]
# A difference of some 1e-6 is rounding: float32 keeps 24 bits, and sums in another order round otherwise. It grows
# with the logits and with the depth, so judge a difference beside the largest logit: what is far above a millionth of
# it has a cause.
#
# ## What a mistake looks like
#
# Most mistakes raise no error, because the shapes fit. Here are some that are easy to make, and how far each moves
# the logits. Read the picture from below: the smaller a difference, the harder it is to notice by reading the text
# that the model writes.


# %%
def changed(name, change):
    """The model with one of its weights changed."""
    other = GPT.from_pretrained(folder).eval()
    with torch.no_grad():
        tensor = other.get_parameter(name)
        tensor.copy_(change(tensor.clone()))
    return other


def rebuilt(**settings):
    """The model with the same weights and other settings."""
    other = GPT(replace(model.config, **settings)).eval()
    other.load_state_dict(model.state_dict())
    return other


mistakes = {
    "nothing": model,
    "norm_eps 1e-6 for 1e-5": rebuilt(norm_eps=1e-6),
    "exact GELU for its approximation": rebuilt(mlp="gelu_exact"),
    "weights in bfloat16": GPT.from_pretrained(folder, dtype=torch.bfloat16).float().eval(),
    "one bias left out": changed("blocks.0.mlp.up_proj.bias", torch.zeros_like),
    "positions begin at 1": changed("pos_emb.weight", lambda w: w.roll(-1, 0)),
    "c_proj of block 0 not transposed": changed("blocks.0.attn.o_proj.weight", lambda w: w.T),
    "c_proj of block 1 not transposed": changed("blocks.1.attn.o_proj.weight", lambda w: w.T),
}
differences = {}
with torch.no_grad():
    for name, other in mistakes.items():
        differences[name] = (other(ids[None])[0][0] - theirs).abs().max().item()
        print(f"{name:34} {differences[name]:.1e}")
plt.barh(list(differences), list(differences.values()), color="tab:blue")
plt.xscale("log")
plt.xlabel("largest difference of a logit")
plt.title("Mistakes that raise no error")
picture("09_mistakes")

# %% [markdown]
# **Exercise 9.4** The loader transposes a published matrix first, and cuts `c_attn` into q, k and v then. A block
# of GPT-2 has four matrices: `attn.c_attn`, `attn.c_proj`, `mlp.c_fc` and `mlp.c_proj`. Which of them would load
# without an error if the transpose were forgotten? Give a list of names.

# %% tags=["9.4"]
silent = None

check("9.4", silent)

# %% [markdown]
# ## Llama's files
#
# Llama's matrices are (out, in), as ours are: nothing is transposed. But there are two layouts of its queries and keys.
# RoPE rotates pairs of channels (lesson 04). Meta's own files pair channel 2i with 2i + 1; Hugging Face's pair i with
# i + D/2, and their converter reorders the rows of q_proj and k_proj to match. Ours follows Hugging Face:

# %%
source(apply_rope)

# %% [markdown]
# **Exercise 9.5** Write `to_halves(weight, n_head)`: the rows of a q_proj (H x D, C) in Meta's order, in which the two
# of a pair are neighbours, reordered so that within each head the first of all pairs come first, and then the second
# of all pairs. For one head of D = 4, rows 0 1 2 3 become 0 2 1 3.


# %% tags=["9.5"]
def to_halves(weight, n_head):
    return None


check("9.5", to_halves)

# %% [markdown]
# ## And back
#
# `save_pretrained` writes the folder again: our names become theirs, q, k and v are joined, matrices transposed. What
# comes out must be what went in, to the bit.

# %%
again = Path(tempfile.mkdtemp()) / "again"
model.save_pretrained(again)
written = load_file(again / "model.safetensors")
equal = [torch.equal(written[name], tensor) for name, tensor in published.items()]
print(f"{sum(equal)} of {len(published)} tensors are equal to the bit")
assert all(equal)

# %% [markdown]
# ## Break it
#
# In `glass/layouts.py`, remove `"c_proj"` from `transposed` of the layout GPT2 and run this lesson again. Loading
# stops with an error about a shape: of mlp.c_proj, which is no square. Now think of a model whose MLP is as wide as its
# stream: there nothing would stop you. In `test_all.py` the tests of parity with `transformers` are what fails.
#
# ## Where it happens
#
# | what | where |
# |---|---|
# | names, transposes | `glass/layouts.py`: `Layout`, `GPT2`, `LLAMA`, `tensor_names` |
# | joined matrices | `glass/weights.py`: `as_stored` |
# | what a config.json may say | `glass/layouts.py`: `read_config` |
# | loading one tensor at a time, writing | `glass/weights.py`: `load_pretrained`, `save_pretrained` |
# | published tokenizers | `glass/hf_tokenizer.py` |
# | try it | `python sample.py --init_from=gpt2 --start "The"`, `python sample.py --export=FOLDER` |
#
# ## To read
# - Radford et al. 2019, "Language models are unsupervised multitask learners": GPT-2.
# - Touvron et al. 2023, "LLaMA", arXiv:2302.13971.
# - The safetensors format: github.com/huggingface/safetensors.
