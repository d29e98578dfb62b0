"""Hugging Face's tokenizer.json: published ones are read, and our tokenizers are written as one."""

import json
import re

import bpe

TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"


class HuggingFaceTokenizer(bpe.Tokenizer):
    """A published tokenizer.json as a tokenizer of bpe.py, through the package tokenizers.

    `encode` adds nothing to the text. `bos_id` is the id that the model expects first, or None.
    `config` is the content of tokenizer_config.json, which holds the chat_template.
    """

    def __init__(self, saved, config, stop_ids=()):
        try:
            import tokenizers
        except ImportError as error:
            raise OSError(
                f"{TOKENIZER} of a published model needs the package tokenizers: "
                "pip install tokenizers"
            ) from error
        self.saved, self.config, self.stop_ids = saved, config, list(stop_ids)
        self.backend = tokenizers.Tokenizer.from_str(json.dumps(saved))
        # The string of a special token is ordinary text here. Tokenizer.encode finds the ones
        # that are allowed.
        self.backend.encode_special_tokens = True
        self.special_tokens = {
            token["content"]: token["id"] for token in saved["added_tokens"] if token["special"]
        }
        self.unknown_id = self.backend.token_to_id(saved["model"].get("unk_token") or "")
        before = self.backend.encode("").ids
        bos = config.get("bos_token") if config.get("add_bos_token") else None
        bos = bos["content"] if isinstance(bos, dict) else bos
        self.bos_id = before[0] if before else self.special_tokens.get(bos)
        self.tokens = self.bytes_of_tokens()

    def bytes_of_tokens(self):
        """The bytes of every id, as a list.

        The vocabulary has them in GPT-2's printable bytes, or as text with ▁ for a space and <0x0A>
        for a byte.
        """
        byte_of = {character: byte for byte, character in bpe.printable_bytes().items()}
        byte_level = '"ByteLevel"' in json.dumps(self.saved["decoder"])
        metaspace = "▁" in json.dumps(self.saved["decoder"], ensure_ascii=False)
        vocabulary = self.backend.get_vocab(with_added_tokens=True)
        bpe.check_distinct(vocabulary)
        added = {token["content"] for token in self.saved["added_tokens"]}
        tokens = [b""] * (1 + max(vocabulary.values()))
        for text, i in vocabulary.items():
            if text in added:
                tokens[i] = text.encode("utf-8")
            elif byte_level:
                tokens[i] = bytes(byte_of[character] for character in text)
            elif metaspace and re.fullmatch("<0x[0-9A-F]{2}>", text):
                tokens[i] = bytes([int(text[3:5], 16)])
            else:
                plain = text.replace("▁", " ") if metaspace else text
                tokens[i] = plain.encode("utf-8")
        return tokens

    def encode_ordinary(self, text):
        return self.backend.encode(text, add_special_tokens=False).ids

    def unknown_characters(self, text):
        encoding = self.backend.encode(text, add_special_tokens=False)
        places = []
        for i, place in zip(encoding.ids, encoding.offsets, strict=True):
            if i == self.unknown_id:
                places.append(place)
        return list(dict.fromkeys(text[start:end] for start, end in places))

    def to_dict(self):
        return {
            "type": "huggingface",
            "tokenizer": self.saved,
            "config": self.config,
            "stop_ids": self.stop_ids,
        }


def tokenizer_files(tokenizer, config):
    """The files tokenizer.json and tokenizer_config.json of one of our tokenizers.

    Gives their contents, dicts, by file name. Raises ValueError if the model of `config` has fewer
    ids than the tokenizer, or if the kind of tokenizer cannot be written.
    """
    if tokenizer.vocab_size > config.vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size} ids but vocab_size={config.vocab_size}: "
            "give the tokenizer that the model was trained with"
        )
    if isinstance(tokenizer, HuggingFaceTokenizer):
        return {TOKENIZER: tokenizer.saved, TOKENIZER_CONFIG: tokenizer.config}
    special = tokenizer.special_tokens
    roles = {"unk_token": bpe.UNKNOWN, "pad_token": bpe.PAD, "eos_token": bpe.END_OF_TEXT}
    written = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": config.block_size}
    written["clean_up_tokenization_spaces"] = False
    written |= {role: token for role, token in roles.items() if token in special}
    if hasattr(tokenizer, "to_huggingface"):
        return {TOKENIZER: tokenizer.to_huggingface(), TOKENIZER_CONFIG: written}
    return {TOKENIZER: word_level_document(tokenizer), TOKENIZER_CONFIG: written}


def word_level_document(tokenizer):
    """The content of a tokenizer.json for a CharTokenizer or WordTokenizer, as a dict."""
    patterns = {
        bpe.CharTokenizer: r"[\s\S]",
        bpe.WordTokenizer: r" ?[\p{L}\p{N}_]+| ?[^\p{L}\p{N}_\s]|\s",
    }
    if type(tokenizer) not in patterns:
        raise ValueError(
            f"a {type(tokenizer).__name__} cannot be written as {TOKENIZER}: "
            "export without a tokenizer"
        )
    flags = {
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": True,
    }
    document = {
        "version": "1.0",
        "added_tokens": [
            {"id": i, "content": token, **flags} for token, i in tokenizer.special_tokens.items()
        ],
        "pre_tokenizer": {
            "type": "Split",
            "pattern": {"Regex": patterns[type(tokenizer)]},
            "behavior": "Isolated",
            "invert": False,
        },
        "decoder": {"type": "Fuse"},
        "model": {
            "type": "WordLevel",
            "vocab": {token: i for i, token in enumerate(tokenizer.tokens)},
            "unk_token": bpe.UNKNOWN,
        },
    }
    return document | dict.fromkeys(("truncation", "padding", "normalizer", "post_processor"))
