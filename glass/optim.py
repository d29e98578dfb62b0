"""Optimizers: Muon, AdamW, which weights each of them updates, and the learning rate of a step."""

import math

import torch

from glass.device import choose_dtype
from glass.parallel import is_shard, local, on_whole_matrices, shard_like


def lr_multiplier(step, settings):
    """What multiplies the largest learning rates in update `step` (from 0): a number in (0, 1].

    It rises linearly in the warm-up, then decays to min_lr / learning_rate. It depends on the step
    alone.
    """
    s = settings
    if not s.decay_lr:
        return 1.0
    if step < s.warmup_iters:
        return (step + 1) / (s.warmup_iters + 1)
    end = s.min_lr / s.learning_rate
    decay_iters = s.max_iters if s.lr_decay_iters is None else s.lr_decay_iters
    progress = min(1.0, (step - s.warmup_iters) / max(1, decay_iters - s.warmup_iters))
    if s.lr_shape == "linear":
        return end + (1 - end) * min(1.0, (1 - progress) / s.cooldown)
    return end + (1 - end) * 0.5 * (1 + math.cos(math.pi * progress))


# a x + b x^3 + c x^5, four times, takes numbers from 0.003 to 1 to between 0.76 and 1.24. Each is the
# closest to 1 on the interval to which those before it bring them, made 2% wider for bfloat16.
POLYNOMIALS = (
    (8.3837, -24.7659, 18.3571),
    (3.9738, -2.8471, 0.5177),
    (3.4883, -2.5210, 0.4842),
    (2.5421, -1.8323, 0.4163),
)


