# config/gpt2_124m.py: GPT-2 124M on OpenWebText, as nanoGPT trains it: 491,520 tokens a step, 300 billion in all
# expect val loss 2.85 after 600,000 steps (nanoGPT's figure, 4 days on 8 A100; not measured here)
# on several GPUs: torchrun --standalone --nproc_per_node=8 train.py config/gpt2_124m.py
dataset = "openwebtext"
out_dir = "out/gpt2_124m"

n_layer = 12
n_head = 12
n_embd = 768
block_size = 1024
bias = False

batch_size = 12
gradient_accumulation_steps = 40  # over all GPUs: 5 each on 8
learning_rate = 6e-4
min_lr = 6e-5
weight_decay = 0.1
warmup_iters = 2000
max_iters = 600000
lr_decay_iters = 600000

eval_interval = 1000
eval_iters = 200
log_interval = 10
