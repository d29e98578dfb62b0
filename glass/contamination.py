"""Whether test items stand in the text that a model was trained on: 13 words in a row in both."""

from glass.shards import META, folder_of, open_dataset

CONTAMINATION = 13  # words, as GPT-3's authors count them (arXiv:2005.14165, appendix C)


def contaminated(texts, name):
    """(texts that share 13 words in a row with training text, texts of 13 words or more).

    name: a dataset whose shards are there.
    """
    grams_of, first_words = {}, set()
    n_long = 0
    for i, text in enumerate(texts):
        words = text.lower().split()
        n_long += len(words) >= CONTAMINATION
        for start in range(len(words) - CONTAMINATION + 1):
            gram = " ".join(words[start : start + CONTAMINATION])
            grams_of.setdefault(gram, set()).add(i)
            first_words.add(words[start])
    dataset, found = open_dataset(name), set()
    for shard in dataset.splits["train"]:
        rest = []  # words that the next piece goes on from
        for start in range(0, len(shard), 1_000_000):
            piece = dataset.tokenizer.decode(shard[start : start + 1_000_000].tolist())
            words = rest + piece.lower().split()
            for place, word in enumerate(words[: 1 - CONTAMINATION]):
                if word in first_words:
                    gram = " ".join(words[place : place + CONTAMINATION])
                    found |= grams_of.get(gram, set())
            rest = words[1 - CONTAMINATION :]
    return len(found), n_long


def count_contamination(figures, texts, dataset):
    """Note with the figures how many of their items stand in the training shards, if these are there."""
    if dataset is None or not (folder_of(dataset) / META).is_file():
        return
    n_found, n_long = contaminated(texts, dataset)
    for figure in figures:
        figure.notes[f"share {CONTAMINATION} words with {dataset}"] = n_found
        figure.notes[f"have {CONTAMINATION} words"] = n_long
