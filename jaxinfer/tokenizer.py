"""Text to token ids and back, from nothing but the vocabulary in a GGUF file's metadata, with llama.cpp's results.

The `tokenizers` library cuts and merges; here its parts are put together as the metadata says. As in llama.cpp, text is
not normalised. Keys: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

import codecs
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import tokenizers
from tokenizers import AddedToken, Regex, models, normalizers, pre_tokenizers

from jaxinfer import chat, gguf


class Pre(NamedTuple):
    """How a byte-level vocabulary cuts text before merging: by each pattern in turn, what lies between being kept."""

    patterns: tuple[str, ...]
    ignore_merges: bool = False  # a piece that is itself a token is taken whole
    add_bos: bool = False  # unless the file says otherwise


_SUFFIX = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACE = r"\s+(?!\S)|\s+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|" + _SPACE
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|" + _SPACE
_QWEN2 = _SUFFIX + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|" + _REST
_QWEN35 = (  # letters with their marks
    _SUFFIX + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|" + _SPACE
)
_LLAMA3 = _SUFFIX + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|" + _REST
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"


def _cased(suffix: str, numbers: str) -> str:
    """The pattern of the o200k family, which also cuts where lower case turns to upper."""
    words = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{suffix}|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{suffix}"
    return rf"{words}|{numbers}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|\s*[\r\n]+|{_SPACE}"


PRES = {
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "megrez", "kormo"), Pre((_QWEN2,))),
    "qwen35": Pre((_QWEN35,)),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3"), Pre((_LLAMA3,), ignore_merges=True, add_bos=True)),
    **dict.fromkeys(("dbrx", "smaug-bpe"), Pre((_LLAMA3,))),
    **dict.fromkeys(("gpt-4o", "llama4"), Pre((_cased(_SUFFIX + "?", r"\p{N}{1,3}"),))),
    "tekken": Pre((_cased("", r"\p{N}"),), ignore_merges=True, add_bos=True),
    **dict.fromkeys(("gpt-2", "olmo", "exaone4", "phi-2"), Pre((_GPT2,))),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r"), Pre((r"\p{N}", _GPT2))),
}
MODELS = ("gpt2", "llama", "gemma4")

_NORMAL, _UNKNOWN, _CONTROL, _USER, _UNUSED, _BYTE = range(1, 7)  # tokenizer.ggml.token_type
_MAX_ADDED = 2**20  # characters of all control or all user-defined tokens; finding them takes 60 times their memory
_MAX_SPM = 256  # characters of a token that merges lead to; known vocabularies have at most 48

# Ends of generation by their text, as files seldom name them all.
_ENDS = {
    *("<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<end_of_turn>", "<|endoftext|>", "</s>"),
    *("<|eom_id|>", "<|end_of_text|>", "<EOT>", "<eos>", "<turn|>", "<|tool_response>", "<end_of_utterance>"),
    *("<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>"),
    *("<reponame>", "<|file_sep|>"),
}
_END_KEYS = ("eos", "eot", "eom", "fim_pad", "fim_rep", "fim_sep")
_HARMONY = {"<|channel|>", "<|message|>", "<|start|>", "<|constrain|>"}  # gpt-oss: always shown


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable character for each byte: itself if it prints in Latin-1, else the next one from U+0100 on."""
    prints = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in prints]
    return {chr(b): b for b in prints} | {chr(0x100 + i): b for i, b in enumerate(others)}


_BYTES = _byte_alphabet()
_BYTE_TOKENS = {f"<0x{b:02X}>": bytes([b]) for b in range(256)}


