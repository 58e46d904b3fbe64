"""The command line end to end: in this process where possible, in one of its own for signals and pipes."""

import csv
import io
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import gguf
import pytest
from goldens import model_path

import jaxinfer
from jaxinfer import Eviction, Sampler, Session, arguments, bench
from jaxinfer import __main__ as cli
from jaxinfer.presses import Knorm, SnapKV
from jaxinfer.terminal import Terminal

pytestmark = pytest.mark.usefixtures("quick_compiler")

MODEL = str(model_path("qwen3"))
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.role }}: {{ m.content }}<|im_end|>{% endfor %}<|im_start|>"
# Shapes are the same all over, so that each program is compiled once for all tests, with stacked layers.
TEXT, SAMPLER = "sea and sky", Sampler(temperature=0)
OFF = "--no-compile-cache"
ASK = ["-m", MODEL, "--temp", "0", "-n", "6", "--no-compile-cache", "--no-expand"]


def run(capfd, *argv: str) -> tuple[int, str, str]:
    """(exit code, stdout, stderr)"""
    return cli.main(list(argv)), *capfd.readouterr()


@pytest.fixture(scope="module")
def loaded():
    return jaxinfer.load(MODEL, expand=False)


@pytest.fixture(scope="module")
def chatty(tmp_path_factory) -> str:
    return with_template(tmp_path_factory.mktemp("chatty") / "chatty.gguf", TEMPLATE)


@pytest.fixture(scope="module")
def thinking(tmp_path_factory) -> str:
    variables = "{{ enable_thinking }}{{ effort }}"
    return with_template(tmp_path_factory.mktemp("thinking") / "thinking.gguf", TEMPLATE + variables)


def with_template(path: Path, template: str) -> str:
    """Writes the model with a chat template."""
    source, writer = gguf.GGUFReader(MODEL), gguf.GGUFWriter(path, "qwen3")
    for name, key in source.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            item = key.types[1] if key.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(name, key.contents(), key.types[0], item)
    writer.add_chat_template(template)
    for tensor in source.tensors:
        writer.add_tensor(tensor.name, tensor.data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return str(path)


def answer(loaded, prompt, **options) -> str:
    return jaxinfer.generate(*loaded, prompt, max_tokens=6, sampler=SAMPLER, **options)


def test_generate_separates_text_from_the_rest(capfd, loaded):
    code, out, err = run(capfd, *ASK, "-p", TEXT)
    assert (code, out) == (0, answer(loaded, TEXT) + "\n")
    ids = loaded.tokenizer.encode(TEXT)
    assert re.search(
        rf"""note: the file has no chat template; the prompt is taken as it is
compiling prefill of 16 tokens
compiling decode
Prompt: {len(ids)} tokens, \d+\.\d tokens-per-sec
Generation: 6 tokens, \d+\.\d tokens-per-sec
Time to first token: \d+\.\d\d s
Peak memory: \d+\.\d\d\d GB
Compile: \d+\.\d s \(prefill of 16 tokens \d+\.\d s, decode \d+\.\d s\)
Compilation cache: off
$""",
        err,
    )


def test_generate_is_the_default_command(capfd):
    assert run(capfd, "generate", *ASK, "-p", TEXT)[:2] == run(capfd, *ASK, "-p", TEXT)[:2]


def test_prompts_from_files_and_stdin_lose_one_newline(capfd, monkeypatch, tmp_path, loaded):
    (tmp_path / "prompt").write_text(TEXT + "\n\n")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(f"{TEXT}\n\n".encode())))
    assert run(capfd, *ASK, "-f", str(tmp_path / "prompt"))[1] == answer(loaded, TEXT + "\n") + "\n"
    assert run(capfd, *ASK, "-p", "-")[1] == answer(loaded, TEXT + "\n") + "\n"


