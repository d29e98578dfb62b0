"""The exercises of lesson 06."""

import math

import torch
from desk import ask, exercise, expect, same

from model import GPT, GPTConfig


@exercise(
    "6.1",
    "Each weight has its own factor, 1 - eta a. Both must stay between -1 and 1.",
    "Solve 1 - 50 eta = -1 for eta.",
)
def limit(answer):
    expect(
        float(answer) != 2, "2 is the limit of the first weight; the second reaches its own before"
    )
    expect(
        float(answer) != 1 / 50, "at 1 / 50 the second weight is at 0 after one step: that is good"
    )
    same(float(answer), 0.04, "at the limit 1 - 50 eta is -1: the second weight jumps to and fro")
    return "At 0.04 the first weight loses only 4% a step."


def steps_of(step, correct, decoupled=True):
    """w after three steps of `step`, or of torch's AdamW if step is None, in float64."""
    generator = torch.Generator().manual_seed(1)
    w = torch.randn(5, generator=generator, dtype=torch.float64)
    gradients = torch.randn(3, 5, generator=generator, dtype=torch.float64)
    if step is None:
        parameter = torch.nn.Parameter(w)
        make = torch.optim.AdamW if decoupled else torch.optim.Adam
        optimizer = make([parameter], lr=0.01, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1)
        for g in gradients:
            parameter.grad = g
            optimizer.step()
        return parameter.detach()
    m, v = torch.zeros_like(w), torch.zeros_like(w)
    for t, g in enumerate(gradients, start=1):
        given = ask(step, w.clone(), g.clone(), m.clone(), v.clone(), t if correct else 1000)
        expect(len(given) == 3, "three tensors are asked for: w, m, v")
        w, m, v = given
    return w


@exercise(
    "6.2",
    "m = beta1 * m + (1 - beta1) * g, and v the same with g * g.",
    "Divide m by 1 - beta1**t and v by 1 - beta2**t, but give back m and v without the division.",
    "w - eta * weight_decay * w - eta * m_hat / (v_hat.sqrt() + eps), with the old w in both places.",
)
def adamw(answer):
    given, expected = steps_of(answer, True), steps_of(None, True)
    ignores_t = torch.equal(given, steps_of(answer, False))
    is_close = torch.allclose(given, expected, rtol=0, atol=1e-6)
    expect(
        is_close or not ignores_t,
        "it gives the same for t = 1 and t = 1000: the correction of m and v is missing",
    )
    coupled = steps_of(None, True, decoupled=False)
    is_coupled = torch.allclose(given, coupled, rtol=0, atol=1e-6)
    expect(not is_coupled, "this is Adam: weight decay must not go through m and v")
    expect(
        is_close,
        "three steps do not end where torch's do: give back m and v without the correction, and let w shrink "
        "by eta * decay * w before the step",
    )
    return "torch.optim.AdamW does this, for all weights at once."


@exercise(
    "6.3",
    "The warm-up is over in step 20, so p = (60 - 20) / (100 - 20).",
    "cos(pi / 2) is 0.",
)
def rate(answer):
    without = 1e-4 + 9e-4 * 0.5 * (1 + math.cos(math.pi * 0.6))
    expect(abs(float(answer) - without) > 1e-6, "p counts from the end of the warm-up, step 20")
    expect(abs(float(answer) - 5e-4) > 1e-9, "this decays to 0: the decay ends at min_lr, 0.0001")
    same(1e4 * float(answer), 5.5, "p is 0.5 here: halfway between largest and smallest", 1e-4)
    return "Halfway, the cosine and a straight line are equal."


@exercise(
    "6.4",
    "zip(idx.chunk(n), targets.chunk(n)) gives the pieces.",
    "model(idx, targets)[1] is the mean over one piece. The mean over all is the sum of these, over n.",
)
def accumulate(answer):
    torch.manual_seed(5)
    model = GPT(GPTConfig(vocab_size=11, block_size=8, n_layer=1, n_head=2, n_embd=16))
    rows = torch.randint(11, (6, 9))
    idx, targets = rows[:, :-1], rows[:, 1:]
    calls = []
    hook = model.register_forward_pre_hook(lambda module, inputs: calls.append(len(inputs[0])))
    given = ask(answer, model, idx, targets, 3)
    hook.remove()
    given = None if given is None else torch.as_tensor(given).detach()
    expect(calls == [2, 2, 2], f"the model saw pieces of {calls} rows, not of [2, 2, 2]")
    grads = [p.grad for p in model.parameters()]
    expect(all(grad is not None for grad in grads), "backward() was not called")
    model.zero_grad()
    loss = model(idx, targets)[1]
    loss.backward()
    expected = torch.cat([p.grad.flatten() for p in model.parameters()])
    found = torch.cat([grad.flatten() for grad in grads])
    is_sum = torch.allclose(found, 3 * expected, atol=1e-5)
    expect(not is_sum, "the gradient is 3 times too large: each piece is one third of the rows")
    same(found, expected, "the gradient is not that of the mean of all rows")
    same(
        float(given), loss.item(), "the gradient is right; the loss that it gives back is not", 1e-4
    )
    return "A step of 480 sequences fits where 12 do: gradient_accumulation_steps=40."
