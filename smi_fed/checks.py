"""One way to refuse a value: the key, what was got and what is allowed.

`checked` makes a frozen dataclass that checks its values by their types, whether it is made in
Python or by `read` from YAML or JSON. The types below say what is allowed.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from functools import wraps
from typing import Annotated, Any, TypeVar, dataclass_transform, get_args

from pydantic import AfterValidator, ConfigDict, Field, GetCoreSchemaHandler, TypeAdapter, ValidationError
from pydantic import dataclasses as checking
from pydantic_core import CoreSchema, ErrorDetails, core_schema

T = TypeVar("T")


class SettingError(ValueError):
    """Settings that cannot be used; the message names key, value and what is allowed.

    Args:
        key, got, allowed: of the first fault.
        more: the other faults.
    """

    def __init__(self, key: str, got: Any, allowed: str, more: Sequence[SettingError] = ()) -> None:
        super().__init__(key, got, allowed, tuple(more))
        self.key, self.got, self.allowed, self.more = key, got, allowed, tuple(more)

    def __str__(self) -> str:
        return "; ".join([f"{self.key}: got {self.got!r}, allowed: {self.allowed}", *map(str, self.more)])

    def under(self, prefix: str) -> SettingError:
        """The same error with `prefix` before its keys."""
        key = ".".join(filter(None, [prefix, self.key]))
        return SettingError(key, self.got, self.allowed, [each.under(prefix) for each in self.more])


def require(ok: bool, key: str, got: Any, allowed: str) -> None:
    """Raise `SettingError` unless `ok`."""
    if not ok:
        raise SettingError(key, got, allowed)


def require_choice(key: str, got: Any, choices: Any) -> None:
    """Raise `SettingError` unless `got` is one of `choices`."""
    names = sorted(str(choice) for choice in choices)
    require(got in choices, key, got, " | ".join(names))


LONGEST_TEXT = 1000
"""Characters of what is told of a stranger's input, which it quotes."""


def printable(text: str, most: int = LONGEST_TEXT) -> str:
    """A stranger's text as it may be logged, printed and written: one line of at most `most` characters.

    What would steer a terminal or turn a line around, and half characters, are spelt out: `\\x1b`, `\\u202e`. Of a
    longer text the middle is left out.
    """
    spelt = [c if c.isprintable() else c.encode("unicode_escape").decode() for c in _ends(text, most)]
    return _ends("".join(spelt), most)


def _ends(text: str, most: int) -> str:
    half = (most - 1) // 2
    return text if len(text) <= most else f"{text[:half]}…{text[-half:]}"


def nearest(key: str, known: Sequence[str]) -> str:
    """Those of the `known` keys that `key` may have been meant for, in words; all where none is near."""
    return " | ".join(get_close_matches(key, known, n=3, cutoff=0.4) or known)


