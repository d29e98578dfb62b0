# A plausible wrong answer to each exercise, for the tests: each must be refused with a reason.

# %% tags=["3.1"]
def past_mean(x):
    return x.cumsum(dim=0) / len(x)


check("3.1", past_mean)

# %% tags=["3.2"]
divisor = 8

check("3.2", divisor)

# %% tags=["3.3"]
cache_bytes = 32 * 8 * 128 * 8192 * 2, 32 * 32 * 128 * 8192 * 2

check("3.3", cache_bytes)


# %% tags=["3.4"]
def attend(x, attention):
    T, C = x.shape
    projections = attention.q_proj, attention.k_proj, attention.v_proj
    q, k, v = (each(x).view(T, attention.n_head, -1).transpose(0, 1) for each in projections)
    weights = F.softmax(q @ k.transpose(1, 2) / q.shape[-1] ** 0.5, dim=-1)
    return attention.o_proj((weights @ v).transpose(0, 1).reshape(T, C))


check("3.4", attend)

# %% tags=["14.1"]
looks_at = 5

check("14.1", looks_at)


# %% tags=["14.2"]
def induction_score(weights, n):
    t = torch.arange(n, 2 * n)
    return weights[t, t - n].mean()


check("14.2", induction_score)


# %% tags=["14.3"]
def loss_without(model, idx, layer, head):
    return model(idx[:, :-1], idx[:, 1:])[1]


check("14.3", loss_without)


# %% tags=["14.4"]
def lens_probability(model, stream, token):
    return model.head(stream).softmax(-1)[token]


check("14.4", lens_probability)
