"""A shop. From the repository: `gunicorn -w 2 example_apps.flask_shop.app:app`."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import TypedDict

from flask import Flask, Response, request
from werkzeug.exceptions import BadRequest, NotFound

import tracemw

app = Flask(__name__)
app.wsgi_app = tracemw.WSGITraceMiddleware(app.wsgi_app)  # type: ignore[method-assign]  # This line traces all.

PRICES = {"lamp": 39.0, "desk": 240.0, "chair": 125.0, "shelf": 80.0}


class Order(TypedDict):
    """An order as clients see it."""

    number: int
    item: str
    quantity: int
    total: float


# A traced function is a span; its arguments are the span's inputs, its result is the output.
@tracemw.trace(span_type="TOOL")
def price(item: str, quantity: int) -> float:
    """What an order costs; ten pieces or more are cheaper."""
    if item not in PRICES:
        raise BadRequest(f"we do not sell {item!r}")
    return round(PRICES[item] * quantity * (0.9 if quantity >= 10 else 1.0), 2)


def charge(total: float, card: str) -> str:
    """Ask the bank. The card's number is masked before anything is stored (the setting `redact`)."""
    with tracemw.start_span("charge", span_type="TOOL") as span:
        span.set_inputs({"total": total, "card_number": card})
        time.sleep(0.005)
        span.set_outputs({"accepted": True})
    return "accepted"


def find(number: int) -> Order:
    """The shop's memory: order 1007 is always the same, in every worker process."""
    if not 1000 <= number < 2000:
        raise NotFound(f"no order {number}")
    item = sorted(PRICES)[number % len(PRICES)]
    quantity = number % 7 + 1
    return {"number": number, "item": item, "quantity": quantity, "total": PRICES[item] * quantity}


# `trace` above the route decorator, as MLflow's guide has it ...
@tracemw.trace
@app.post("/orders")
def create_order() -> tuple[Order, int]:
    """Take an order."""
    wanted = request.get_json()
    item, quantity = str(wanted["item"]), int(wanted.get("quantity", 1))
    total = price(item, quantity)
    charge(total, str(wanted.get("card", "")))
    # Facts about the whole request go on the trace: `tracemw search "tags.item = 'desk'"`.
    tracemw.update_current_trace(tags={"item": item}, metadata={"currency": "EUR"})
    return {"number": 1000 + quantity, "item": item, "quantity": quantity, "total": total}, 201


# ... or under it: the trace is the same.
@app.get("/orders/<int:number>")
@tracemw.trace
def show_order(number: int) -> Order:
    """One order. The trace is called `GET /orders/<int:number>`, whatever the number."""
    return find(number)


# A traced generator is a span that lasts while it is iterated.
@tracemw.trace(span_type="PARSER", output_reducer=len)
def rows(count: int) -> Iterator[str]:
    """Orders as lines of CSV."""
    yield "number,item,quantity,total\n"
    for number in range(1000, 1000 + count):
        order = find(number)
        yield f"{order['number']},{order['item']},{order['quantity']},{order['total']}\n"


@app.get("/orders.csv")
@tracemw.trace
def export() -> Response:
    """Send orders while they are read; the trace ends when the server closes the response."""
    return Response(rows(min(int(request.args.get("count", 50)), 1000)), mimetype="text/csv")


@app.post("/orders/<int:number>/refund")
@tracemw.trace
def refund(number: int) -> Order:
    """The failing one: the client gets a 500, the trace the exception with its stack."""
    order = find(number)
    raise ConnectionError(f"the bank does not answer (refund of {order['total']})")


@app.get("/health")
def health() -> dict[str, str]:
    """Health probes are not traced (the setting `exclude` says which paths)."""
    return {"status": "ok"}
