"""Stand-ins for a search index and a language model: no network, the same answer every time."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from typing import TypedDict


class Passage(TypedDict):
    """A piece of text that was found, in the shape MLflow shows as a document."""

    page_content: str
    metadata: dict[str, str]


LIBRARY = {
    "trace": "A trace is everything that happened for one request: a tree of spans with one root.",
    "span": "A span is one step of the work. It has a name, a start, an end, inputs and outputs.",
    "session": "A session groups the requests of one conversation, so that it can be read in order.",
    "latency": "Latency is the time from the request to the last byte of the response.",
    "sampling": "Sampling keeps a share of all traces. The decision is made once, at the root.",
}


def search(question: str, limit: int = 2) -> list[Passage]:
    """The documents that share the most words with the question, best first."""
    words = set(re.findall(r"[a-z]+", question.lower()))

    def shared(title: str) -> int:
        return len(words & set(re.findall(r"[a-z]+", LIBRARY[title].lower()))) + 3 * (title in words)

    titles = sorted(LIBRARY, key=lambda title: (-shared(title), title))[:limit]
    return [{"page_content": LIBRARY[title], "metadata": {"doc_uri": f"library/{title}"}} for title in titles]


async def complete(question: str, passages: list[Passage]) -> AsyncIterator[str]:
    """Write an answer token by token, as slowly as a fast model would."""
    answer = f"You asked: {question.strip()} " + " ".join(passage["page_content"] for passage in passages)
    for token in re.findall(r"\S+\s*", answer):
        await asyncio.sleep(0.002)
        yield token
