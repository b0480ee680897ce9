"""Technology: status codes, ports, acronyms, commands, languages, Python itself, characters, and, from
beside it, bits and small programs.

Status phrases are http.HTTPStatus's, keywords and small programs are Python's own, characters are unicodedata's.
"""

from __future__ import annotations

import keyword
import unicodedata
from collections.abc import Iterator
from http import HTTPStatus
from random import Random

from ..facts.computing import (
    ACRONYMS,
    COMMANDS,
    COSTS,
    FILE_TYPES,
    GIT,
    LANGUAGES,
    MEDIA_TYPES,
    OTHER_WORDS,
    PORTS,
    STATUS,
)
from ..rows import Fact
from ..unsettled import unsettled
from . import bits

_STATUS_KINDS = {1: "informational", 2: "success", 3: "redirection", 4: "client error", 5: "server error"}
_NO_KEYWORDS = (
    "print", "len", "range", "list", "dict", "self", "int", "str", "set", "map", "filter", "open", "sum", "input",
    "super", "object", "repeat", "until", "function", "var", "then", "switch", "foreach", "unless", "begin", "end",
)  # fmt: skip
_CHARACTERS = (
    "".join(map(chr, range(33, 127))) + "£§©®°±µ¶×ß÷éèêëàâäçñöøüåæÆØÅΑΒΓΔΘΛΞΠΣΦΨΩαβγδεζηθλμνξπρστφχψω€™→←↑↓∞≈≠≤≥√∑∫"
)


def facts(random: Random) -> Iterator[Fact]:
    """All facts of technology; small programs and conversions are drawn from the random stream."""
    yield from _web()
    yield from _acronyms()
    yield from _commands()
    yield from _languages()
    yield from _keywords()
    yield from _characters()
    yield from bits.facts(random)
    yield from _unsettled()


