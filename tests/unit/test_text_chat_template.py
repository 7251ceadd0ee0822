"""app.text.chat_template renders what transformers renders, within its limits."""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from itertools import product
from pathlib import Path

import pytest
import tokenizers
from tokenizers import models

from app.core.errors import ConfigurationError, InvalidRequest
from app.text import ChatTemplate
from app.text.tools import CallForm
from tests.store_models import default_model_folder

transformers = pytest.importorskip("transformers")

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}

SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n"
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = """{{- bos_token }}
{%- if custom_tools is defined %}
    {%- set tools = custom_tools %}
{%- endif %}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%Y") %}
    {%- else %}
        {%- set date_string = "26 Jul 2024" %}
    {%- endif %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{{- "Today Date: " + date_string + "\\n\\n" }}
{%- if tools is not none %}
    {%- for t in tools %}
        {{- t | tojson(indent=4) }}
        {{- "\\n\\n" }}
    {%- endfor %}
{%- endif %}
{{- system_message }}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
        {{- message['content'] | trim + '<|eot_id|>' }}
    {%- elif 'tool_calls' in message %}
        {%- if not message.tool_calls|length == 1 %}
            {{- raise_exception("This model only supports single tool-calls at once!") }}
        {%- endif %}
        {%- set tool_call = message.tool_calls[0].function %}
        {{- '{"name": "' + tool_call.name + '", "parameters": ' }}
        {{- tool_call.arguments | tojson }}
        {{- "}" }}
    {%- else %}
        {{- "<|start_header_id|>ipython<|end_header_id|>\\n\\n" }}
        {%- if message.content is mapping or message.content is iterable %}
            {{- message.content | tojson }}
        {%- else %}
            {{- message.content }}
        {%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
QWEN = """{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {{- "# Tools\\n\\n<tools>" }}
    {%- for tool in tools %}
        {{- "\\n" }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- "\\n</tools><|im_end|>\\n" }}
{%- endif %}
{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" and message.content is string %}
        {%- set ns.multi_step_tool = false %}
        {%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == "tool" %}
        {{- '<|im_start|>user\\n<tool_response>\\n' + message.content + '\\n</tool_response><|im_end|>\\n' }}
        {%- continue %}
    {%- endif %}
    {%- if message.reasoning_content is string and loop.index0 > ns.last_query_index %}
        {{- '<think>\\n' + message.reasoning_content.strip('\\n') + '\\n</think>\\n\\n' }}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\\n' + (message.content or '') }}
    {%- for tool_call in message.tool_calls or [] %}
        {%- set tool_call = tool_call.function %}
        {{- '\\n<tool_call>\\n{"name": "' ~ tool_call.name ~ '", "arguments": ' ~ tool_call.arguments | tojson ~ '}' }}
    {%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}"""
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}{% set role = message['role'] %}"
    "{% endif %}{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}"
)
MISTRAL = """{{ bos_token }}
  {% for message in messages %}
    {% if loop.index0 > 50 %}{% break %}{% endif %}
    {%- if message.role == 'user' %}
[INST] {{ message.content }} [/INST]
    {%- elif message.role == 'assistant' %}
      {% generation %}{{ message.content }}{{ eos_token }}{% endgeneration %}

    {%- endif %}
  {# a comment #}
  {% endfor %}
{{ documents is none }} {{ missing }} {{ dict(a=1) | tojson(separators=(',', ':')) }}
"""
TEMPLATES = {"smollm2": SMOLLM2, "llama3": LLAMA3, "qwen": QWEN, "gemma": GEMMA, "mistral": MISTRAL}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "Wetter & <b>天气</b> 'now' 😀",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        },
    }
]
CALL = {
    "id": "a",
    "type": "function",
    "function": {"name": "get_weather", "arguments": {"city": "北京", "n": [1, None]}},
}
CONVERSATIONS: dict[str, list[dict[str, object]]] = {
    "one": [{"role": "user", "content": "  你好 <b>&amp;</b> 'quoted' 👩‍👩‍👧‍👦\n"}],
    "system": [{"role": "system", "content": " Be brief. "}, {"role": "user", "content": "{{ 7 * 7 }}"}],
    "turns": [
        {"role": "user", "content": "a", "name": None},
        {"role": "assistant", "content": "b", "tool_calls": None},
        {"role": "user", "content": "c"},
    ],
    "tools": [
        {"role": "user", "content": "天气?"},
        {"role": "assistant", "content": "", "tool_calls": [CALL], "reasoning": "\nI look it up.\n"},
        {"role": "tool", "content": "22 °C"},
    ],
}


def _reference(template: str, messages: Sequence[Mapping[str, object]], **options: object) -> str:
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizers.Tokenizer(models.BPE()), **SPECIAL)
    rendered = tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False, **options)
    assert isinstance(rendered, str)
    return rendered


@pytest.mark.parametrize("name", TEMPLATES)
def test_equal_to_transformers(name: str) -> None:
    template = ChatTemplate({"default": TEMPLATES[name]}, special_tokens=SPECIAL)
    for messages, tools, prompt, thinking in product(
        CONVERSATIONS.values(), (None, TOOLS), (True, False), (True, False)
    ):
        options = {"tools": tools, "add_generation_prompt": prompt, "enable_thinking": thinking}
        try:
            expected = _reference(TEMPLATES[name], messages, **options)
        except Exception as error:
            with pytest.raises(InvalidRequest) as refusal:
                template.render(messages, **options)  # type: ignore[arg-type]
            assert str(error) in str(refusal.value)
        else:
            assert template.render(messages, **options) == expected  # type: ignore[arg-type]


def test_the_default_models_own_template() -> None:
    folder = default_model_folder()
    template = ChatTemplate.load(folder.path)
    assert template is not None
    source = (folder.path / "chat_template.jinja").read_text()
    for messages in CONVERSATIONS.values():
        rendered = template.render(messages, add_generation_prompt=True)
        assert rendered == _reference(source, messages, add_generation_prompt=True)


def test_what_is_rendered_is_worth_comparing() -> None:
    """The equality above would hold for two empty strings too."""
    smollm2 = ChatTemplate({"default": SMOLLM2}, special_tokens=SPECIAL)
    assert smollm2.render([{"role": "user", "content": "Hi"}], add_generation_prompt=True) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    qwen = ChatTemplate({"default": QWEN}, special_tokens=SPECIAL)
    rendered = qwen.render(CONVERSATIONS["tools"], add_generation_prompt=False, tools=TOOLS)
    assert "Wetter & <b>天气</b> 'now' 😀" in rendered
    assert "<think>\nI look it up.\n</think>" in rendered
    assert '{"name": "get_weather", "arguments": {"city": "北京", "n": [1, null]}}' in rendered


def test_the_clock_is_the_callers() -> None:
    template = ChatTemplate(
        {"default": "{{ strftime_now('%d %b %Y') }}"}, special_tokens={}, clock=lambda: datetime(2026, 2, 3)
    )
    assert template.render([], add_generation_prompt=False) == "03 Feb 2026"


def _folder(path: Path, chat_template: object, jinja: str | None = None) -> Path:
    (path / "tokenizer_config.json").write_text(json.dumps(SPECIAL | {"chat_template": chat_template}))
    if jinja is not None:
        (path / "chat_template.jinja").write_text(jinja)
    return path


def _render(template: ChatTemplate | None, **options: object) -> str:
    assert template is not None
    return template.render([], add_generation_prompt=False, **options)  # type: ignore[arg-type]


def test_where_templates_come_from(tmp_path: Path) -> None:
    assert ChatTemplate.load(tmp_path) is None
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "a processor's"}))
    assert _render(ChatTemplate.load(tmp_path)) == "a processor's"
    assert _render(ChatTemplate.load(_folder(tmp_path, "one {{ eos_token }}"))) == "one </s>"
    named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "with tools"}]
    template = ChatTemplate.load(_folder(tmp_path, named))
    assert (_render(template), _render(template, tools=[])) == ("plain", "with tools")
    assert _render(ChatTemplate.load(_folder(tmp_path, named, "from the file"))) == "from the file"
    (tmp_path / "mine.jinja").write_text("the operator's")
    assert _render(ChatTemplate.load(tmp_path, override=tmp_path / "mine.jinja")) == "the operator's"


@pytest.mark.parametrize(
    "chat_template", [[{"name": "tool_use", "template": "x"}], [], 7, "{% if %}", "{% nonsense %}"]
)
def test_a_template_that_cannot_serve_is_the_operators_error(tmp_path: Path, chat_template: object) -> None:
    with pytest.raises(ConfigurationError, match="--chat-template"):
        ChatTemplate.load(_folder(tmp_path, chat_template))


def test_a_missing_operators_template_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"none\.jinja"):
        ChatTemplate.load(tmp_path, override=tmp_path / "none.jinja")


@pytest.mark.parametrize(
    ("source", "why"),
    [
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe|not safely"),
        ("{% set ns = namespace(_x=1) %}", "_x"),
        ("{% set ns = namespace() %}{% set ns._x = 1 %}", "_x"),
        ("{% for i in range(999999999) %}{% endfor %}", "Range too big"),
        ("{{ messages[0].content + 1 }}", "str"),
        ("{{ missing.field }}", "undefined"),
        ("{{ 1 / 0 }}", "division"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "too deep"),
    ],
)
def test_the_sandbox_and_errors_of_the_template(source: str, why: str) -> None:
    template = ChatTemplate({"default": source}, special_tokens={})
    with pytest.raises(InvalidRequest, match=why) as refusal:
        template.render([{"role": "user", "content": "x"}], add_generation_prompt=False)
    assert refusal.value.param == "messages"


def test_output_is_bounded_in_size_and_time() -> None:
    loop = "{% for i in range(99999) %}{% for j in range(99999) %}0123456789{% endfor %}{% endfor %}"
    with pytest.raises(InvalidRequest, match="more than 1000 characters"):
        _render(ChatTemplate({"default": loop}, special_tokens={}, max_chars=1000))
    with pytest.raises(InvalidRequest, match=r"takes more than 0\.01 s"):
        _render(ChatTemplate({"default": loop}, special_tokens={}, max_seconds=0.01))


def test_arguments_cannot_replace_the_messages() -> None:
    with pytest.raises(InvalidRequest, match="'messages'"):
        _render(ChatTemplate({"default": ""}, special_tokens={}), messages=[])


@pytest.mark.parametrize("content", ["It is", "It is  ", "你好 🌍", "Line\n\n", " "])
@pytest.mark.parametrize("name", TEMPLATES)
def test_a_final_message_is_continued_as_in_transformers(name: str, content: str) -> None:
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": content}]
    template = ChatTemplate({"default": TEMPLATES[name]}, special_tokens=SPECIAL)
    expected = _reference(TEMPLATES[name], messages, continue_final_message=True)
    assert template.render(messages, add_generation_prompt=False, continue_final_message=True) == expected


def test_only_a_message_with_text_can_be_continued() -> None:
    template = ChatTemplate({"default": "{{ messages[0].content }}"}, special_tokens=SPECIAL)
    for messages in (
        [{"role": "assistant", "content": None}],
        [{"role": "user", "content": "x"}, {"role": "assistant", "content": "never shown"}],
    ):
        with pytest.raises(InvalidRequest):
            template.render(messages, add_generation_prompt=False, continue_final_message=True)


def test_the_variables_that_a_template_reads() -> None:
    source = (
        "{{ bos_token }}{% set ns = namespace(x=1) %}{% for m in messages %}{{ m.role }}{{ loop.index }}{% endfor %}"
        "{% if enable_thinking is defined and tools %}{{ strftime_now(date_format) }}{% endif %}{{ documents }}"
    )
    template = ChatTemplate({"default": source, "tool_use": "{{ of_tools }}"}, special_tokens=SPECIAL)
    assert template.variables == {"enable_thinking", "date_format", "of_tools"}
    assert not template.knows_developer
    assert ChatTemplate({"default": "{{ messages['developer'] }}"}, special_tokens={}).knows_developer


def test_how_a_templates_model_calls_tools() -> None:
    def form(source: str) -> tuple[bool, CallForm]:
        template = ChatTemplate({"default": source}, special_tokens=SPECIAL)
        return template.reads_tools, template.call_form

    assert form(QWEN) == (True, CallForm.TAGGED)
    assert form(LLAMA3) == (True, CallForm.BARE)
    assert form(SMOLLM2) == (False, CallForm.TAGGED)
    assert form("{% set tools = [] %}{{ tools }}") == (False, CallForm.TAGGED)
