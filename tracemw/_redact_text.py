"""Masking secrets in text that was not made by us: bodies and query strings. Imported when one is captured."""

from __future__ import annotations

import json
import re
from collections.abc import Callable

from tracemw._redact import MASK, Redactor

_STRING = r'"(?:[^"\\]|\\.)*(?:"|\\?\Z)'
_JSON_KEY = re.compile(r'"((?:[^"\\]|\\.){1,256})"\s{0,32}:\s{0,32}', re.DOTALL)
_JSON_SCALAR = re.compile(rf'{_STRING}|[^\s,}}\]{{\["]+', re.DOTALL)
_JSON_NESTING = re.compile(rf"{_STRING}|[{{}}\[\]]", re.DOTALL)
# A key begins where the one before it cannot go on, so that each part of a text is looked at once.
_PAIR_KEY = re.compile(r"""(?<![^\s&?;,="])([^\s&?;,="]+)(?:[?;,"]{0,8}=|[ \t]{1,32}=[ \t]{0,32})""")
_OPENING = re.compile(r"[(\[{#']")
_PAIR_VALUE = re.compile(r'"[^"\r\n]*"?|[^\s&]*')
_PAIR_VALUE_IN_JSON = re.compile(r'[^\s&"]*')  # the quote ends the JSON string around the pair
_LINE = re.compile(r"^[ \t]{0,32}([A-Za-z][\w.-]{0,127})[ \t]{0,8}:[ \t]{0,8}(?=\S)", re.MULTILINE)
_LINE_VALUE = re.compile(r"[^\r\n]*")
_PART = re.compile(r'\bname="([^"\r\n]{1,256})"[^\r\n]{0,256}\r?\n(?:[^\r\n]{1,512}\r?\n){0,8}\r?\n')
_PART_VALUE = re.compile(r".*?(?=\r?\n--|\Z)", re.DOTALL)
_USER_INFO = re.compile(r"(://[^\s/@:?#\"]{0,256}:)[^\s/@\"]{1,256}@")
_NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:[eE][-+]?\d+)?\Z")


def mask_secrets(text: str, redactor: Redactor) -> str:
    """The text with its secrets masked; `tracemw.capture.redact_text` says what is found."""
    if '"' in text:
        text = _mask(
            text, lambda key: redactor.level(_unescaped(key)), _JSON_KEY, _json_end, f'"{MASK}"'
        )
        text = _mask(text, redactor.level, _PART, _end_by(_PART_VALUE))
    if "=" in text:
        value = _PAIR_VALUE_IN_JSON if text.lstrip()[:1] in ("{", "[", '"') else _PAIR_VALUE
        text = _mask(text, lambda key: _pair_level(key, redactor), _PAIR_KEY, _end_by(value))
    if ":" in text:
        text = _mask(text, redactor.level, _LINE, _end_by(_LINE_VALUE))
        if redactor.masks("password"):
            text = _USER_INFO.sub(rf"\1{MASK}@", text)
    return text


def _mask(
    text: str,
    level_of: Callable[[str], int],
    keys: re.Pattern[str],
    value_end: Callable[[str, int], int],
    mask: str = MASK,
) -> str:
    """Replaces what follows each secret key; the search goes on inside the values of all other keys."""
    parts: list[str] = []
    done = 0
    found = keys.search(text)
    while found:
        level, start = level_of(found[1]), found.end()
        if level:
            end = value_end(text, start)
            value = text[start:end]
            parts += text[done:start], value if _harmless(value, level) else mask
            done = start = end
        found = keys.search(text, start)
    return "".join(parts) + text[done:]


def _harmless(value: str, level: int) -> bool:
    if level == 1 and _NUMBER.match(value):
        return True
    return value in ("", "null", "true", "false", MASK, f'"{MASK}"')


def _end_by(pattern: re.Pattern[str]) -> Callable[[str, int], int]:
    def end(text: str, start: int) -> int:
        found = pattern.match(text, start)
        return found.end() if found else start

    return end


def _json_end(text: str, start: int) -> int:
    """Where the JSON value that begins at `start` ends; the end of the text if it was cut off."""
    if text[start : start + 1] not in ("{", "["):
        scalar = _JSON_SCALAR.match(text, start)
        return scalar.end() if scalar else start
    depth = 0
    for token in _JSON_NESTING.finditer(text, start):
        if token[0] in ("{", "["):
            depth += 1
        elif token[0] in ("}", "]"):
            depth -= 1
            if not depth:
                return token.end()
    return len(text)


def _unescaped(key: str) -> str:
    if "\\" not in key:
        return key
    try:
        return str(json.loads(f'"{key}"', strict=False))
    except ValueError:
        return key


def _pair_level(key: str, redactor: Redactor) -> int:
    """How much is masked after `key=`; what stands before a bracket (`call(pin=`) may not belong to the key."""
    key = _percent_decoded(key)
    level = redactor.level(key)
    return level or redactor.level(_OPENING.split(key)[-1])


def _percent_decoded(key: str) -> str:
    if "%" not in key:
        return key
    from urllib.parse import unquote

    return unquote(key)