def _web() -> Iterator[Fact]:
    for code in STATUS:
        phrase, kind = HTTPStatus(code).phrase, _STATUS_KINDS[code // 100]
        yield Fact(
            f"status/{code}/phrase",
            (f"What does HTTP status {code} mean?", f"What is the reason phrase of HTTP status code {code}?"),
            phrase, f"It is one of the {kind} codes, which begin with {code // 100}.",
            subjects=(str(code),),
        )  # fmt: skip
        yield Fact(
            f"status/{code}/code",
            (f"Which HTTP status code means {phrase}?", f"What number is the HTTP status {phrase}?"),
            str(code), f"It is one of the {kind} codes.", subjects=(str(code),),
        )  # fmt: skip
        yield Fact(
            f"status/{code}/kind",
            (f"What kind of HTTP status is {code}?", f"To which class of HTTP status codes does {code} belong?"),
            kind.capitalize(), f"Its reason phrase is {phrase}.",
            accepted=(f"{code // 100}xx", *(("Successful",) if kind == "success" else ())),
            subjects=(str(code),),
        )  # fmt: skip
    for protocol, port in PORTS.items():
        range_name = "well-known ports, below 1024" if port < 1024 else "registered ports, from 1024 to 49151"
        yield Fact(
            f"port/{protocol}",
            (f"Which port does {protocol} use by default?", f"What is the standard port number of {protocol}?"),
            str(port), f"It is one of the {range_name}.", accepted=(f"Port {port}",), subjects=(protocol,),
        )  # fmt: skip
        yield Fact(
            f"port/{port}",
            (f"Which protocol or service has port {port} by default?", f"What usually listens on port {port}?"),
            protocol, f"{port} is one of the {range_name}.", subjects=(protocol,),
        )  # fmt: skip
    for name, media_type in MEDIA_TYPES.items():
        yield Fact(
            f"media/{name}",
            (f"What is the media type of {name}?", f"Which MIME type is registered for {name}?"),
            media_type, "Web servers send it in the Content-Type header.",
        )  # fmt: skip


def _acronyms() -> Iterator[Fact]:
    for acronym, (words, remark) in ACRONYMS.items():
        yield Fact(
            f"acronym/{acronym}",
            (f"What does {acronym} stand for?", f"What is {acronym} short for?",
             f"Spell out the abbreviation {acronym}."),
            words[0].upper() + words[1:], remark, accepted=OTHER_WORDS.get(acronym, ()), subjects=(acronym,),
        )  # fmt: skip
        yield Fact(
            f"acronym-of/{acronym}",
            (f"What is the abbreviation of {words}?", f"Which abbreviation stands for {words}?"), acronym, remark,
            accepted=(acronym.removesuffix(" address"),),
            subjects=(acronym,),
        )  # fmt: skip


def _commands() -> Iterator[Fact]:
    for shell, table in (("Unix", COMMANDS), ("Git", GIT)):
        for deed, (command, remark) in table.items():
            yield Fact(
                f"command/{command}",
                (f"Which {shell} command {deed}?", f"Name the {shell} command that {deed}."), command, remark,
                accepted=(command.removeprefix("git "), f"{command} command"), subjects=(command,),
            )  # fmt: skip
            yield Fact(
                f"what-does/{command}",
                (f"What does the {shell} command {command} do?", f"What is {command} for in {shell}?"),
                f"It {deed}", remark, accepted=(deed.capitalize(),), subjects=(command,),
            )  # fmt: skip
    for algorithm, (cost, remark) in COSTS.items():
        yield Fact(
            f"cost/{algorithm}",
            (f"What is the worst-case time of {algorithm}?", f"How does the worst-case time of {algorithm} grow?"),
            cost, remark, accepted=(cost.replace("^2", "²").replace("^3", "³"),),
        )  # fmt: skip


def _languages() -> Iterator[Fact]:
    for language, (creator, year) in LANGUAGES.items():
        yield Fact(
            f"language/{language}/creator",
            (f"Who created the programming language {language}?",
             f"Whose design was the programming language {language}?"),
            creator, f"It appeared in about {year}.", accepted=(creator.split()[-1],), subjects=(language,),
        )  # fmt: skip
        yield Fact(
            f"language/{language}/year",
            (f"In about which year did the programming language {language} appear?",
             f"About when was {language} first released?"),
            f"About {year}", f"It was first designed by {creator}; sources differ on which release was the first.",
            "Medium", (str(year), f"In {year}"), (language,),
        )  # fmt: skip
    for extension, language in FILE_TYPES.items():
        yield Fact(
            f"extension/{extension}",
            (f"Which programming language has source files that end in {extension}?",
             f"In which language is a file called main{extension} probably written?"),
            language, "The extension is a convention, which tools and editors follow.", subjects=(extension,),
        )  # fmt: skip
        yield Fact(
            f"extension-of/{language}",
            (f"What is the usual file extension of {language} source code?",
             f"How do names of {language} source files end?"),
            extension, "The extension is a convention, which tools and editors follow.",
            accepted=(extension.removeprefix("."),), subjects=(extension,),
        )  # fmt: skip


def _keywords() -> Iterator[Fact]:
    for word in (*keyword.kwlist, *_NO_KEYWORDS):
        is_one = word in keyword.kwlist
        yield Fact(
            f"keyword/{word}",
            (f"Is {word} a keyword of Python?", f"Is the word {word} reserved in Python?"),
            "Yes" if is_one else "No",
            "No variable can have this name." if is_one else "A variable can have this name, wise or not.",
        )  # fmt: skip


def _characters() -> Iterator[Fact]:
    for sign in _CHARACTERS:
        code, name = ord(sign), unicodedata.name(sign)
        yield Fact(
            f"character/{code:04X}/name",
            (f"What is the Unicode name of the character U+{code:04X}?",
             f"What does Unicode call the character with the code point U+{code:04X}?"),
            name.capitalize(), f"It is written {sign}; in decimal its number is {code}.",
            accepted=() if sign.isalnum() else (sign,), subjects=(sign,),
        )  # fmt: skip
        if code < 127 and sign.isalnum():
            kind = "digit" if sign.isdigit() else "capital letter" if sign.isupper() else "small letter"
            yield Fact(
                f"character/{code:04X}/code",
                (f"What is the ASCII code of the {kind} {sign}?",
                 f"Which decimal number has the {kind} {sign} in ASCII?"),
                str(code), f"In hexadecimal it is {code:X}.", accepted=(f"0x{code:X}",), subjects=(sign,),
            )  # fmt: skip


def _unsettled() -> Iterator[Fact]:
    names = [*LANGUAGES]
    for language, other in zip(names, names[1:] + names[:1]):
        yield unsettled(
            "taste", f"language/{language}",
            (f"Is {language} a better language than {other}?", f"Should everybody learn {language} first?"),
            f"It depends on the task and the person; {language} was designed by {LANGUAGES[language][0]}.",
        )  # fmt: skip
        yield unsettled(
            "future", f"language/{language}",
            (f"Will {language} still be in use in the year 2200?",
             f"When will the last {language} program be switched off?"),
            f"{language} has been around since about {LANGUAGES[language][1]}; how long it stays nobody can say.",
        )  # fmt: skip
    for thing in (
        "laptop",
        "phone",
        "router",
        "printer",
        "script",
        "server",
        "website",
        "database",
        "build",
        "download",
    ):
        yield unsettled(
            "missing", f"slow/{thing}",
            (f"Why is my {thing} so slow?", f"What is wrong with my {thing}?"),
            f"Nothing is said about the {thing}; logs or measurements would help.",
        )  # fmt: skip
