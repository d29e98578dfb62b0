# config/shakespeare_char.py: Tiny Shakespeare, one token per character, 1.8M parameters: the three-minute recipe
# expect val loss 1.430 to 1.442 (three seeds), in 150 to 169 s on two cores of a Zen 5, before glass/fused.c
dataset = "shakespeare_char"
out_dir = "out/shakespeare_char"

# model: GPT-2's parts, Llama's positions, and what RECIPE.md found to pay
block_size = 256  # characters
n_layer = 4
n_head = 4
n_embd = 192
pos = "rope"
mlp = "gelu_exact"
qk_norm = True
tie_weights = False
zero_init = True
smear = True
embed_skip = True

# 1,024 characters a step; Muon takes rates that would ruin AdamW
optimizer = "muon"
muon_weight_decay = 0.1
batch_size = 4
gradient_accumulation_steps = 1
learning_rate = 6e-3  # of AdamW: embedding, norms, head
lr_shape = "linear"
min_lr = 0.0
warmup_iters = 50
max_iters = 2600
lr_decay_iters = 2600

eval_interval = 2600
keep_every = 260  # weights to look at through training: serve.py's slider
eval_iters = None  # the whole validation split
log_interval = 50
