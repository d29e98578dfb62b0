"""The exercises of lesson 15."""

from desk import ask, exercise, expect, same


@exercise(
    "15.1",
    "A process takes 8 / n rows. The first is row step * 8 + rank * (8 / n).",
    "list(range(first, first + share))",
)
def own_rows(answer):
    given = [list(ask(answer, 3, rank, 4)) for rank in range(4)]
    every = sorted(row for rows in given for row in rows)
    expect(every == list(range(24, 32)), f"step 3 takes rows 24 to 31, together yours are {every}")
    expect(given[1] == [26, 27], f"of 4 processes, rank 1 takes rows 26 and 27, not {given[1]}")
    expect(list(ask(answer, 3, 0, 1)) == list(range(24, 32)), "one process takes all eight rows")
    return "The union over the ranks is the step's rows, whatever n is."


@exercise(
    "15.2",
    "In each of 2 (n - 1) rounds a process sends one piece, 1 / n of the tensor. 4 bytes a number.",
    "Milliseconds: bytes / 25e9 * 1000.",
)
def ring_bytes(answer):
    function, milliseconds = answer
    given = ask(function, 1200, 4)
    expect(given != 1800, "1800 is the count of numbers; a float32 has 4 bytes")
    expect(given != 3600, "a ring goes round twice: reduce-scatter, then all-gather")
    same(float(given), 7200.0, f"4 processes and 1,200 parameters: it is not {given}")
    same(float(ask(function, 800, 8)), 5600.0, "for 8 processes it is wrong")
    if milliseconds is None:
        raise ValueError("the milliseconds are missing")
    expected = 2 * 7 / 8 * 124_439_808 * 4 / 25e9 * 1000
    same(float(milliseconds), expected, "the time is wrong: bytes over bytes a second", 1e-2)
    return "A step that computes for longer than this can hide it."


@exercise(
    "15.3",
    "50 GB are left for 16 P / n bytes.",
    "16 * 8.03e9 / 50e9 is 2.57.",
)
def n_devices_needed(answer):
    expect(answer != 2, "on 2 devices it is 64 GB each, and 50 are there")
    expect(answer != 3, "3 is enough but is no power of two")
    expect(answer == 4, f"with {answer} devices each holds {16 * 8.03 / answer:.1f} GB, of 50")
    return "32 GB on each of 4."


@exercise(
    "15.4",
    "The mean over tokens: all nats over all tokens.",
    "85 / 40; and the mean of 2.5 and 2.0.",
)
def losses(answer):
    right, wrong = answer
    expect(abs(right - 2.25) > 1e-6, "2.25 is the mean of means: it weighs 10 tokens like 30")
    same(float(right), 85 / 40, "the loss of the step is all nats over all tokens")
    same(float(wrong), 2.25, "the mean of means is that of 2.5 and 2.0")
    return "A mean of means is right only where all have equally many tokens, as in pretraining."
