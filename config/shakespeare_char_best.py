# config/shakespeare_char_best.py: config/shakespeare_char.py, more channels and characters a step, 3.2M parameters
# expect val loss 1.435, with seed=1 1.428 (whole split), in three and a half minutes on two Zen 5 cores
dataset = "shakespeare_char"
out_dir = "out/shakespeare_char_best"

block_size = 256  # characters
n_layer = 4
n_head = 4
n_embd = 256
pos = "rope"
mlp = "gelu_exact"
qk_norm = True
tie_weights = False
zero_init = True
smear = True
embed_skip = True

optimizer = "muon"
muon_weight_decay = 0.1
batch_size = 8
gradient_accumulation_steps = 1
learning_rate = 3e-3  # of AdamW: embedding, norms, head
lr_shape = "linear"
min_lr = 0.0
warmup_iters = 50
max_iters = 1600
lr_decay_iters = 1600

eval_interval = 1600
eval_iters = None  # the whole validation split
log_interval = 50
