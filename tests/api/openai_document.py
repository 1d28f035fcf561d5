"""Makes openai_requests.json: what OpenAI's published document says of the requests we serve, without its prose.

    python tests/api/openai_document.py openapi.json

openapi.json: of github.com/openai/openai-openapi (MIT licence, copyright OpenAI). Hosted tools and the items of their calls are
left out of /responses: they are nine tenths of it, and refused as a whole.
"""

import json
import sys
from pathlib import Path

OUT = Path(__file__).with_name("openai_requests.json")
REQUESTS = {"/v1/chat/completions": "CreateChatCompletionRequest", "/v1/completions": "CreateCompletionRequest",
            "/v1/responses": "CreateResponse"}  # fmt: skip
PROSE = {"description", "title", "example", "examples", "deprecated"}


def stripped(schema, names=False):
    """names: its keys are the names of properties, none of which is prose."""
    if isinstance(schema, list):
        return [stripped(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    kept = schema if names else {key: v for key, v in schema.items() if key not in PROSE and not key.startswith("x-")}
    return {key: stripped(value, key == "properties" and not names) for key, value in kept.items()}


def references(schema):
    if isinstance(schema, dict):
        own = {schema["$ref"].rpartition("/")[2]} if isinstance(schema.get("$ref"), str) else set()
        return own.union(*(references(value) for value in schema.values()))
    return set().union(*(references(item) for item in schema)) if isinstance(schema, list) else set()


def main() -> None:
    document = json.loads(Path(sys.argv[1]).read_text())
    schemas = {name: stripped(schema) for name, schema in document["components"]["schemas"].items()}
    for name in ("tools", "tool_choice"):
        del schemas["ResponseProperties"]["properties"][name]
    schemas["InputItem"] = {"$ref": "#/components/schemas/EasyInputMessage"}
    wanted, todo = {}, set(REQUESTS.values())
    while todo:
        name = todo.pop()
        wanted[name] = schemas[name]
        todo |= references(schemas[name]) - wanted.keys()
    paths = {}
    for path, name in REQUESTS.items():
        body = {"application/json": {"schema": {"$ref": f"#/components/schemas/{name}"}}}
        paths[path] = {"post": {"requestBody": {"required": True, "content": body},
                                "responses": {"default": {"description": "any"}}}}  # fmt: skip
    info = {"title": "From OpenAI's API document", **{key: document["info"][key] for key in ("version", "license")}}
    lines = ",\n".join(f'"{name}": {json.dumps(wanted[name], separators=(",", ":"))}' for name in sorted(wanted))
    head = json.dumps({"openapi": "3.1.0", "info": info, "paths": paths})
    OUT.write_text(f'{head[:-1]}, "components": {{"schemas": {{\n{lines}\n}}}}}}\n')
    print(f"{OUT.name}: {len(wanted)} schemas, {OUT.stat().st_size} bytes")


if __name__ == "__main__":
    main()