def test_chat_template(capfd, chatty):
    loaded = jaxinfer.load(chatty, expand=False)
    messages = [{"role": "system", "content": "be"}, {"role": "user", "content": TEXT}]
    argv = ["-m", chatty, *ASK[2:], "-p", TEXT]
    assert run(capfd, *argv, "-sys", "be")[1] == answer(loaded, messages) + "\n"
    assert run(capfd, *argv)[1] == answer(loaded, messages[1:]) + "\n"
    _, out, err = run(capfd, *argv, "--no-chat-template")
    assert out == answer(loaded, TEXT) + "\n"
    assert "note" not in err
    code, out, err = run(capfd, *argv, "--no-chat-template", "--system", "be")
    assert (code, out) == (2, "")
    assert "--system needs the chat template" in err


@pytest.mark.usefixtures("templates_here")
def test_thinking_and_other_variables_of_the_chat_template(capfd, tmp_path, thinking):
    loaded, messages = jaxinfer.load(thinking, expand=False), [{"role": "user", "content": TEXT}]
    argv = ["-m", thinking, *ASK[2:], "-p", TEXT]

    def told(**kwargs) -> str:
        return answer(loaded, messages, chat_template_kwargs=kwargs) + "\n"

    on, off, high = told(enable_thinking=True), told(enable_thinking=False), told(effort="high")
    assert len({answer(loaded, messages) + "\n", on, off, high}) == 4
    assert run(capfd, *argv, "--reasoning", "on")[1] == on
    assert run(capfd, *argv, "-rea", "off")[1] == off
    assert run(capfd, *argv, "--chat-template-kwargs", '{"effort": "high"}')[1] == high
    (tmp_path / "run.toml").write_text('reasoning = "off"\nchat_template_kwargs = { effort = "high" }\n')
    assert run(capfd, "run", str(tmp_path / "run.toml"), *argv)[1] == told(enable_thinking=False, effort="high")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--reasoning", "off"], "has no variable 'enable_thinking'"),
        (["--chat-template-kwargs", '{"message": 1}'], "has no variable 'message'"),
        (["--chat-template-kwargs", "[1]"], r"'\[1\]' is no JSON object such as"),
        (["--chat-template-kwargs", "{"], "'{' is no JSON object such as"),
        (["--reasoning", "off", "--no-chat-template"], "--reasoning needs the chat template of the file"),
        (["--chat-template-kwargs", '{"a": 1}', "--no-chat-template"], "-kwargs needs the chat template of the"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_variables_that_would_be_ignored(capfd, chatty, argv, message):
    code, out, err = run(capfd, "-m", chatty, *ASK[2:], "-p", TEXT, *argv)
    assert (code, out) == (2, "")
    assert re.search(f"^error: .*{message}", err, re.MULTILINE)


@pytest.mark.usefixtures("templates_here")
def test_chat_remembers(capfd, monkeypatch, loaded):
    monkeypatch.setattr(sys, "stdin", io.StringIO("sea\nsky\n/exit\nnot read\n"))
    code, out, _ = run(capfd, "chat", *ASK, "--system", "be")
    messages = [{"role": "system", "content": "be"}, {"role": "user", "content": "sea"}]
    first = answer(loaded, messages)
    messages += [{"role": "assistant", "content": first}, {"role": "user", "content": "sky"}]
    assert (code, out) == (0, f"{first}\n{answer(loaded, messages)}\n")


def test_chat_survives_ctrl_c_and_a_line_that_is_too_long(capfd, monkeypatch):
    asked = []

    def stream(model, params, tokenizer, messages, **options):
        asked.append([m["content"] for m in messages])
        yield jaxinfer.Piece("part", 1)
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "stream", stream)
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\ntwo\n"))
    code, out, _ = run(capfd, "chat", *ASK)
    assert (code, out, asked) == (0, "part\npart\n", [["one"], ["one", "part", "two"]])
    monkeypatch.undo()
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{'x' * 300}\n"))
    code, out, err = run(capfd, "chat", *ASK, "--ctx", "256")
    assert (code, out) == (0, "")
    assert "exceed the context of 256 tokens" in err


