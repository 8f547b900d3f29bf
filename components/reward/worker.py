"""A worker: one process that runs one reward function over batches it is sent. It trusts nobody and nobody trusts it.

Started as `python -m components.reward.worker FD`, FD being its end of a socket pair. First message: what to run, as
JSON; then batches, as Arrow tables whose columns are the function's parameters. Replies: scores and errors, as JSON.
"""

import inspect
import json
import math
import os
import socket
import sys
import traceback
from collections.abc import Callable
from typing import Any

from components.reward.frames import receive, send_json
from components.reward.sandbox import Limits, confine

MAX_ERROR_LENGTH = 300
Rows = dict[str, list[Any]]


def main(descriptor: int) -> None:
    """Serves one function until the other side closes the connection."""
    os.set_inheritable(descriptor, False)
    connection = socket.socket(fileno=descriptor)
    order = json.loads(receive(connection) or b"{}")
    missing = confine(Limits(**order["limits"]))
    from components.reward.resolve import NotUsable, load, parameters

    try:
        function = load(order["name"], order["source"])
    except NotUsable as error:
        send_json(connection, {"refused": str(error)})
        return
    import pyarrow  # noqa: F401 (of the start's time, not of the first batch's)

    send_json(connection, {"parameters": parameters(function).as_json(), "missing": missing})
    arguments, messages = order["arguments"], order["messages"]

    def call(rows: Rows) -> Any:
        found = function(**(_as_messages(rows) if messages else rows), **arguments)
        return _finished(found) if inspect.isawaitable(found) else found

    while (batch := receive(connection)) is not None:
        send_json(connection, score(call, _rows(batch)))


def _finished(awaitable: Any) -> Any:
    import asyncio  # only those who need it pay for its import

    return asyncio.run(awaitable)


def score(call: Callable[[Rows], Any], rows: Rows) -> dict[str, Any]:
    """Scores a batch, and if that fails each completion alone: `scores`, None where none, and `errors` by position."""
    count = len(next(iter(rows.values())))
    try:
        values = _checked(call(rows), count)
    except (Exception, SystemExit, KeyboardInterrupt) as error:  # a user's function may raise anything
        if count == 1:
            return {"scores": [None], "errors": {"0": _describe(error) + _place(error)}}
    else:
        return _numbers(values)
    alone = [score(call, {name: [values[row]] for name, values in rows.items()}) for row in range(count)]
    errors = {str(row): text for row, result in enumerate(alone) for text in result["errors"].values()}
    return {"scores": [result["scores"][0] for result in alone], "errors": errors}


def _checked(values: Any, count: int) -> list[Any]:
    if isinstance(values, str | bytes | dict) or not hasattr(values, "__len__"):
        raise TypeError(f"want a list of {count} scores, got {type(values).__name__}")
    if len(values) != count:
        raise ValueError(f"want {count} scores, one a completion, got {len(values)}")
    return list(values)


def _numbers(values: list[Any]) -> dict[str, Any]:
    scores: list[float | None] = []
    errors: dict[str, str] = {}
    for row, value in enumerate(values):
        try:
            number = None if value is None else float(value)
        except (Exception, SystemExit) as error:  # a score may be any object
            number, errors[str(row)] = None, f"want a number or None, got {_describe(error)}"
        if number is not None and not math.isfinite(number):
            errors[str(row)] = f"want a finite number, got {number}"
            number = None
        scores.append(number)
    return {"scores": scores, "errors": errors}


def _describe(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"[:MAX_ERROR_LENGTH]


def _place(error: BaseException) -> str:
    """Where in the function's own file it was raised; nothing when the function did return."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not _is_ours(frame.filename)]
    own = [frame for frame in frames if frame.filename == frames[0].filename]
    return f" ({os.path.basename(own[-1].filename)}, line {own[-1].lineno}, in {own[-1].name})" if own else ""


def _is_ours(filename: str) -> bool:
    return filename == __file__ or f"{os.sep}asyncio{os.sep}" in filename


def _rows(batch: bytes) -> Rows:
    import pyarrow as pa

    table = pa.ipc.open_stream(batch).read_all()
    return {name: table.column(name).to_pylist() for name in table.column_names}


def _as_messages(rows: Rows) -> Rows:
    """Prompts, which come as JSON, and completions as TRL hands them over for conversational data sets."""
    found = dict(rows)
    if "prompts" in rows:
        found["prompts"] = [json.loads(text) for text in rows["prompts"]]
    if "completions" in rows:
        found["completions"] = [[{"role": "assistant", "content": text}] for text in rows["completions"]]
    return found


if __name__ == "__main__":
    main(int(sys.argv[1]))
