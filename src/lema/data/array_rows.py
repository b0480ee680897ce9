"""Rows of a JSON file that is one array, each row read where it is, as lines of a JSONL file are.

It knows where the elements of an array are; it knows nothing of what they mean. The elements are read with their own
types: a table would give every object the fields of all, and make dates of texts.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import os
from array import array
from pathlib import Path

import numpy as np

from ..errors import InputError
from .index import RowIndex
from .rows import JsonlRows

_CHUNK = 1 << 20
_UNDECIDED = 32
"""Characters before the end of what was read so far in which an error may only mean that more is to be read."""
_SPACE = " \t\r\n"


class ArrayRows(JsonlRows):
    """Rows of a JSON array of objects."""

    kind = "array"

    @staticmethod
    def scan(path: Path, stat: os.stat_result) -> RowIndex:
        """Where the elements are.

        Raises:
            InputError: the file is not JSON, or not one array; says where.
        """
        elements = _Elements(path)
        spans = np.array(elements.spans(), dtype=np.int64).reshape(-1, 3)
        return RowIndex(spans, elements.hasher.hexdigest(), stat.st_size, stat.st_mtime_ns)

    def where(self, index: int) -> str:
        return f"{self.name}, row {index + 1} (line {self._index.line(index)})"

    def _hint(self, data: bytes) -> str:
        return ""

    def _why_none(self) -> str:
        return ": the array is empty"


class _Elements:
    """Reads an array piece by piece; what is before `at` in `text` is done with."""

    def __init__(self, path: Path) -> None:
        self.hasher = hashlib.sha256()
        self._path = path
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._text, self._at = "", 0
        self._offset, self._line = 0, 1  # of `at`: in bytes, and counted from 1
        self._ended = False

    def spans(self) -> array[int]:
        """Offset, length and line of each element, one after the other."""
        found = array("q")
        json_decoder = json.JSONDecoder()
        with open(self._path, "rb", buffering=0) as self._file:
            if self._next() == "\ufeff":
                self._pass(1)
            self._take("[")
            while (sign := self._next()) != "]":
                if found:
                    self._take(",")
                    sign = self._next()
                if not sign:
                    raise self._wrong("the file ends inside the array")
                length = self._element(json_decoder, len(found) // 3 + 1)
                begin, line = self._offset, self._line
                self._pass(length)
                found.extend((begin, self._offset - begin, line))
            self._take("]")
            if self._next():
                raise self._wrong("something follows the array")
        return found

    def _element(self, decoder: json.JSONDecoder, row: int) -> int:
        """Characters of the element that begins here, however much must be read for it."""
        while True:
            try:
                _, end = decoder.raw_decode(self._text, self._at)
                if end < len(self._text) or not self._more():
                    return end - self._at
            except json.JSONDecodeError as error:
                cut = error.msg.startswith("Unterminated string") or error.pos > len(self._text) - _UNDECIDED
                if not (cut and self._more()):
                    raise self._wrong(f"row {row} is not JSON: {error.msg}", error.pos) from error
            except RecursionError as error:
                raise self._wrong(f"row {row} is nested too deeply to be read") from error
            except ValueError as error:
                raise self._wrong(f"row {row} is not JSON that can be read: {str(error).partition(';')[0]}") from error

    def _next(self) -> str:
        """The next character that is no white space; none at the end of the file."""
        while True:
            rest = self._at
            while rest < len(self._text) and self._text[rest] in _SPACE:
                rest += 1
            self._pass(rest - self._at)
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._more():
                return ""

    def _take(self, sign: str) -> None:
        found = self._next()
        if found != sign:
            raise self._wrong(f"{sign} is expected here, and there is {found or 'the end of the file'}")
        self._pass(1)

    def _pass(self, count: int) -> None:
        done = self._text[self._at : self._at + count]
        self._at += count
        self._offset += len(done) if done.isascii() else len(done.encode())
        self._line += done.count("\n")

    def _more(self) -> bool:
        """Read on, as much again as is at hand; False at the end of the file."""
        if self._ended:
            return False
        data = self._file.read(max(_CHUNK, len(self._text) - self._at))
        self._ended = not data
        self.hasher.update(data)
        try:
            text = self._decoder.decode(data, final=self._ended)
        except UnicodeDecodeError as error:
            raise InputError(f"{self._path} is not UTF-8: byte 0x{error.object[error.start]:02x} in it") from error
        self._text, self._at = self._text[self._at :] + text, 0
        return bool(text) or not self._ended

    def _wrong(self, what: str, position: int | None = None) -> InputError:
        line = self._line + self._text.count("\n", self._at, self._at if position is None else position)
        return InputError(f"{self._path}, line {line}: {what}")