def test_run_file_is_the_command_line_and_the_command_line_wins(capfd, tmp_path, loaded):
    path = tmp_path / "run.toml"
    want = answer(loaded, TEXT)
    stop = want[2:4]
    path.write_text(
        f'model = {json.dumps(MODEL)}\nprompt = "{TEXT}"\nmax_tokens = 6\ntemperature = 0\ncompile_cache = ""\n'
        f"stop = [{json.dumps(stop)}]\nexpand = false\nchunk = 16\nignore_eos = false\ntop_p = 0.5\n"
    )
    assert run(capfd, "run", str(path))[1] == want[: want.index(stop)] + "\n"
    assert run(capfd, "run", str(path), "--stop", "<never>")[1] == want + "\n"
    (tmp_path / "prompt").write_text("of all")
    other = ["--file", str(tmp_path / "prompt"), "--stop", "<never>"]
    assert run(capfd, "run", str(path), *other)[1] == answer(loaded, "of all") + "\n"


def test_run_file_chooses_the_command(capfd, tmp_path):
    path = tmp_path / "run.toml"
    path.write_text(f'command = "bench"\nmodel = {json.dumps(MODEL)}\nn_prompt = [16, 8]\nn_gen = [0]\nchunk = 16\n')
    command, given = arguments.read(["run", str(path), "-r", "2", "-b", "16,32"])
    assert command == "bench"
    assert given == {"model": MODEL, "n_prompt": [16, 8], "n_gen": [0], "chunk": [16, 32], "repetitions": 2}


