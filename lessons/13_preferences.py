# %% [markdown]
# # 13 Preferences and rewards
#
# After this lesson you can
# - learn a score from pairs of which one was preferred: a reward model,
# - measure how far two distributions are apart, by the KL divergence,
# - compute DPO's loss of a pair by hand, and say what beta does,
# - compute advantages in a group, and let GRPO find the better of two arms.
#
# You need lesson 12. Time: 50 minutes, exercises included.
#
# Letters: B rows, T positions, $\sigma(x) = 1 / (1 + e^{-x})$, and $\pi$ for a policy: the model as what chooses.

# %%
from types import SimpleNamespace

import matplotlib.pyplot as plt
import torch
from desk import check, hint, picture, source  # noqa: F401
from torch.nn import functional as F

from finetune import Prefer, grpo_loss
from glass import tasks
from model import GPT, GPTConfig

torch.manual_seed(0)

# %% [markdown]
# ## From pairs to scores
#
# For most answers there is no right or wrong, but people can say which of two is better. The **Bradley-Terry model**
# gives each answer a score r, its **reward**, and says: a is preferred to b with probability $\sigma(r_a - r_b)$.
# Only differences matter. The scores are learned from pairs by the loss $-\ln \sigma(r_{chosen} - r_{rejected})$.
#
# Four answers with hidden scores, and 2,000 pairs judged by them:

# %%
hidden = torch.tensor([1.5, 0.5, 0.0, -2.0])
a, b = torch.randint(4, (2, 2000))
a, b = a[a != b], b[a != b]
a_wins = torch.rand(len(a)) < torch.sigmoid(hidden[a] - hidden[b])
chosen, rejected = torch.where(a_wins, a, b), torch.where(a_wins, b, a)

scores = torch.zeros(4, requires_grad=True)
optimizer = torch.optim.Adam([scores], lr=0.1)
for _ in range(200):
    loss = -F.logsigmoid(scores[chosen] - scores[rejected]).mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
learned = (scores - scores.mean()).detach()
print("hidden scores, mean 0: ", [round(value, 2) for value in (hidden - hidden.mean()).tolist()])
print("learned from the pairs:", [round(value, 2) for value in learned.tolist()])

# %% [markdown]
# **Exercise 13.1** Answer a has the score 1.5 and b has 0.5. With which probability is a preferred? And which
# difference of scores gives 0.9? Give both numbers.

# %% tags=["13.1"]
bradley_terry = None

check("13.1", bradley_terry)

# %% [markdown]
# ## A reward model
#
# A **reward model** gives a score to a text that it has never seen: a language model with a head of one number on the
# last token. Here someone prefers texts with more of the letter `a` (token 0). The model gets pairs, never the rule.

# %%
VOCABULARY, LENGTH = 8, 10
reward_model = GPT(
    GPTConfig(vocab_size=VOCABULARY, block_size=LENGTH, n_layer=1, n_head=2, n_embd=32, n_classes=1)
)


def preferred_first(n):
    """(chosen, rejected), (n, LENGTH) each: chosen has more of token 0."""
    first, second = torch.randint(VOCABULARY, (2, 2 * n, LENGTH))
    counts, others = (first == 0).sum(1), (second == 0).sum(1)
    first, second = first[counts != others][:n], second[counts != others][:n]
    better = ((first == 0).sum(1) > (second == 0).sum(1))[:, None]
    return torch.where(better, first, second), torch.where(better, second, first)


def score(texts):
    return reward_model.classify(texts, torch.full((len(texts),), LENGTH))[:, 0]  # (n,)


optimizer = torch.optim.AdamW(reward_model.parameters(), lr=3e-3)
for _ in range(200):
    good, bad = preferred_first(64)
    loss = -F.logsigmoid(score(good) - score(bad)).mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()

good, bad = preferred_first(500)
with torch.no_grad():
    accuracy = (score(good) > score(bad)).float().mean().item()
    by_count = [score(good[(good == 0).sum(1) == k]).mean().item() for k in (1, 2, 3)]
print(f"right in {accuracy:.3f} of 500 unseen pairs; chance 0.500")
print("mean score of texts with 1, 2 and 3 a:", [round(value, 2) for value in by_count])

# %% [markdown]
# ## How far has a policy moved? The KL divergence
#
# A model that chases a reward forgets the rest. So one measures how far its distribution p has moved from the
# reference q: $\mathrm{KL}(p \| q) = \sum_i p_i \ln \frac{p_i}{q_i}$, in nats. It is 0 for equal distributions, never
# negative, and not symmetric.