@dataclass(frozen=True, eq=False)
class Tokenizer:
    """A vocabulary. Immutable, and safe to use from several threads."""

    path: str  # of the file
    texts: Sequence[str]  # as stored, by id
    types: Sequence[int]  # tokenizer.ggml.token_type, by id, with llama.cpp's corrections
    bos_id: int | None
    eos_id: int | None
    eog_ids: tuple[int, ...]  # every token that ends a generation, sorted
    add_bos: bool
    add_eos: bool
    space_prefix: bool  # a space is put before text, and the first one of a whole text dropped when decoding
    byte_level: bool  # normal tokens are in GPT-2's byte alphabet; otherwise in UTF-8, with U+2581 for a space
    chat_template: str | None
    parsing: tokenizers.Tokenizer  # finds control tokens in text
    plain: tokenizers.Tokenizer  # takes their text for text

    @property
    def vocab_size(self) -> int:
        return len(self.texts)

    def encode(self, text: str, add_special: bool = True, parse_special: bool = False) -> list[int]:
        """The ids of a text. Raises ValueError (UnicodeEncodeError) if it has a lone surrogate, which is no character.

        add_special: with BOS and EOS where the vocabulary wants them. parse_special: the text of a control token stands
        for the token, as in a rendered chat; leave it off for text from elsewhere.
        """
        text.encode()  # the library would raise a TypeError
        ids = (self.parsing if parse_special else self.plain).encode(text, add_special_tokens=False).ids
        before = [self.bos_id] if add_special and self.add_bos and self.bos_id is not None else []
        after = [self.eos_id] if add_special and self.add_eos and self.eos_id is not None else []
        return before + ids + after

    def piece(self, token: int, skip_special: bool = True) -> bytes:
        """The bytes that one token stands for; they may be a part of a character. Control tokens have none if skipped.

        Raises ValueError for an id outside the vocabulary.
        """
        if not 0 <= token < self.vocab_size:
            raise ValueError(f"token id {token} is outside the vocabulary of {self.vocab_size} tokens")
        text, kind = self.texts[token], self.types[token]
        if kind in (_UNKNOWN, _CONTROL):
            return b"" if skip_special else text.encode()
        if kind == _USER:
            return text.encode()
        if kind == _BYTE:
            return _BYTE_TOKENS.get(text) or text.encode()
        if kind != _NORMAL:  # unused: padding rows
            return b""
        if not self.byte_level:
            return text.replace("▁", " ").encode()
        try:
            return bytes([_BYTES[c] for c in text])
        except KeyError:  # a plain text among the byte-level ones
            return text.encode()

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """The text of whole sequences of ids, without what `encode` puts around it: decoding undoes encoding.

        Control tokens give no text if they are skipped, else their own. Bytes that are not UTF-8 become U+FFFD.
        """
        text = b"".join(self.piece(i, skip_special) for i in ids).decode(errors="replace")
        return text[1:] if self.space_prefix and text.startswith(" ") else text

    def stream(self, skip_special: bool = True) -> "Stream":
        """Decodes ids one by one, as a continuation: the first space stays."""
        return Stream(self, skip_special)

    def chat(self, messages: Sequence[Any], /, **kwargs: Any) -> list[int]:
        """The ids of a conversation under the file's chat template, ready for the assistant's answer.

        messages: as for `chat.render`. kwargs: variables of the template, such as `tools` or `enable_thinking`, which
        it must mention; `add_generation_prompt` is on by default and may be given to any. A file without a template
        gets ChatML if its vocabulary has that form's tokens. The template writes BOS itself, so none is added.
        Raises ValueError as `chat.render` does, where there is no template, and for other kwargs.
        """
        template = self.chat_template
        if template is None:
            if not {"<|im_start|>", "<|im_end|>"} <= set(self.texts):
                raise ValueError(
                    f"{self.path} has no chat template, nor the tokens of ChatML (<|im_start|>, <|im_end|>)"
                )
            template = chat.CHATML
        # What the template does not mention would be ignored, and the names of `render`'s own arguments are taken.
        free = {"add_generation_prompt", *re.findall(r"\w+", template)} - {"template", "messages", "now", "limits"}
        if unknown := [name for name in kwargs if name not in free]:
            names = ", ".join(map(repr, unknown))
            raise ValueError(f"{self.path}: the chat template has no variable {names} that can be set")
        bos, eos = (None if i is None else self.texts[i] for i in (self.bos_id, self.eos_id))
        kwargs = {"add_generation_prompt": True, "bos_token": bos, "eos_token": eos} | kwargs
        return self.encode(chat.render(template, messages, **kwargs), add_special=False, parse_special=True)

    def next_turn(self, messages: Sequence[Any], /, **kwargs: Any) -> list[int]:
        """The ids that the template adds for these messages to a conversation before them, ready for the answer.

        Takes what `chat` takes. Raises ValueError where what the template makes of earlier messages depends on these.
        """
        told = [{"role": "user", "content": "."}, {"role": "assistant", "content": "."}]
        for before in (told[:1], told):  # some templates want the roles in turn
            try:
                old = self.chat(before, **kwargs | {"add_generation_prompt": False})
                new = self.chat([*before, *messages], **kwargs)
            except ValueError:
                continue
            if new[: len(old)] == old:
                return new[len(old) :]
        raise ValueError(f"{self.path}: the chat template cannot go on after a conversation that it has not seen")


class Stream:
    """Text from token ids as they come. What may become a character with the next token is held back until then."""

    def __init__(self, tokenizer: Tokenizer, skip_special: bool):
        self._tokenizer, self._skip_special = tokenizer, skip_special
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        """The text that this token completes, perhaps none."""
        return self._decoder.decode(self._tokenizer.piece(token, self._skip_special))

    def flush(self) -> str:
        """What is held back, as U+FFFD; to be called at the end."""
        return self._decoder.decode(b"", final=True)


