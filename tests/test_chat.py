import json
import lzma
import re
import subprocess
from datetime import datetime
from pathlib import Path

import jinja2
import pytest

from jaxinfer import chat
from jaxinfer.chat import Limits, render

DATA = Path(__file__).parent / "data" / "templates"
CASES = json.loads(lzma.decompress((DATA / "cases.json.xz").read_bytes()))
TEMPLATES = sorted(path.name for path in DATA.glob("*.jinja"))
USER = [{"role": "user", "content": "Hi"}]
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
FAST = Limits(wall_s=1.0, memory_bytes=2**28)


def read(name: str) -> str:
    return (DATA / name).read_bytes().decode()


def arguments(case: dict) -> dict:
    return {"bos_token": case["bos_token"], "eos_token": case["eos_token"], **case["kwargs"]}


@pytest.mark.parametrize("name", TEMPLATES)
def test_renders_what_transformers_renders(name):
    cases = [case for case in CASES if case["template"] == name]
    (now,) = {case["now"] for case in cases}
    template = chat.compiled(read(name), datetime.fromisoformat(now))
    for case in cases:
        if "expected" in case:
            assert chat.fill(template, case["messages"], **arguments(case)) == case["expected"], case["id"]
        elif case["error_kind"] == "raise_exception":
            with pytest.raises(jinja2.TemplateError, match=re.escape(case["expected_error"])):
                chat.fill(template, case["messages"], **arguments(case))
        else:
            with pytest.raises((jinja2.TemplateError, TypeError)):
                chat.fill(template, case["messages"], **arguments(case))


def test_all_goldens_are_covered():
    assert len(CASES) == 761
    assert {case["template"] for case in CASES} == set(TEMPLATES)


@pytest.mark.parametrize("name", ["features.jinja", "gpt-oss.jinja", "gemma2.jinja"])
def test_the_process_gives_the_same(name, monkeypatch):
    started, run = [], subprocess.run
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: started.append(a) or run(*a, **k))
    kinds = {case.get("error_kind"): case for case in CASES if case["template"] == name}  # one case of each
    for kind, case in kinds.items():
        now = datetime.fromisoformat(case["now"])
        if kind is None:
            assert render(read(name), case["messages"], now=now, **arguments(case)) == case["expected"]
        else:
            message = re.escape(case["expected_error"]) if kind == "raise_exception" else "the chat template failed"
            with pytest.raises(ValueError, match=message):
                render(read(name), case["messages"], now=now, **arguments(case))
    assert len(started) == len(kinds)


def test_any_text_passes_the_process_unchanged():
    text = "\0 \r\n é 🎉 \u2028 </s> \ud800 {{ 7 }}"
    assert render("{{ messages[0].content }}", [{"role": "user", "content": text}], **TOKENS) == text


def test_the_present_is_the_default_time():
    before = datetime.now()
    seen = datetime.fromisoformat(render("{{ strftime_now('%Y-%m-%dT%H:%M:%S.%f') }}", USER, **TOKENS))
    assert before <= seen <= datetime.now()


def test_chatml():
    messages = [{"role": "system", "content": "Be brief."}, *USER]
    text = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
    assert render(chat.CHATML, messages, **TOKENS) == text
    assert render(chat.CHATML, messages, add_generation_prompt=True, **TOKENS) == text + "<|im_start|>assistant\n"


