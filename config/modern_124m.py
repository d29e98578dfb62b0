# config/modern_124m.py: GPT-2 124M's size with the parts of RECIPE.md and Muon, on FineWeb-Edu
# not measured here, for want of a GPU
# on several GPUs: torchrun --standalone --nproc_per_node=8 train.py config/modern_124m.py
dataset = "fineweb_edu"
out_dir = "out/modern_124m"

n_layer = 12
n_head = 6  # of 128 channels
n_embd = 768
block_size = 1024
pos = "rope"
mlp = "gelu_exact"
qk_norm = True
tie_weights = False
zero_init = True
smear = True
embed_skip = True

optimizer = "muon"
muon_weight_decay = 0.1
batch_size = 32
gradient_accumulation_steps = 16  # 524,288 tokens a step
learning_rate = 3e-3
lr_shape = "linear"
cooldown = 0.5
min_lr = 0.0
warmup_iters = 100
max_iters = 5000
lr_decay_iters = 5000

eval_interval = 250
eval_iters = 200
log_interval = 10
