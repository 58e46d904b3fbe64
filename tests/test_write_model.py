"""The files that benchmarks/write_model.py writes, against shapes and types set down here by hand."""

import importlib.util
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf.quants import dequantize

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "write_model.py"
spec = importlib.util.spec_from_file_location("write_model", SCRIPT)
assert spec
assert spec.loader
write_model = importlib.util.module_from_spec(spec)
spec.loader.exec_module(write_model)
SHAPES, FILE_TYPES = write_model.SHAPES, write_model.FILE_TYPES


def table(text: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes; all are weights but for those that say otherwise."""
    shapes = {name: tuple(map(int, dims.split("x"))) for name, dims in (item.split() for item in text.split(","))}
    other = (".scale", ".bias", "ssm_a")
    return {name if name.endswith(other) else f"{name}.weight": shape for name, shape in shapes.items()}


# One layer of each kind at its published size, rows first.
QWEN3 = table(
    "attn_norm 4096, attn_q 4096x4096, attn_k 1024x4096, attn_v 1024x4096, attn_q_norm 128, attn_k_norm 128,"
    "attn_output 4096x4096, ffn_norm 4096, ffn_gate 12288x4096, ffn_up 12288x4096, ffn_down 4096x12288"
)
QWEN3_MOE = table(
    "attn_norm 2048, attn_q 4096x2048, attn_k 512x2048, attn_v 512x2048, attn_q_norm 128, attn_k_norm 128,"
    "attn_output 2048x4096, ffn_norm 2048, ffn_gate_inp 128x2048,"
    "ffn_gate_exps 128x768x2048, ffn_up_exps 128x768x2048, ffn_down_exps 128x2048x768"
)
MLP_27B = table("attn_norm 5120, post_attention_norm 5120, ffn_gate 17408x5120, ffn_up 17408x5120, ffn_down 5120x17408")
DELTA_27B = MLP_27B | table(
    "attn_qkv 10240x5120, attn_gate 6144x5120, ssm_conv1d 10240x4, ssm_dt.bias 48, ssm_a 48,"
    "ssm_alpha 48x5120, ssm_beta 48x5120, ssm_norm 128, ssm_out 5120x6144"
)
FULL_27B = MLP_27B | table(
    "attn_q 12288x5120, attn_k 1024x5120, attn_v 1024x5120, attn_q_norm 256, attn_k_norm 256, attn_output 5120x6144"
)
MTP_27B = FULL_27B | table("nextn.eh_proj 5120x10240, nextn.enorm 5120, nextn.hnorm 5120, nextn.shared_head_norm 5120")
MOE_35B = table(
    "attn_norm 2048, post_attention_norm 2048, ffn_gate_inp 256x2048,"
    "ffn_gate_exps 256x512x2048, ffn_up_exps 256x512x2048, ffn_down_exps 256x2048x512,"
    "ffn_gate_inp_shexp 2048, ffn_gate_shexp 512x2048, ffn_up_shexp 512x2048, ffn_down_shexp 2048x512"
)
DELTA_35B = MOE_35B | table(
    "attn_qkv 8192x2048, attn_gate 4096x2048, ssm_conv1d 8192x4, ssm_dt.bias 32, ssm_a 32,"
    "ssm_alpha 32x2048, ssm_beta 32x2048, ssm_norm 128, ssm_out 2048x4096"
)
FULL_35B = MOE_35B | table(
    "attn_q 8192x2048, attn_k 512x2048, attn_v 512x2048, attn_q_norm 256, attn_k_norm 256, attn_output 2048x4096"
)
MTP_35B = FULL_35B | table("nextn.eh_proj 2048x4096, nextn.enorm 2048, nextn.hnorm 2048, nextn.shared_head_norm 2048")
MLP_31B = table(
    "attn_norm 5376, post_attention_norm 5376, ffn_norm 5376, post_ffw_norm 5376, layer_output_scale 1,"
    "ffn_gate 21504x5376, ffn_up 21504x5376, ffn_down 5376x21504"
)
SLIDING_31B = MLP_31B | table(
    "attn_q 8192x5376, attn_k 4096x5376, attn_v 4096x5376, attn_q_norm 256, attn_k_norm 256, attn_output 5376x8192"
)
FULL_31B = MLP_31B | table(
    "attn_q 16384x5376, attn_k 2048x5376, attn_q_norm 512, attn_k_norm 512, attn_output 5376x16384"
)
MOE_26B = table(
    "attn_norm 2816, post_attention_norm 2816, ffn_norm 2816, post_ffw_norm 2816, layer_output_scale 1,"
    "ffn_gate 2112x2816, ffn_up 2112x2816, ffn_down 2816x2112,"
    "ffn_gate_inp 128x2816, ffn_gate_inp.scale 2816, pre_ffw_norm_2 2816, post_ffw_norm_1 2816, post_ffw_norm_2 2816,"
    "ffn_gate_up_exps 128x1408x2816, ffn_down_exps 128x2816x704, ffn_down_exps.scale 128"
)
SLIDING_26B = MOE_26B | table(
    "attn_q 4096x2816, attn_k 2048x2816, attn_v 2048x2816, attn_q_norm 256, attn_k_norm 256, attn_output 2816x4096"
)
FULL_26B = MOE_26B | table(
    "attn_q 8192x2816, attn_k 1024x2816, attn_q_norm 512, attn_k_norm 512, attn_output 2816x8192"
)
MLP_E4B = table(
    "attn_norm 2560, post_attention_norm 2560, ffn_norm 2560, post_ffw_norm 2560, layer_output_scale 1,"
    "ffn_gate 10240x2560, ffn_up 10240x2560, ffn_down 2560x10240, inp_gate 256x2560, proj 2560x256, post_norm 2560"
)
SHARED_SLIDING_E4B = MLP_E4B | table("attn_q 2048x2560, attn_q_norm 256, attn_output 2560x2048")
SHARED_FULL_E4B = MLP_E4B | table("attn_q 4096x2560, attn_q_norm 512, attn_output 2560x4096")
SLIDING_E4B = SHARED_SLIDING_E4B | table("attn_k 512x2560, attn_v 512x2560, attn_k_norm 256")
FULL_E4B = SHARED_FULL_E4B | table("attn_k 1024x2560, attn_v 1024x2560, attn_k_norm 512")
LAYERS = {
    "qwen3-8b": [QWEN3] * 36,
    "qwen3-30b-a3b": [QWEN3_MOE] * 48,
    "qwen3.6-27b": ([DELTA_27B] * 3 + [FULL_27B]) * 16 + [MTP_27B],
    "qwen3.6-35b-a3b": ([DELTA_35B] * 3 + [FULL_35B]) * 10 + [MTP_35B],
    "gemma4-e4b": ([SLIDING_E4B] * 5 + [FULL_E4B]) * 4 + ([SHARED_SLIDING_E4B] * 5 + [SHARED_FULL_E4B]) * 3,
    "gemma4-26b-a4b": ([SLIDING_26B] * 5 + [FULL_26B]) * 5,
    "gemma4-31b": ([SLIDING_31B] * 5 + [FULL_31B]) * 10,
}
OUTSIDE = {
    "qwen3-8b": "token_embd 151936x4096, output_norm 4096, output 151936x4096",
    "qwen3-30b-a3b": "token_embd 151936x2048, output_norm 2048, output 151936x2048",
    "qwen3.6-27b": "token_embd 248320x5120, output_norm 5120, output 248320x5120",
    "qwen3.6-35b-a3b": "token_embd 248320x2048, output_norm 2048, output 248320x2048",
    "gemma4-e4b": "token_embd 262144x2560, output_norm 2560, rope_freqs 256,"
    "per_layer_token_embd 262144x10752, per_layer_model_proj 10752x2560, per_layer_proj_norm 256",
    "gemma4-26b-a4b": "token_embd 262144x2816, output_norm 2816, rope_freqs 256",
    "gemma4-31b": "token_embd 262144x5376, output_norm 5376, rope_freqs 256",
}


@pytest.mark.parametrize("name", SHAPES)
def test_tensors_of_the_published_shape(name):
    expected = table(OUTSIDE[name]) | {
        f"blk.{i}.{key}": shape for i, layer in enumerate(LAYERS[name]) for key, shape in layer.items()
    }
    listed = list(write_model.tensors(SHAPES[name]))
    assert dict(listed) == expected
    assert len(listed) == len(expected)  # no name twice


def attention_keys(heads: int, kv_heads: int | list[int], head: int, rope_base: float) -> dict[str, Any]:
    return {
        "attention.head_count": heads,
        "attention.head_count_kv": kv_heads,
        "attention.key_length": head,
        "attention.value_length": head,
        "attention.layer_norm_rms_epsilon": 1e-6,
        "rope.freq_base": rope_base,
    }


def expert_keys(count: int, width: int) -> dict[str, Any]:
    return {"expert_count": count, "expert_used_count": 8, "expert_feed_forward_length": width}


QWEN35_KEYS = {
    "context_length": 262144,
    "vocab_size": 248320,
    "rope.dimension_count": 64,
    "rope.dimension_sections": [11, 11, 10, 0],
    "full_attention_interval": 4,
    "ssm.conv_kernel": 4,
    "ssm.state_size": 128,
    "ssm.group_count": 16,
    "nextn_predict_layers": 1,
}
GEMMA4_KEYS = {
    "context_length": 262144,
    "vocab_size": 262144,
    "attention.key_length_swa": 256,
    "attention.value_length_swa": 256,
    "attention.sliding_window": 1024,
    "attention.shared_kv_layers": 0,
    "rope.dimension_count": 512,
    "rope.dimension_count_swa": 256,
    "rope.freq_base_swa": 1e4,
    "embedding_length_per_layer_input": 0,
    "final_logit_softcapping": 30.0,
}
SLIDING = [True, True, True, True, True, False]
KEYS = {
    "qwen3-8b": attention_keys(32, 8, 128, 1e6)
    | {"block_count": 36, "embedding_length": 4096, "feed_forward_length": 12288}
    | {"context_length": 40960, "vocab_size": 151936},
    "qwen3-30b-a3b": attention_keys(32, 4, 128, 1e6)
    | {"block_count": 48, "embedding_length": 2048, "feed_forward_length": 6144}
    | {"context_length": 40960, "vocab_size": 151936}
    | expert_keys(128, 768),
    "qwen3.6-27b": attention_keys(24, 4, 256, 1e7)
    | QWEN35_KEYS
    | {"block_count": 65, "embedding_length": 5120, "feed_forward_length": 17408}
    | {"ssm.time_step_rank": 48, "ssm.inner_size": 6144},
    "qwen3.6-35b-a3b": attention_keys(16, 2, 256, 1e7)
    | QWEN35_KEYS
    | {"block_count": 41, "embedding_length": 2048, "expert_shared_feed_forward_length": 512}
    | {"ssm.time_step_rank": 32, "ssm.inner_size": 4096}
    | expert_keys(256, 512),
    "gemma4-e4b": attention_keys(8, 2, 512, 1e6)
    | GEMMA4_KEYS
    | {"block_count": 42, "embedding_length": 2560, "feed_forward_length": 10240, "context_length": 131072}
    | {"attention.sliding_window": 512, "attention.sliding_window_pattern": SLIDING * 7}
    | {"attention.shared_kv_layers": 18, "embedding_length_per_layer_input": 256},
    "gemma4-26b-a4b": attention_keys(16, [8, 8, 8, 8, 8, 2] * 5, 512, 1e6)
    | GEMMA4_KEYS
    | {"block_count": 30, "embedding_length": 2816, "feed_forward_length": 2112}
    | {"attention.sliding_window_pattern": SLIDING * 5}
    | expert_keys(128, 704),
    "gemma4-31b": attention_keys(32, [16, 16, 16, 16, 16, 4] * 10, 512, 1e6)
    | GEMMA4_KEYS
    | {"block_count": 60, "embedding_length": 5376, "feed_forward_length": 21504}
    | {"attention.sliding_window_pattern": SLIDING * 10},
}
ARCHITECTURES = {
    "qwen3-8b": "qwen3",
    "qwen3-30b-a3b": "qwen3moe",
    "qwen3.6-27b": "qwen35",
    "qwen3.6-35b-a3b": "qwen35moe",
    "gemma4-e4b": "gemma4",
    "gemma4-26b-a4b": "gemma4",
    "gemma4-31b": "gemma4",
}


@pytest.mark.parametrize("name", SHAPES)
def test_keys_of_the_published_shape(name, tmp_path):
    path = tmp_path / "header.gguf"
    writer = write_model.header(str(path), SHAPES[name], name, "Q8_0")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    fields = gguf.GGUFReader(path).fields
    prefix = f"{ARCHITECTURES[name]}."
    found = {key.removeprefix(prefix): field for key, field in fields.items() if key.startswith(prefix)}
    assert found.keys() == KEYS[name].keys()
    for key, value in KEYS[name].items():
        if isinstance(value, list):
            kind = {bool: "BOOL", int: "INT32"}[type(value[0])]
        else:
            kind = {int: "UINT32", float: "FLOAT32"}[type(value)]
        assert found[key].types[-1].name == kind, key
        assert found[key].contents() == (np.float32(value) if isinstance(value, float) else value), key
    assert fields["general.architecture"].contents() == ARCHITECTURES[name]
    assert fields["general.file_type"].contents() == 7
    assert fields["tokenizer.ggml.model"].contents() == "none"


def types(name: str, file_type: str) -> dict[str, str]:
    return {entry.name: entry.kind for entry in write_model.plan(SHAPES[name], file_type)}


def layers_of(found: dict[str, str], suffix: str, kind: str) -> list[int]:
    return [int(name.split(".")[1]) for name, k in found.items() if name.endswith(suffix) and k == kind]


def test_q4_k_m_of_a_hybrid():
    """The 64 layers of the published Qwen3.6-27B file, and its MTP block, which is the last of 65."""
    found = types("qwen3.6-27b", "Q4_K_M")
    finer = [*range(8), *range(10, 56, 3), *range(56, 65)]
    assert layers_of(found, "ffn_down.weight", "Q6_K") == finer
    values = layers_of(found, "attn_qkv.weight", "Q6_K") + layers_of(found, "attn_v.weight", "Q6_K")
    assert sorted(values) == finer
    assert found["output.weight"] == "Q6_K"
    assert found["token_embd.weight"] == "Q4_K"
    assert {found[f"blk.0.{n}"] for n in ("ssm_conv1d.weight", "ssm_a", "ssm_dt.bias", "ssm_norm.weight")} == {"F32"}
    others = ("attn_gate.weight", "ssm_alpha.weight", "ssm_beta.weight", "ssm_out.weight", "ffn_gate.weight")
    assert {found[f"blk.0.{n}"] for n in others} == {"Q4_K"}
    assert found["blk.64.nextn.eh_proj.weight"] == "Q4_K"


def test_q4_k_m_of_experts():
    found = types("qwen3.6-35b-a3b", "Q4_K_M")
    finer = [*range(5), *range(7, 35, 3), *range(35, 41)]  # of 41 blocks: 41 // 8 = 5, 7 * 41 // 8 = 35
    assert layers_of(found, "ffn_down_exps.weight", "Q6_K") == finer
    assert layers_of(found, "ffn_down_shexp.weight", "Q6_K") == finer
    assert layers_of(found, "ffn_up_exps.weight", "Q4_K") == list(range(41))
    assert layers_of(found, "ffn_gate_inp.weight", "F32") == list(range(41))
    assert layers_of(found, "ffn_gate_inp_shexp.weight", "F32") == list(range(41))


def test_q4_k_m_of_tied_embeddings():
    found = types("gemma4-e4b", "Q4_K_M")
    assert found["token_embd.weight"] == found["per_layer_token_embd.weight"] == "Q6_K"
    assert found["per_layer_model_proj.weight"] == found["rope_freqs.weight"] == "F32"
    assert found["blk.0.inp_gate.weight"] == found["blk.0.proj.weight"] == "Q4_K"
    # 24 layers own a V: 24 // 8 = 3, 7 * 24 // 8 = 21
    assert layers_of(found, "attn_v.weight", "Q6_K") == [0, 1, 2, 5, 8, 11, 14, 17, 20, 21, 22, 23]


def test_q4_k_m_counts_values_where_they_exist():
    """Full layers of the 31B model have no V, so that the 50 of sliding layers are counted without them."""
    found = types("gemma4-31b", "Q4_K_M")
    values = [i for i in range(60) if i % 6 != 5]
    assert layers_of(found, "attn_v.weight", "Q6_K") == [
        values[i] for i in (*range(6), *range(8, 43, 3), *range(43, 50))
    ]


def test_q4_k_m_of_rows_that_are_no_multiple_of_256():
    found = types("gemma4-26b-a4b", "Q4_K_M")  # rows of 2112 and 704 into ffn_down
    finer = [*range(3), *range(5, 26, 3), *range(26, 30)]
    for name in ("ffn_down.weight", "ffn_down_exps.weight"):
        assert layers_of(found, name, "Q8_0") == finer
        assert layers_of(found, name, "Q5_0") == sorted(set(range(30)) - set(finer))
    assert found["blk.0.ffn_gate_up_exps.weight"] == "Q4_K"
    assert found["blk.0.ffn_down_exps.scale"] == "F32"


@pytest.mark.parametrize("file_type", ["BF16", "Q8_0"])
@pytest.mark.parametrize("name", SHAPES)
def test_plain_files_keep_f32_for_vectors_routers_and_convolutions(name, file_type):
    for entry in write_model.plan(SHAPES[name], file_type):
        plain = len(entry.shape) == 1 or "_inp." in entry.name or "conv1d" in entry.name or "model_proj" in entry.name
        assert entry.kind == ("F32" if plain else file_type), entry.name


@pytest.mark.parametrize(
    ("name", "file_type", "size"),
    [
        ("qwen3-8b", "Q4_K_M", 5.0e9),
        ("qwen3-30b-a3b", "Q4_K_M", 17.2 * 2**30),  # as llama.cpp prints its size
        ("qwen3-30b-a3b", "Q8_0", 30.25 * 2**30),
        ("qwen3.6-27b", "Q4_K_M", 16.9e9),
        ("qwen3.6-35b-a3b", "Q4_K_M", 21.2e9),  # without the MTP block, which adds 0.5
        ("gemma4-e4b", "Q8_0", 8.0e9),
        ("gemma4-31b", "Q4_K_M", 18.8e9),
    ],
)
def test_size_of_the_published_file(name, file_type, size):
    # 5 %: publishers keep some tensors in other types, and the MTP block or not
    assert write_model.size_bytes(SHAPES[name], file_type) == pytest.approx(size, rel=0.05)


SMALL = {
    "embedding_length": 256,
    "feed_forward_length": 512,
    "expert_count": 8,
    "expert_feed_forward_length": 288,  # no multiple of 256
    "expert_shared_feed_forward_length": 256,
    "attention.head_count": 16,
    "attention.key_length": 64,
    "attention.value_length": 64,
    "attention.key_length_swa": 32,
    "attention.value_length_swa": 32,
    "rope.dimension_count": 64,
    "rope.dimension_count_swa": 32,
    "ssm.state_size": 32,
    "ssm.group_count": 4,
    "ssm.time_step_rank": 8,
    "ssm.inner_size": 256,
    "embedding_length_per_layer_input": 32,
}


def small(name: str):
    """A shape with two periods of layers and narrow ones; eight layers where all are alike, for both types."""
    shape = SHAPES[name]
    keys = shape.keys | {key: value for key, value in SMALL.items() if shape.keys.get(key)}
    return shape._replace(layers=max(8, 2 * shape.period), vocab=320, keys=keys)


def check_values(tensor: gguf.ReaderTensor) -> None:
    name, fan_in = tensor.name, int(tensor.shape[0])
    values = dequantize(tensor.data, tensor.tensor_type)
    assert np.isfinite(values).all(), name
    if name == "rope_freqs.weight":
        np.testing.assert_array_equal(values, [1] * 8 + [np.float32(1e30)] * 24)
    elif name.endswith("ssm_a"):
        assert ((values > -8.01) & (values < -0.049)).all(), name
    elif name.endswith("ssm_dt.bias"):
        step = np.log1p(np.exp(values))
        assert ((step > 0.00099) & (step < 0.101)).all(), name
    elif len(tensor.shape) > 1 or name.endswith("ffn_gate_inp_shexp.weight"):
        # Four deviations of a mean over groups of 32 weights: those of Q4_K have a scale and a minimum of their own.
        tolerance = 4 * (values.size / 32) ** -0.5
        unit = values * fan_in**0.5
        assert abs(unit.mean()) < tolerance + 0.055, name  # Q5_0's codes go from -16 to 15: half a code of 9.2 too low
        assert abs(unit.std() - 1) < tolerance, name
    else:
        assert abs(values - 1).max() < 0.6, name  # six deviations


@pytest.mark.parametrize("file_type", FILE_TYPES)
@pytest.mark.parametrize("name", SHAPES)
def test_written_file(name, file_type, tmp_path):
    path, shape = tmp_path / "small.gguf", small(name)
    write_model.write(str(path), shape, name, file_type, seed=0)
    reader = gguf.GGUFReader(path)
    planned = write_model.plan(shape, file_type)
    found = [(t.name, tuple(reversed(t.shape.tolist())), t.tensor_type.name) for t in reader.tensors]
    assert found == [(entry.name, entry.shape, entry.kind) for entry in planned]
    assert path.stat().st_size == reader.data_offset + write_model.size_bytes(shape, file_type)
    for tensor in reader.tensors:
        check_values(tensor)


def test_tensors_of_one_shape_differ(tmp_path):
    path = tmp_path / "small.gguf"
    write_model.write(str(path), small("qwen3-8b"), "small", "BF16", seed=0)
    data = {t.name: t.data for t in gguf.GGUFReader(path).tensors}
    assert (data["blk.0.ffn_gate.weight"] != data["blk.0.ffn_up.weight"]).any()
    assert (data["blk.0.ffn_gate.weight"] != data["blk.1.ffn_gate.weight"]).any()


@pytest.mark.parametrize("layers", [6, 12, 18, 24, 42])
def test_fewer_layers_share_the_caches_of_layers_that_remain(layers):
    keys = write_model.metadata(SHAPES["gemma4-e4b"]._replace(layers=layers))
    own = keys["block_count"] - keys["attention.shared_kv_layers"]
    assert own >= 6
    assert keys["attention.sliding_window_pattern"][own - 2 : own] == [True, False]  # whose caches are shared


def test_command(tmp_path, monkeypatch, capsys):
    path = tmp_path / "out.gguf"
    monkeypatch.setitem(SHAPES, "qwen3.6-27b", small("qwen3.6-27b"))
    arguments = ["write_model.py", "qwen3.6-27b", "Q4_K_M", str(path), "--vocab", "64", "--layers"]
    monkeypatch.setattr("sys.argv", [*arguments, "4"])
    write_model.main()
    reader = gguf.GGUFReader(path)
    assert reader.fields["qwen35.block_count"].contents() == 5  # four and the MTP block
    assert next(t for t in reader.tensors if t.name == "output.weight").shape.tolist() == [256, 64]
    assert str(path) in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", [*arguments, "6"])
    with pytest.raises(SystemExit):
        write_model.main()
    assert "6 layers are not a multiple of 4" in capsys.readouterr().err
