"""The kinds of values that a notebook's parameters have, and the words of their error messages."""

from __future__ import annotations

import itertools
import re
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
NAME_WORDS = (
    "letters, digits, '.', '_' or '-' (at most 64, beginning with a letter or digit, no '..')"
)


class Parameters(BaseModel):
    """Base of the notebooks' models: every field required, nothing else allowed, values frozen."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=()
    )


# The checks below raise ValueError without a sentence: it comes from the field's description.


def _plain_name(value: str) -> str:
    if not NAME.fullmatch(value) or ".." in value:
        raise ValueError
    return value


def _no_truth_value(value: Any) -> Any:
    if isinstance(value, bool):  # Python takes True for 1
        raise ValueError
    return value


def _read_list(value: Any) -> Any:
    """A list that arrived as text, as papermill's -p gives it."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            return yaml.safe_load(value)
        except yaml.YAMLError:
            return value  # stays text, which no list field takes
    return value


def _increasing(values: list[int]) -> list[int]:
    if any(a >= b for a, b in itertools.pairwise(values)):
        raise ValueError
    return values


def _distinct(values: list) -> list:
    if len(set(values)) != len(values):
        raise ValueError
    return values


INCREASING = AfterValidator(_increasing)
DISTINCT = AfterValidator(_distinct)
Whole = Annotated[int, BeforeValidator(_no_truth_value)]
Real = Annotated[float, BeforeValidator(_no_truth_value)]
PlainName = Annotated[str, AfterValidator(_plain_name)]


def described(kind: Any, words: str, *checks: Any, **limits: Any) -> Any:
    """A type with its limits and the words that an error message uses for them.

    kind    a type that pydantic reads
    words   what to give instead of a wrong value
    checks  pydantic validators
    limits  those of `pydantic.Field` (ge, gt, lt, min_length)
    """
    return Annotated[kind, Field(description=words, **limits), *checks]


def list_of(kind: Any, words: str, *checks: Any, **limits: Any) -> Any:
    """As `described` (words, checks, limits there), a list of `kind`, which may arrive as text."""
    return described(list[kind], words, BeforeValidator(_read_list), *checks, **limits)


def choice(*names: str) -> Any:
    """One of a few words, the names.

    >>> choice("cpu", "cuda").__metadata__[0].description
    'one of cpu, cuda'
    """
    return described(Literal[names], "one of " + ", ".join(names))


def choices(*names: str, empty: bool = False) -> Any:
    """A list of different words out of a few; `empty` says whether it may have none."""
    words = "a list of different names out of " + ", ".join(names)
    if empty:
        return list_of(Literal[names], words + ", or an empty one", DISTINCT)
    return list_of(Literal[names], words, DISTINCT, min_length=1)


def whole_from(least: int) -> Any:
    """An integer of at least `least`.

    >>> whole_from(2).__metadata__[-1].description
    'an integer of at least 2'
    """
    return described(Whole, f"an integer of at least {least}", ge=least)


Name = described(PlainName, f"a name, as text, of {NAME_WORDS}")
Names = list_of(
    PlainName, f"a list of different run names, each of {NAME_WORDS}, or an empty one", DISTINCT
)
Text = described(str, "text in quotes")
NonEmpty = described(str, "text that is not empty", min_length=1)
Seed = described(Whole, "an integer from 0 to 4294967295", ge=0, le=2**32 - 1)
Natural = whole_from(0)
Count = whole_from(1)
AtLeastTwo = whole_from(2)
Fraction = described(Real, "a number between 0 and 1, both excluded", gt=0, lt=1)
Positive = described(Real, "a number greater than 0", gt=0)
NotNegative = described(Real, "a number of at least 0", ge=0)
Positives = list_of(
    Annotated[Real, Field(gt=0)], "a list of one or more numbers greater than 0", min_length=1
)
Sizes = list_of(
    Annotated[Whole, Field(ge=1)],
    "a strictly increasing list of one or more integers of at least 1",
    INCREASING,
    min_length=1,
)
SizesOrNone = list_of(
    Annotated[Whole, Field(ge=2)],
    "a strictly increasing list of integers of at least 2, or an empty one",
    INCREASING,
)
Device = choice("cpu", "cuda")
