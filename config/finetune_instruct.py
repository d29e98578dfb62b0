# config/finetune_instruct.py: 1,100 instructions of everyday English, the loss on the answers alone
# expect the loss of held-out answers to go from 2.84 to 1.33 in 40 s: the form of an answer, not its content
task = "instruct"
dataset = "instruct"
init_from = "out/pydoc_char"
out_dir = "out/finetune_instruct"

batch_size = 4
gradient_accumulation_steps = 4
optimizer = "muon"
muon_lr = 0.01
learning_rate = 1e-3
dropout = 0.1
max_iters = 200
eval_interval = 50
