# Solutions of the exercises, by their numbers. Each replaces the cell of the same number in its lesson.

# %% tags=["3.1"]
def past_mean(x):
    counts = torch.arange(1, len(x) + 1)[:, None]  # (T, 1)
    return x.cumsum(dim=0) / counts


check("3.1", past_mean)

# %% tags=["3.2"]
divisor = (64 * 4) ** 0.5

check("3.2", divisor)

# %% tags=["3.3"]
bytes_of_a_head = 2 * 32 * 128 * 8192 * 2
cache_bytes = 8 * bytes_of_a_head, 32 * bytes_of_a_head

check("3.3", cache_bytes)


# %% tags=["3.4"]
def attend(x, attention):
    T, C = x.shape
    projections = attention.q_proj, attention.k_proj, attention.v_proj
    q, k, v = (
        each(x).view(T, attention.n_head, -1).transpose(0, 1) for each in projections
    )  # (H, T, D)
    scores = q @ k.transpose(1, 2) / q.shape[-1] ** 0.5  # (H, T, T)
    weights = F.softmax(scores + causal_mask(torch.arange(T), T), dim=-1)
    return attention.o_proj((weights @ v).transpose(0, 1).reshape(T, C))


check("3.4", attend)

# %% tags=["14.1"]
looks_at = 25 - 20 + 1

check("14.1", looks_at)


# %% tags=["14.2"]
def induction_score(weights, n):
    t = torch.arange(n, 2 * n)
    return weights[t, t - n + 1].mean()


check("14.2", induction_score)


# %% tags=["14.3"]
def loss_without(model, idx, layer, head):
    mask = torch.zeros(len(model.blocks), model.config.n_head + 1, dtype=torch.bool)
    mask[layer, head] = True
    with torch.no_grad(), switched_off(model, mask):
        return model(idx[:, :-1], idx[:, 1:])[1]


check("14.3", loss_without)


# %% tags=["14.4"]
def lens_probability(model, stream, token):
    logits = model.head(model.final_norm(stream))
    return logits.softmax(-1)[token]


check("14.4", lens_probability)
