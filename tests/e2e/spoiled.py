"""Wrong values for every field of a request, derived from its msgspec type: of another JSON type, or out of range."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import msgspec
from msgspec import inspect as types

OF_KIND: dict[str, Any] = {"string": "x", "integer": 3, "number": 1.5, "boolean": True, "array": [], "object": {}}
SAFE_INTEGERS = 2**63


@dataclass(frozen=True)
class Wrong:
    """One body that must be refused, and the field that is to blame."""

    field: str  # of the body itself
    path: str
    body: dict[str, Any]


def wrong_bodies(kind: type[msgspec.Struct], good: dict[str, Any]) -> Iterator[Wrong]:
    """`good` is a body that is accepted; each result differs from it in one place."""
    info = types.type_info(kind)
    assert isinstance(info, types.StructType)
    for field in info.fields:
        if field.required:
            body = {name: value for name, value in good.items() if name != field.encode_name}
            yield Wrong(field.encode_name, f"{field.encode_name} missing", body)
        for path, value in wrong_values(field.type):
            where = f"{field.encode_name}{path}"
            yield Wrong(field.encode_name, f"{where} = {str(value)[:40]}", good | {field.encode_name: value})


def wrong_values(kind: types.Type) -> Iterator[tuple[str, Any]]:
    """(where below the field, a value that the type refuses)."""
    allowed = set().union(*(_kinds(member) for member in _members(kind)))
    yield from (("", value) for name, value in OF_KIND.items() if name not in allowed)
    for member in _members(kind):
        yield from _wrong_inside(member)


def example(kind: types.Type) -> Any:
    """A value that the type accepts."""
    match _members(kind)[0]:
        case types.StructType() as struct:
            return _struct(struct)
        case types.LiteralType(values=values):
            return values[0]
        case member:
            return OF_KIND[min(_kinds(member))]


def _members(kind: types.Type) -> tuple[types.Type, ...]:
    match kind:
        case types.UnionType(types=members):
            return tuple(member for member in members if not isinstance(member, types.NoneType)) or (kind,)
        case types.Metadata(type=inner):
            return _members(inner)
        case _:
            return (kind,)


def _kinds(kind: types.Type) -> set[str]:
    match kind:
        case types.AnyType():
            return set(OF_KIND)
        case types.StrType() | types.LiteralType():
            return {"string"}
        case types.IntType():
            return {"integer"}
        case types.FloatType():
            return {"integer", "number"}
        case types.BoolType():
            return {"boolean"}
        case types.ListType():
            return {"array"}
        case types.DictType() | types.StructType():
            return {"object"}
        case types.NoneType():
            return set()
        case _:
            raise AssertionError(f"a type that no test knows: {kind}")


def _wrong_inside(kind: types.Type) -> Iterator[tuple[str, Any]]:
    match kind:
        case types.StructType():
            yield from _wrong_fields(kind)
        case types.ListType(item_type=item, min_length=least, max_length=most):
            yield from ((f"[0]{path}", [value]) for path, value in wrong_values(item))
            if least:
                yield " too short", []
            if most is not None:
                yield " too long", [example(item)] * (most + 1)
        case types.DictType(value_type=value_type):
            yield from ((f".1{path}", {"1": value}) for path, value in wrong_values(value_type))
        case types.IntType() | types.FloatType():
            yield from _out_of_range(kind)
        case types.StrType(min_length=least, max_length=most):
            yield from ((" empty", "") for _ in range(1 if least else 0))
            yield from ((" too long", "x" * (length + 1)) for length in (most,) if length is not None)
        case types.LiteralType():
            yield " unknown", "no such value"
        case _:
            pass


def _wrong_fields(struct: types.StructType) -> Iterator[tuple[str, Any]]:
    good = _struct(struct)
    yield ".unknown", good | {"unknown": 1}
    for field in struct.fields:
        yield from (
            (f".{field.encode_name}{path}", good | {field.encode_name: value})
            for path, value in wrong_values(field.type)
        )


def _out_of_range(kind: types.IntType | types.FloatType) -> Iterator[tuple[str, Any]]:
    if kind.ge is not None:
        yield " too small", kind.ge - 1
    if kind.gt is not None:
        yield " too small", kind.gt
    if kind.le is not None:
        yield " too large", kind.le + 1


def _struct(struct: types.StructType) -> dict[str, Any]:
    fields = {field.encode_name: example(field.type) for field in struct.fields if field.required}
    return fields if struct.tag_field is None else {struct.tag_field: struct.tag} | fields