def load_tokenizer(path: str | os.PathLike[str]) -> Tokenizer:
    """The tokenizer of a GGUF file, which may hold a vocabulary only. Raises ValueError if it has none or a bad one."""
    file = gguf.read(path)
    return from_metadata(file.metadata, file.path)


def from_metadata(metadata: Mapping[str, Any], path: str) -> Tokenizer:
    """The tokenizer in a file's metadata, as `gguf.read` gives them; path: the file's name in errors (ValueError)."""
    keys = _Keys(metadata, path)
    model = keys.get("model", str)
    if model in (None, "none", "no_vocab"):
        raise ValueError(f"{path} has no tokenizer: tokenizer.ggml.model is {model or 'missing'}")
    if model not in MODELS:
        raise ValueError(f"{path}: tokenizer.ggml.model is {model!r}; known are {', '.join(MODELS)}")
    pre = _pre(keys) if model == "gpt2" else Pre((r"\n+",) if model == "gemma4" else (), add_bos=True)
    texts = keys.strings("tokens")
    if not texts:
        raise ValueError(f"{path}: the vocabulary is empty (tokenizer.ggml.tokens)")
    types = keys.numbers("token_type", len(texts)) or [_NORMAL] * len(texts)
    ids = _ids(texts, types, path)

    defaults = (1, 2) if model == "llama" else (None, None)
    bos_id, eos_id = (keys.token(name, len(texts), d) for name, d in zip(("bos", "eos"), defaults, strict=True))
    add_bos = model == "gemma4" or keys.get("add_bos_token", bool, pre.add_bos)
    add_eos = keys.get("add_eos_token", bool, False)
    for add, token, name in ((add_bos, bos_id, "bos"), (add_eos, eos_id, "eos")):
        if add and token is None:
            raise ValueError(f"{path}: a {name.upper()} is to be added, but tokenizer.ggml.{name}_token_id is missing")
    ends = {keys.token(name, len(texts)) for name in _END_KEYS} | {eos_id}
    ends = {i for i in ends if i is not None} | {ids[text] for text in _ENDS & ids.keys()}
    ends -= _correct(types, ids)

    space_prefix = model == "llama" and keys.get("add_space_prefix", bool, True)
    if model != "gpt2" and (missing := sorted(_BYTE_TOKENS.keys() - ids.keys())):
        raise ValueError(f"{path}: the vocabulary lacks {len(missing)} of 256 byte tokens, such as {missing[0]}")
    special, user = _added(texts, types, path, _CONTROL, _UNKNOWN), _added(texts, types, path, _USER)
    merges = _spm_merges(keys, texts, ids, types) if model == "llama" else _merges(keys, ids)
    try:
        bpe = models.BPE(ids, merges, ignore_merges=pre.ignore_merges, byte_fallback=model != "gpt2")
        parsing, plain = (_pipeline(bpe, model, pre, space_prefix) for _ in range(2))
        for pipeline in (parsing, plain):
            pipeline.add_special_tokens(special)
            pipeline.add_tokens(user)
    except Exception as error:  # the library raises nothing more exact
        raise ValueError(f"{path}: the vocabulary and its merges do not fit together: {error}") from error
    plain.encode_special_tokens = True
    template = keys.get("chat_template", str, prefix="tokenizer.")
    return Tokenizer(
        path, texts, types, bos_id, eos_id, tuple(sorted(ends)), add_bos, add_eos,
        space_prefix, model == "gpt2", template, parsing, plain,
    )  # fmt: skip


class _Keys:
    """The metadata under tokenizer.ggml, each value checked for its type."""

    def __init__(self, metadata: Mapping[str, Any], path: str):
        self.metadata, self.path = metadata, path

    def get(self, key: str, kind: type, default: Any = None, prefix: str = "tokenizer.ggml.") -> Any:
        value = self.metadata.get(prefix + key, default)
        if value is not None and type(value) is not kind:
            raise ValueError(f"{self.path}: {prefix}{key} must be of type {kind.__name__}, not {str(value)[:80]}")
        return value

    def strings(self, key: str) -> list[str]:
        values = self.get(key, list)
        if values is None or not set(map(type, values)) <= {str}:
            raise ValueError(f"{self.path}: tokenizer.ggml.{key} must be an array of strings")
        return values

    def numbers(self, key: str, size: int) -> list[Any] | None:
        """An array of `size` numbers, if there is one."""
        values = self.get(key, np.ndarray)
        if values is None:
            return None
        if values.shape != (size,) or np.isnan(values).any():
            raise ValueError(f"{self.path}: tokenizer.ggml.{key} must be {size} numbers, one for each token")
        return values.tolist()

    def token(self, name: str, size: int, default: int | None = None) -> int | None:
        """The id of a named token; a default that the vocabulary is too small for counts as none."""
        key = f"{name}_token_id"
        value = self.get(key, int)
        if value is None:
            return default if default is not None and default < size else None
        if not 0 <= value < size:
            raise ValueError(f"{self.path}: tokenizer.ggml.{key} is {value}, outside the vocabulary of {size} tokens")
        return value


