# config/finetune_tasks.py: ten kinds of small instructions with checkable answers; the base is python train.py's
# expect 74% exact matches on 500 test tasks, in 3.4 minutes on two cores of an AMD Zen 5 server (sums and differences: none)
task = "instruct"
dataset = "tasks"
init_from = "out/pydoc_char"
out_dir = "out/finetune_tasks"

batch_size = 64
optimizer = "muon"
muon_lr = 0.02
learning_rate = 3e-3
max_iters = 1200
eval_interval = 300
log_interval = 50
