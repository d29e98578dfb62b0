# config/finetune_tasks.py: ten kinds of small instructions with checkable answers; the base is python train.py's
# expect 98.6% exact matches on 500 test tasks, in 3.5 minutes on two cores of an AMD Zen 5 server
task = "instruct"
dataset = "tasks"
init_from = "out/pydoc_char"
out_dir = "out/finetune_tasks"

batch_size = 16
gradient_accumulation_steps = 2
optimizer = "muon"
muon_lr = 0.02
momentum = 0.9
muon_beta2 = 0.95  # NorMuon
learning_rate = 5e-3  # of the embedding, the norms and the head
lr_shape = "linear"
max_iters = 1700
eval_interval = 850
log_interval = 50