def _pre(keys: _Keys) -> Pre:
    name = keys.get("pre", str)
    if name not in PRES:
        known = ", ".join(PRES)
        raise ValueError(f"{keys.path}: tokenizer.ggml.pre is {name or 'missing'}; known are {known}")
    return PRES[name]


def _ids(texts: Sequence[str], types: Sequence[int], path: str) -> dict[str, int]:
    """Text to id. Padding rows may repeat a text, which then means the first of them, or have none."""
    ids: dict[str, int] = {}
    for i, text in enumerate(texts):
        if text and ids.setdefault(text, i) != i and types[i] == _NORMAL:
            raise ValueError(f"{path}: tokens {ids[text]} and {i} have the same text {text!r}")
    return ids


def _correct(types: list[int], ids: Mapping[str, int]) -> set[int]:
    """Sets the types that llama.cpp overrides by text; returns the ids that do not end a generation after all."""
    not_ends = set()
    for text in _ENDS & ids.keys():
        types[ids[text]] = _CONTROL
    for text in _HARMONY & ids.keys():
        types[ids[text]] = _USER
    if {"<|return|>", "<|call|>", "<|end|>"} <= ids.keys():  # gpt-oss: it ends a message of several
        types[ids["<|end|>"]] = _USER
        not_ends.add(ids["<|end|>"])
    if {"<|tool_response>", "</s>"} <= ids.keys():  # Gemma 4: a tag of HTML
        types[ids["</s>"]] = _NORMAL
        not_ends.add(ids["</s>"])
    return not_ends


def _merges(keys: _Keys, ids: dict[str, int]) -> list[tuple[str, str]]:
    """Pairs to merge, first come first merged. Their left part may begin with a space."""
    texts = dict.fromkeys(keys.strings("merges"))  # of a repeated merge, the first counts
    pairs = [(text[:cut], text[cut + 1 :]) for text in texts if (cut := text.find(" ", 1)) > 0]
    if len(pairs) < len(texts):
        wrong = [text for text in texts if " " not in text[1:]]
        raise ValueError(f"{keys.path}: tokenizer.ggml.merges has {wrong[0]!r}, not two texts with a space between")
    longest = max(map(len, map(str.encode, ids))) + 1  # bytes; what is longer makes tokenizers 0.23 panic
    if wrong := [text for text in texts if len(text.encode()) > longest]:
        raise ValueError(
            f"{keys.path}: tokenizer.ggml.merges has {wrong[0]!r}, which makes more than the longest token"
        )
    return pairs


def _spm_merges(keys: _Keys, texts: list[str], ids: dict[str, int], types: list[int]) -> list[tuple[str, str]]:
    """The merges that SentencePiece's scores amount to: all ways to make a token of two, the best score first."""
    scores = keys.numbers("scores", len(types))
    if scores is None:
        raise ValueError(f"{keys.path}: a vocabulary of model 'llama' needs tokenizer.ggml.scores")
    tokens = [(text, i) for text, i in ids.items() if types[i] in (_NORMAL, _USER)]
    tokens.sort(key=lambda token: -scores[token[1]])
    merges = []
    for text, i in tokens:
        if len(text) > _MAX_SPM:
            raise ValueError(f"{keys.path}: token {i} has {len(text)} characters; the limit is {_MAX_SPM}")
        cuts = range(1, len(text))
        merges += sorted([(ids[a], ids[b]) for c in cuts if (a := text[:c]) in ids and (b := text[c:]) in ids])
    return [(texts[left], texts[right]) for left, right in merges]


def _pipeline(bpe: models.BPE, model: str, pre: Pre, space_prefix: bool) -> tokenizers.Tokenizer:
    """The space's symbol, then cuts, then merges."""
    pipeline = tokenizers.Tokenizer(bpe)
    steps: list[Any] = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in pre.patterns]
    if model == "gpt2":
        steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
    else:
        prefix = [normalizers.Prepend("▁")] if space_prefix else []
        pipeline.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", "▁")])
    if steps:
        pipeline.pre_tokenizer = pre_tokenizers.Sequence(steps)
    return pipeline


def _added(texts: list[str], types: list[int], path: str, *kinds: int) -> list[AddedToken]:
    """The tokens of these types, to be cut out of text as they are, the longest first."""
    found = [text for text, kind in zip(texts, types, strict=True) if kind in kinds and text]
    if (size := sum(map(len, found))) > _MAX_ADDED:
        raise ValueError(f"{path}: tokens of type {kinds} have {size} characters; the limit is {_MAX_ADDED}")
    return [AddedToken(text, special=_USER not in kinds, normalized=False) for text in found]
