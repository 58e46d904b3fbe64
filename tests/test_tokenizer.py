import json
import tarfile
import threading
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxinfer import chat, gguf
from jaxinfer.tokenizer import PRES, Tokenizer, from_metadata, load_tokenizer

ARCHIVE = Path(__file__).parent / "data" / "tokenizers" / "vocabularies.tar.xz"
NAMES = ["qwen2", "llama-bpe", "gemma-4"]
SEPARATOR = "\n__ggml_vocab_test__\n"


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("vocabularies")
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(path, filter="data")
    return path


@pytest.fixture(scope="session")
def load(folder) -> Callable[[str], Tokenizer]:
    loaded: dict[str, Tokenizer] = {}

    def load(name: str) -> Tokenizer:
        if name not in loaded:
            loaded[name] = load_tokenizer(folder / f"{name}.gguf")
        return loaded[name]

    return load


def strings(folder: Path, name: str) -> list[str]:
    texts = (folder / f"{name}.inp").read_bytes().decode().split(SEPARATOR)
    return texts[:-1] if texts[-1] == "" else texts


@pytest.mark.parametrize("name", NAMES)
def test_ids_of_the_bundled_strings(name, folder, load):
    texts, lines = strings(folder, name), (folder / f"{name}.out").read_text().split("\n")
    assert len(texts) == 46
    for text, line in zip(texts, lines, strict=False):
        assert load(name).encode(text, add_special=False) == [int(i) for i in line.split()], text
        assert load(name).decode(load(name).encode(text)) == text


@pytest.mark.parametrize("name", NAMES)
def test_ids_and_pieces_of_further_strings(name, folder, load):
    tokenizer, rows = load(name), json.loads((folder / f"{name}.extra.json").read_text())
    assert len(rows) == 134
    for row in rows:
        ids = tokenizer.encode(row["text"], row["add_special"], row["parse_special"])
        assert ids == row["ids"], row
        assert b"".join(tokenizer.piece(i, skip_special=False) for i in ids).hex() == row["pieces_hex"], row


def test_smollm2(folder, load):
    tokenizer, goldens = load("smollm2"), json.loads((folder / "smollm2.json").read_text())
    for prompt in goldens["prompts"].values():
        assert tokenizer.encode(prompt["text"], parse_special=True) == prompt["tokens"]
    assert tokenizer.chat(goldens["chat_messages"]) == goldens["prompts"]["chat"]["tokens"]
    assert tokenizer.chat(goldens["chat_messages"], add_generation_prompt=False) == (
        tokenizer.encode(goldens["prompts"]["chat"]["text"].removesuffix("<|im_start|>assistant\n"), parse_special=True)
    )


@pytest.mark.parametrize(
    ("name", "size", "bos", "eos", "ends"),
    [
        ("qwen2", 151936, 151643, 151643, {"</s>", "<|endoftext|>", "<|im_end|>"}),
        ("llama-bpe", 128256, 128000, 128001, {"<|end_of_text|>", "<|eot_id|>"}),
        ("gemma-4", 262144, 2, 1, {"<eos>", "<turn|>", "<|tool_response>"}),
        ("smollm2", 49152, 1, 2, {"<|endoftext|>", "<|im_end|>", "<reponame>"}),
    ],
)
def test_named_tokens(name, size, bos, eos, ends, load):
    tokenizer = load(name)
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (size, bos, eos)
    assert {tokenizer.texts[i] for i in tokenizer.eog_ids} == ends
    assert (tokenizer.chat_template is None) == (name == "llama-bpe")


# Joiners, marks, cased and uncased scripts, all kinds of space, special tokens, and whatever else there is.
SNIPPETS = [
    "'LL",
    " ",
    "\r\n",
    "\u00a0",
    "\u3000",
    "é",
    "e\u0301",
    "👩‍👩‍👧",
    "हिन्दी",
    "<|im_end|>",
    "<0x41>",
    "▁",
    "123456",
]
TEXTS = st.lists(st.text(max_size=8) | st.sampled_from(SNIPPETS), max_size=12).map("".join)


@pytest.mark.parametrize("name", ["qwen2", "llama-bpe"])  # byte-level: nothing is lost, whatever the text
@given(text=TEXTS, parse=st.booleans())
def test_round_trip_and_streaming(name, text, parse, load):
    tokenizer = load(name)
    ids = tokenizer.encode(text, add_special=False, parse_special=parse)
    assert tokenizer.decode(ids, skip_special=False) == text
    stream = tokenizer.stream(skip_special=False)
    pieces = [stream.push(i) for i in ids] + [stream.flush()]
    assert "".join(pieces) == text
    assert "\ufffd" not in "".join(pieces) or "\ufffd" in text


