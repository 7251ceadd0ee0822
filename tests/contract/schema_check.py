"""Whether a JSON value is what a schema of our OpenAPI document says: the part of JSON Schema that it uses."""

import math
import re
from collections.abc import Mapping
from typing import Any

KINDS: dict[str, tuple[type, ...]] = {
    "object": (dict,),
    "array": (list,),
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "null": (type(None),),
}
KNOWN = {
    *("$ref", "anyOf", "oneOf", "enum", "type", "properties", "required", "additionalProperties", "propertyNames"),
    *("items", "prefixItems", "minItems", "maxItems", "minLength", "maxLength", "pattern", "minProperties"),
    *("maxProperties", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"),
    *("title", "description", "default", "x-event-data", "discriminator"),
}


def problems(value: object, schema: Mapping[str, Any], schemas: Mapping[str, Any], *, at: str = "$") -> list[str]:
    """What of `value` the schema forbids; fields that an object's schema does not name count, too."""
    assert set(schema) <= KNOWN, f"{set(schema) - KNOWN} is not checked here"
    if "$ref" in schema:
        return problems(value, schemas[schema["$ref"].rpartition("/")[2]], schemas, at=at)
    for union in ("anyOf", "oneOf"):
        if union in schema:
            each = [problems(value, one, schemas, at=at) for one in schema[union]]
            return [] if [] in each else min(each, key=len)
    if "enum" in schema:
        return [] if value in schema["enum"] else [f"{at}: {value!r} is none of {schema['enum']}"]
    if "type" in schema and not _is_kind(value, schema["type"]):
        return [f"{at}: {value!r} is no {schema['type']}"]
    if isinstance(value, dict):
        return _of_object(value, schema, schemas, at=at)
    if isinstance(value, list):
        items = schema.get("prefixItems", [schema.get("items", {})] * len(value))
        assert schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", math.inf), at
        return [
            problem
            for index, (one, item) in enumerate(zip(value, items, strict=True))
            for problem in problems(one, item, schemas, at=f"{at}[{index}]")
        ]
    if isinstance(value, str) and "pattern" in schema:
        return [] if re.search(schema["pattern"], value) else [f"{at}: {value!r} does not match"]
    return []


def _is_kind(value: object, kinds: str | list[str]) -> bool:
    names = [kinds] if isinstance(kinds, str) else kinds
    return any(isinstance(value, KINDS[name]) and (name == "boolean" or value.__class__ is not bool) for name in names)


def _of_object(value: dict[str, Any], schema: Mapping[str, Any], schemas: Mapping[str, Any], *, at: str) -> list[str]:
    properties, more = schema.get("properties", {}), schema.get("additionalProperties", "properties" not in schema)
    found = [f"{at}.{name} is missing" for name in schema.get("required", ()) if name not in value]
    for name, one in value.items():
        if name in properties:
            found += problems(one, properties[name], schemas, at=f"{at}.{name}")
        elif isinstance(more, Mapping):
            found += problems(one, more, schemas, at=f"{at}.{name}")
        elif not more:
            found.append(f"{at}.{name} is not in the document")
    return found
