"""The reader on files from gguf-py's writer, and on files put together byte by byte that break one rule each."""

import os
import struct
import tracemalloc

import gguf
import numpy as np
import pytest
from gguf.constants import GGMLQuantizationType, GGUFValueType
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxinfer.gguf import read

U32, STRING, ARRAY = GGUFValueType.UINT32, GGUFValueType.STRING, GGUFValueType.ARRAY
SCALARS = {
    GGUFValueType.UINT8: st.integers(0, 2**8 - 1),
    GGUFValueType.INT8: st.integers(-(2**7), 2**7 - 1),
    GGUFValueType.UINT16: st.integers(0, 2**16 - 1),
    GGUFValueType.INT16: st.integers(-(2**15), 2**15 - 1),
    GGUFValueType.UINT32: st.integers(0, 2**32 - 1),
    GGUFValueType.INT32: st.integers(-(2**31), 2**31 - 1),
    GGUFValueType.FLOAT32: st.floats(width=32, allow_nan=False),
    GGUFValueType.UINT64: st.integers(0, 2**64 - 1),
    GGUFValueType.INT64: st.integers(-(2**63), 2**63 - 1),
    GGUFValueType.FLOAT64: st.floats(allow_nan=False),
    GGUFValueType.BOOL: st.booleans(),
    # any text, NULs included, and lengths on both sides of one byte's range
    GGUFValueType.STRING: st.text(max_size=12) | st.text("aé\0", min_size=250, max_size=260),
}


def text(value: bytes | str) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(data)) + data


def key(name: bytes | str, kind: int, value: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + value


def array(kind: int, count: int, items: bytes = b"") -> bytes:
    return struct.pack("<IQ", kind, count) + items


def tensor(name: bytes | str = "t", ne: tuple[int, ...] = (4, 2), kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(ne)}QIQ", len(ne), *ne, kind, offset)


def file(keys=(), tensors=(), data=b"", version=3, n_keys=None, n_tensors=None, align=32) -> bytes:
    """A GGUF file as the format's description has it; the counts can be made to lie."""
    counts = len(tensors) if n_tensors is None else n_tensors, len(keys) if n_keys is None else n_keys
    header = b"GGUF" + struct.pack("<IQQ", version, *counts) + b"".join(keys) + b"".join(tensors)
    return header + bytes(-len(header) % align) + data


def written(path, tensors: dict[str, np.ndarray], keys=(), align=32, **options):
    writer = gguf.GGUFWriter(path, "llama", **options)
    writer.add_custom_alignment(align)
    for name, value, kind, of in keys:
        writer.add_key_value(name, value, kind, of)
    for name, value in tensors.items():
        quantised = value.dtype == np.uint8
        writer.add_tensor(name, value, raw_dtype=GGMLQuantizationType.Q8_0 if quantised else None)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def some_tensors() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "norm": rng.standard_normal(5, np.float32),
        "half": rng.standard_normal((3, 7)).astype(np.float16),
        "experts": rng.standard_normal((2, 3, 4)).astype(np.float32),
        "quantised": rng.integers(0, 256, (3, 68), np.uint8),  # 3 rows of 2 Q8_0 blocks
    }


def assert_holds(tensors, expected: dict[str, np.ndarray]):
    assert list(tensors) == list(expected)
    for name, want in expected.items():
        got = tensors[name]
        assert got.name == name
        assert got.shape == (want.shape if want.dtype != np.uint8 else (3, 64))
        assert got.data.dtype == np.uint8
        assert not got.data.flags.writeable
        assert not got.data.flags.owndata
        np.testing.assert_array_equal(got.data, want.view(np.uint8))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_reads_metadata_as_gguf_py_writes_it(tmp_path, data):
    keys = []
    for i in range(data.draw(st.integers(0, 6))):
        kind = data.draw(st.sampled_from(list(SCALARS)))
        value = data.draw(SCALARS[kind] | st.lists(SCALARS[kind], min_size=1, max_size=5))
        keys.append((f"k{i}", value, ARRAY, kind) if isinstance(value, list) else (f"k{i}", value, kind, None))
    written(tmp_path / "m.gguf", {}, keys)
    metadata = read(tmp_path / "m.gguf").metadata
    assert (metadata.pop("general.architecture"), metadata.pop("general.alignment")) == ("llama", 32)
    assert list(metadata) == [name for name, *_ in keys]
    for name, value, kind, of in keys:
        got = metadata[name]
        if kind == ARRAY and of != STRING:
            assert isinstance(got, np.ndarray)
            got = got.tolist()
        assert got == value
        assert type(got) is type(value)
        assert not isinstance(got, list) or all(type(g) is type(v) for g, v in zip(got, value, strict=True))