@given(ids=st.lists(st.integers(0, 262143), max_size=20))
def test_streaming_gives_what_decoding_gives(ids, load):
    tokenizer = load("gemma-4")
    stream = tokenizer.stream()
    assert "".join([*map(stream.push, ids), stream.flush()]) == tokenizer.decode(ids)


def test_streaming_holds_back_parts_of_characters(load):
    tokenizer = load("gemma-4")
    ids = [tokenizer.texts.index(f"<0x{b:02X}>") for b in "é🎉".encode()]
    stream = tokenizer.stream()
    assert [stream.push(i) for i in ids] == ["", "é", "", "", "", "🎉"]
    assert stream.push(ids[0]) == ""
    assert stream.flush() == "\ufffd"
    assert stream.push(ids[2]) + stream.push(ids[0]) == "\ufffd"  # a broken character, and the start of another
    assert stream.push(ids[1]) == "é"


def test_special_tokens_are_hidden_unless_asked_for(load):
    tokenizer = load("gemma-4")
    ids = tokenizer.encode("<|turn>Hi<|channel>", parse_special=True)
    assert tokenizer.decode(ids) == "Hi<|channel>"  # a user-defined token is always shown
    assert tokenizer.decode(ids, skip_special=False) == "<bos><|turn>Hi<|channel>"


@pytest.mark.parametrize("token", [-1, 49152, 2**40])
def test_ids_outside_the_vocabulary(token, load):
    tokenizer = load("smollm2")
    for use in (lambda: tokenizer.decode([1, token]), lambda: tokenizer.stream().push(token)):
        with pytest.raises(ValueError, match=f"token id {token} is outside the vocabulary of 49152 tokens"):
            use()


def test_text_that_is_not_unicode(load):
    with pytest.raises(ValueError, match="surrogates not allowed"):
        load("smollm2").encode("a\ud800b")


