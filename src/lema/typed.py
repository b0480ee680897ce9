"""Classes of settings: typed and bounded by pydantic, refused in words for people, and read from what they write.

It knows type hints and how numbers are written; it knows no setting by name.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import typing
from collections.abc import Iterable, Mapping, Sequence
from decimal import Decimal
from numbers import Integral
from numbers import Real as RealNumber
from types import UnionType
from typing import Annotated, Any, TypeVar

from annotated_types import Ge, Gt, Le, Lt
from pydantic import AfterValidator, AllowInfNan, BeforeValidator, ConfigDict, ValidationError, ValidationInfo
from pydantic.dataclasses import dataclass as typed_dataclass
from pydantic.dataclasses import rebuild_dataclass
from typing_extensions import dataclass_transform

from .errors import ConfigError, LemaError
from .json_file import parse_object

C = TypeVar("C", bound=type)

LARGEST = 2**63 - 1
"""What generators take as a seed, and files as a count."""
_TOO_LARGE = "is too large a number: up to 2**63 - 1 is meant"
_BOOLS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
_WORDS = {
    bool: "true or false", int: "a whole number", float: "a number", str: "text", list: "a list of texts",
    dict: "names with values",
}  # fmt: skip
_BOUNDS = {Ge: "{.ge} or more", Gt: "more than {.gt}", Le: "{.le} or less", Lt: "less than {.lt}"}


@dataclasses.dataclass(frozen=True, slots=True)
class Role:
    """What a setting is to a run: stands in its type hint."""

    affects_numerics: bool = True
    """Whether other values give other numbers, beyond the last bits of sums that are cut otherwise."""
    planner_owned: bool = False
    """Whether the memory plan decides where nobody else did."""


SAME_NUMBERS = Role(affects_numerics=False)
PLANNED = Role(affects_numerics=False, planner_owned=True)


@dataclass_transform(field_specifiers=(dataclasses.field,))
def settings(cls: C) -> C:
    """A dataclass whose values are brought to their types where nothing is lost, as 3 to 3.0 and "1e-4" to 0.0001.

    Making one raises `ConfigError` for a value that is refused, and `TypeError` for a name that there is not. A plain
    dataclass below it, whose own `__init__` stores what it is given, has its inherited fields checked all the same.
    """
    checked = getattr(cls, "__post_init__", None)

    def __post_init__(self: Any) -> None:
        if type(self) is not made and not hasattr(type(self).__init__, "__wrapped__"):
            for name, value in vars(made(**{name: getattr(self, name) for name in kinds_of(made)})).items():
                setattr(self, name, value)
        elif checked is not None:
            checked(self)

    typing.cast(Any, cls).__post_init__ = __post_init__
    made: Any = typed_dataclass(config=ConfigDict(strict=True, extra="forbid", defer_build=True))(cls)
    validated = made.__init__

    @functools.wraps(validated)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        named = dict(zip(getattr(cls, "POSITIONAL", kinds_of(cls)), args))
        if len(named) < len(args):
            raise TypeError(
                f"{cls.__name__} takes at most {len(named)} values without names, and was given {len(args)}"
            )
        if twice := named.keys() & kwargs.keys():
            raise TypeError(f"{cls.__name__}: {min(twice)} is given twice")
        if not made.__pydantic_complete__:  # with the first that is made, for importing is to be quick
            rebuild_dataclass(made)
            made.__init__ = __init__
        try:
            validated(self, **named, **kwargs)
        except ValidationError as error:
            raise _refusal(cls, error, {**named, **kwargs}) from None

    made.__init__ = __init__
    return typing.cast(C, made)


def _refusal(cls: type, error: ValidationError, given: Mapping[str, Any]) -> Exception:
    """The first thing wrong with what was given, in words."""
    found: Any = error.errors(include_url=False)[0]
    cause = found.get("ctx", {}).get("error")
    if isinstance(cause, LemaError):
        return cause
    name, kinds = found["loc"][0], kinds_of(cls)
    value = found["input"] if len(found["loc"]) == 1 else given.get(name)
    if name not in kinds or found["type"].startswith("missing"):
        return TypeError(f"{cls.__name__}: {name} is {'missing' if name in kinds else 'no setting of it'}")
    if cause is not None:
        words, value = (*cause.args, value)[:2]
    elif found["type"] == "finite_number":
        words = "must be a finite number"
    elif found["type"].startswith(("greater_than", "less_than")):
        words = f"must be {_bounds(cls, name)}"
    elif value is None:
        return ConfigError(f"{name} must be {_wanted(kinds[name])}, and is empty")
    else:
        words = f"must be {_wanted(kinds[name])}"
    return ConfigError(f"{name}={shortened(value)} {words}")


def _bounds(cls: type, name: str) -> str:
    bounds = [_BOUNDS[type(said)].format(said) for said in _said(_hints(cls)[name]) if type(said) in _BOUNDS]
    return " and ".join(bounds) + (", or none" if type(None) in kinds_of(cls)[name] else "")


def _wanted(kinds: Sequence[Any]) -> str:
    words = [_WORDS.get(typing.get_origin(kind) or kind, "") for kind in kinds if kind is not type(None)]
    found = list(dict.fromkeys(word for word in words if word)) or ["one of its names"]
    return " or ".join(found) + (", or none" if type(None) in kinds else "")


def _number(value: Any) -> Any:
    """An int or a float for any kind of real number, and for a text that says one; anything else as it is."""
    if isinstance(value, bool):
        return value
    try:
        if isinstance(value, str):
            text = value.strip()
            value = int(text) if text.removeprefix("-").isdecimal() else float(text)
        elif isinstance(value, Integral):
            value = int(value)
        elif isinstance(value, RealNumber | Decimal):
            value = float(value)
    except OverflowError:
        raise ValueError(_TOO_LARGE) from None
    except ValueError:
        return value
    if isinstance(value, int) and abs(value) > LARGEST:
        raise ValueError(_TOO_LARGE)
    return value


def _real(value: Any) -> Any:
    value = _number(value)
    if type(value) is int:
        return float(value)
    strange = hasattr(value, "__float__") and not isinstance(value, bool | float)
    return repr(value) if strange else value  # numpy's bools and arrays of one number, which pydantic takes for floats


def whole(value: Any) -> Any:
    """An int for texts and floats that say a whole number; anything else as it is, or as a number."""
    value = _number(value)
    if not isinstance(value, float) or not value.is_integer():
        return value
    if abs(value) > LARGEST:
        raise ValueError(_TOO_LARGE, value)  # as a number, if it was a text
    return int(value)


def as_flag(value: Any) -> Any:
    """True or False for the words that say so; anything else as it is."""
    return _BOOLS.get(value.strip().lower(), value) if isinstance(value, str) else value


def _object(value: Any, info: ValidationInfo) -> Any:
    """Names with values for the JSON of them; anything else as it is."""
    if isinstance(value, str):
        return parse_object(value, f"{info.field_name}={shortened(value)}", ConfigError)
    return value


def _texts(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def check_choice(value: str, choices: Sequence[str], more: str = "") -> None:
    """`ValueError` for a word that is none of these; names the one that is close to it."""
    if value not in choices:
        raise ValueError(f"is unknown: choose one of {', '.join(choices)}{close_to(value, choices)}{more}")


def close_to(word: str, known: Iterable[str]) -> str:
    """Whether a known word was meant, to be said after a refusal; empty where none is like it."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def one_of(*choices: str) -> AfterValidator:
    """For a text that is one of these words."""

    def checked(value: str) -> str:
        check_choice(value, choices)
        return value

    return AfterValidator(checked)


