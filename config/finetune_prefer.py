# config/finetune_prefer.py: of two answers the chosen one (DPO), from config/finetune_instruct.py's model
# watch val chosen loss beside val accuracy: preferences must not make the chosen answers unlikely
task = "prefer"
dataset = "preferences"
init_from = "out/finetune_instruct"
out_dir = "out/finetune_prefer"

batch_size = 8
learning_rate = 5e-5
max_iters = 200
eval_interval = 50
