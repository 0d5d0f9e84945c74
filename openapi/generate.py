"""Writes openapi.yaml from the operations and the types that the routes read and write: `python openapi/generate.py`.

With `--check` it writes nothing and fails where the file is stale.
"""

import argparse
import http
import importlib.metadata
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import yaml
from operations import OPERATIONS, ErrorAnswer, Operation

Json = dict[str, Any]

TARGET = Path(__file__).with_name("openapi.yaml")
HEADER = "# Made by openapi/generate.py from the gateway's types; a test fails when it is stale.\n"
REF = "#/components/schemas/{name}"
DESCRIPTION = (
    "One base model and its LoRA adapters behind OpenAI's API. `model` names the base (`llama`), an adapter "
    "(`llama:sql`), or an adapter by its bare name (`sql`)."
)
SECURITY: Json = {
    "apiKey": {"type": "http", "scheme": "bearer", "description": "Wanted where the server has an --api-key."},
    "adminKey": {
        "type": "http",
        "scheme": "bearer",
        "description": "The --admin-api-key. Without one, only clients on the server's machine are answered.",
    },
}
REQUEST_ID: Json = {"description": "The request's id: the client's own where it is sane.", "schema": {"type": "string"}}


def document() -> Json:
    """The whole specification."""
    _, components = msgspec.json.schema_components(list(_types()), ref_template=REF)
    paths: Json = {}
    for operation in OPERATIONS:
        paths.setdefault(operation.path, {})[operation.method] = _operation(operation)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "loramux",
            "version": importlib.metadata.version("loramux"),
            "description": DESCRIPTION,
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "servers": [{"url": "http://127.0.0.1:30000"}],
        "paths": paths,
        "components": {
            "schemas": dict(sorted(components.items())),
            "headers": {"RequestId": REQUEST_ID},
            "securitySchemes": SECURITY,
        },
    }


def _types() -> Iterator[Any]:
    yield ErrorAnswer
    for operation in OPERATIONS:
        request = None if operation.files else operation.request  # forms are written out
        parts = (request, operation.answer, operation.event, operation.failure)
        yield from (part for part in parts if part is not None)


def _operation(operation: Operation) -> Json:
    made: Json = {"operationId": operation.id, "tags": [operation.tag], "summary": operation.summary}
    if names := re.findall(r"{(\w+)}", operation.path):
        made["parameters"] = [
            {"name": name, "in": "path", "required": True, "schema": {"type": "string"}} for name in names
        ]
    if operation.request is not None:
        content = {"application/json": {"schema": _schema(operation.request)}}
        made["requestBody"] = {"required": True, "content": _form(operation) if operation.files else content}
    made["responses"] = {"200": _success(operation), **_failures(operation)}
    made["security"] = [] if operation.security is None else [{}, {operation.security: []}]
    return made


def _form(operation: Operation) -> Json:
    """A form's fields, and its files."""
    (fields,) = msgspec.json.schema(operation.request)["$defs"].values()
    binary = {"type": "string", "format": "binary"}
    properties = fields["properties"] | dict.fromkeys(operation.files, binary)
    schema = fields | {"properties": properties, "required": [*fields["required"], *operation.files]}
    return {"multipart/form-data": {"schema": schema}}


def _success(operation: Operation) -> Json:
    schema = {"type": "string"} if operation.answer is None else _schema(operation.answer)
    content: Json = {operation.media_type: {"schema": schema}}
    if operation.event is not None:
        content["text/event-stream"] = {"schema": _event(operation.event)}
    return _response("Success", content)


def _failures(operation: Operation) -> Json:
    content = {"application/json": {"schema": _schema(operation.failure)}}
    told = {str(status): _response(http.HTTPStatus(status).phrase, content) for status in operation.failures}
    other = {"application/json": {"schema": _schema(ErrorAnswer)}}
    return told | {"default": _response("Any other refusal", other)}


def _response(description: str, content: Json) -> Json:
    return {
        "description": description,
        "headers": {"x-request-id": {"$ref": "#/components/headers/RequestId"}},
        "content": content,
    }


def _event(kind: Any) -> Json:
    """One event of a stream: what it holds is JSON in a string; the last one is `[DONE]`."""
    holds = {"anyOf": [_schema(kind), _schema(ErrorAnswer)]}
    data = {"type": "string", "contentMediaType": "application/json", "contentSchema": holds}
    return {"type": "object", "required": ["data"], "properties": {"data": data, "event": {"type": "string"}}}


def _schema(kind: Any) -> Json:
    (schema,), _ = msgspec.json.schema_components([kind], ref_template=REF)
    return schema


def render() -> str:
    """The file's text."""
    return HEADER + yaml.dump(document(), Dumper=_Plain, sort_keys=False, allow_unicode=True, width=120)


class _Plain(yaml.SafeDumper):
    """Writes equal parts out instead of pointing at each other."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; fail where the file is stale")
    check = parser.parse_args().check
    text = render()
    if not check:
        TARGET.write_text(text, encoding="utf-8")
    elif TARGET.read_text(encoding="utf-8") != text:
        print(f"{TARGET.name} is stale: run `make openapi`", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