def test_reads_tensors_and_alignment_as_gguf_py_writes_them(tmp_path):
    expected = some_tensors()
    written(tmp_path / "t.gguf", expected, align=64)
    model = read(str(tmp_path / "t.gguf"))
    assert model.path == str(tmp_path / "t.gguf")
    assert_holds(model.tensors, expected)
    assert [t.type.name for t in model.tensors.values()] == ["F32", "F16", "F32", "Q8_0"]


@pytest.mark.parametrize("version", [2, 3])
def test_reads_both_versions_and_what_gguf_py_does_not_write(tmp_path, version):
    nested = array(ARRAY, 2, array(U32, 2, struct.pack("<II", 1, 2)) + array(STRING, 1, text("x")))
    keys = [
        key("nested", ARRAY, nested),
        key("none", ARRAY, array(STRING, 0)),
        key("no numbers", ARRAY, array(U32, 0)),
        key("flags", ARRAY, array(GGUFValueType.BOOL, 3, b"\0\1\2")),
    ]
    path = tmp_path / "f.gguf"
    path.write_bytes(file(keys, [tensor()], bytes(range(32)), version))
    model = read(path)
    numbers, strings = model.metadata["nested"]
    assert (numbers.tolist(), strings) == ([1, 2], ["x"])
    assert model.metadata["none"] == []
    assert model.metadata["no numbers"].shape == (0,)
    assert model.metadata["flags"].tolist() == [False, True, True]
    assert model.tensors["t"].shape == (2, 4)
    assert model.tensors["t"].data.tobytes() == bytes(range(32))


def test_reads_a_file_of_metadata_that_ends_without_padding(tmp_path):
    (tmp_path / "v.gguf").write_bytes(file([key("k", U32, b"\1\0\0\0")], align=1))
    assert read(tmp_path / "v.gguf").metadata == {"k": 1}


def test_reads_all_parts_of_a_split_file(tmp_path):
    expected = some_tensors()
    written(tmp_path / "m.gguf", expected, split_max_tensors=2)
    first, second = sorted(tmp_path.iterdir())
    assert first.name == "m-00001-of-00002.gguf"
    model = read(first)
    assert model.path == str(first)
    assert model.metadata["general.architecture"] == "llama"
    assert_holds(model.tensors, expected)
    with pytest.raises(ValueError, match=r"m-00002-of-00002.*give the first, m-00001-of-00002\.gguf"):
        read(second)
    first.rename(tmp_path / "other.gguf")
    with pytest.raises(ValueError, match=r"other\.gguf: one of 2 parts, whose names must end in -00001-of-00002"):
        read(tmp_path / "other.gguf")


def test_names_all_missing_parts(tmp_path):
    written(tmp_path / "m.gguf", some_tensors(), split_max_tensors=1)
    for i in (2, 4):
        (tmp_path / f"m-0000{i}-of-00004.gguf").unlink()
    with pytest.raises(ValueError, match=r"missing parts.*: m-00002-of-00004\.gguf, m-00004-of-00004\.gguf$"):
        read(tmp_path / "m-00001-of-00004.gguf")


def part(number: int, count: int, total: int, name: str) -> bytes:
    u16, i32 = GGUFValueType.UINT16, GGUFValueType.INT32
    keys = [
        key("split.no", u16, struct.pack("<H", number)),
        key("split.count", u16, struct.pack("<H", count)),
        key("split.tensors.count", i32, struct.pack("<i", total)),
    ]
    return file(keys, [tensor(name)], bytes(32))