NESTED = "{% for i in range(99999) %}" * 4 + "{{ x }}" + "{% endfor %}" * 4
DOUBLING = "{% set n = namespace(s='abcdefgh') %}{% for i in range(60) %}{% set n.s = n.s + n.s %}{% endfor %}{{ n.s }}"
TREE = "{% macro f(n) %}{{ f(n - 1) }}{{ f(n - 1) }}{% endmacro %}{{ f(300) }}"
GROWING = "{% set n = namespace(l=[]) %}{% for i in range(60) %}{% set n.l = n.l + [n.l, n.l] * 9999 %}{% endfor %}"
HOSTILE = {
    "endless loops": NESTED,
    "endless loops with output": NESTED.replace("{{ x }}", "{{ messages }}"),
    "endless recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "a tree of calls": TREE,
    "recursive loop": "{% for m in [[1]] recursive %}{{ loop([m]) }}{% endfor %}",
    "long text": "{{ 'a' * 10**12 }}",
    "long list": "{{ [0] * 10**12 }}",
    "text above the output limit": "{{ 'a' * 3000000 }}",
    "doubling": DOUBLING,
    "growing list": GROWING,
    "large number": "{{ 2 ** (10 ** 9) }}",
    "larger number": "{{ 9 ** (9 ** (9 ** 9)) }}",
    "number to text": "{{ 2 ** 100000 }}",
    "wide % format": "{{ '%1000000000d' % 1 }}",
    "wide format": "{{ '{:>999999999}'.format(1) }}",
    "wide format filter": "{{ '%999999999s' | format('x') }}",
    "center": "{{ 'a' | center(10**9) }}",
    "ljust": "{{ 'a'.ljust(10**10) }}",
    "indent": "{{ ('\\n' * 100000) | indent(100000, blank=true) }}",
    "tojson indent": "{{ [[[1]]] | tojson(indent=10**10) }}",
    "join": "{{ range(99999) | join('a' * 99999) }}",
    "batch": "{{ range(99999) | batch(10**12, 0) | list }}",
    "slice": "{{ range(9) | slice(10**12) | list | length }}",
    "replace": "{{ ('a' * 99999) | replace('a', 'a' * 99999) }}",
    "lipsum": "{{ lipsum(n=100000, max=10000) }}",
    "too many nested brackets": "{{ " + "(" * 100000 + "1" + ")" * 100000 + " }}",
    "too many nested lists": "{{ " + "[" * 5000 + "]" * 5000 + " }}",
    "too many nested blocks": "{% if 1 %}" * 5000 + "{% endif %}" * 5000,
    "long chain": "{{ 1" + " + 1" * 100000 + " }}",
    "large template": "{{ x }}" * 200000,
    "class": "{{ ''.__class__.__mro__ }}",
    "globals": "{{ cycler.__init__.__globals__ }}",
    "globals by attr": "{{ (cycler | attr('__init__'))['__globals__']['os'].system('id') }}",
    "format to attributes": "{{ '{0.__class__.__init__.__globals__}'.format(raise_exception) }}",
    "change of a message": "{{ messages.append(1) }}",
    "file": "{% include '/etc/passwd' %}",
    "import": "{% import 'os' as os %}",
    "syntax": "{% for %}",
    "unknown tag": "{% frob %}",
    "unknown filter": "{{ 1 | frob }}",
    "division by zero": "{{ 1 / 0 }}",
    "long message": "{{ raise_exception('a' * 100000) }}",
    "no text in a message": "{{ raise_exception({'a': [none]}) }}",
}


@pytest.mark.parametrize("template", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_hostile_template_ends_in_a_value_error(template):
    with pytest.raises(ValueError, match="chat template") as caught:
        render(template, USER, limits=FAST, **TOKENS)
    assert len(str(caught.value)) < 2 * chat.MAX_ERROR


def test_harmless_attributes_stay_undefined():
    # The sandbox shows private attributes as undefined, which renders as nothing.
    assert render("{{ ''.__class__ }}{{ messages.__init__ }}", USER, **TOKENS) == ""


@pytest.mark.parametrize(
    ("limits", "template", "message"),
    [
        (Limits(wall_s=0.5), NESTED, "stopped after 0.5 s"),
        (Limits(memory_bytes=2**27), "{{ ('a' * 2**28) | length }}", "MemoryError"),
        (Limits(output_chars=10, output_factor=0), "{{ 'a' * 11 }}", "more than the allowed 10 characters"),
        (Limits(template_chars=10), "a" * 11, "has 11 characters; the limit is 10"),
    ],
    ids=["wall_s", "memory_bytes", "output_chars", "template_chars"],
)
def test_limits(limits, template, message):
    with pytest.raises(ValueError, match=message):
        render(template, USER, limits=limits, **TOKENS)


def test_long_conversations_are_within_the_limits():
    content = "word " * 1_000_000
    assert render("{{ messages[0].content }}", [{"role": "user", "content": content}], **TOKENS) == content


@pytest.mark.parametrize(
    "messages",
    [["Hi"], [{"content": "Hi"}], [{"role": None}], [{"role": 1}], [*USER, {"Role": "user"}], "Hi"],
    ids=str,
)
def test_malformed_messages(messages):
    with pytest.raises(ValueError, match=r"message \d is not a dict with a str under 'role'"):
        render("", messages, **TOKENS)


@pytest.mark.parametrize("tools", [[{1, 2}], [object()], [datetime.now()]], ids=["set", "object", "datetime"])
def test_arguments_must_be_plain_data(tools):
    with pytest.raises(ValueError, match="must be plain data"):
        render("", USER, tools=tools, **TOKENS)
