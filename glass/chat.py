"""Conversations as token ids: chat templates, what the assistant says, and what ends a reply.

A message is {"role": "system" | "user" | "assistant", "content": text}. A template gives the parts
of a message as (text, is_special). A special part becomes its token. Every other part is ordinary
text, whatever it holds, so no message can smuggle in a special token.
"""

from typing import Literal

from bpe import ASSISTANT, END, END_OF_TEXT, SYSTEM, USER

MARKERS = {"system": SYSTEM, "user": USER, "assistant": ASSISTANT}  # of our own template
# Special tokens that end a text or an answer: ours, Llama 3's and ChatML's. A published model may
# name others.
ENDS = (END_OF_TEXT, END, "<|eot_id|>", "<|end_of_text|>", "<|im_end|>")
# A tokenizer that has this marker uses this template.
TEMPLATE_OF_MARKER = {"<|start_header_id|>": "llama3", "<|im_start|>": "chatml", USER: "markers"}
Template = Literal["auto", "markers", "alpaca", "llama3", "chatml"]  # auto: see template_for
TEMPLATE_STOPS = {"alpaca": ["### Instruction:"]}  # strings that end a reply where no token does
ALPACA_PREAMBLE = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request."
)


def markers_parts(role, content):
    """The parts of a message in our own template: a list of (text, is_special)."""
    return [(MARKERS[role], True), (content, False), (END, True)]


def alpaca_parts(role, content):
    """The parts of a message as plain text, for a tokenizer without markers.

    The input of an instruction is part of the content.
    """
    if role == "assistant":
        return [("\n\n### Response:\n", False), (content, False), (END_OF_TEXT, True)]
    if role == "system":
        return [(content, False)]
    return [(f"{ALPACA_PREAMBLE}\n\n### Instruction:\n{content}", False)]


def llama3_parts(role, content):
    """The parts of a message in Llama 3's template."""
    header = [
        ("<|start_header_id|>", True),
        (role, False),
        ("<|end_header_id|>", True),
        ("\n\n", False),
    ]
    return [*header, (content.strip(), False), ("<|eot_id|>", True)]


def chatml_parts(role, content):
    """The parts of a message in ChatML."""
    return [
        ("<|im_start|>", True),
        (role + "\n", False),
        (content, False),
        ("<|im_end|>", True),
        ("\n", False),
    ]


# name: the function above, the parts that begin a chat, the number of parts before the content
CHAT_TEMPLATES = {
    "markers": (markers_parts, [], 1),
    "alpaca": (alpaca_parts, [], 1),
    "llama3": (llama3_parts, [("<|begin_of_text|>", True)], 4),
    "chatml": (chatml_parts, [], 2),
}


def chat_parts(messages, template="markers", reply=False):
    """The parts of a chat, a list of (text, is_special, is_said).

    is_said is True for what the assistant says and for the part that ends it. With reply, the chat
    ends with the parts that come before the assistant's next words. Raises ValueError for an
    unknown template or role.
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
    """(ids, is_answer), two lists: the tokens of the chat, and which of them the assistant says.

    Raises ValueError if the tokenizer lacks a marker of the template.
    """
    ids, is_answer = [], []
    for text, is_special, is_said in chat_parts(messages, template, reply):
        if is_special and text not in tokenizer.special_tokens:
            raise ValueError(
                f"template={template!r} needs {text}, which this tokenizer lacks: "
                "use another template"
            )
        part = [tokenizer.special_tokens[text]] if is_special else tokenizer.encode(text)
        ids += part
        is_answer += [is_said] * len(part)
    return ids, is_answer


def chat_text(messages, template="markers", reply=False):
    """The chat as text, for people. Its markers become tokens only through `encode_chat`."""
    return "".join(text for text, _, _ in chat_parts(messages, template, reply))


def fit_chat(tokenizer, messages, template, room):
    """The ids of a chat that waits for a reply, at most `room` of them.

    The oldest turns are dropped until the chat fits; the system message stays. If the last turn
    alone is too long, its last `room` ids are kept.
    """
    messages = list(messages)
    while True:
        ids, _ = encode_chat(tokenizer, messages, template, reply=True)
        oldest = 1 if messages[0]["role"] == "system" else 0
        if len(ids) <= room or len(messages) <= oldest + 1:
            return ids[-room:]
        del messages[oldest : oldest + 2]


def messages_of(row, template):
    """The conversation of an instruction row, as a list of messages.

    Alpaca's template has a heading for the input.
    """
    if "messages" in row:
        return row["messages"]
    asked = row["instruction"]
    if row.get("input"):
        heading = "\n\n### Input:\n" if template == "alpaca" else "\n"
        asked += heading + row["input"]
    answer = row.get("output", "")
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]


def template_for(tokenizer):
    """The name of the template whose marker the tokenizer has, or alpaca if it has none."""
    special = tokenizer.special_tokens
    known = (name for marker, name in TEMPLATE_OF_MARKER.items() if marker in special)
    return next(known, "alpaca")


def stop_ids(tokenizer):
    """The ids that end a text or an answer, as a sorted list."""
    special = tokenizer.special_tokens
    published = getattr(tokenizer, "stop_ids", ())  # those that a published model names
    ours = (special[name] for name in ENDS if name in special)
    return sorted({*published, *ours})


def encode_for_class(tokenizer, text, longest):
    """(ids, was_cut): a text of at most `longest` tokens, as a classifier reads it.

    The classifier reads the class at the last token. So the ids always end with the token that ends
    a text, if the tokenizer has one.
    """
    special = tokenizer.special_tokens
    ids = tokenizer.encode(text)
    end = [special[name] for name in ENDS if name in special][:1]
    room = longest - len(end)
    return ids[:room] + end, len(ids) > room
