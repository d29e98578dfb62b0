# config/docs.py: the documentation that every Python carries, in byte pairs, 4.2M parameters; for finetune_docs.py
# expect val loss 4.146 (50 batches; 1.891 bits per byte) in 47 s on two cores of an AMD Zen 5 server, dataset included
dataset = "pydoc_bpe"
out_dir = "out/docs"

# model: as in config/shakespeare_char.py, wider
block_size = 128  # tokens: about 400 characters
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
momentum = 0.9
muon_beta2 = 0.95
muon_weight_decay = 0.1
batch_size = 8
gradient_accumulation_steps = 1
learning_rate = 6e-3
lr_shape = "linear"
min_lr = 0.0
warmup_iters = 50
max_iters = 400
lr_decay_iters = 400

eval_interval = 400
eval_iters = 50
log_interval = 50