def test_another_model_is_not_held_to_the_sum_of_the_run_file(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text(f'model = "a"\nsha256 = "{"0" * 64}"\n')
    assert arguments.read(["run", str(path), "-m", "b"])[1] == {"model": "b"}
    assert arguments.read(["run", str(path), "-n", "1"])[1] == {"model": "a", "sha256": "0" * 64, "max_tokens": 1}


@pytest.mark.parametrize("command", arguments.COMMANDS)
def test_every_argument_works_in_a_run_file(tmp_path, command):
    values = {str: '"a b"', int: "-3", float: "0.5", bool: "false", list: "[1, 2]", dict: "{ a = 1 }"}
    values[int | str] = '"auto"'
    path, options = tmp_path / "run.toml", [o for o in arguments.COMMANDS[command].options if o.type]
    for option in options:
        choices = option.more.get("choices") or (arguments.DTYPES if option.name == "dtype" else None)
        value = f'"{choices[0]}"' if choices else values[option.type]
        path.write_text(f'command = "{command}"\n{option.name} = {value}\n')
        assert arguments.read(["run", str(path)])[1].keys() == {option.name}


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["-p", "a"], "a model is missing: --model with a path of a GGUF file"),
        (["-m", "missing.gguf", "-p", "a"], "'missing.gguf' is no file here"),
        (["-m", __file__, "-p", "a"], r"test_cli\.py: not a GGUF file"),
        (["-m", MODEL], "one prompt is needed: --prompt TEXT"),
        ([*ASK, "-p", ""], "the prompt is empty"),
        ([*ASK, "-f", "missing"], "missing: the prompt cannot be read"),
        ([*ASK, "-f", MODEL], r"qwen3\.gguf: the prompt cannot be read: 'utf-8'"),
        ([*ASK, "-p", "a", "--top_k", "3"], "generate has no argument '--top_k'; the nearest flag is --top-k"),
        ([*ASK, "-p", "a", "b"], "generate has no argument 'b'"),
        ([*ASK, "-p", "a", "--top-k", "x"], "argument --top-k: invalid int value: 'x'"),
        ([*ASK, "-p", "a", "--top-p", "2"], "top_p=2.0 must be a number from 0 to 1"),
        ([*ASK, "-p", "a", "-c", "0"], "ctx=0 must be at least 1"),
        ([*ASK, "-p", "a", "-n", "9999"], "the largest max_tokens that fits is 4095"),
        ([*ASK, "-p", "a", "--sha256", "0" * 64], "checksum"),
        (["prefill", *ASK[:2], "-p", "a"], "prefill needs a file to save the session to"),
        ([*ASK, "-p", "a", "--window", "8"], "--window needs --keep"),
        ([*ASK, "-p", "a", "--keep", "8"], "keep=8 is below the 64 tokens that the press looks from"),
        ([*ASK, "-p", "a", "--keep", "-8"], "keep=-8 must be 0, for all tokens, or more"),
        ([*ASK, "-p", "a", "--keep", "many"], "'many' is neither a whole number nor auto"),
        ([*ASK, "-p", "a", "--keep", "8", "--press", "knorm", "--window", "4"], "'knorm' looks at 0 queries always"),
        ([*ASK, "-p", "a", "--keep", "8", "--press", "knorm", "--kernel", "3"], "'knorm' pools nothing"),
        ([*ASK, "-p", "a", "--keep", "99", "--kernel", "4"], "kernel=4 odd"),
        ([*ASK, "-p", "a", "--session", "missing"], "missing"),
        ([*ASK, "-p", "a", "--session", MODEL], r"qwen3\.gguf"),
        ([*ASK, "-p", "a", "--session", MODEL, "-b", "8"], "--chunk is fixed in a session"),
        (["info", *ASK[:2], "--fit", "much"], "'much' is no size in memory"),
        ([*ASK, "-p", "a", "--dtype", "int8"], "invalid choice: 'int8'"),
        ([*ASK, "-p", "a", "--device", "gpu"], "--device gpu: "),
        (["generat"], "'generat' is no command; the nearest one is 'generate'"),
        (["run"], "run needs the path of a TOML file"),
        (["run", "missing.toml"], "missing.toml: cannot read this run file"),
        (["bench", "-m", MODEL, "-p", "x"], "'x' is no list of whole numbers"),
        (["bench", "-m", MODEL, "-p", "-1"], r"lengths of prompts must be 0 or more, not \[-1\]"),
        (["bench", "-m", MODEL, "-r", "0", "-n", "1"], "repetitions=0 must be at least 1"),
        (["bench", "-m", MODEL, "--dtype", "float32,int8"], "int8 is none of float32, bfloat16"),
        (["perplexity", "-m", MODEL, "-p", "abc"], "windows of ctx=512 tokens need at least 1024"),
        (["info", "-m", MODEL, "-c", "0"], "ctx=0 must be at least 1"),
    ],
    ids=lambda value: " ".join(value[-2:]).replace(MODEL, "MODEL")[-40:] if isinstance(value, list) else "",
)
def test_bad_input(capfd, argv, message):
    cache = [] if argv[:1] == ["run"] or "--no-compile-cache" in argv or len(argv) < 2 else ["--no-compile-cache"]
    code, out, err = run(capfd, *argv, *cache)
    assert code == 2
    assert re.search(f"^error: .*{message}", err, re.MULTILINE)
    assert "Traceback" not in err
    assert not [line for line in out.splitlines() if not line.startswith("|")]  # bench has begun its table


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("temprature = 1", r"run\.toml: 'temprature' is no argument; the nearest one is 'temperature'"),
        ('command = "info"\nprompt = "a"', r"run\.toml: 'prompt' is no argument; the nearest one is"),
        ('command = "tell"', "'tell' is no command"),
        ("max_tokens = 1.5", r"run\.toml: max_tokens must be of type int"),
        ('dtype = "int8"', r"run\.toml: argument --dtype: invalid choice: 'int8'"),
        ('prompt = "a"\nfile = "b"', "one prompt is needed"),
        ("model =", r"run\.toml: not a TOML file"),
    ],
)
def test_bad_run_file(capfd, tmp_path, text, message):
    path = tmp_path / "run.toml"
    path.write_text(text)
    code, out, err = run(capfd, "run", str(path), *([] if "command" in text else ["--no-compile-cache"]))
    assert (code, out) == (2, "")
    assert re.search(f"^error: .*{message}", err, re.MULTILINE)


