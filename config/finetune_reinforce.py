# config/finetune_reinforce.py: numbers to write as sums of two, which config/finetune_tasks.py's model has seen few of
# expect TODO
task = "reinforce"
dataset = "sums"
reward = "config/reward_sums.py"
init_from = "out/finetune_tasks"
out_dir = "out/finetune_reinforce"

batch_size = 64  # prompts, each with 8 answers
group_size = 8
answer_tokens = 16
optimizer = "muon"
muon_lr = 0.003
learning_rate = 3e-4  # of the embedding, the norms and the head
lr_shape = "linear"
max_iters = 100
eval_interval = 50
eval_answers = 500
test_items = 1000
log_interval = 5
