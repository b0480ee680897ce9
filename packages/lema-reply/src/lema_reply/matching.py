"""Whether a text gives an expected answer: both in one plain form, the answer's words in a row within the text's.

Words, numbers and units are compared, of any two texts. A text that
mentions the answer and denies it matches too: what is compared is words, not meaning.

The plain form: Unicode NFKD without accents, case folded; articles, punctuation, degree signs, `per` and `about` left
out; numbers by their value, whatever their separators and powers of ten (`1,000` is `1e3`), words up to twenty among
them; units by their symbol (`5 kilometres` is `5 km`); days before months.
"""

from __future__ import annotations

import re
import unicodedata
from decimal import Context, Decimal

_ARTICLE = re.compile(r"\b(?:[Tt]he|THE|[Aa]n|a)\b|(?:^|(?<=[.!?:]\s)|(?<=\n))A(?=\s)")
_POWER = re.compile(r"(?<=\d)[\u207a\u207b\u2070\u00b9\u00b2\u00b3\u2074-\u2079]+")
_NARROW_SPACE = re.compile(r"(?<=\d)[\u00a0\u2009\u202f](?=\d{3}(?!\d))")
_TOKEN = re.compile(
    r"(?P<fraction>\d+/\d+)"
    r"|(?P<number>(?:(?<![\w)])[-+])?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|(?<!\w)\.\d+))"
    r"(?:\s*[x×*·]\s*10\s*\^\s*(?P<power>[-+]?\d{1,4})|e(?P<short>[-+]?\d{1,4})(?!\w)"
    r"|\s+(?P<scale>thousand|million|billion|trillion)(?!\w)|(?:st|nd|rd|th)(?!\w))?"
    r"|(?P<word>%|[^\W\d]\w*[+#]*)"
)
_AFTER_QUOTE = re.compile(r"(?<=[\"'`*)])[.,;]+$")
_COUNTED = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen", "twenty",
)  # fmt: skip
_NUMBERS = {word: str(value) for value, word in enumerate(_COUNTED)}
_SCALES = {"thousand": 3, "million": 6, "billion": 9, "trillion": 12}
_SYMBOLS = {
    "metre": "m", "meter": "m", "kilometre": "km", "kilometer": "km", "centimetre": "cm", "centimeter": "cm",
    "millimetre": "mm", "millimeter": "mm", "gram": "g", "gramme": "g", "kilogram": "kg", "milligram": "mg",
    "litre": "l", "liter": "l", "millilitre": "ml", "milliliter": "ml", "second": "s", "minute": "min", "hour": "h",
    "hr": "h", "mile": "mi", "foot": "ft", "feet": "ft", "yard": "yd", "pound": "lb", "lbs": "lb", "ounce": "oz",
    "kilobyte": "kb", "megabyte": "mb", "gigabyte": "gb", "terabyte": "tb", "celsius": "c", "fahrenheit": "f",
    "kelvin": "k", "percent": "%", "newton": "n", "joule": "j", "watt": "w", "volt": "v", "hertz": "hz",
    "kilohertz": "khz", "megahertz": "mhz", "gigahertz": "ghz", "pascal": "pa", "sec": "s", "inche": "inch",
}  # fmt: skip
_UNITS = {*_SYMBOLS.values()}
_POWERS = {"square": "2", "squared": "2", "cubic": "3", "cubed": "3"}
_WRITTEN_OUT = 40  # digits before or after the point up to which a number is written without a power
_LEFT_OUT = {"per", "degree", "degrees", "about", "approximately", "approx", "around", "roughly", "circa"}
_DAYS = {str(day) for day in range(1, 32)}
_MONTHS = {
    "january", "february", "march", "april", "may", "june", "july", "august", "september", "october", "november",
    "december",
}  # fmt: skip


def matches(expected: str, text: str) -> bool:
    """Whether the expected answer's words stand in a row in the text, both in the plain form."""
    wanted = plain_form(expected)
    if wanted:
        return _contains(plain_form(text), wanted)
    wanted = _tokens(expected)  # nothing but an article
    if wanted:
        return _contains(_tokens(text), wanted)
    sign = "".join(expected.split())
    around = "\"'`*()" if set(sign) <= set(".-") else ".,;\"'`*()"  # a full stop may be part of a sign
    parts = [_AFTER_QUOTE.sub("", part) for part in text.split()]
    return bool(sign) and sign in [part.strip(around) or part for part in parts]


def plain_form(text: str) -> tuple[str, ...]:
    """The text's words and numbers in the form in which they are compared."""
    tokens = _tokens(_ARTICLE.sub(" ", text))
    tokens = tuple(token for token in tokens if token not in _LEFT_OUT)
    return _days_first(_powers_of_units(tokens))


def _tokens(text: str) -> tuple[str, ...]:
    text = _POWER.sub(lambda found: "^" + found[0], _NARROW_SPACE.sub("", text))
    text = re.sub(r"\bper cent\b", "percent", text)
    text = unicodedata.normalize("NFKD", text).replace("\u2212", "-").replace("\u2044", "/")
    text = "".join(letter for letter in text if not unicodedata.combining(letter)).casefold()
    text = re.sub(r"(?<=[^\W\d])\^(?=\d)|['’`]", "", text)
    return tuple(_token(found) for found in _TOKEN.finditer(text))


def _token(found: re.Match[str]) -> str:
    if word := found["word"]:
        word = _NUMBERS.get(word, word)
        return _SYMBOLS.get(word) or _SYMBOLS.get(word.removesuffix("s")) or word
    if found["fraction"]:
        return found["fraction"]
    digits = found["number"].replace(",", "")
    power = found["power"] or found["short"] or _SCALES.get(found["scale"], 0)
    value = Decimal(f"{digits}e{power}").normalize(Context(prec=len(digits))) or Decimal(0)
    return format(value, "f") if abs(value.adjusted()) < _WRITTEN_OUT else str(value)


def _powers_of_units(tokens: tuple[str, ...]) -> tuple[str, ...]:
    """`square m` and `m squared` as `m2`."""
    made: list[str] = []
    for token in tokens:
        if made and token in _UNITS and made[-1] in ("square", "cubic"):
            made[-1] = token + _POWERS[made[-1]]
        elif made and made[-1] in _UNITS and token in ("squared", "cubed"):
            made[-1] += _POWERS[token]
        else:
            made.append(token)
    return tuple(made)


def _days_first(tokens: tuple[str, ...]) -> tuple[str, ...]:
    """`july 20` and `20 of july` as `20 july`."""
    made: list[str] = []
    for i, token in enumerate(tokens):
        before, after = made[-1:], tokens[i + 1 : i + 2]
        if token == "of" and before and before[0] in _DAYS and after and after[0] in _MONTHS:
            continue
        if token in _DAYS and before and before[0] in _MONTHS and not (len(made) > 1 and made[-2] in _DAYS):
            made.insert(len(made) - 1, token)
        else:
            made.append(token)
    return tuple(made)


def _contains(words: tuple[str, ...], wanted: tuple[str, ...]) -> bool:
    return any(words[i : i + len(wanted)] == wanted for i in range(len(words) - len(wanted) + 1))
