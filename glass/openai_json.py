"""OpenAI's JSON: what the fields of a request may be, and how log-probabilities are written."""

import codecs
import difflib
import json
import math
import secrets

from glass.guard import ApiError
from glass.loading import Drawing

MAX_TOP = 20  # likeliest tokens that a request may ask for at each position
MAX_STOPS, MAX_STOP = 16, 200  # strings that end a text, and characters of one
LEAST_LOGPROB = -9999.0  # stands for -infinity, which JSON lacks, as in OpenAI's API
# They change nothing here, and real clients send them.
IGNORED = set(
    "user metadata store service_tier safety_identifier prompt_cache_key prompt_cache_retention "
    "parallel_tool_calls stream_options".split()
)
# What is not done here would change the answer. So only the values that mean "not" are taken.
NEUTRAL = {
    "presence_penalty": [0],
    "frequency_penalty": [0],
    "logit_bias": [{}],
    "best_of": [1],
    "suffix": [""],
    "tools": [[]],
    "tool_choice": ["none", "auto"],
    "functions": [[]],
    "function_call": ["none", "auto"],
    "response_format": [{"type": "text"}],
    "modalities": [["text"]],
    "audio": [],
    "prediction": [],
    "web_search_options": [],
    "reasoning_effort": ["none"],
    "verbosity": [],
}
KINDS = {str: "a text", bool: "true or false", int: "a whole number", float: "a number"}
ROLES = {name: name for name in ("system", "user", "assistant")} | {"developer": "system"}


def no_constant(name):
    raise ValueError(f"{name} is not JSON")


def wrong(name, value, needed):
    """The ApiError for a field whose value is not as needed."""
    shown = json.dumps(value, default=str)[:60]
    return ApiError(400, f"{name}={shown} must be {needed}", "invalid_value", name)


def check_text(name, text):
    """ApiError for a text that is not Unicode: half of a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise wrong(name, "...", "Unicode: it holds half of a surrogate pair") from None


class Fields:
    """The fields of a request's JSON. Each is taken by name; `end` refuses those that are left.

    All methods raise ApiError for what cannot be done, by name.
    """

    def __init__(self, body):
        try:
            document = json.loads(body, parse_constant=no_constant)
        except (ValueError, RecursionError) as error:
            reason = str(error) if isinstance(error, json.JSONDecodeError) else type(error).__name__
            raise ApiError(400, f"the body is not JSON ({reason}): send an object") from None
        if not isinstance(document, dict):
            raise ApiError(400, f"the body is a {type(document).__name__}: send a JSON object")
        self.document = document
        self.left = {name: value for name, value in document.items() if value is not None}

    def take(self, name, kind, default=None, low=None, high=None):
        """The value of a field: a str, bool, int or float (which may be given as an int)."""
        value = self.left.pop(name, None)
        if value is None:
            return default
        is_whole = type(value) is int and abs(value) < 2**1000  # larger ones are no float
        is_kind = type(value) is kind or (kind is float and is_whole)
        if not is_kind:
            raise wrong(name, value, KINDS[kind])
        if kind is str:
            check_text(name, value)
        too_low, too_high = low is not None and value < low, high is not None and value > high
        if too_low or too_high:
            raise wrong(name, value, f"from {low} to {'any' if high is None else high}")
        return value

    def take_stops(self):
        """The strings that end a text, a list."""
        stop = self.left.pop("stop", None) or []
        stops = [stop] if isinstance(stop, str) else stop
        is_list = isinstance(stops, list) and len(stops) <= MAX_STOPS
        if not is_list or not all(isinstance(s, str) and 0 < len(s) <= MAX_STOP for s in stops):
            needed = f"at most {MAX_STOPS} strings of 1 to {MAX_STOP} characters"
            raise wrong("stop", stop, needed)
        for text in stops:
            check_text("stop", text)
        return stops

    def take_drawing(self):
        """How to draw, with OpenAI's defaults; without a seed, a new one."""
        seed = self.take("seed", int)
        given = {
            "temperature": self.take("temperature", float, 1.0, 0, 100),
            "top_p": self.take("top_p", float),
            "top_k": self.take("top_k", int),
            "min_p": self.take("min_p", float),
            "repetition_penalty": self.take("repetition_penalty", float, 1.0, 0.01, 100),
            "seed": secrets.randbits(62) if seed is None else seed % 2**63,
        }
        for name in ("top_p", "min_p", "top_k"):  # other servers' words for off
            if given[name] in ((1,) if name == "top_p" else (0, -1)):
                given[name] = None
        try:
            return Drawing(**given)
        except ValueError as error:
            raise ApiError(400, str(error), "invalid_value", str(error).split("=")[0]) from None

    def take_messages(self):
        """The conversation, as glass.chat has it: a list of messages whose content is a text."""
        messages = self.left.pop("messages", None)
        if not isinstance(messages, list) or not 0 < len(messages) <= 1000:
            raise wrong("messages", messages, "a list of 1 to 1,000 messages")
        return [message_of(message) for message in messages]

    def take_prompts(self, n_ids):
        """The prompts, a list of texts and lists of ids; ids lie below n_ids."""
        prompt = self.left.pop("prompt", None)
        is_one = isinstance(prompt, str) or (
            isinstance(prompt, list) and bool(prompt) and type(prompt[0]) is int
        )
        prompts = [prompt] if is_one else prompt
        if not isinstance(prompts, list) or not prompts:
            raise wrong("prompt", prompt, "a text, texts, a list of ids, or lists of ids")
        for each in prompts:
            check_prompt(each, n_ids)
        return prompts

    def end(self):
        """Refuse what would change the answer and is not done, and what nobody knows."""
        for name, value in self.left.items():
            if name in IGNORED:
                continue
            if name in NEUTRAL:
                if not any(type(value) is not bool and value == each for each in NEUTRAL[name]):
                    raise ApiError(
                        400, f"{name} is not supported: leave it out", "unsupported_parameter", name
                    )
                continue
            near = difflib.get_close_matches(name[:60], KNOWN, n=1)
            advice = f"did you mean {near[0]}?" if near and near[0] != name else "leave it out"
            raise ApiError(
                400, f"{name[:60]!r} is no field of this request: {advice}", "unknown_parameter"
            )