def test_threads_do_not_disturb_each_other(load):
    tokenizer, text = load("qwen2"), "<|im_start|>user\nHi<|im_end|>" * 20
    expected = {parse: tokenizer.encode(text, parse_special=parse) for parse in (False, True)}
    wrong = []

    def work(parse: bool) -> None:
        wrong.extend(i for i in range(200) if tokenizer.encode(text, parse_special=parse) != expected[parse])

    threads = [threading.Thread(target=work, args=(i % 2 == 0,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert expected[False] != expected[True]
    assert not wrong


# Small vocabularies made here.
PRINTS = [*range(33, 127), *range(161, 173), *range(174, 256)]  # the bytes that GPT-2 writes as themselves
BYTE_CHARS = [chr(b) if b in PRINTS else chr(256 + b - sum(p < b for p in PRINTS)) for b in range(256)]
BYTE_TOKENS = [f"<0x{b:02X}>" for b in range(256)]


def byte_level(*added: str, types: tuple[int, ...] = (), **changes: object) -> dict[str, object]:
    """Metadata of a byte-level vocabulary with two merges and `added` tokens, control ones unless `types` says."""
    kinds = types or (3,) * len(added)
    keys = {
        "model": "gpt2",
        "pre": "qwen2",
        "tokens": [*BYTE_CHARS, "he", "hel", *added],
        "token_type": np.array([1] * 258 + list(kinds), np.int32),
        "merges": ["h e", "he l"],
    }
    return named(keys | changes)


def spm(tokens: dict[str, float], **changes: object) -> dict[str, object]:
    """Metadata of a SentencePiece vocabulary: <unk>, <s>, </s>, bytes, then the tokens with these scores."""
    keys = {
        "model": "llama",
        "tokens": ["<unk>", "<s>", "</s>", *BYTE_TOKENS, *tokens],
        "token_type": np.array([2, 3, 3] + [6] * 256 + [1] * len(tokens), np.int32),
        "scores": np.array([0] * 259 + list(tokens.values()), np.float32),
    }
    return named(keys | changes)


def named(keys: dict[str, object]) -> dict[str, object]:
    return {f"tokenizer.ggml.{key}": value for key, value in keys.items() if value is not None}


@pytest.mark.parametrize(
    ("names", "pieces"),
    [
        (
            ["qwen2", "deepseek-r1-qwen", "megrez", "kormo"],
            "I|'LL| say| HelloWorld| |1|2|3|4|!\r\n\n| | a|\u0301b| '|t",
        ),
        (["qwen35"], "I|'LL| say| HelloWorld| |1|2|3|4|!\r\n\n| | a\u0301b| '|t"),
        (
            ["llama-bpe", "llama3", "llama-v3", "dbrx", "smaug-bpe"],
            "I|'LL| say| HelloWorld| |123|4|!\r\n\n| | a|\u0301b| '|t",
        ),
        (["gpt-4o", "llama4"], "I'LL| say| Hello|World| |123|4|!\r\n\n| | a\u0301b| '|t"),
        (["tekken"], "I|'LL| say| Hello|World| |1|2|3|4|!\r\n\n| | a\u0301b| '|t"),
        (
            ["gpt-2", "olmo", "exaone4", "phi-2"],
            "I|'|LL| say| HelloWorld| 1234|!|\r\n\n | a|\u0301|b| '|t",
        ),
        (
            ["smollm", "starcoder", "refact", "command-r"],
            "I|'|LL| say| HelloWorld| |1|2|3|4|!|\r\n\n | a|\u0301|b| '|t",
        ),
    ],
)
def test_pieces_before_merging(names, pieces):
    """By hand from the published patterns; every known name is in exactly one row."""
    text = pieces.replace("|", "")
    for name in names:
        tokenizer = from_metadata(byte_level("<s>", pre=name, bos_token_id=258), name)
        cut = tokenizer.plain.pre_tokenizer.pre_tokenize_str(text)
        assert [text[a:b] for _, (a, b) in cut] == pieces.split("|"), name
        takes_whole = name in ("llama-bpe", "llama3", "llama-v3", "tekken")
        assert tokenizer.encode("") == ([258] if takes_whole else [])
        # Without the merge that leads to it, a token is reached only where whole pieces are taken.
        tokenizer = from_metadata(byte_level("<s>", pre=name, bos_token_id=258, merges=["h e"]), name)
        assert tokenizer.encode("hel", add_special=False) == ([257] if takes_whole else [256, BYTE_CHARS.index("l")])


def test_every_pre_tokenizer_is_tested():
    mark = next(mark for mark in test_pieces_before_merging.pytestmark if mark.name == "parametrize")
    assert sorted(name for names, _ in mark.args[1] for name in names) == sorted(PRES)


def spm_reference(text: str, scores: dict[str, float]) -> list[str]:
    """SentencePiece by definition: neighbours that make the best-scored token are joined, leftmost first."""
    symbols = list("▁" + text.replace(" ", "▁")) if text else []
    while pairs := [(-scores[a + b], i) for i, (a, b) in enumerate(pairwise(symbols)) if a + b in scores]:
        i = min(pairs)[1]
        symbols[i : i + 2] = ["".join(symbols[i : i + 2])]
    return [part for s in symbols for part in ([s] if s in scores else (f"<0x{b:02X}>" for b in s.encode()))]


SCORES = {
    t: -float(i) for i, t in enumerate(["▁a", "ab", "ba", "▁ab", "aba", "abab", "▁▁", "bb", "▁", "a", "b", "é", "bé"])
}


@given(text=st.text("ab éü", max_size=24))
def test_sentencepiece_follows_its_definition(text):
    tokenizer = from_metadata(spm(SCORES), "spm")
    ids = tokenizer.encode(text, add_special=False)
    assert [tokenizer.texts[i] for i in ids] == spm_reference(text, SCORES)
    assert tokenizer.decode(ids) == text
    stream = tokenizer.stream()
    assert "".join([*map(stream.push, ids), stream.flush()]) == (" " + text if text else "")


def test_sentencepiece_adds_bos_and_a_space_unless_told_otherwise():
    a, space_a = 3 + 256 + list(SCORES).index("a"), 3 + 256
    assert from_metadata(spm(SCORES), "").encode("a") == [1, space_a]
    assert from_metadata(spm(SCORES, add_space_prefix=False), "").encode("a") == [1, a]
    assert from_metadata(spm(SCORES, add_bos_token=False, add_eos_token=True), "").encode("a") == [space_a, 2]
    # The space comes again after every special token.
    assert from_metadata(spm(SCORES), "").encode("a<s>a", parse_special=True) == [1, space_a, 1, space_a]


GEMMA_TOKENS = [
    "<pad>",
    "<eos>",
    "<bos>",
    "<unk>",
    *BYTE_TOKENS,
    "▁",
    "\n",
    "a",
    "▁a",
    "\n\n",
    "</s>",
    "<|tool_response>",
]


def gemma(**changes: object) -> dict[str, object]:
    keys = {
        "model": "gemma4",
        "tokens": GEMMA_TOKENS,
        "token_type": np.array([3] * 4 + [6] * 256 + [1] * 6 + [4], np.int32),
        "merges": ["▁ a", "\n \n"],
        "bos_token_id": 2,
        "eos_token_id": 1,
        "add_bos_token": False,
    }
    return named(keys | changes)


def test_gemma4_always_adds_bos_and_never_a_space():
    tokenizer = from_metadata(gemma(), "")
    texts = [tokenizer.texts[i] for i in tokenizer.encode("a a\n\né")]
    assert texts == ["<bos>", "a", "▁a", "\n\n", "<0xC3>", "<0xA9>"]


@pytest.mark.parametrize(
    ("metadata", "ends"),
    [
        (byte_level("<a>", "<b>", "<c>", eos_token_id=258), {"<a>"}),
        (byte_level("<a>", "<b>", "<c>", eot_token_id=258, eom_token_id=259), {"<a>", "<b>"}),
        (byte_level("<a>", "<b>", "<c>", fim_pad_token_id=258, fim_sep_token_id=260), {"<a>", "<c>"}),
        (byte_level("<|im_end|>", "<|file_sep|>", "<x>"), {"<|im_end|>", "<|file_sep|>"}),
        (byte_level("<|end|>", "<|return|>", "<x>"), {"<|end|>", "<|return|>"}),
        (byte_level("<|end|>", "<|return|>", "<|call|>", eos_token_id=259), {"<|return|>", "<|call|>"}),
        (byte_level("</s>", "<x>", "<y>"), {"</s>"}),
        (gemma(), {"<eos>", "<|tool_response>"}),
        (spm(SCORES), {"</s>"}),
    ],
)
def test_ends_of_generation(metadata, ends):
    tokenizer = from_metadata(metadata, "")
    assert {tokenizer.texts[i] for i in tokenizer.eog_ids} == ends
    assert list(tokenizer.eog_ids) == sorted(tokenizer.eog_ids)


def test_gpt_oss_shows_what_gives_its_text_form():
    added = ("<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|return|>", "<|call|>", "<|constrain|>")
    tokenizer = from_metadata(byte_level(*added, pre="gpt-4o"), "")
    text = "<|start|>a<|channel|>b<|message|>c<|end|><|constrain|>"
    assert tokenizer.decode(tokenizer.encode(text + "<|return|>", parse_special=True)) == text


def test_padding_rows_may_repeat_or_be_empty():
    tokenizer = from_metadata(byte_level("[PAD]", "[PAD]", "", "", types=(4, 4, 5, 1)), "")
    assert tokenizer.encode("a[PAD]") == [BYTE_CHARS.index("a"), 258]
    assert tokenizer.decode([258, 259, 260, 261]) == "[PAD][PAD]"


def test_a_vocabulary_without_types_or_merges_is_all_normal():
    tokenizer = from_metadata(byte_level(token_type=None, merges=[]), "")
    assert tokenizer.decode(tokenizer.encode("hello é")) == "hello é"
    assert len(tokenizer.encode("hello é")) == 8
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.eog_ids) == (None, None, ())


def test_longer_added_tokens_come_first():
    tokenizer = from_metadata(byte_level("<a>", "<a><b>", " <c> "), "")
    assert tokenizer.encode("<a><b><a> <c> ", parse_special=True) == [259, 258, 260]


def test_a_left_part_may_begin_with_a_space():
    tokenizer = from_metadata(gemma(merges=["  a", "▁ a"], tokens=[*GEMMA_TOKENS[:-3], " ", " a", "x"]), "")
    assert tokenizer.encode("a a", add_special=False) == [262, 263]


def test_chat_without_a_template():
    tokenizer = from_metadata(byte_level("<|im_start|>", "<|im_end|>"), "")
    prompt = chat.render(chat.CHATML, [{"role": "user", "content": "hel"}], bos_token=None, eos_token=None)
    ids = tokenizer.chat([{"role": "user", "content": "hel"}], add_generation_prompt=False)
    assert tokenizer.decode(ids, skip_special=False) == prompt
    assert ids[0] == 258
    with pytest.raises(ValueError, match=r"x\.gguf has no chat template"):
        from_metadata(byte_level("<|im_start|>"), "x.gguf").chat([{"role": "user", "content": "hel"}])


def test_the_template_alone_writes_bos():
    template = {"tokenizer.chat_template": "{{ bos_token }}{{ messages[0].content }}{{ eos_token }}"}
    metadata = byte_level("<s>", pre="llama3", bos_token_id=258) | template
    assert from_metadata(metadata, "").chat([{"role": "user", "content": "hel"}]) == [258, 257]


def test_variables_of_the_template():
    template = {"tokenizer.chat_template": "{{ messages[0].content }}{% if enable_thinking %}hel{% endif %}"}
    tokenizer, messages = from_metadata(byte_level() | template, "x.gguf"), [{"role": "user", "content": "hel"}]
    assert tokenizer.chat(messages, enable_thinking=True) == [257, 257]
    assert tokenizer.chat(messages, enable_thinking=False) == tokenizer.chat(messages) == [257]
    assert tokenizer.chat(messages, add_generation_prompt=False) == [257]  # of the call, not of this template
    for name in ("reasoning_effort", "messages", "limits"):
        with pytest.raises(ValueError, match=rf"x\.gguf: the chat template has no variable '{name}' that can be set"):
            tokenizer.chat(messages, **{name: "high"})


BROKEN = {
    "no model": (byte_level(model=None), "x.gguf has no tokenizer: tokenizer.ggml.model is missing"),
    "model none": (byte_level(model="none"), "has no tokenizer"),
    "unknown model": (byte_level(model="bert"), "'bert'; known are gpt2, llama, gemma4"),
    "model of another type": (byte_level(model=1), "model must be of type str"),
    "no pre": (byte_level(pre=None), "pre is missing; known are qwen2, "),
    "unknown pre": (byte_level(pre="no-such"), "pre is no-such; known are qwen2, "),
    "no tokens": (byte_level(tokens=None), "tokens must be an array of strings"),
    "tokens are numbers": (byte_level(tokens=np.arange(258)), "tokens must be of type list"),
    "tokens are arrays": (byte_level(tokens=[["a"]]), "tokens must be an array of strings"),
    "empty vocabulary": (byte_level(tokens=[], token_type=None), "the vocabulary is empty"),
    "types are too few": (byte_level(token_type=np.ones(257, np.int32)), "token_type must be 258 numbers"),
    "types are too many": (byte_level(token_type=np.ones(259, np.int32)), "token_type must be 258 numbers"),
    "same text twice": (byte_level("he", types=(1,)), "tokens 256 and 258 have the same text 'he'"),
    "no merges": (byte_level(merges=None), "merges must be an array of strings"),
    "merge without a space": (byte_level(merges=["h e", "hel"]), "merges has 'hel', not two texts"),
    "merge to too long a token": (byte_level(merges=["hel he"]), "merges has 'hel he', which makes more than"),
    "merge of unknown tokens": (byte_level(merges=["l ol"]), "do not fit together"),
    "merge to an unknown token": (byte_level(merges=["h l"]), "do not fit together"),
    "long control tokens": (byte_level("a" * 2**19, "b" * 2**19, "c"), "have 1048577 characters; the limit is 1048576"),
    "bos outside": (byte_level(bos_token_id=258), "bos_token_id is 258, outside the vocabulary of 258"),
    "eos outside": (byte_level(eos_token_id=2**32 - 1), "eos_token_id is 4294967295, outside"),
    "eot outside": (byte_level(eot_token_id=-1), "eot_token_id is -1, outside"),
    "eos is text": (byte_level(eos_token_id="</s>"), "eos_token_id must be of type int"),
    "no bos to add": (byte_level(add_bos_token=True), "bos_token_id is missing"),
    "no eos to add": (byte_level(add_eos_token=True), "eos_token_id is missing"),
    "add_bos is a number": (byte_level(add_bos_token=1), "add_bos_token must be of type bool"),
    "template is a list": (byte_level() | {"tokenizer.chat_template": []}, "tokenizer.chat_template must be"),
    "gemma4 without bos": (gemma(bos_token_id=None), "bos_token_id is missing"),
    "gemma4 without a byte": (gemma(tokens=["x" if t == "<0x0A>" else t for t in GEMMA_TOKENS]), "such as <0x0A>"),
    "spm without scores": (spm(SCORES, scores=None), "needs tokenizer.ggml.scores"),
    "spm with few scores": (spm(SCORES, scores=np.zeros(3, np.float32)), "scores must be 272 numbers"),
    "spm with a score of nan": (spm({"a": np.nan}), "scores must be 260 numbers"),
    "spm with a long token": (spm({"a" * 257: 0.0}), "token 259 has 257 characters; the limit is 256"),
}


@pytest.mark.parametrize(("metadata", "message"), BROKEN.values(), ids=BROKEN.keys())
def test_a_broken_vocabulary_is_refused(metadata, message):
    with pytest.raises(ValueError, match=r"x\.gguf") as caught:
        from_metadata(metadata, "x.gguf")
    assert message in str(caught.value)


def test_metadata_come_from_the_reader(folder):
    path = folder / "smollm2.gguf"
    assert load_tokenizer(path).texts == from_metadata(gguf.read(path).metadata, str(path)).texts
    assert load_tokenizer(str(path)).path == str(path)