def test_help_and_version(capfd):
    for argv, code, text in (
        ([], 2, "usage: jaxinfer"),
        (["--help"], 0, "perplexity"),
        (["chat", "--help"], 0, "--repeat-last-n"),
        (["--version"], 0, "jax"),
    ):
        with pytest.raises(SystemExit) as exit:
            cli.main(argv)
        assert exit.value.code == code
        assert text in capfd.readouterr().out


def test_ctrl_c(capfd, monkeypatch):
    def stream(*args, **options):
        yield jaxinfer.Piece("part", 1)
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "stream", stream)
    code, out, err = run(capfd, *ASK, "-p", TEXT)
    assert (code, out) == (130, "part")
    assert err.endswith("stopped by Ctrl-C\n")


@pytest.fixture(scope="module")
def process(tmp_path_factory):
    """Starts a run that takes long, in a process of its own with a home of its own."""
    home = tmp_path_factory.mktemp("home")
    argv = ["-m", MODEL, "-p", TEXT, "-n", "4000", "--ignore-eos", "--burst", "1", "--no-expand"]

    def start() -> subprocess.Popen[bytes]:
        environment = os.environ | {"HOME": str(home), "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
        pipe = subprocess.PIPE
        command = [sys.executable, "-m", "jaxinfer", *argv]
        return subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe)

    start.home = home
    return start


def test_a_signal_ends_a_run_cleanly_and_leaves_the_compilation_cache(process):
    child = process()
    assert child.stdout.read(1)
    child.send_signal(signal.SIGINT)
    err = child.communicate()[1].decode()
    assert child.returncode == 130
    assert "stopped by Ctrl-C" in err
    assert "Traceback" not in err
    assert any(f.name.startswith("jit_decode") for f in (process.home / ".cache/jaxinfer/xla").iterdir())


def test_a_broken_pipe_is_no_error(process):
    child = process()
    assert child.stdout.read(1)
    child.stdout.close()
    err = child.stderr.read().decode()
    assert child.wait() == 141
    assert "Traceback" not in err
    assert "Broken" not in err


def test_bench_table(capfd):
    argv = ["bench", "-m", MODEL, "-p", "16,0", "-n", "3", "-d", "0,20", "-r", "2", "--burst", "2", "-b", "16,32"]
    code, out, err = run(capfd, *argv, "--no-compile-cache")
    assert code == 0
    head, rule, *rows, empty, build = out.splitlines()
    cells = [[c.strip() for c in row.strip("|").split("|")] for row in (head, *rows)]
    assert cells[0] == ["model", "size", "params", "backend", "chunk", "test", "t/s"]
    assert len({len(line) for line in (head, rule, *rows)}) == 1
    tests = ["pp16", "tg3", "pp16 @ d20", "tg3 @ d20"]
    assert [row[4:6] for row in cells[1:]] == [[chunk, test] for chunk in ("16", "32") for test in tests]
    assert {tuple(row[:4]) for row in cells[1:]} == {("qwen3 F32", "0.56 MiB", "0.15 M", "CPU")}
    for row in cells[1:]:
        rate, deviation = map(float, row[-1].split(" ± "))
        assert rate > 0 <= deviation
    assert empty == ""
    assert re.fullmatch(r"build: jaxinfer [\d.]+, jax [\d.]+; device: cpu", build)
    assert "loaded" in err
    assert "first run of pp16 @ d20, compiling included: " in err