@pytest.mark.parametrize(
    ("second", "rule"),
    [
        (part(0, 2, 2, "b"), r"00002-of-00002.*split\.no, split\.count are \(0, 2\), not \(1, 2\)"),
        (part(1, 3, 2, "b"), r"00002-of-00002.*split\.no, split\.count are \(1, 3\), not \(1, 2\)"),
        (part(1, 2, 2, "a"), r"00002-of-00002.*an earlier part has too: \['a'\]"),
        (part(1, 2, 2, "b")[:40], r"00002-of-00002.*needs"),
    ],
)
def test_rejects_parts_that_do_not_fit(tmp_path, second, rule):
    (tmp_path / "m-00001-of-00002.gguf").write_bytes(part(0, 2, 2, "a"))
    (tmp_path / "m-00002-of-00002.gguf").write_bytes(second)
    with pytest.raises(ValueError, match=rule):
        read(tmp_path / "m-00001-of-00002.gguf")


def test_rejects_a_split_with_too_few_tensors(tmp_path):
    for i in range(2):
        (tmp_path / f"m-0000{i + 1}-of-00002.gguf").write_bytes(part(i, 2, 5, f"t{i}"))
    with pytest.raises(ValueError, match=r"2 part\(s\) hold 2 tensors, but split\.tensors\.count is 5"):
        read(tmp_path / "m-00001-of-00002.gguf")


deep = array(U32, 0)
for _ in range(8):
    deep = array(ARRAY, 1, deep)
