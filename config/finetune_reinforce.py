# config/finetune_reinforce.py: sums of three numbers, working them out is what the right answers reinforce (GRPO)
# the base is config/finetune_tasks.py's, which has seen one in three of such sums worked out
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