KNOWN = [
    *"model prompt messages max_tokens max_completion_tokens temperature top_p top_k min_p".split(),
    *"repetition_penalty n stop stream seed echo logprobs top_logprobs input".split(),
    *IGNORED,
    *NEUTRAL,
]


def check_prompt(prompt, n_ids):
    """ApiError for a prompt that is neither a text nor a list of ids."""
    if isinstance(prompt, str):
        check_text("prompt", prompt)
    else:
        check_ids("prompt", prompt, n_ids)


def check_ids(name, ids, n_ids):
    """ApiError for what is no list of ids below n_ids, or an empty one."""
    is_list = isinstance(ids, list) and bool(ids)
    if not is_list or not all(type(i) is int and 0 <= i < n_ids for i in ids):
        raise wrong(name, ids, f"a list of ids from 0 to {n_ids - 1}, none empty")


def message_of(message):
    """A message of a request as glass.chat has it. Raises ApiError."""
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise wrong("messages", message, "objects with role and content")
    role, content = ROLES.get(message["role"]), message.get("content")
    if role is None:
        raise wrong("role", message["role"], "system, user or assistant")
    for name in ("tool_calls", "function_call", "audio"):
        if message.get(name):
            raise ApiError(400, f"{name} is not supported: leave it out", "unsupported_parameter")
    if isinstance(content, list):
        is_text = [isinstance(p, dict) and isinstance(p.get("text"), str) for p in content]
        if not all(is_text) or any(p.get("type") != "text" for p in content):
            raise wrong("content", content, "a text, or parts of type text")
        content = "".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise wrong("content", content, "a text, or parts of type text")
    check_text("content", content)
    return {"role": role, "content": content}


# Log-probabilities.


def token_text(tokenizer, token):
    """A token as text. One that is no whole UTF-8 gets OpenAI's form, bytes:\\xf0\\x9f."""
    raw = tokenizer.decode_bytes([token])
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def as_number(logprob):
    """A log-probability as JSON can say it."""
    return max(logprob, LEAST_LOGPROB) if math.isfinite(logprob) else LEAST_LOGPROB


def named_top(tokenizer, token, likely, n_top):
    """A dict from text to log-probability: the n_top likeliest tokens, and the token itself."""
    named = {}
    for i, logprob in [*likely.top[:n_top], (token, likely.logprob)]:
        named.setdefault(token_text(tokenizer, i), as_number(logprob))
    return named


class Offsets:
    """Where each token begins in a text, in characters, while the text grows."""

    def __init__(self):
        self.decoder, self.length = codecs.getincrementaldecoder("utf-8")("replace"), 0

    def next(self, raw):
        """The place of the next token, whose bytes are `raw`."""
        place = self.length
        self.length += len(self.decoder.decode(raw))
        return place


def completion_logprobs(tokenizer, entries, n_top, offsets):
    """The logprobs of /v1/completions, of (id, Likely or None) pairs that continue a text."""
    found = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    for token, likely in entries:
        found["tokens"].append(token_text(tokenizer, token))
        found["text_offset"].append(offsets.next(tokenizer.decode_bytes([token])))
        known = likely is not None
        found["token_logprobs"].append(as_number(likely.logprob) if known else None)
        top = named_top(tokenizer, token, likely, n_top) if known else None
        found["top_logprobs"].append(top)
    return found


def chat_logprobs(tokenizer, entries, n_top):
    """The logprobs of /v1/chat/completions, of (id, Likely) pairs."""

    def described(token, logprob):
        raw = list(tokenizer.decode_bytes([token]))
        text = token_text(tokenizer, token)
        return {"token": text, "logprob": as_number(logprob), "bytes": raw}

    content = []
    for token, likely in entries:
        top = [described(i, logprob) for i, logprob in likely.top[:n_top]]
        content.append(described(token, likely.logprob) | {"top_logprobs": top})
    return {"content": content, "refusal": None}