def orthogonalise(matrices):
    """An approximation of the nearest semi-orthogonal matrix to each of a batch (n, rows, columns).

    Same shape as the batch, in bfloat16 where the device multiplies it natively, else in float32: a
    Zen 3 emulates bfloat16 at a fortieth of float32's rate. The largest singular values come close
    to 1: x = a x + b (x x^T) x + c (x x^T)^2 x for each of POLYNOMIALS. The sums are fused into the
    products: 23 ms instead of 47 on two cores, for 16 matrices of 256 x 256 and five polynomials.
    Sources: Jordan et al. 2024, kellerjordan.github.io/posts/muon, which takes one polynomial five
    times; Polar Express, arXiv:2505.16932, which takes the best one each time.
    """
    is_fast = choose_dtype("auto", matrices.device) == torch.bfloat16
    x = matrices.bfloat16() if is_fast else matrices.float()
    is_tall = x.shape[1] > x.shape[2]
    # no singular value above 1, even when rounded
    x = x / (1.01 * x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for a, b, c in POLYNOMIALS:
        gram = x.mT @ x if is_tall else x @ x.mT  # the smaller of the two
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        left, right = (x, polynomial) if is_tall else (polynomial, x)
        x = torch.baddbmm(x, left, right, beta=a)
    return x


def with_even_rows(updates, squares, beta2):
    """NorMuon: each row of the updates divided by the root of its mean square over time.

    updates (n, rows, columns), squares (n, rows, 1): that mean square so far. Gives both, new. The
    Frobenius norm of an update stays what it was. Source: arXiv:2510.05491.
    """
    row_norms = torch.linalg.vector_norm(updates, dim=-1, keepdim=True, dtype=torch.float32)
    squares = squares.lerp(row_norms.square() / updates.shape[-1], 1 - beta2)
    factors = 1 / (squares.sqrt() + 1e-10)  # (n, rows, 1)
    norm, even_norm = (each.norm(dim=1, keepdim=True) for each in (row_norms, factors * row_norms))
    return updates * (factors * (norm / (even_norm + 1e-10))), squares


def updates_and_squares(ahead, squares, beta2):
    """The updates of a batch (n, rows, columns), and the mean squares of its rows, if any."""
    updates = orthogonalise(ahead)
    return with_even_rows(updates, squares, beta2) if beta2 else (updates, squares)


class Muon(torch.optim.Optimizer):
    """Nesterov momentum with an orthogonalised update, for the matrices of the blocks.

    Matrices of one shape are updated as one batch. An update is scaled by sqrt(max(1, rows /
    columns)), so that lr means the same for every shape. Weight decay is decoupled. With beta2 the
    rows of an update get even sizes: see `with_even_rows`. Source: see `orthogonalise`.
    """

    def __init__(self, params, lr, momentum=0.95, weight_decay=0.0, beta2=0.0):
        options = dict(lr=lr, momentum=momentum, weight_decay=weight_decay, beta2=beta2)
        super().__init__(params, options)

    @torch.no_grad()
    def step(self):
        """Update every matrix that has a gradient."""
        for group in self.param_groups:
            by_shape = {}
            for p in group["params"]:
                if p.grad is not None:
                    self.state[p].setdefault("momentum", torch.zeros_like(p))
                    if group["beta2"]:
                        self.state[p].setdefault("row_squares", torch.zeros_like(p[:, :1]))
                    by_shape.setdefault(p.shape, []).append(p)
            for params in by_shape.values():
                self.update(params, group)

    def update(self, params, group):
        """Update a list of matrices that all have one shape, or this process's rows of them."""
        first, matrices = params[0], [local(p) for p in params]  # updated in place
        grads = [local(p.grad) for p in params]
        momenta = [local(self.state[p]["momentum"]) for p in params]
        torch._foreach_lerp_(momenta, grads, 1 - group["momentum"])
        ahead = torch._foreach_lerp(grads, momenta, group["momentum"])  # Nesterov's look ahead
        rows, columns = first.shape
        squares = [p[:, :0] for p in matrices]  # none
        if group["beta2"]:
            squares = [local(self.state[p]["row_squares"]) for p in params]
        if is_shard(first):  # the squares travel as a last column

            def make(batch):
                ahead, squares = batch[..., :columns].contiguous(), batch[..., columns:]
                return torch.cat(updates_and_squares(ahead, squares, group["beta2"]), -1)

            joined = [torch.cat(pair, 1) for pair in zip(ahead, squares, strict=True)]
            joined = torch.stack(on_whole_matrices(make, joined, first))
            updates, new_squares = joined[..., :columns], joined[..., columns:]
        else:
            batch = torch.stack(ahead), torch.stack(squares)
            updates, new_squares = updates_and_squares(*batch, group["beta2"])
        torch._foreach_copy_(squares, list(new_squares))
        scale = max(1, rows / columns) ** 0.5
        torch._foreach_mul_(matrices, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(matrices, list(updates.to(first.dtype)), alpha=-group["lr"] * scale)


def make_optimizers(model, settings):
    """A list of optimizers: [AdamW], or [AdamW, Muon] with optimizer='muon'.

    Muon updates the matrices of the blocks. AdamW decays matrices and embeddings only. Parameters
    that need no gradient are left out.
    """
    s = settings
    trained = [p for p in model.parameters() if p.requires_grad]
    matrices = []
    if s.optimizer == "muon":
        matrices = [p for p in model.blocks.parameters() if p.dim() == 2 and p.requires_grad]
    for_muon = set(matrices)
    decayed = [p for p in trained if p.dim() >= 2 and p not in for_muon]
    groups = [
        {"params": decayed, "weight_decay": s.weight_decay},
        {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
    ]
    betas = (s.beta1, s.beta2)
    optimizers = [torch.optim.AdamW(groups, lr=s.learning_rate, betas=betas, fused=True)]
    if matrices:
        muon = Muon(matrices, s.muon_lr, s.momentum, s.muon_weight_decay, s.muon_beta2)
        optimizers.append(muon)
    for group in param_groups(optimizers):
        group["max_lr"] = group["lr"]
    return optimizers


def param_groups(optimizers):
    """The parameter groups of all optimizers, in order, as a list."""
    return [group for optimizer in optimizers for group in optimizer.param_groups]


def set_learning_rates(optimizers, step, settings):
    """Give every group the learning rate of update `step`."""
    multiplier = lr_multiplier(step, settings)
    for group in param_groups(optimizers):
        group["lr"] = group["max_lr"] * multiplier


def load_moments(optimizers, saved):
    """Load the moments of saved state dicts.

    Learning rates, betas and weight decays stay as the settings of this run have them.
    """
    for optimizer, state in zip(optimizers, saved, strict=True):
        options = [{**group} for group in optimizer.param_groups]
        parameters = [p for group in options for p in group["params"]]
        moments = {}
        for i, tensors in state["state"].items():
            moments[i] = {
                name: shard_like(tensor, parameters[i]) if tensor.ndim else tensor
                for name, tensor in tensors.items()
            }
        optimizer.load_state_dict({**state, "state": moments})
        for group, of_this_run in zip(optimizer.param_groups, options, strict=True):
            del of_this_run["params"]
            group.update(of_this_run)