one, four = struct.pack("<I", 1), struct.pack("<I", 4)
alignment = "general.alignment"
BROKEN = {
    "empty": (b"", "the file is empty"),
    "short": (b"GG", "not a GGUF file: it starts with b'GG'"),
    "magic": (b"ggjt" + file()[4:], "not a GGUF file: it starts with b'ggjt'"),
    "no version": (b"GGUF\3", "the version needs 4 bytes at byte 4, but the file ends 1 bytes later"),
    "no counts": (file()[:16], "the number of keys needs 8 bytes"),
    "version 1": (file(version=1), "GGUF version 1; little-endian versions .2, 3. are supported"),
    "version 4": (file(version=4), "GGUF version 4; "),
    "big-endian": (file(version=3 << 24), "the file is big-endian"),
    "key count": (file([key("a", U32, one)], n_keys=2**60, align=1), "the length of a key needs 8 bytes"),
    "tensor count": (file(tensors=[tensor()], n_tensors=2**60, align=1), "the length of a tensor's name needs 8"),
    "key length": (file([struct.pack("<Q", 2**60)]), f"a key has {2**60} bytes; the limit is 65535"),
    "key text": (file([key(b"\xff", U32, one)]), "a key is not UTF-8"),
    "key twice": (file([key("a", U32, one)] * 2), "key 'a' occurs twice"),
    "value type": (file([key("a", 13, one)]), "'a' has the unknown value type 13"),
    "value cut": (file([key("a", U32, b"")], align=1), "'a' needs 4 bytes"),
    "string length": (file([key("a", STRING, struct.pack("<Q", 2**60))]), f"'a' has {2**60} bytes"),
    "string cut": (file([key("a", STRING, struct.pack("<Q", 99))], align=1), "'a' needs 99 bytes"),
    "string text": (file([key("a", STRING, text(b"\xe2\x82"))]), "'a' is not UTF-8"),
    "array type": (file([key("a", ARRAY, array(13, 1))]), "'a' has the unknown value type 13"),
    "array count": (file([key("a", ARRAY, array(U32, 2**60))]), f"'a' needs {2**62} bytes"),
    "strings count": (file([key("a", ARRAY, array(STRING, 2**60))]), f"'a' claims {2**60} strings"),
    "strings cut": (file([key("a", ARRAY, array(STRING, 3, text("x")))], align=1), "'a' claims 3 strings.*in number 1"),
    "strings length": (file([key("a", ARRAY, array(STRING, 1, b"\xff" * 8))]), f"'a' needs {2**64 + 7} bytes"),
    "strings text": (file([key("a", ARRAY, array(STRING, 2, text("x") + text(b"\xff")))]), "'a' is not UTF-8"),
    "strings NUL text": (file([key("a", ARRAY, array(STRING, 2, text("\0") + text(b"\xff")))]), "'a' is not UTF-8"),
    "arrays count": (file([key("a", ARRAY, array(ARRAY, 2**60))]), "'a' nests arrays"),
    "arrays depth": (file([key("a", ARRAY, deep)]), "'a' nests arrays more than 4 deep"),
    "alignment 0": (file([key(alignment, U32, bytes(4))]), "general.alignment is 0, not a power of two"),
    "alignment 48": (file([key(alignment, U32, b"0\0\0\0")]), "general.alignment is 48, not a power of two"),
    "alignment text": (file([key(alignment, STRING, text("32"))]), "general.alignment is 32, not a power"),
    "tensor twice": (file(tensors=[tensor()] * 2, data=bytes(32)), "tensor 't' occurs twice"),
    "no dimensions": (file(tensors=[tensor(ne=())], data=bytes(32)), "tensor 't' has 0 dimensions, not 1 to 4"),
    "dimensions": (file(tensors=[tensor(ne=(1,) * 5)], data=bytes(32)), "tensor 't' has 5 dimensions, not 1 to 4"),
    "dimension 0": (file(tensors=[tensor(ne=(4, 0))], data=bytes(32)), r"tensor 't' of type F32 has shape \(0, 4\)"),
    "overflow": (file(tensors=[tensor(ne=(2**62, 2**62))], data=bytes(32)), "tensor 't' of shape .* ends at byte"),
    "block": (file(tensors=[tensor(ne=(48, 1), kind=8)], data=bytes(64)), "Q8_0 has shape .1, 48.; .* blocks of 32"),
    "tensor type": (file(tensors=[tensor(kind=99)], data=bytes(32)), r"'t' has the unknown type 99; .* Q4_0 \(2\)"),
    "old type": (file(tensors=[tensor(kind=4)], data=bytes(32)), "tensor 't' has the unknown type 4"),
    "offset": (file(tensors=[tensor(offset=8)], data=bytes(64)), "'t' starts at 8, not a multiple of the alignment 32"),
    "offset past": (file(tensors=[tensor(offset=2**60)], data=bytes(32)), f"ends at byte {2**60 + 128}, .* has 128"),
    "data cut": (file(tensors=[tensor()], data=bytes(31)), "tensor 't' of shape .2, 4. ends at byte 128, .* has 127"),
    "split count": (file([key("split.count", U32, bytes(4))]), "split.count is 0, not a number of parts"),
    "split array": (file([key("split.no", ARRAY, array(U32, 2, one + four))]), r"split.no is array.*, not an integer"),
    "split type": (file([key("split.count", STRING, text("2"))]), "split.count is '2', not an integer"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_names_the_file_and_the_broken_rule_and_allocates_little(tmp_path, case):
    content, rule = BROKEN[case]
    path = tmp_path / "bad.gguf"
    path.write_bytes(content)
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=rf"bad\.gguf: .*{rule}"):
            read(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 2**20  # the files hold under 200 bytes and claim up to 2**64


def test_bounds_the_header_of_a_large_file_of_zeros(tmp_path):
    """A damaged count before a stretch of zeros, as broken downloads have, does not become millions of strings."""
    path = tmp_path / "zeros.gguf"
    with path.open("wb") as f:
        f.write(file([key("a", ARRAY, array(STRING, 2**28))], align=1))
        f.truncate(2**32)  # sparse
    with pytest.raises(ValueError, match="claims 268435456 strings, but the limit of 67108864 bytes for a header"):
        read(path)


def test_rejects_what_is_no_readable_file(tmp_path):
    for path, rule in ((tmp_path / "no.gguf", "no such file"), (tmp_path, "not a regular file")):
        with pytest.raises(ValueError, match=rule) as error:
            read(path)
        assert str(path) in str(error.value)
    os.mkfifo(tmp_path / "pipe")  # opening it would wait for a writer
    with pytest.raises(ValueError, match="not a regular file"):
        read(tmp_path / "pipe")
    with pytest.raises(ValueError, match="cannot be read: File name too long"):
        read(tmp_path / ("x" * 300))


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damage_is_a_value_error_or_harmless(tmp_path, data):
    path = tmp_path / "f.gguf"
    if not path.exists():
        keys = [("words", ["a", "bc", "é"], ARRAY, STRING), ("ids", [1, 2, 3], ARRAY, U32), ("n", 7, U32, None)]
        written(path, some_tensors(), keys)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(0, 3))):  # mostly in the header
        content[data.draw(st.integers(0, 600))] = data.draw(st.integers(0, 255))
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(content[: data.draw(st.just(len(content)) | st.integers(0, len(content)))])
    try:
        model = read(damaged)
    except ValueError as error:
        if str(damaged) not in str(error):
            raise
    else:
        assert all(t.data.nbytes <= len(content) for t in model.tensors.values())