def is_number(value: Any) -> bool:
    """True for a finite int or float; False for bool, NaN and infinities."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < float("inf")


def is_integer(value: Any) -> bool:
    """True for an int that is not a bool."""
    return isinstance(value, int) and not isinstance(value, bool)


@dataclass(frozen=True)
class Allowed:
    """In a type: what is allowed, in the words of the error."""

    text: str

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """One error in our words for whatever is wrong with the value."""
        return core_schema.custom_error_schema(handler(source), "allowed", custom_error_message=self.text)


def one_of(choices: Collection[Any]) -> AfterValidator:
    """In a type: one of `choices`, where they stand in a table; elsewhere a `Literal` does it."""

    def check(value: Any) -> Any:
        require_choice("", value, choices)
        return value

    return AfterValidator(check)


def kinds_of(choice: Any) -> dict[Any, type]:
    """Classes of a union of `checked` classes by their `kind`; none where `choice` is another type."""
    classes = get_args(choice)
    tags = [getattr(each, "__pydantic_fields__", {}).get("kind") for each in classes]
    return {get_args(tag.annotation)[0]: each for tag, each in zip(tags, classes, strict=True) if tag is not None}


@dataclass(frozen=True)
class Choice:
    """In a type: one of a union of `checked` classes, each with a `kind: Literal[...]` of its own.

    The kind alone, as a text, stands for its defaults.
    """

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """By the kind, so that each fault is told of the class that was meant."""
        kinds = kinds_of(source)

        def spell_out(value: Any) -> Any:
            return {"kind": value} if isinstance(value, str) and value in kinds else value

        schema = handler.generate_schema(Annotated[source, Field(discriminator="kind")])
        return core_schema.no_info_before_validator_function(spell_out, schema)


EXACT = Field(lt=2**53)
"""Larger whole numbers do not pass every JSON, Flower's records or torch's seeds."""

Flag = Annotated[bool, Field(strict=True), Allowed("true | false")]
Text = Annotated[str, Field(strict=True), Allowed("a text")]
Device = Annotated[Text, Field(pattern="^(auto|(cpu|cuda)(:[0-9]+)?)$"), Allowed("auto | cpu | cuda | cuda:N")]
Count = Annotated[int, Field(strict=True, ge=1), Allowed("an int >= 1"), EXACT]
Natural = Annotated[int, Field(strict=True, ge=0), Allowed("an int >= 0"), EXACT]
Number = Annotated[float, Field(strict=True, allow_inf_nan=False), Allowed("a finite number")]
Positive = Annotated[float, Field(strict=True, gt=0, allow_inf_nan=False), Allowed("a number > 0")]
NonNegative = Annotated[float, Field(strict=True, ge=0, allow_inf_nan=False), Allowed("a number >= 0")]
Share = Annotated[float, Field(strict=True, gt=0, lt=1), Allowed("a number inside (0, 1)")]
Fraction = Annotated[float, Field(strict=True, ge=0, lt=1), Allowed("a number in [0, 1)")]
Betas = Annotated[tuple[Fraction, Fraction], Allowed("two numbers in [0, 1)")]


@dataclass_transform(frozen_default=True, field_specifiers=(field,))
def checked(cls: type[T]) -> type[T]:
    """Make a frozen dataclass that raises `SettingError` with all faults of its values.

    Lists become tuples and ints floats where the types say so; nothing else is converted. Rules
    that join several fields stand in `__post_init__`, which is called once each field is good.
    """
    kind: Any = checking.dataclass(cls, frozen=True, config=ConfigDict(extra="forbid"))
    init = kind.__init__

    @wraps(init)
    def checking_init(self: Any, *args: Any, **kwargs: Any) -> None:
        try:
            init(self, *args, **kwargs)
        except ValidationError as error:
            raise _refusal(kind, error) from None

    kind.__init__ = checking_init
    return kind


def read(cls: type[T], values: Any) -> T:
    """An instance of a `checked` class from plain containers.

    Raises:
        SettingError: all unknown and missing keys and all values that cannot be, by their paths.
    """
    try:
        return TypeAdapter(cls).validate_python(values)
    except ValidationError as error:
        raise _refusal(cls, error) from None


def _refusal(cls: type, error: ValidationError) -> SettingError:
    first, *more = [_fault(cls, details) for details in error.errors(include_url=False)]
    return SettingError(first.key, first.got, first.allowed, more)


WORDS = {
    "missing": "a value, it has no default", "dataclass_type": "a mapping", "dict_type": "a mapping",
    "tuple_type": "a list",
}  # fmt: skip


def _fault(cls: type, details: ErrorDetails) -> SettingError:
    """One of pydantic's errors in our form."""
    steps, kind, context, got = list(details["loc"]), details["type"], details.get("ctx", {}), details["input"]
    if steps and isinstance(steps[0], int):  # an argument by its place
        names = [each.name for each in fields(cls) if not each.kw_only]  # type: ignore[arg-type]
        steps[0] = dict(enumerate(names)).get(steps[0], str(steps[0]))
    path, place = _place(cls, steps)
    own = context.get("error")
    if isinstance(own, SettingError):
        return own.under(".".join(path[:-1] if path[-1:] == [own.key] else path))
    allowed = WORDS.get(kind) or details["msg"].removeprefix("Input should be ")
    if kind == "missing":
        got = None
    elif kind == "literal_error":
        choices = context["expected"].replace(" or ", ", ").replace("'", "")
        allowed = " | ".join(sorted(choices.split(", ")))
    elif kind == "unexpected_keyword_argument":
        known = [each.name for each in fields(_place(cls, steps[:-1])[1])]
        allowed = f"a key of {'.'.join(path[:-1]) or 'the configuration'}: {nearest(path[-1], known)}"
    elif kinds := kinds_of(place):
        allowed = " | ".join(sorted(kinds))
        if isinstance(got, Mapping):
            path, got = [*path, "kind"], got.get("kind")
    return SettingError(".".join(path) or cls.__name__, got, allowed)


def _place(kind: Any, steps: Sequence[Any]) -> tuple[list[str], Any]:
    """The keys of pydantic's `steps` below `kind`, which has a step more in each choice; and the type there."""
    path = []
    for step in steps:
        if step in kinds_of(kind):
            kind = kinds_of(kind)[step]
            continue
        path.append(str(step))
        known = getattr(kind, "__pydantic_fields__", None)
        kind = (get_args(kind) or (None,))[-1] if known is None else step in known and known[step].annotation
    return path, kind
