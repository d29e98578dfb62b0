# config/finetune_docs.py: what Python's library does, asked in many phrasings; the base is config/docs.py's
# expect 96% of first sentences, 95% of arguments, 98% of modules (bench.py docs), in 14 minutes on two Zen 5 cores
task = "instruct"
dataset = "docs"
init_from = "out/docs"
out_dir = "out/finetune_docs"

batch_size = 16
gradient_accumulation_steps = 2
optimizer = "muon"
muon_lr = 0.02
momentum = 0.9
muon_beta2 = 0.95
learning_rate = 5e-3  # of the embedding, the norms and the head
lr_shape = "linear"
max_iters = 3800
eval_interval = 1900
log_interval = 50
test_items = 1000