@pytest.mark.parametrize("form", ["csv", "json", "jsonl"])
def test_bench_forms(capfd, form):
    argv = ["bench", "-m", MODEL, "-p", "16", "-n", "3", "-r", "2", "--burst", "2", "-b", "16", "-o", form]
    code, out, _ = run(capfd, *argv, "--no-compile-cache")
    assert code == 0
    match form:
        case "csv":
            rows = list(csv.DictReader(io.StringIO(out)))
        case "json":
            rows = json.loads(out)
        case _:
            rows = [json.loads(line) for line in out.splitlines()]
    assert [(row["test"], int(row["n_prompt"]), int(row["n_gen"])) for row in rows] == [("pp16", 16, 0), ("tg3", 0, 3)]
    for row, tokens in zip(rows, (16, 3), strict=True):
        assert int(row["model_n_params"]) == 148096
        if form != "csv":
            assert [tokens / (ns / 1e9) for ns in row["samples_ns"]] == pytest.approx(row["samples_ts"], rel=1e-5)  # ns
            assert sum(row["samples_ts"]) / 2 == pytest.approx(row["avg_ts"])


def test_bench_cuts_prompts_and_answers_into_calls(monkeypatch, loaded):
    """The tokens of the depth once, then the test again and again at the same positions, never past them."""
    calls = []
    prefill, decode = bench.engine.prefill, bench.engine.decode

    def counting_prefill(model, params, tokens, pos, cache, *, chunk):
        calls.append(("prefill", chunk, int(pos.max())))
        return prefill(model, params, tokens, pos, cache, chunk=chunk)

    def counting_decode(model, params, state, keys, stops, limit, *, sampler, room):
        calls.append(("decode", int(limit), int(state.pos[0])))
        return decode(model, params, state, keys, stops, limit, sampler=sampler, room=room)

    monkeypatch.setattr(bench.engine, "prefill", counting_prefill)
    monkeypatch.setattr(bench.engine, "decode", counting_decode)
    bench.measure(loaded.model, loaded.params, bench.Test(0, 3, 20), chunk=16, burst=2, repetitions=1)
    assert calls == [("prefill", 16, 3), ("prefill", 16, 19), *[("decode", 2, 20), ("decode", 1, 22)] * 2]
    calls.clear()
    bench.measure(loaded.model, loaded.params, bench.Test(16, 0, 20), chunk=16, burst=2, repetitions=1)
    assert calls == [("prefill", 16, 3), ("prefill", 16, 19), *[("prefill", 16, 35)] * 2]


def test_perplexity(capfd, tmp_path, loaded):
    text = "the sea and the sky are blue, and so is the bird. " * 3
    (tmp_path / "text").write_text(text)
    argv = ["perplexity", "-m", MODEL, "-f", str(tmp_path / "text"), "-c", "32", "--no-compile-cache"]
    code, out, _ = run(capfd, *argv)
    assert code == 0
    windows = len(loaded.tokenizer.encode(text)) // 32
    running, final = out.splitlines()
    assert re.fullmatch("".join(rf"\[{i}\]\d+\.\d{{4}}," for i in range(1, windows + 1)), running)
    assert re.fullmatch(r"Final estimate: PPL = \d+\.\d{4} \+/- \d+\.\d{5}", final)
    assert final.split()[4] == running.split("]")[-1].rstrip(",")


def test_info(capfd, chatty):
    code, out, err = run(capfd, "info", "-m", MODEL, "-c", "256")
    assert (code, err) == (0, "")
    facts = dict(line.split(":", 1) for line in out.splitlines())
    facts = {name: fact.strip() for name, fact in facts.items()}
    assert facts["architecture"] == "qwen3 F32"
    assert facts["tensors"] == "35 F32"
    assert facts["parameters"] == "0.15 M"
    assert facts["context"] == "4096 tokens"
    assert facts["layers"] == "3: 3 full"
    assert facts["rope keys"] == "freq_base 1e+06"
    assert facts["tokenizer"] == "gpt2 qwen2, 288 tokens, no chat template"
    # k and v: 3 layers, 2 heads of 32, 256 slots, 4 bytes; positions: 4 bytes for each slot
    size = f"{3 * 256 * (2 * 2 * 32 * 4 + 4) / 2**10:.2f} KiB"
    assert facts["cache"] == f"full: 256 slots, {size}; in all {size} for 256 tokens in chunks of 512"
    assert facts["weights"] == "expanded to float32, on cpu"
    assert facts["activations"] == "float32"
    assert re.fullmatch(
        r"matmul: \w+, attention: \w+, experts: \w+, delta: \w+, votes: \w+, store: \w+, project: \w+, route: \w+, "
        r"scores: \w+",
        facts["ops"],
    )
    out = run(capfd, "info", "-m", chatty, "--no-expand", "--dtype", "bfloat16")[1]
    assert "with chat template" in out
    assert "segments:     1 x 3 (layer bodies compiled: 1, distinct: 1)" in out
    assert "packed as in the file" in out
    assert re.search(r"activations: +bfloat16", out)


