# config/shakespeare_bpe.py: Tiny Shakespeare in GPT-2's tokens: few tokens, a large vocabulary
# expect val loss 4.979 (whole split) in 104 s on two Zen 5 cores: python train.py config/shakespeare_bpe.py
dataset = "shakespeare"
out_dir = "out/shakespeare_bpe"

block_size = 128  # tokens, about 400 characters
n_layer = 3
n_head = 4
n_embd = 128
pos = "rope"
qk_norm = True
dropout = 0.2  # 300,000 tokens are seen several times

optimizer = "muon"
batch_size = 8
gradient_accumulation_steps = 1
learning_rate = 2e-3
min_lr = 0.0
warmup_iters = 20
max_iters = 600
lr_decay_iters = 600

eval_interval = 300
eval_iters = None
log_interval = 50
