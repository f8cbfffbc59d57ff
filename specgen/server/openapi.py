"""/openapi.json, made of the table of routes and the structs."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import msgspec

from specgen import __version__
from specgen.server.protocol.errors import ErrorAnswer
from specgen.server.routes import Route

_ERRORS = {
    "400": "The request cannot be served as it stands; `param` names the field.",
    "404": "There is no such model.",
    "408": "It took too long.",
    "413": "The body is too large.",
    "415": "The body is no JSON.",
    "429": "Too much at once; Retry-After says when to come again.",
    "500": "Something failed; the log has it under the answer's x-request-id.",
    "503": "Not now.",
}
_REFUSED = {"401": "A key is needed.", "403": "The admin key is needed."}
_TEMPLATE = "#/components/schemas/{name}"


def document(routes: Iterable[Route]) -> bytes:
    """The document as JSON, OpenAPI 3.1."""
    routes = list(routes)
    kinds = [ErrorAnswer, *(kind for r in routes for kind in (r.body, r.answer, r.event) if kind is not None)]
    kinds = list(dict.fromkeys(kinds))
    schemas, components = msgspec.json.schema_components(kinds, ref_template=_TEMPLATE)
    by_kind = dict(zip(kinds, schemas, strict=True))
    paths: dict[str, dict[str, object]] = {}
    for route in routes:
        paths.setdefault(_path(route), {})[route.method.lower()] = _operation(route, by_kind)
    found = {
        "openapi": "3.1.0",
        "info": {"title": "specgen", "version": __version__, "license": {"name": "Apache-2.0"}},
        "paths": paths,
        "components": {
            "schemas": components,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }
    return msgspec.json.encode(found)


def _path(route: Route) -> str:
    """As the document writes it: without what a name in it may match."""
    return re.sub(r"{(\w+):[^}]+}", r"{\1}", route.path)


def _operation(route: Route, schemas: dict[object, Any]) -> dict[str, Any]:
    found: dict[str, object] = {
        "summary": route.summary,
        "operationId": re.sub(r"\W+", "_", f"{route.method.lower()}{_path(route)}").strip("_"),
        "responses": _responses(route, schemas),
    }
    if route.access != "open":
        found["security"] = [{"key": []}]
    if parameters := re.findall(r"{(\w+)}", _path(route)):
        found["parameters"] = [
            {"name": name, "in": "path", "required": True, "schema": {"type": "string"}} for name in parameters
        ]
    if route.body is not None:
        found["requestBody"] = {"required": True, "content": {"application/json": {"schema": schemas[route.body]}}}
    return found


def _responses(route: Route, schemas: dict[object, object]) -> dict[str, object]:
    content: dict[str, object] = {"text/plain": {"schema": {"type": "string"}}}
    if route.answer is not None:
        content = {"application/json": {"schema": schemas[route.answer]}}
    if route.event is not None:
        content["text/event-stream"] = {"schema": {"type": "string"}}
    if route.access == "open":
        return {"200": {"description": route.summary, "content": content}, "503": _described("Not now.", content)}
    error = {"application/json": {"schema": schemas[ErrorAnswer]}}
    failures = {**_REFUSED, **_ERRORS}
    return {
        "200": {"description": route.summary, "content": content},
        **{status: _described(text, error) for status, text in failures.items()},
    }


def _described(text: str, content: dict[str, Any]) -> dict[str, Any]:
    return {"description": text, "content": content}
