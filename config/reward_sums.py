# config/reward_sums.py: the reward of config/finetune_reinforce.py, for numbers to write as sums of two
import re


def reward(prompt, answer):
    """1 for two numbers of two digits or more that add up to the last one in the prompt, otherwise 0."""
    wanted = int(re.findall(r"\d+", prompt)[-1])
    numbers = re.fullmatch(r"([1-9]\d+) \+ ([1-9]\d+)", answer.strip())
    return float(numbers is not None and int(numbers[1]) + int(numbers[2]) == wanted)
