"""Owns the rendering of messages into a prompt, as transformers renders them.

The template comes from the model folder or from the operator, never from a request. It runs in jinja's
immutable sandbox, sees plain JSON values only, and is cut off at a size and at a time. Both are looked at
after each piece of output: a template that loops without output is the operator's to avoid.
"""

import json
import secrets
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path

import jinja2
import jinja2.meta
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import CallBlock, Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from app.core.errors import ConfigurationError, InvalidRequest
from app.text.model_files import read_json_object, read_special_tokens
from app.text.reasoning import FORMS
from app.text.tools import OPEN_TAG, CallForm

MAX_RENDERED_CHARS = 8 * 1024 * 1024
MAX_RENDER_SECONDS = 2.0
_OWN_VARIABLES = frozenset({"messages", "tools", "add_generation_prompt", "continue_final_message", "documents"})
_REASONING = ("reasoning_content", "thinking", "reasoning")


class ChatTemplate:
    """A compiled template. Safe to share: rendering changes nothing in it."""

    def __init__(
        self,
        sources: Mapping[str, str],
        *,
        special_tokens: Mapping[str, str],
        clock: Callable[[], datetime] = datetime.now,
        max_chars: int = MAX_RENDERED_CHARS,
        max_seconds: float = MAX_RENDER_SECONDS,
    ) -> None:
        """`sources` maps names to templates: "default", and perhaps "tool_use" for requests with tools."""
        environment = _environment(clock)
        try:
            self._templates = {name: environment.from_string(source) for name, source in sources.items()}
        except jinja2.TemplateSyntaxError as error:
            raise ConfigurationError(
                f"the chat template does not parse: {error.message} (line {error.lineno}); "
                "give another by --chat-template"
            ) from error
        read = set().union(*(jinja2.meta.find_undeclared_variables(environment.parse(one)) for one in sources.values()))
        self.variables = frozenset(read - _OWN_VARIABLES - set(special_tokens) - set(environment.globals))
        """Names that the templates read and this class does not set: what `allowed` can have an effect by."""
        self.reads_tools = "tools" in read
        """Whether tools that are given to it reach the prompt."""
        is_tagged = any(OPEN_TAG in source for source in sources.values()) or not self.reads_tools
        self.call_form = CallForm.TAGGED if is_tagged else CallForm.BARE
        """How a model of these templates writes its tool calls."""
        self.shows_reasoning = any(one.closing in source for one in FORMS.values() for source in sources.values())
        """Whether it speaks of the tags around a model's reasoning."""
        self.knows_developer = any("developer" in source for source in sources.values())
        """Whether the role `developer` means anything to the templates."""
        self._special_tokens = dict(special_tokens)
        self._max_chars = max_chars
        self._max_seconds = max_seconds

    @classmethod
    def load(cls, model_dir: Path, *, override: Path | None = None) -> "ChatTemplate | None":
        """The operator's file, else chat_template.jinja, else tokenizer_config.json's, else chat_template.json's.

        None where there is none.
        """
        sources = _read_sources(model_dir, override)
        return cls(sources, special_tokens=read_special_tokens(model_dir)) if sources else None

    @classmethod
    def check(cls, file: Path) -> None:
        """Raises ConfigurationError where the operator's file cannot be read or does not parse."""
        cls(_read_sources(file.parent, file), special_tokens={})

    def render(
        self,
        messages: Sequence[Mapping[str, object]],
        /,
        *,
        add_generation_prompt: bool,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, object]] | None = None,
        **allowed: object,
    ) -> str:
        """The prompt for these messages; `allowed` are further variables of the template, JSON values.

        With `continue_final_message` the prompt ends with the last message's content, a string, as in
        transformers: what the template writes behind it is cut off.

        Raises `InvalidRequest` where the template refuses the messages or their prompt is too long.
        """
        if "messages" in allowed:
            raise InvalidRequest("the template argument 'messages' has a field of its own; set it there")
        mark = f"CONTINUE_{secrets.token_hex(16)} " if continue_final_message else ""
        if continue_final_message:
            messages = [*messages[:-1], _with_mark(messages[-1], mark)]
        name = "tool_use" if tools is not None and "tool_use" in self._templates else "default"
        context = {
            **self._special_tokens,
            **allowed,
            "messages": [_as_templates_read(message) for message in messages],
            "tools": tools,
            "add_generation_prompt": add_generation_prompt,
        }
        context.setdefault("documents", None)
        try:
            rendered = self._join(self._templates[name].generate(context))
            return _cut_at_mark(rendered, mark) if continue_final_message else rendered
        except InvalidRequest:
            raise
        except (jinja2.TemplateError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            raise InvalidRequest(
                f"the model's chat template refuses these messages: {error}; change their roles, order or content",
                param="messages",
            ) from error
        except RecursionError as error:
            raise InvalidRequest("the messages are nested too deep for the chat template", param="messages") from error

    def _join(self, pieces: Iterable[str]) -> str:
        """Collect the rendered pieces within the limits."""
        deadline = time.monotonic() + self._max_seconds
        rendered: list[str] = []
        num_chars = 0
        for piece in pieces:
            rendered.append(piece)
            num_chars += len(piece)
            if num_chars > self._max_chars:
                raise InvalidRequest(
                    f"the messages render to more than {self._max_chars} characters; shorten them", param="messages"
                )
            if time.monotonic() > deadline:
                raise InvalidRequest(
                    f"rendering the messages takes more than {self._max_seconds} s; shorten them", param="messages"
                )
        return "".join(rendered)


def _read_sources(model_dir: Path, override: Path | None) -> dict[str, str]:
    path = model_dir / "chat_template.jinja" if override is None else override
    if override is not None or path.exists():
        try:
            return {"default": path.read_text(encoding="utf-8")}
        except (OSError, ValueError) as error:
            raise ConfigurationError(f"cannot read the chat template {path}: {error}") from error
    for name in ("tokenizer_config.json", "chat_template.json"):  # the second is where processors had it
        sources = _named_sources(read_json_object(model_dir / name).get("chat_template"), name)
        if sources:
            return sources
    return {}


def _named_sources(value: object, file: str) -> dict[str, str]:
    """A config holds one template, or a list of {"name", "template"} that must have a default."""
    match value:
        case None:
            return {}
        case str():
            return {"default": value}
        case list():
            named = {item["name"]: item["template"] for item in value if isinstance(item, dict) and "name" in item}
            if isinstance(named.get("default"), str):
                return named
    raise ConfigurationError(f"{file} holds no default chat template; give one by --chat-template")


def _as_templates_read(message: Mapping[str, object]) -> Mapping[str, object]:
    """Without nulls, which templates print as "None", and with reasoning under each name that templates use."""
    given = {name: value for name, value in message.items() if value is not None}
    reasoning = next((given[name] for name in _REASONING if name in given), None)
    return given if reasoning is None else {"thinking": reasoning, **given, "reasoning_content": reasoning}


def _with_mark(message: Mapping[str, object], mark: str) -> dict[str, object]:
    content = message.get("content")
    if not isinstance(content, str):
        raise InvalidRequest("the final message has no text that could be continued", param="messages")
    return {**message, "content": content + mark}


def _cut_at_mark(rendered: str, mark: str) -> str:
    """What stands before the mark. Where the template trimmed the message's end, so is the prompt."""
    place = rendered.rfind(mark.rstrip())
    if place < 0:
        raise InvalidRequest(
            "the model's chat template leaves the final message out, so it cannot be continued", param="messages"
        )
    return rendered[:place] if rendered.startswith(mark, place) else rendered[:place].rstrip()


def _environment(clock: Callable[[], datetime]) -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda format: clock().strftime(format)
    environment.globals["namespace"] = _Namespace
    return environment


class _GenerationTag(Extension):
    """{% generation %} marks what a model is trained on; when rendering, its content stands as it is."""

    tags = {"generation"}  # noqa: RUF012 - jinja's own declaration, read only

    def parse(self, parser: Parser) -> Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        # A call block, as in transformers: names set inside stay inside.
        return CallBlock(self.call_method("_content"), [], [], body).set_lineno(line)

    def _content(self, caller: Callable[[], str]) -> str:
        return caller()


class _Namespace(jinja2.utils.Namespace):
    """jinja's namespace without names that begin with an underscore."""

    def __init__(*args: object, **fields: object) -> None:  # `self` may be a field's name
        self, *rest = args
        attributes = dict(*rest, **fields)
        for name in attributes:
            _refuse_private(name)
        jinja2.utils.Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: object) -> None:
        _refuse_private(name)
        super().__setitem__(name, value)


def _refuse_private(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a chat template may not set {name!r} on a namespace")


def _tojson(
    value: object,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """jinja's own filter would escape HTML characters, which models were not trained on."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> str:
    raise jinja2.TemplateError(message)
