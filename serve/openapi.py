"""The OpenAPI document of one space's replica: entities, columns and vector lengths are those that the spec declares."""

from __future__ import annotations

from typing import Any

from crossrep.spec import MAX_KEY_BYTES, Column, Space

Schema = dict[str, Any]

_TIME: Schema = {"type": ["number", "null"], "description": "seconds since 1970; null: never"}
_COUNT: Schema = {"type": "integer", "minimum": 0, "description": "events folded"}
# An id has up to 64 bytes of UTF-8, which JSON Schema cannot say: up to 16 characters whatever they are, or 64 of ASCII.
_ID: Schema = {
    "anyOf": [
        {"type": "string", "minLength": 1, "maxLength": MAX_KEY_BYTES // 4},
        {"type": "string", "pattern": f"^[ -~]{{1,{MAX_KEY_BYTES}}}$"},
    ]
}
_ERROR = {"type": "object", "properties": {"error": {"type": "string"}, "fix": {"type": "string"}}, "required": ["error", "fix"]}
_LAG: Schema = {
    "type": "object",
    "description": "how far the replica is behind the topic",
    "properties": {
        "records": {"type": "integer", "minimum": 0, "description": "not yet applied"},
        "seconds": {
            "type": ["number", "null"],
            "description": "whatever was visible longer ago than this is in the answer; null: not yet known",
        },
    },
    "required": ["records", "seconds"],
}
_SAID: dict[str, Schema] = {
    "space": {"type": "string"},
    "hash": {"type": "string", "description": "of the spec"},
    "entity": {"type": "string"},
    "lag": {"$ref": "#/components/schemas/Lag"},
}


def document(space: Space, max_keys: int, max_nearest: int, secured: bool) -> Schema:
    """OpenAPI 3.1.

    Args:
        max_keys: of a batch.
        max_nearest: the greatest k.
        secured: look-ups need a bearer token.
    """
    paths: dict[str, Schema] = {
        "/healthz": {"get": _get("healthz", "Is the process alive?", {"200": _json("it is", {"type": "object"})}, open=True)},
        "/ready": {
            "get": _get(
                "ready",
                "Has it caught up, and how far is it behind?",
                {"200": _json("it answers", {"type": "object"}), "503": _json("not yet, or no more", {"type": "object"})},
                open=True,
            )
        },
        "/metrics": {
            "get": _get(
                "metrics", "For Prometheus", {"200": {"description": "text", "content": {"text/plain": {"schema": {"type": "string"}}}}}
            )
        },
        "/openapi.json": {"get": _get("openapi", "This document", {"200": _json("it", {"type": "object"})})},
        "/v1/status": {"get": _get("status", "What the page at / shows: the flow as it is now", {"200": _json("it", {"type": "object"})})},
        "/v1/space": {
            "get": _get("space", "What is served: the spec, and the lag of every entity", {"200": _json("it", {"type": "object"})})
        },
    }
    for entity, declared in space.entities.items():
        paths |= _of_entity(entity, dict(declared.columns), max_keys, max_nearest)
    security: Schema = {"security": [{"token": []}]} if secured else {}
    schemes = {"securitySchemes": {"token": {"type": "http", "scheme": "bearer"}}} if secured else {}
    if secured:
        for path in paths.values():
            for operation in path.values():
                if "security" not in operation:
                    operation["responses"]["401"] = _error("no valid token")
    return {
        "openapi": "3.1.0",
        "info": {"title": f"crossrep: {space.name}", "version": space.hash.hex(), "description": "Representations, as of now. Read-only."},
        "paths": paths,
        "components": {"schemas": {"Error": _ERROR, "Lag": _LAG}, **schemes},
        **security,
    }


def _of_entity(entity: str, columns: dict[str, Column], max_keys: int, max_nearest: int) -> dict[str, Schema]:
    names = {"type": "array", "items": {"type": "string", "enum": list(columns)}}
    at: Schema = {"type": "number", "description": "decay weights to this time, seconds since 1970; default the stream's own time"}
    id: Schema = {"name": "id", "in": "path", "required": True, "schema": _ID}
    options: list[Schema] = [
        {"name": "at", "in": "query", "schema": at},
        {"name": "columns", "in": "query", "style": "form", "explode": False, "schema": {**names, "minItems": 1}},
    ]
    body = {
        "type": "object",
        "properties": {
            "ids": {"type": "array", "items": _ID, "description": f"{max_keys} at most, or 413"},
            "at": at,
            "columns": names,
        },
        "required": ["ids"],
        "additionalProperties": False,
    }
    errors = {"400": _error("the request is wrong"), "503": _unavailable()}
    unknown = {"404": _error("no such key")}
    lookup = f"Look up one {entity}"
    batch = f"Look up many {entity}s; `found` says which exist, the others' vectors, weights and counts are 0"
    paths: dict[str, Schema] = {
        f"/v1/{entity}/{{id}}": {
            "get": _get(f"{entity}_point", lookup, {"200": _answer(_point(columns)), **errors, **unknown}, [id, *options])
        },
        f"/v1/{entity}/batch": {
            "post": {
                "operationId": f"{entity}_batch",
                "summary": batch,
                "requestBody": {"required": True, "content": {"application/json": {"schema": body}}},
                "responses": {"200": _answer(_batch(columns)), **errors, "413": _error("too many keys, or too large a body")},
            }
        },
    }
    vectors = [name for name, column in columns.items() if column.dim]
    if vectors:
        parameters: list[Schema] = [
            id,
            {"name": "column", "in": "query", "schema": {"type": "string", "enum": vectors, "default": vectors[0]}},
            {"name": "k", "in": "query", "schema": {"type": "integer", "minimum": 1, "maximum": max_nearest, "default": 10}},
        ]
        found = {"200": _json("greatest cosine first", _nearest(vectors)), **errors, **unknown}
        paths[f"/v1/{entity}/{{id}}/nearest"] = {"get": _get(f"{entity}_nearest", f"The nearest {entity}s by cosine", found, parameters)}
    return paths


def _get(name: str, summary: str, responses: Schema, parameters: list[Schema] | None = None, open: bool = False) -> Schema:
    operation: Schema = {"operationId": name, "summary": summary, "responses": responses}
    return operation | ({"parameters": parameters} if parameters else {}) | ({"security": []} if open else {})


def _point(columns: dict[str, Column]) -> Schema:
    said = {**_SAID, "at": {"type": ["number", "null"]}, "id": {"type": "string"}, "count": _COUNT, "event_time": _TIME}
    return _whole({**said, "columns": _columns(columns, many=False)})


def _batch(columns: dict[str, Column]) -> Schema:
    many = {"found": _list({"type": "boolean"}), "count": _list(_COUNT), "event_time": _list(_TIME)}
    return _whole({**_SAID, "at": {"type": ["number", "null"]}, **many, "columns": _columns(columns, many=True)})


def _nearest(vectors: list[str]) -> Schema:
    pair = _whole({"id": {"type": "string"}, "cosine": {"type": "number"}})
    return _whole({**_SAID, "id": {"type": "string"}, "column": {"type": "string", "enum": vectors}, "nearest": _list(pair)})


def _columns(columns: dict[str, Column], many: bool) -> Schema:
    described = {}
    for name, column in columns.items():
        vector = {"type": "array", "items": {"type": "number"}, "minItems": column.dim, "maxItems": column.dim}
        values = {"vector": vector} if column.dim else {}
        weight = {"type": "number", "minimum": 0, "description": "decayed to `at`: how much evidence is left"}
        values |= ({"weight": weight} if column.half_life is not None else {}) | {"time": _TIME}
        described[name] = _whole({field: _list(schema) for field, schema in values.items()} if many else values)
    return {"type": "object", "properties": described}


def _whole(properties: dict[str, Schema]) -> Schema:
    return {"type": "object", "properties": properties, "required": list(properties)}


def _list(schema: Schema) -> Schema:
    return {"type": "array", "items": schema}


def _json(description: str, schema: Schema) -> Schema:
    return {"description": description, "content": {"application/json": {"schema": schema}}}


def _answer(schema: Schema) -> Schema:
    binary = {"schema": {"type": "string", "format": "binary"}}
    return {"description": "what is known", "content": {"application/json": {"schema": schema}, "application/x-safetensors": binary}}


def _error(description: str) -> Schema:
    return _json(description, {"$ref": "#/components/schemas/Error"})


def _unavailable() -> Schema:
    header = {"Retry-After": {"description": "seconds", "schema": {"type": "integer"}}}
    return {**_error("not caught up, or overloaded; ask another replica"), "headers": header}
