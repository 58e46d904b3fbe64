"""Each rule that a value of the metadata must meet; an error names the file, the key and the rule."""

import math
import re

import numpy as np
import pytest

from jaxinfer.metadata import Metadata


def of(**values) -> Metadata:
    return Metadata("m.gguf", {"general.architecture": "llama"} | {f"llama.{k}": v for k, v in values.items()})


@pytest.mark.parametrize("value", [None, 3, ["llama"]])
def test_the_architecture_must_be_a_string(value):
    values = {} if value is None else {"general.architecture": value}
    with pytest.raises(ValueError, match=re.escape(f"m.gguf: general.architecture must be a string, not {value!r}")):
        Metadata("m.gguf", values)


@pytest.mark.parametrize("read", ["get", "whole", "number", "text"])
def test_a_key_without_default_is_required(read):
    with pytest.raises(ValueError, match=r"m\.gguf: the metadata has no llama\.x, which llama needs"):
        getattr(of(y=1), read)("x")


def test_defaults_and_values():
    m = of(a=3, b=2.5, c="yes", d=2)
    assert (m.architecture, m.whole("a"), m.number("b"), m.text("c")) == ("llama", 3, 2.5, "yes")
    assert (m.whole("x", 7), m.number("x", 1.5), m.text("x", "no"), m.get("x", None)) == (7, 1.5, "no", None)
    assert (m.number("d"), type(m.number("d"))) == (2.0, float)


@pytest.mark.parametrize(
    "value",
    [0, -1, 2**31, 2**64, True, 3.0, "3", None, [3], *map(np.array, ([1, 2], [], [1.0, 1.0], [True, True], [0, 0]))],
    ids=repr,
)
def test_a_whole_number_is_refused(value):
    rule = r"m\.gguf: llama\.x is .*, but must be a whole number from 1 to 2147483647, the same for all layers"
    with pytest.raises(ValueError, match=rule):
        of(x=value).whole("x")


def test_a_whole_number_within_its_bounds_alone_or_for_each_layer():
    assert of(x=0).whole("x", least=0) == 0
    assert of(x=9).whole("x", most=9) == 9
    with pytest.raises(ValueError, match="from 1 to 8"):
        of(x=9).whole("x", most=8)
    value = of(x=np.full(4, 7, np.uint32)).whole("x")
    assert (value, type(value)) == (7, int)


@pytest.mark.parametrize("value", [0, 0.0, -1.5, math.inf, -math.inf, math.nan, True, "1", None, np.ones(2)], ids=repr)
def test_a_number_is_refused(value):
    with pytest.raises(ValueError, match=r"m\.gguf: llama\.x is .*, but must be a finite number above zero"):
        of(x=value).number("x")


@pytest.mark.parametrize("value", [1, True, None, ["a"], np.ones(2)], ids=repr)
def test_a_text_is_refused(value):
    with pytest.raises(ValueError, match=r"m\.gguf: llama\.x is .*, but must be a string"):
        of(x=value).text("x")


def test_errors_stay_short_however_long_the_value():
    for read in ("whole", "number", "text"):
        for value in (["token"] * 10**5, np.arange(10**6)):
            with pytest.raises(ValueError, match="x is") as error:
                getattr(of(x=value), read)("x")
            assert len(str(error.value)) < 2000


def test_refuse():
    of().refuse("x", 0)
    of(x=0).refuse("x", 0)
    of(x=True).refuse("x", True)
    for value in (8, np.array([0, 8]), "0"):
        with pytest.raises(ValueError, match=r"m\.gguf: llama\.x = .* is not supported"):
            of(x=value).refuse("x", 0)


def test_unread_names_what_nobody_asked_for():
    m = Metadata(
        "m.gguf",
        {"general.architecture": "llama", "general.name": "n", "llama.b": 1, "llama.a": 1, "llama.c": 1}
        | {"llama2.d": 1, "tokenizer.x": 1, "llama.e": 0, "llama.f": "f"},
    )
    assert m.whole("c") == 1
    m.refuse("e", 0)
    m.text("f")
    assert m.unread() == ["llama.a", "llama.b"]


def test_a_whole_number_for_each_layer():
    assert of(x=4).wholes("x", 3) == (4, 4, 4)
    assert of().wholes("x", 2, 5) == (5, 5)
    assert of(x=np.array([1, 2, 3], np.int32)).wholes("x", 3) == (1, 2, 3)
    assert of(x=np.array([0, 2])).wholes("x", 2, least=0) == (0, 2)


@pytest.mark.parametrize("value", [[1, 2], [1, 2, 0], [1, 2, 2**31], [1.0, 2.0, 3.0], [True, True, True]], ids=repr)
def test_whole_numbers_for_each_layer_are_refused(value):
    with pytest.raises(
        ValueError, match=r"m\.gguf: llama\.x is .*, but must be 3 whole numbers from 1 on, one for each"
    ):
        of(x=np.array(value)).wholes("x", 3)


def test_true_or_false_for_each_layer():
    assert of(x=np.array([True, False, True])).flags("x", 3) == (True, False, True)
    assert of(x=np.array([0, 1, 1], np.uint32)).flags("x", 3) == (False, True, True)
    assert of(x=3).flags("x", 7) == (True, True, False) * 2 + (True,)
    assert of(x=1).flags("x", 2) == (False, False)
    assert of().flags("x", 4, 2) == (True, False, True, False)


@pytest.mark.parametrize(
    "value", [np.array([1, 0]), np.array([1, 0, 2]), np.array([0.5, 0, 1]), 0, "1", True], ids=repr
)
def test_flags_are_refused(value):
    with pytest.raises(ValueError, match=r"m\.gguf: llama\.x is .*, but must be"):
        of(x=value).flags("x", 3)