# %%
p, q = torch.tensor([0.7, 0.2, 0.1]), torch.tensor([0.4, 0.4, 0.2])
print(f"KL(p || q) = {(p * (p / q).log()).sum():.4f}, KL(q || p) = {(q * (q / p).log()).sum():.4f}")
print(f"torch's:     {F.kl_div(q.log(), p, reduction='sum'):.4f}")

# %% [markdown]
# **Exercise 13.2** Write `kl(p, q)` so that an entry with p = 0 counts 0, whatever q is there.


# %% tags=["13.2"]
def kl(p, q):
    return None


check("13.2", kl)

# %% [markdown]
# ## DPO: preferences without a reward model
#
# **DPO** (direct preference optimisation) takes the model itself as the reward model. The reward of an answer is how
# much likelier the model finds it than the reference does, times beta:
#
# $$r = \beta \, (\ln \pi(answer) - \ln \pi_{reference}(answer))$$
#
# and the loss is Bradley-Terry's: $-\ln \sigma(r_{chosen} - r_{rejected})$. At the start the model is the reference,
# both rewards are 0, and the loss is $\ln 2 = 0.693$.

# %%
source(Prefer.margins)

# %% [markdown]
# **Exercise 13.3** Beta is 0.1. Two pairs, as log-probabilities in nats. First pair: chosen -20 under the model and
# -22 under the reference, rejected -30 and -25. Second pair: chosen -12 and -12, rejected -14 and -18. What is the
# loss of each pair? Give a tuple of two numbers.

# %% tags=["13.3"]
dpo_losses = None

check("13.3", dpo_losses)

# %% [markdown]
# A policy small enough to see whole: four answers, one logit each. The reference finds all alike. The first answer is
# preferred to the second, pair after pair; nobody mentions the other two.


