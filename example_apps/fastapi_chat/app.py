"""A chat service. From the repository: `uvicorn example_apps.fastapi_chat.app:app`."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator

from fastapi import FastAPI, HTTPException
from fastapi.responses import StreamingResponse
from pydantic import BaseModel

import tracemw
from example_apps.fastapi_chat import model

app = FastAPI(title="Chat")
app.add_middleware(tracemw.TraceMiddleware)  # This line traces every request; what follows adds detail.


class Question(BaseModel):
    """What a client sends."""

    question: str


class Answer(BaseModel):
    """What it gets back."""

    answer: str
    sources: list[str]


# A traced function is a span; its arguments are the span's inputs, its result is the output.
@tracemw.trace(span_type="RETRIEVER")
def retrieve(question: str) -> list[model.Passage]:
    """Look for documents about the question."""
    return model.search(question)


# A block can be a span, too. Inputs and outputs in the shape of a chat are shown as one.
async def generate(question: str, passages: list[model.Passage]) -> str:
    """Let the model write the answer."""
    with tracemw.start_span("generate", span_type="LLM") as span:
        span.set_inputs({"messages": [{"role": "user", "content": question}]})
        tokens = [token async for token in model.complete(question, passages)]
        text = "".join(tokens).strip()
        span.set_attribute("model", "stand-in-1")
        span.set_attribute("output_tokens", len(tokens))
        span.set_outputs({"choices": [{"message": {"role": "assistant", "content": text}}]})
    return text


# A traced generator is a span that lasts while it is iterated; the reducer makes one output of its items.
@tracemw.trace(name="generate", span_type="LLM", output_reducer="".join)
async def stream_tokens(question: str, passages: list[model.Passage]) -> AsyncIterator[str]:
    """Let the model write the answer and pass each token on at once."""
    async for token in model.complete(question, passages):
        yield token


async def answer(question: str) -> Answer:
    """Retrieval, then generation: the two spans below each handler."""
    passages = retrieve(question)
    text = await generate(question, passages)
    # Facts about the whole request go on the trace: `tracemw search "tags.topic = 'library/span'"`.
    tracemw.update_current_trace(tags={"topic": passages[0]["metadata"]["doc_uri"]}, response_preview=text)
    return Answer(answer=text, sources=[passage["metadata"]["doc_uri"] for passage in passages])


# `trace` under the route decorator ...
@app.post("/chat")
@tracemw.trace
async def chat(body: Question) -> Answer:
    """Answer in one piece."""
    return await answer(body.question)


# ... or above it, as MLflow's guide has it: the trace is the same.
@tracemw.trace
@app.post("/ask")
async def ask(body: Question) -> Answer:
    """Answer in one piece."""
    return await answer(body.question)


@app.post("/chat/stream")
@tracemw.trace
async def chat_stream(body: Question) -> StreamingResponse:
    """Answer token by token, as server-sent events. The trace lasts until the last event is sent."""
    passages = retrieve(body.question)

    async def events() -> AsyncIterator[str]:
        async for token in stream_tokens(body.question, passages):
            yield f"data: {json.dumps(token)}\n\n"
        yield "data: [DONE]\n\n"

    return StreamingResponse(events(), media_type="text/event-stream")


@app.get("/documents/{title}")
async def document(title: str) -> dict[str, str]:
    """One document. No decorator: the request is traced all the same, under `GET /documents/{title}`."""
    if title not in model.LIBRARY:
        raise HTTPException(404, f"no document about {title!r}")
    return {"title": title, "text": model.LIBRARY[title]}


@app.get("/summary")
@tracemw.trace
async def summary() -> dict[str, int]:
    """The slow one: `tracemw search "execution_time > 250ms"` finds it."""
    await asyncio.sleep(0.3)
    return {"documents": len(model.LIBRARY)}


@app.post("/index/rebuild")
@tracemw.trace
async def rebuild() -> None:
    """The failing one: the client gets a 500, the trace the exception with its stack."""
    with tracemw.start_span("read_index", span_type="TOOL") as span:
        span.set_inputs({"path": "library.idx"})
        raise FileNotFoundError("library.idx is gone")


@app.get("/health")
async def health() -> dict[str, str]:
    """Health probes are not traced (the setting `exclude` says which paths)."""
    return {"status": "ok"}
