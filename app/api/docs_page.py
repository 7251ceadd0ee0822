"""The OpenAPI document as one page of HTML without scripts."""

import json
from collections.abc import Iterator, Mapping
from html import escape
from typing import Any

Json = Mapping[str, Any]

STYLE = """
:root{color-scheme:light dark}
body{font:15px/1.5 system-ui,sans-serif;max-width:62rem;margin:0 auto;padding:1.5rem}
code,pre{font:13px/1.5 ui-monospace,monospace}
pre{padding:.8rem;overflow:auto;background:light-dark(#f3f4f6,#1f2430);border-radius:6px}
details{border:1px solid light-dark(#d5d9e0,#3a4150);border-radius:6px;margin:.6rem 0;padding:.2rem .9rem}
summary{cursor:pointer;padding:.5rem 0}
summary b{display:inline-block;min-width:4rem}
table{border-collapse:collapse;width:100%}
td,th{text-align:left;vertical-align:top;padding:.25rem .8rem .25rem 0;border-top:1px solid light-dark(#e3e6eb,#303644)}
td:first-child{white-space:nowrap}
"""

_HEAD = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>Headwater API</title><style>{style}</style></head><body>
<h1>Headwater API {version}</h1>
<p>OpenAI's clients work with the base URL <code>/v1</code> of this server. The same for machines:
<a href="openapi.json">openapi.json</a>. In the examples <code>$URL</code> is this server's address; where it has
keys, add <code>-H "Authorization: Bearer $KEY"</code>.</p>
"""


def render_page(document: Json) -> str:
    """The page."""
    parts = [_HEAD.format(style=STYLE, version=escape(str(document["info"]["version"])))]
    tag = None
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            if operation["tags"][0] != tag:
                tag = operation["tags"][0]
                parts.append(f"<h2>{escape(tag)}</h2>")
            parts.extend(_operation(path, method, operation, document))
    parts.append("<h2>Objects</h2>")
    for name, schema in document["components"]["schemas"].items():
        parts.append(f'<details id="{escape(name)}"><summary><code>{escape(name)}</code></summary>')
        parts.append(f"<p>{_text(schema.get('description', ''))}</p>{_fields(schema)}</details>")
    parts.append("</body></html>\n")
    return "\n".join(parts)


def _operation(path: str, method: str, operation: Json, document: Json) -> Iterator[str]:
    described = operation.get("description", operation["summary"])
    identity = escape(operation["operationId"])
    yield f'<details id="{identity}"><summary><b>{method.upper()}</b> <code>{escape(path)}</code> '
    yield f"{_text(described.partition(chr(10))[0])}</summary>"
    body = operation.get("requestBody", {}).get("content", {}).get("application/json", {})
    for name, example in body.get("examples", {}).items():
        value = json.dumps(example["value"], ensure_ascii=False).replace("'", "'\\''")
        command = f"curl \"$URL{path}\" -H 'content-type: application/json' \\\n  -d '{value}'"
        yield f"<p>{_text(name.replace('_', ' '))}</p><pre>{escape(command)}</pre>"
    if "$ref" in body.get("schema", {}):
        name = body["schema"]["$ref"].rpartition("/")[2]
        yield f"<h3>Fields</h3>{_fields(document['components']['schemas'][name])}"
    yield "<h3>Answers</h3><table>"
    for status, response in operation["responses"].items():
        kinds = [_type(content["schema"]) for content in response.get("content", {}).values() if "schema" in content]
        yield f"<tr><td>{escape(status)}</td><td>{_text(response['description'])}</td><td>{', '.join(kinds)}</td></tr>"
    yield "</table></details>"


def _fields(schema: Json) -> str:
    required = set(schema.get("required", ()))
    rows = [
        f"<tr><td><code>{escape(name)}</code>{' *' if name in required else ''}</td><td>{_type(one)}</td>"
        f"<td>{_text(one.get('description', ''))}</td></tr>"
        for name, one in schema.get("properties", {}).items()
    ]
    return f"<table>{''.join(rows)}</table>" if rows else ""


def _type(schema: Json) -> str:
    """A schema in a few words, as HTML."""
    if "$ref" in schema:
        name = escape(schema["$ref"].rpartition("/")[2])
        return f'<a href="#{name}">{name}</a>'
    for union in ("anyOf", "oneOf"):
        if union in schema:
            kinds = [_type(one) for one in schema[union] if one.get("type") != "null"]
            return " or ".join(kinds)
    if "enum" in schema:
        return ", ".join(f"<code>{escape(json.dumps(one))}</code>" for one in schema["enum"])
    kind = schema.get("type", "anything")
    if kind == "array" and isinstance(schema.get("items"), dict):
        return f"list of {_type(schema['items'])}"
    if kind == "object" and isinstance(schema.get("additionalProperties"), dict):
        return f"object of {_type(schema['additionalProperties'])}"
    return escape(" or ".join(kind) if isinstance(kind, list) else kind)


def _text(text: str) -> str:
    """Prose with `code` in backticks."""
    parts = escape(text).split("`")
    return "".join(f"<code>{part}</code>" if index % 2 else part for index, part in enumerate(parts))
