# config/pydoc_char.py: the documentation that every Python carries, one token per character, 1.8M parameters
# expect val loss 1.32 (100 batches; CPython 3.11.7's text) in 75 s on two cores of an AMD Zen 5 server: python train.py
dataset = "pydoc"
out_dir = "out/pydoc_char"

# model: as in config/shakespeare_char.py
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

optimizer = "muon"
muon_weight_decay = 0.1
batch_size = 4
gradient_accumulation_steps = 1
learning_rate = 6e-3
lr_shape = "linear"
min_lr = 0.0
warmup_iters = 50
max_iters = 1100
lr_decay_iters = 1100

eval_interval = 550
keep_every = 110  # weights to look at through training: serve.py's slider
eval_iters = 100
log_interval = 50
