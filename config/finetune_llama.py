# config/finetune_llama.py: published Llama 3.2 1B follows instructions, by LoRA beside frozen weights
# not measured here, for want of the published weights; needs about 10 GB of memory
task = "instruct"
dataset = "instruct"
init_from = "llama3.2-1b"
out_dir = "out/finetune_llama"

template = "alpaca"
trainable = "lora"
lora_rank = 16
lora_alpha = 32.0
lora_targets = "q_proj k_proj v_proj o_proj"
block_size = 512
batch_size = 4
gradient_accumulation_steps = 4
learning_rate = 2e-4
max_iters = 120
eval_interval = 40
