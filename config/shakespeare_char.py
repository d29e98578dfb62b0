# config/shakespeare_char.py: Tiny Shakespeare, one token per character, 3.2M parameters: the three-minute recipe
# expect EXPECT
dataset = "shakespeare_char"
out_dir = "out/shakespeare_char"

# model: GPT-2's MLP, Llama's positions and norm, and what RECIPE.md found to pay
block_size = 256  # characters
n_layer = 4
n_head = 4
n_embd = 256
pos = "rope"
norm = "rmsnorm"
qk_norm = True
tie_weights = False
zero_init = True
smear = True
embed_skip = True
dropout = 0.1
attn_dropout = 0.0  # costs 40% of a step on a CPU, and gave nothing here

# 2,048 characters a step; Muon takes rates that would ruin AdamW
optimizer = "muon"
muon_weight_decay = 0.1
batch_size = 8
gradient_accumulation_steps = 1
learning_rate = 3e-3  # of AdamW: embedding, norms, head
lr_shape = "linear"
min_lr = 0.0
warmup_iters = 50
max_iters = 1000
lr_decay_iters = 1000

eval_interval = 1000
eval_iters = None  # the whole validation split
log_interval = 50