def test_progress_takes_few_lines_where_there_is_no_terminal(capfd):
    progress = Terminal().meter("prefilling", "tokens")
    for done in range(1001):
        progress(done, 1000)
    assert capfd.readouterr().err == "prefilling: 0/1000 tokens\n"


LONG = " ".join(f"{word} and {i}" for i, word in enumerate(["sea", "sky", "sand"] * 3))
EVICT = ["--snapkv-keep", "24", "--snapkv-window", "8"]


def test_eviction(capfd, loaded):
    eviction = Eviction(press=Knorm(), keep=24, one_list=True)
    code, out, err = run(capfd, *ASK, "-p", LONG, "--keep", "24", "--press", "knorm", "--one-list")
    assert (code, out) == (0, answer(loaded, LONG, eviction=eviction) + "\n")
    assert re.search(r"Eviction: caches from \d+\.\d to \d+\.\d MB in", err)
    code, out, _ = run(capfd, *ASK, "-p", LONG, *EVICT, "-ct", "bfloat16", "-b", "16")
    eviction = Eviction(press=SnapKV(window=8), keep=24)
    assert out == answer(loaded, LONG, eviction=eviction, cache_dtype="bfloat16", chunk=16) + "\n"
    assert "Eviction" not in run(capfd, *ASK, "-p", LONG, "--keep", "auto")[2]  # a small cache


def test_a_session_goes_on_from_its_file(capfd, tmp_path, loaded):
    first, second = str(tmp_path / "first"), str(tmp_path / "second")
    code, out, err = run(capfd, "prefill", *ASK[:2], OFF, "--no-expand", "-p", LONG, "--save-session", first)
    ids = loaded.tokenizer.encode(LONG, parse_special=True)
    assert (code, out) == (0, "")
    assert f"saved {len(ids)} tokens to {first}" in err
    more = loaded.tokenizer.encode(TEXT, parse_special=True)
    for _ in range(2):  # the file stays as it is
        _, out, err = run(capfd, *ASK, "-p", TEXT, "--session", first, "--save-session", second)
        assert out == answer(loaded, ids + more) + "\n"
    assert f"Prompt: {len(ids) + len(more)} tokens ({len(ids)} of them read before)" in err
    assert len(Session.load(second, loaded.model, loaded.params).tokens[0]) == len(ids) + len(more) + 6


@pytest.mark.usefixtures("templates_here")
def test_a_session_of_messages(capfd, tmp_path, chatty):
    loaded, path = jaxinfer.load(chatty, expand=False), str(tmp_path / "session")
    run(capfd, "prefill", "-m", chatty, OFF, "--no-expand", "-p", LONG, "--save-session", path, *EVICT)
    messages = [{"role": "user", "content": LONG}, {"role": "user", "content": TEXT}]
    argv = ["-m", chatty, *ASK[2:], "-p", TEXT, "--session", path]
    assert run(capfd, *argv)[1] == answer(loaded, messages) + "\n"
    eviction = Eviction(press=SnapKV(window=8), keep=24)
    _, out, err = run(capfd, *argv, *EVICT)
    assert out == answer(loaded, messages, eviction=eviction) + "\n"
    assert "Eviction" in err


