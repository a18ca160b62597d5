"""A model that costs next to nothing: a Responses API on raw asyncio with prerendered answers.

Leans on asyncio alone. Refuses to read a request further than the model's name, whether it
streams, and how many tool results are in it.

``python -m benchmarks.mock_model`` prints its port. The models:

    mock-plain     one sentence
    mock-tools     five calls of ``look_up``, one after another, then a sentence
    mock-stream    1,000 tokens, as fast as they are read
    mock-paced     1,000 tokens, one every 2 ms
    mock-stamped   as paced, each token the moment at which it was written (monotonic, ns)
    mock-slow      2 s of silence, then 20 tokens
"""

import asyncio
import json
import re
import time
from collections.abc import Iterable
from typing import Any

MODEL = re.compile(rb'"model":\s?"([^"]+)"')
STREAM = re.compile(rb'"stream":\s?true')
STAMP = b"@%018d"
UNSTAMPED = STAMP % 0
TOOL_CALLS = 5
TOKENS = 1_000
PACE_S = 0.002
SLOW_S = 2.0
SLOW_TOKENS = 20
SENTENCE = "The handbook answers this in three paragraphs, and the second one is the best. "
JSON_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n"
SSE_HEAD = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
)
END = b"0\r\n\r\n"


def message(text: str, status: str = "completed") -> dict[str, Any]:
    part = {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
    return {
        "id": "msg_1",
        "type": "message",
        "role": "assistant",
        "status": status,
        "content": [part] if status == "completed" else [],
    }


def tool_call(number: int) -> dict[str, Any]:
    return {
        "id": f"fc_{number}",
        "type": "function_call",
        "status": "completed",
        "call_id": f"call_{number}",
        "name": "look_up",
        "arguments": json.dumps({"topic": "durability", "page": number}),
    }


def response(output: list[dict[str, Any]], tokens: int, status: str = "completed") -> Any:
    return {
        "id": "resp_1",
        "object": "response",
        "created_at": 1_700_000_000,
        "model": "mock",
        "status": status,
        "error": None,
        "incomplete_details": None,
        "instructions": None,
        "metadata": {},
        "output": output,
        "parallel_tool_calls": True,
        "temperature": 1.0,
        "tool_choice": "auto",
        "tools": [],
        "top_p": 1.0,
        "usage": {
            "input_tokens": 40,
            "output_tokens": tokens,
            "total_tokens": 40 + tokens,
            "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
            "output_tokens_details": {"reasoning_tokens": 0},
        },
    }


def whole(value: Any) -> bytes:
    body = json.dumps(value).encode()
    return JSON_HEAD + b"content-length: %d\r\n\r\n" % len(body) + body


def chunks(events: Iterable[dict[str, Any]]) -> list[bytes]:
    made = []
    for number, event in enumerate(events):
        data = json.dumps({**event, "sequence_number": number})
        text = f"event: {event['type']}\ndata: {data}\n\n".encode()
        made.append(b"%x\r\n%b\r\n" % (len(text), text))
    return made


def text_events(tokens: list[str]) -> list[dict[str, Any]]:
    text = "".join(tokens)
    where = {"item_id": "msg_1", "output_index": 0, "content_index": 0}
    part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
    done = message(text)
    return [
        {"type": "response.created", "response": response([], 0, "in_progress")},
        {"type": "response.in_progress", "response": response([], 0, "in_progress")},
        {
            "type": "response.output_item.added",
            "output_index": 0,
            "item": message("", "in_progress"),
        },
        {"type": "response.content_part.added", **where, "part": part},
        *(
            {"type": "response.output_text.delta", **where, "delta": token, "logprobs": []}
            for token in tokens
        ),
        {"type": "response.output_text.done", **where, "text": text, "logprobs": []},
        {"type": "response.content_part.done", **where, "part": done["content"][0]},
        {"type": "response.output_item.done", "output_index": 0, "item": done},
        {"type": "response.completed", "response": response([done], len(tokens))},
    ]


def call_events(item: dict[str, Any]) -> list[dict[str, Any]]:
    where = {"item_id": item["id"], "output_index": 0}
    kind = "response.function_call_arguments"
    begun = {**item, "arguments": "", "status": "in_progress"}
    return [
        {"type": "response.created", "response": response([], 0, "in_progress")},
        {"type": "response.in_progress", "response": response([], 0, "in_progress")},
        {"type": "response.output_item.added", "output_index": 0, "item": begun},
        {"type": f"{kind}.delta", **where, "delta": item["arguments"]},
        {"type": f"{kind}.done", **where, "arguments": item["arguments"]},
        {"type": "response.output_item.done", "output_index": 0, "item": item},
        {"type": "response.completed", "response": response([item], 12)},
    ]


def words(count: int) -> list[str]:
    return [f"word{number} " for number in range(count)]


class Answer:
    """One prerendered answer: as JSON, and as the chunks of a stream."""

    def __init__(self, output: dict[str, Any], events: list[dict[str, Any]], tokens: int) -> None:
        self.json = whole(response([output], tokens))
        self.chunks = chunks(events)
        self.stream = SSE_HEAD + b"".join(self.chunks) + END


def text_answer(tokens: list[str]) -> Answer:
    return Answer(message("".join(tokens)), text_events(tokens), len(tokens))


PLAIN = text_answer(re.findall(r"\S+\s*", SENTENCE))
CALLS = [Answer(tool_call(n), call_events(tool_call(n)), 12) for n in range(TOOL_CALLS)]
LONG = text_answer(words(TOKENS))
STAMPED = text_answer([UNSTAMPED.decode() + " "] * TOKENS)
SHORT = text_answer(words(SLOW_TOKENS))


class Peer(asyncio.Protocol):
    """One connection; a request is answered before the next one is read."""

    def __init__(self) -> None:
        self.buffer = b""
        self.timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def connection_lost(self, exc: Exception | None) -> None:
        if self.timer is not None:
            self.timer.cancel()

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        end = self.buffer.find(b"\r\n\r\n")
        if end < 0:
            return
        head = self.buffer[:end].lower()
        at = head.find(b"content-length:")
        size = int(head[at + 15 :].split(b"\r\n", 1)[0]) if at >= 0 else 0
        if len(self.buffer) < end + 4 + size:
            return
        body = self.buffer[end + 4 : end + 4 + size]
        self.buffer = self.buffer[end + 4 + size :]
        self.answer(body)

    def answer(self, body: bytes) -> None:
        found = MODEL.search(body)
        name = found.group(1) if found else b""
        streams = STREAM.search(body) is not None
        if name == b"mock-tools":
            results = body.count(b'"function_call_output"')
            self.reply(CALLS[results] if results < TOOL_CALLS else PLAIN, streams)
        elif name == b"mock-stream":
            self.reply(LONG, streams)
        elif name == b"mock-slow":
            loop = asyncio.get_running_loop()
            self.timer = loop.call_later(SLOW_S, self.reply, SHORT, streams)
        elif name in (b"mock-paced", b"mock-stamped") and streams:
            self.transport.write(SSE_HEAD)
            started = asyncio.get_running_loop().time()
            self.pace((LONG if name == b"mock-paced" else STAMPED).chunks, 0, started)
        else:
            self.reply(PLAIN, streams)

    def reply(self, answer: Answer, streams: bool) -> None:
        self.transport.write(answer.stream if streams else answer.json)

    def pace(self, parts: list[bytes], number: int, started: float) -> None:
        """Write what is due by now; one write for each part."""
        loop = asyncio.get_running_loop()
        due = min(len(parts), 1 + int((loop.time() - started) / PACE_S))
        while number < due:
            stamp = STAMP % time.monotonic_ns()
            self.transport.write(parts[number].replace(UNSTAMPED, stamp))
            number += 1
        if number == len(parts):
            self.transport.write(END)
            return
        at = started + number * PACE_S
        self.timer = loop.call_at(at, self.pace, parts, number, started)


async def main() -> None:
    loop = asyncio.get_running_loop()
    server = await loop.create_server(Peer, "127.0.0.1", 0, backlog=4096)
    print(server.sockets[0].getsockname()[1], flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main())
