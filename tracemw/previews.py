"""The short text that lists of traces show of a request and of its response, by MLflow's rules."""

from __future__ import annotations

import json
import re
from typing import Any, Final, TypeGuard

LONGEST: Final = 1_000  # MLflow's column has this many characters

# Only an object that has one of these can be chat-shaped; without one there is nothing to parse.
_CHAT: Final = re.compile(r'"(?:messages|choices|input|output|request)"')


def request_preview(inputs: str | None) -> str | None:
    """What was asked: the text of the last user message where the inputs are chat-shaped, else their JSON.

    Chat-shaped is an object with a list `messages` or `input`, with `choices`, `output`, or with such an
    object as its `request`.

    Args:
        inputs: JSON text, as `tracemw.capture.dumps` makes it; None if nothing was recorded.

    Returns:
        At most 1,000 characters, cut ones ending in `...`; None for None.
    """
    return _preview(inputs, "user")


def response_preview(outputs: str | None) -> str | None:
    """What was answered: the text of the last assistant message, with the rules of `request_preview`."""
    return _preview(outputs, "assistant")


def shorten(text: str) -> str:
    """A text of at most 1,000 characters that every store and server takes: no NUL, no lone surrogate."""
    if len(text) > LONGEST:
        text = f"{text[: LONGEST - 3]}..."
    if not text.isascii():
        text = text.encode("utf-8", "replace").decode("utf-8")
    return text.replace("\0", "\ufffd")


def _preview(text: str | None, role: str) -> str | None:
    if text is None:
        return None
    return shorten(_chat_text(text, role) or text)


def _chat_text(text: str, role: str) -> str | None:
    """The text of the last message of a role, or of the last message if nobody has that role."""
    if not text.startswith("{") or not _CHAT.search(text):
        return None
    try:
        messages = _messages(json.loads(text))
    except (ValueError, RecursionError):
        return None
    said = [message for message in messages if message["role"] == role] or messages
    return _text(said[-1]["content"]) if said else None


def _messages(value: Any) -> list[dict[str, Any]]:
    """The messages of a chat request or response, of the first shape that it has."""
    while isinstance(value, dict):
        for name in ("messages", "choices", "input", "output"):
            found = value.get(name)
            if not isinstance(found, list) or not found:
                continue
            if name == "choices":
                first = found[0].get("message") if isinstance(found[0], dict) else None
                if _is_message(first):
                    return [first]
            else:
                return [item for item in found if _is_message(item)]
        value = value.get("request")
    return []


def _is_message(value: Any) -> TypeGuard[dict[str, Any]]:
    return isinstance(value, dict) and "role" in value and "content" in value


def _text(content: Any) -> str | None:
    """The text of a message: itself, or its first part that is text."""
    if isinstance(content, str):
        return content
    for part in content if isinstance(content, list) else ():
        if isinstance(part, str):
            return part
        if isinstance(part, dict) and part.get("type") in ("text", "output_text"):
            text = part.get("text")
            return text if isinstance(text, str) else None
    return None
