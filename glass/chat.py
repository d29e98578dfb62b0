"""Conversations as token ids: chat templates, what the assistant says in them, and what ends a
reply.

A message is {"role": "system" | "user" | "assistant", "content": text}. A template gives the parts
of a message as (text, is_special). A special part becomes its token; everything else is ordinary
text whatever it holds, so no message can smuggle in a special token.
"""

from bpe import ASSISTANT, END, END_OF_TEXT, SYSTEM, USER

MARKERS = {"system": SYSTEM, "user": USER, "assistant": ASSISTANT}  # of our own template
# special tokens that end a text or an answer: ours, Llama 3's, ChatML's; a published model may name
# others
ENDS = (END_OF_TEXT, END, "<|eot_id|>", "<|end_of_text|>", "<|im_end|>")
# the template of a tokenizer that has this marker
TEMPLATE_OF_MARKER = {"<|start_header_id|>": "llama3", "<|im_start|>": "chatml", USER: "markers"}
ALPACA_PREAMBLE = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request."
)


def markers_parts(role, content):
    return [(MARKERS[role], True), (content, False), (END, True)]


def alpaca_parts(role, content):
    """Plain text, for tokenizers without markers. An instruction's input is part of the content."""
    if role == "assistant":
        return [("\n\n### Response:\n", False), (content, False), (END_OF_TEXT, True)]
    if role == "system":
        return [(content, False)]
    return [(f"{ALPACA_PREAMBLE}\n\n### Instruction:\n{content}", False)]


def llama3_parts(role, content):
    header = [
        ("<|start_header_id|>", True),
        (role, False),
        ("<|end_header_id|>", True),
        ("\n\n", False),
    ]
    return [*header, (content.strip(), False), ("<|eot_id|>", True)]


def chatml_parts(role, content):
    return [
        ("<|im_start|>", True),
        (role + "\n", False),
        (content, False),
        ("<|im_end|>", True),
        ("\n", False),
    ]


# name: the function above, what the chat begins with, how many parts come before the content
CHAT_TEMPLATES = {
    "markers": (markers_parts, [], 1),
    "alpaca": (alpaca_parts, [], 1),
    "llama3": (llama3_parts, [("<|begin_of_text|>", True)], 4),
    "chatml": (chatml_parts, [], 2),
}


def chat_parts(messages, template="markers", reply=False):
    """The parts of a chat: (text, is_special, is_said), is_said for the assistant's words and their
    end.

    With reply, the chat ends with what comes before the assistant's next words. Raises ValueError
    for an unknown template or role.
    """
    if template not in CHAT_TEMPLATES:
        raise ValueError(f"template={template!r} must be one of {sorted(CHAT_TEMPLATES)}")
    parts_of, beginning, n_before = CHAT_TEMPLATES[template]
    parts = [(text, is_special, False) for text, is_special in beginning]
    for message in messages:
        role = message["role"]
        if role not in MARKERS:
            raise ValueError(f"role={role!r} of a message must be system, user or assistant")
        for i, (text, is_special) in enumerate(parts_of(role, message["content"])):
            is_content_or_end = n_before <= i < n_before + 2
            parts.append((text, is_special, role == "assistant" and is_content_or_end))
    if reply:
        before_reply = parts_of("assistant", "")[:n_before]
        parts += [(text, is_special, False) for text, is_special in before_reply]
    return parts


def encode_chat(tokenizer, messages, template="markers", reply=False):
    """(ids, is_answer), two lists: the chat's tokens, and which of them the assistant says.

    Raises ValueError where the tokenizer lacks a marker of the template.
    """
    ids, is_answer = [], []
    for text, is_special, is_said in chat_parts(messages, template, reply):
        if is_special and text not in tokenizer.special_tokens:
            raise ValueError(
                f"template={template!r} needs {text}, which this tokenizer lacks: use another template"
            )
        part = [tokenizer.special_tokens[text]] if is_special else tokenizer.encode(text)
        ids += part
        is_answer += [is_said] * len(part)
    return ids, is_answer


def chat_text(messages, template="markers", reply=False):
    """The chat as text, to look at; its markers become tokens only through encode_chat."""
    return "".join(text for text, _, _ in chat_parts(messages, template, reply))


def fit_chat(tokenizer, messages, template, room):
    """The ids of a chat that waits for a reply, without its oldest turns where `room` is too small."""
    messages = list(messages)
    while True:
        ids, _ = encode_chat(tokenizer, messages, template, reply=True)
        oldest = 1 if messages[0]["role"] == "system" else 0
        if len(ids) <= room or len(messages) <= oldest + 1:
            return ids[-room:]
        del messages[oldest : oldest + 2]


def messages_of(row, template):
    """The conversation of an instruction row. Alpaca's template has a heading for the input."""
    if "messages" in row:
        return row["messages"]
    asked = row["instruction"]
    if row.get("input"):
        asked += ("\n\n### Input:\n" if template == "alpaca" else "\n") + row["input"]
    answer = row.get("output", "")
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]


def template_for(tokenizer):
    """The name of the template whose marker the tokenizer has, else alpaca."""
    special = tokenizer.special_tokens
    known = (name for marker, name in TEMPLATE_OF_MARKER.items() if marker in special)
    return next(known, "alpaca")


def stop_ids(tokenizer):
    """The ids that end a text or an answer, as a sorted list."""
    special = tokenizer.special_tokens
    published = getattr(tokenizer, "stop_ids", ())  # those that a published model names itself
    return sorted({*published, *(special[name] for name in ENDS if name in special)})


def encode_for_class(tokenizer, text, longest):
    """(ids, was_cut): a text of at most `longest` tokens, as a classifier reads it.

    The class is read at the last token, so that is always the one that ends a text, where the
    tokenizer has one.
    """
    ids = tokenizer.encode(text)
    ends = [tokenizer.special_tokens[name] for name in ENDS if name in tokenizer.special_tokens]
    room = longest - len(ends[:1])
    return ids[:room] + ends[:1], len(ids) > room