def test_ctrl_c_saves_what_was_read(capfd, monkeypatch, tmp_path, loaded):
    def meter(*_):
        def progress(done, total):
            raise KeyboardInterrupt

        return progress

    path = str(tmp_path / "session")
    monkeypatch.setattr(
        cli.Terminal, "meter", lambda self, what, unit="": meter() if unit == "tokens" else lambda *_: 0
    )
    argv = ["prefill", *ASK[:2], OFF, "--no-expand", "-p", LONG, "-b", "16", "--save-session", path]
    code, _, err = run(capfd, *argv)
    read, ids = Session.load(path, loaded.model, loaded.params).tokens[0], loaded.tokenizer.encode(LONG)
    assert code == 130
    assert 0 < len(read) < len(ids)
    assert read == ids[: len(read)]
    assert f"saved {len(read)} tokens" in err


def test_memory_of_a_gpu_that_is_not_there(capfd):
    _, out, _ = run(capfd, "info", *ASK[:2], OFF, "--fit", "1GiB")
    assert "on a GPU with 1.00 GiB fit 4096 tokens, in chunks of 4096:" in out
    assert re.search(r"^peak at 4096 tokens +\d+\.\d\d MiB$", out, re.MULTILINE)
    short = re.search(r"fit (\d+) tokens", run(capfd, "info", *ASK[:2], OFF, "--fit", "8MiB")[1])
    assert short
    assert 0 < int(short[1]) < 4096
    code, _, err = run(capfd, "info", *ASK[:2], OFF, "--fit", "1MB")
    assert code == 2
    assert "not even the shortest context fits" in err


def test_the_context_that_fits(capfd, monkeypatch):
    assert "for 4096 tokens" in run(capfd, "info", *ASK[:2], OFF, "-c", "auto")[1]
    monkeypatch.setattr(cli.memory, "available_bytes", lambda device: 5 * 10**6)
    auto = re.search(r"for (\d+) tokens", run(capfd, "info", *ASK[:2], OFF, "-c", "auto")[1])
    assert auto
    assert 256 <= int(auto[1]) < 4096
    code, _, err = run(capfd, *ASK, "-p", LONG, "-n", "4000")
    assert code == 2
    assert re.search(r"weights .* \+ caches .* \+ workspace .* but there are .*: the largest context that fits is", err)


def test_explain(capfd):
    code, out, err = run(capfd, "explain", *ASK[:2], OFF, "-c", "512")
    assert (code, err) == (0, "")
    assert "attention_blocks" in out


def test_needles(capfd, tmp_path):
    argv = [
        "eval",
        "needle",
        "-m",
        MODEL,
        "--no-compile-cache",
        "--no-expand",
        "--lengths",
        "200",
        "--depths",
        "0.1,0.9",
        "--seeds",
        "1",
    ]
    code, out, _ = run(capfd, *argv, "--keep", "64", "--press", "snapkv,knorm", "--window", "8", "-n", "4")
    assert code == 0
    heads = [line.split("|")[1:4] for line in out.splitlines()]
    assert [[cell.strip() for cell in head] for head in heads[2:]] == [
        ["full", "all", "200"],
        ["snapkv", "64", "200"],
        ["knorm", "64", "200"],
    ]
    path = tmp_path / "run.toml"
    path.write_text(f'command = "eval needle"\nmodel = {json.dumps(MODEL)}\nkeep = [64]\nlengths = [200]\n')
    command, given = arguments.read(["run", str(path), "--depths", "0.5"])
    assert command == "eval needle"
    assert given == {"model": MODEL, "keep": [64], "lengths": [200], "depths": [0.5]}
    assert "the nearest one is 'eval needle'" in run(capfd, "eval", "needles")[2]


def test_perplexity_under_an_eviction(capfd, loaded):
    text = " ".join(map(str, range(60)))
    argv = ["perplexity", *ASK[:2], OFF, "--no-expand", "-p", text, "-c", "64", "-b", "32"]
    plain, evicting = (run(capfd, *argv, *more)[1] for more in ((), EVICT))
    assert re.search(r"Final estimate: PPL = \d+\.\d{4}", plain)
    assert plain != evicting
    assert run(capfd, *argv, "--keep", "64")[1] == plain