WHOLE, REAL, _FINITE = BeforeValidator(whole), BeforeValidator(_real), AllowInfNan(False)
Whole = Annotated[int, WHOLE]
Amount = Annotated[int, Ge(0), WHOLE]
Count = Annotated[int, Ge(1), WHOLE]
Real = Annotated[float, _FINITE, REAL]
NotNegative = Annotated[float, _FINITE, Ge(0), REAL]
Positive = Annotated[float, _FINITE, Gt(0), REAL]
Share = Annotated[float, _FINITE, Ge(0), Lt(1), REAL]
Flag = Annotated[bool, BeforeValidator(as_flag)]
OBJECT = BeforeValidator(_object)
Texts = Annotated[list[str] | str, BeforeValidator(_texts)]


def kinds_of(cls: Any) -> Mapping[str, tuple[Any, ...]]:
    """The alternatives of every field's type, by name: `int | None` is `(int, NoneType)`; for a dataclass."""
    return _kinds_of(cls)


@functools.cache
def _kinds_of(cls: Any) -> Mapping[str, tuple[Any, ...]]:
    return {name: _alternatives(hint) for name, hint in typing.get_type_hints(cls).items()}


def _alternatives(hint: Any) -> tuple[Any, ...]:
    union = isinstance(hint, UnionType) or typing.get_origin(hint) is typing.Union
    return typing.get_args(hint) if union else (hint,)


def role_of(cls: type, name: str) -> Role:
    """What a field is to a run; for a dataclass."""
    return next((said for said in _said(_hints(cls)[name]) if isinstance(said, Role)), Role())


def fields_with(cls: type, said: Any) -> tuple[str, ...]:
    """Names of the fields in whose type hint this stands; for a dataclass."""
    return tuple(name for name, hint in _hints(cls).items() if said in _said(hint))


@functools.cache
def _hints(cls: Any) -> Mapping[str, Any]:
    return typing.get_type_hints(cls, include_extras=True)


def _said(hint: Any) -> list[Any]:
    """All that a hint says beside its types, and what the alternatives say."""
    inner = [said for part in typing.get_args(hint) for said in _said(part)]
    return [*inner, *getattr(hint, "__metadata__", ())]


def parse_text(text: str, kinds: tuple[Any, ...]) -> Any:
    """What someone typed for a setting: "none", yes and no, whole numbers where text may be too, names with commas
    between them where several may be; other texts are left to the setting's type."""
    if type(None) in kinds and text.lower() in ("none", "null"):
        return None
    if bool in kinds:
        return as_flag(text)
    if int in kinds and str in kinds and text.removeprefix("-").isdecimal():
        return int(text[:4000])  # Python reads no numbers of more than 4,300 digits
    if list[str] in kinds:
        parts = split_names(text)
        return parts if len(parts) > 1 or str not in kinds else text
    return text


def split_names(text: str) -> list[str]:
    """Names with commas between them; commas within brackets of any kind belong to a pattern and split nothing."""
    parts, depth = [""], 0
    for letter in text:
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and depth <= 0:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts if part.strip()]


def shortened(value: Any) -> str:
    """A value for a message, never a page of it."""
    try:
        text = repr(value)
    except ValueError:  # Python writes no numbers of more than 4,300 digits
        return f"a number of {value.bit_length()} bits" if isinstance(value, int) else "a list with such a number"
    return text if len(text) <= 60 else f"{text[:57]}..."