# %%
def run_dpo(beta, steps=200):
    policy = torch.zeros(4, requires_grad=True)
    reference = F.log_softmax(torch.zeros(4), dim=0)
    optimizer = torch.optim.Adam([policy], lr=0.05)
    for _ in range(steps):
        gains = F.log_softmax(policy, dim=0) - reference
        loss = -F.logsigmoid(beta * (gains[0] - gains[1]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return F.softmax(policy, dim=0).detach()


even = torch.full((4,), 0.25)
for beta in (0.1, 1.0):
    after = run_dpo(beta)
    moved = (after * (after / even).log()).sum().item()
    shown = [round(value, 3) for value in after.tolist()]
    print(f"beta {beta}: probabilities {shown}, KL from the reference {moved:.3f}")

# %% [markdown]
# The larger beta is, the sooner the loss of a pair is satisfied, so the less the policy moves. And the answers that
# nobody mentioned changed too: a probability that goes up takes from all others.
#
# ## GRPO: rewards for what the model itself says
#
# Where an answer can be checked by a program, no pairs are needed. **GRPO** draws a group of answers to one
# question, gives each its reward, and compares it with its group: the **advantage** is (reward - mean of the group)
# / standard deviation. Answers above the mean become likelier, those below it less likely.
#
# The loss below is that, with two guards. A group may be used for several steps, and the model moves meanwhile, so
# each token counts by the **ratio** of its probability now to that when it was drawn; at the first step it is 1,
# and its gradient is that of ln p. Beyond 1 ± `clip` a ratio earns nothing more (PPO's clipping). `weight` says
# which tokens count, and `kl_coef` adds the divergence from the model at the start.

# %%
rewards = torch.tensor([1.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0])
advantages = (rewards - rewards.mean()) / rewards.std(correction=0)
print(
    "advantages:",
    [round(value, 2) for value in advantages.tolist()],
    "sum",
    round(advantages.sum().item(), 4),
)
source(grpo_loss)

# %% [markdown]
# **Exercise 13.4** A group of four has the rewards 1, 1, 1, 0. What are the advantages (with the standard deviation
# of the group, divided by 4, not 3)? And what are they if all four rewards are 1? (Where the standard
# deviation is 0, an advantage is 0.) Give two lists.

# %% tags=["13.4"]
group_advantages = None

check("13.4", group_advantages)

# %% [markdown]
# A slot machine has two arms: a pull of the first pays 1 with probability 0.8, of the second with 0.2, and else 0.
# The policy is one logit for each. It begins by preferring the bad arm. An "answer" is one token: which arm to pull.

# %%
settings = SimpleNamespace(clip=0.2, kl_coef=0.0)
PAYS = torch.tensor([0.8, 0.2])


def run_grpo(group_size, steps=150):
    torch.manual_seed(2)
    policy = torch.tensor([-1.0, 1.0], requires_grad=True)
    optimizer, path = torch.optim.Adam([policy], lr=0.05), []
    for _ in range(steps):
        logprobs = F.log_softmax(policy, dim=0)
        path.append(logprobs[0].exp().item())
        pulled = torch.multinomial(logprobs.exp().detach(), group_size, replacement=True)
        rewards = (torch.rand(group_size) < PAYS[pulled]).float()
        advantages = (rewards - rewards.mean()) / (rewards.std(correction=0) + 1e-6)
        chosen = logprobs[pulled][:, None]  # (B, 1): one token an answer
        loss = grpo_loss(chosen, chosen.detach(), advantages, torch.ones_like(chosen), settings)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return path


plt.figure(figsize=(5, 3))
for group_size in (2, 8, 32):
    path = run_grpo(group_size)
    plt.plot(path, label=f"groups of {group_size}")
    print(
        f"groups of {group_size:2}: probability of the good arm {path[0]:.2f} at first, {path[-1]:.2f} after 150 steps"
    )
plt.xlabel("step")
plt.ylabel("probability of the good arm")
plt.title("Two arms")
plt.legend()
picture("13_arms")

# %% [markdown]
# ## The same in a language model
#
# `python finetune.py config/finetune_tasks.py` teaches sums of three numbers in two ways. One row in three works them
# out, digit by digit: a chain of thought (Wei et al. 2022). The others name the bare result, which a model of 1.8M
# parameters rarely gets right. Bare is what it saw more often, so this is how it answers. Then
# `config/finetune_reinforce.py` rewards the result alone. Nothing says that an answer should have steps; the two ways
# are two arms again, and the one that pays takes over within some thirty updates.

# %%
question = "Add the three numbers. 74 840 548"
for answer in (tasks.worked_sum((74, 840, 548)), "1462", "1362"):
    print(f"reward {tasks.reward(question, answer):.0f} for {answer}")

# %% [markdown]
# ## Break it
#
# Leave the mean out and take the reward itself as advantage. Then no answer is ever made less likely by itself. On
# average this still goes the right way, because softmax lowers one arm when the other rises, and the good arm's pulls
# are rewarded more often. What grows is the noise: a single group pushes the wrong way more often. Below, the push is
# the gradient of the sum of advantage times ln p in the logits, advantage times (one-hot - p). In `finetune.py` it is
# the line `advantages = (rewards - mean) / ...`.


# %%
def push_of_a_group(subtract_mean, groups=2000):
    """(mean, spread, share below 0) of the push of the good arm's logit; groups of 8."""
    torch.manual_seed(0)
    p, pushes = F.softmax(torch.tensor([-1.0, 1.0]), dim=0), []
    for _ in range(groups):
        pulled = torch.multinomial(p, 8, replacement=True)
        rewards = (torch.rand(8) < PAYS[pulled]).float()
        weights = rewards - rewards.mean() if subtract_mean else rewards
        pushes.append((weights[:, None] * (F.one_hot(pulled, 2) - p)).sum(0)[0])
    pushes = torch.stack(pushes)
    return pushes.mean().item(), pushes.std().item(), (pushes < 0).float().mean().item()


for subtract_mean in (True, False):
    mean, spread, wrong = push_of_a_group(subtract_mean)
    name = "reward - mean" if subtract_mean else "reward alone"
    print(f"{name:14} good arm {mean:+.3f} a group, spread {spread:.3f}, {wrong:.0%} the wrong way")

# %% [markdown]
# ## Where it happens
#
# | what | where |
# |---|---|
# | pairs, references, DPO's loss | `finetune.py`: `Prefer` |
# | drawing groups, rewards, advantages | `finetune.py`: `Reinforce.draw` |
# | the clipped objective, KL | `finetune.py`: `grpo_loss` |
# | answers worked out, and a reward for their result | `glass/tasks.py`: `worked_sum`, `reward` |
# | try it | after lesson 12's: `python finetune.py config/finetune_reinforce.py` |
#
# ## To read
# - Christiano et al. 2017, "Deep reinforcement learning from human preferences", arXiv:1706.03741.
# - Wei et al. 2022, "Chain-of-thought prompting elicits reasoning in large language models", arXiv:2201.11903.
# - Rafailov et al. 2023, "Direct preference optimization", arXiv:2305.18290.
# - Shao et al. 2024, "DeepSeekMath", arXiv:2402.03300: GRPO.
