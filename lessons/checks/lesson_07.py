"""The exercises of lesson 07."""

from desk import exercise, expect, same


@exercise("7.1", "Weights and two moments: three numbers a parameter, of 4 bytes each.", "12 * P")
def checkpoint_bytes(answer):
    expect(answer != 4 * 124_439_808, "these are the weights alone; the two moments are kept too")
    same(float(answer), 12.0 * 124_439_808, "it is three float32 numbers for each parameter", 1e-2)
    return "1.5 GB for GPT-2: this is why the last two are kept, and not all."


@exercise(
    "7.2",
    "The shape of a matrix, or what is done to its input, belongs to the weights.",
    "batch_size changes where the run goes, and it may.",
)
def refused(answer):
    answer = set(answer)
    expect(
        "batch_size" not in answer, "batch_size may change: the run goes another way, and says so"
    )
    expect("eval_interval" not in answer, "evaluating more often changes no weight")
    expect("weight_decay" not in answer, "weight_decay may change, as the learning rate may")
    needed = {"n_layer", "qk_norm", "dataset"}
    expect(answer <= needed, f"not in the list: {' '.join(sorted(answer - needed))}")
    expect(answer == needed, f"missing: {' '.join(sorted(needed - answer))}")
    return "qk_norm has no weights at all, and still the weights were trained with it."


@exercise(
    "7.3", "The last multiple of 100 before 1,234.", "1,200; steps 1,200 to 1,233 are redone."
)
def after_a_kill(answer):
    start, twice = answer
    expect(start == 1200, "it goes on from the last checkpoint")
    expect(twice == 34, f"the steps after 1,200 are done again: not {twice}")
    return "And they are the same steps, so the run does not show that it was killed."
