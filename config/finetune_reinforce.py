# config/finetune_reinforce.py: sums of three numbers, of which the base has seen one in three worked out (GRPO)
# expect 93.5% of 983 test sums to be right after 20.8%, in 65 s on two cores of an AMD Zen 5 server
task = "reinforce"
dataset = "totals"
reward = "glass/tasks.py"  # the result alone counts
init_from = "out/finetune_tasks"
out_dir = "out/finetune_reinforce"

batch_size = 32  # prompts, each with 8 answers
group_size = 8
optimizer = "muon"
muon_lr = 0.004
learning_rate = 3e-4  # of the embedding, the norms and the head
lr_shape = "linear"
max_iters = 70
eval_interval = 35
eval_answers = 500
test_items = 1000
log_interval = 5
