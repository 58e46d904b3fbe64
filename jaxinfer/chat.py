"""Chat messages to prompt text through the Jinja2 template of a model file, in the environment that Hugging Face gives.

The template is foreign code, so `render` runs it in Jinja2's immutable sandbox inside a short-lived process whose time,
memory and output are limited. That process runs this very file, which therefore imports nothing else of the package.
Environment: https://huggingface.co/docs/transformers/chat_templating_writing.
"""

import json
import math
import subprocess
import sys
from collections.abc import Sequence
from datetime import datetime
from typing import Any, NamedTuple, NoReturn

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_ERROR = 1000  # characters of a template's own error message that are passed on
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


class Limits(NamedTuple):
    """What one rendering may use. The output may also have `output_factor` characters for each of the request's."""

    wall_s: float = 10.0  # the real templates take milliseconds
    memory_bytes: int = 2**30  # address space of the process; not enforced on macOS, which has no such limit
    template_chars: int = 2**20  # the longest known template has 17,000
    output_chars: int = 2**20
    output_factor: int = 8


def render(
    template: str,
    messages: Sequence[Any],
    *,
    bos_token: str | None,
    eos_token: str | None,
    now: datetime | None = None,
    limits: Limits = Limits(),  # noqa: B008 (immutable)
    **kwargs: Any,
) -> str:
    """The text of a conversation under `template`, which may be hostile.

    messages: dicts with a str under "role"; they and kwargs (`add_generation_prompt`, `tools`, `enable_thinking`, ...)
    are plain data, as JSON has it. A token of None is not defined in the template. now: the local time that the
    template sees, by default the present. Takes about 0.1 s, the start of a process.
    Raises ValueError for messages of another form, for what the template raises, and for a limit exceeded.
    """
    for i, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise ValueError(f"message {i} is not a dict with a str under 'role': {str(message)[:80]}")
    if len(template) > limits.template_chars:
        raise ValueError(f"the chat template has {len(template)} characters; the limit is {limits.template_chars}")
    request = {
        "template": template,
        "messages": list(messages),
        "kwargs": {"bos_token": bos_token, "eos_token": eos_token, **kwargs},
        "now": now and now.isoformat(),
        "limits": limits,
    }
    try:
        data = json.dumps(request).encode()
    except (TypeError, RecursionError) as error:
        raise ValueError(f"chat messages and arguments must be plain data: {error}") from error
    # -P keeps this folder, whose files have names of other modules, off the child's path.
    command = [sys.executable, "-P", __file__]
    try:
        child = subprocess.run(command, input=data, capture_output=True, timeout=limits.wall_s, check=False)
    except subprocess.TimeoutExpired:
        raise ValueError(f"the chat template was stopped after {limits.wall_s} s") from None
    if child.returncode:
        last = child.stderr.decode(errors="replace").strip().rpartition("\n")[2][:MAX_ERROR]
        raise ValueError(f"the chat template broke its process (exit status {child.returncode}): {last}")
    reply = json.loads(child.stdout)
    if "error" in reply:
        raise ValueError(f"the chat template failed: {reply['error']}")
    return reply["text"]


def fill(
    template: jinja2.Template,
    messages: Sequence[Any],
    *,
    bos_token: str | None,
    eos_token: str | None,
    max_chars: float = math.inf,
    **kwargs: Any,
) -> str:
    """The text under a compiled template, in this process and bounded in its length only; raises what it raises."""
    tokens = {"bos_token": bos_token, "eos_token": eos_token}
    variables = {"tools": None, "documents": None, "add_generation_prompt": False}
    variables |= {name: text for name, text in tokens.items() if text is not None} | kwargs
    pieces, size = [], 0
    for piece in template.generate(messages=[_cleaned(m) for m in messages], **variables):
        pieces.append(piece)
        if (size := size + len(piece)) > max_chars:
            raise ValueError(f"the output has more than the allowed {max_chars} characters")
    return "".join(pieces)


def compiled(template: str, now: datetime | None = None) -> jinja2.Template:
    """A template in Jinja2's immutable sandbox, with all that Hugging Face adds to it."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda format: (now or datetime.now()).strftime(format)
    return environment.from_string(template)


def _cleaned(message: dict[str, Any]) -> dict[str, Any]:
    """A message without empty keys, its reasoning under both names that templates read."""
    message = {key: value for key, value in message.items() if value is not None}
    for name in ("reasoning_content", "thinking", "reasoning"):
        if name in message:
            return {"thinking": message[name]} | message | {"reasoning_content": message[name]}
    return message


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` ... `{% endgeneration %}` marks what training counts; here its body just passes through."""

    tags = {"generation"}  # noqa: RUF012 (Jinja2's interface)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as it is, where Jinja2's own filter would escape it for HTML and sort its keys."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _serve() -> None:
    """Runs in the child: one request from stdin, rendered under its limits, one reply to stdout."""
    import resource  # there on Unix only, and needed in the child only

    data = sys.stdin.buffer.read()
    request = json.loads(data)
    limits = Limits(*request["limits"])
    seconds = math.ceil(limits.wall_s)  # of processor time: ends this process should its parent die
    bounds = {resource.RLIMIT_CPU: seconds, resource.RLIMIT_FSIZE: 0, resource.RLIMIT_CORE: 0}
    if sys.platform != "darwin":
        bounds[resource.RLIMIT_AS] = limits.memory_bytes
    for kind, bound in bounds.items():
        hard = resource.getrlimit(kind)[1]  # cannot be raised
        bound = bound if hard == resource.RLIM_INFINITY else min(bound, hard)
        resource.setrlimit(kind, (bound, bound))
    now = request["now"] and datetime.fromisoformat(request["now"])
    max_chars = limits.output_chars + limits.output_factor * len(data)
    try:
        template = compiled(request["template"], now)
        reply = {"text": fill(template, request["messages"], max_chars=max_chars, **request["kwargs"])}
    except Exception as error:  # a template can raise whatever Python can
        reply = {"error": f"{type(error).__name__}: {str(error)[:MAX_ERROR]}"}
    print(json.dumps(reply))


if __name__ == "__main__":
    _serve()
