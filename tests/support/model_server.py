"""A small OpenAI-compatible server for tests and benchmarks: Responses and Chat Completions.

Of embeddings it makes vectors of three numbers, the last of them the length of the text.

Leans on asyncio alone (and on the demo model's voice where asked), so that it takes little CPU
beside what is measured. Answers are scripted, by rules or one after another; faults can be put
anywhere. Refuses to know the code under test: it is spoken to over a real socket.

In process: ``async with ModelServer(rules=[...]) as server: server.base_url``. As a process:
``python -m tests.support.model_server --port 0 [--demo]`` prints its port first; ``POST
/script`` sets the script, ``GET /calls`` tells what was asked, ``POST /reset`` forgets.

A script is ``{"queue": [reply, …], "rules": [{"match": regex, "steps": [reply, …]}, …],
"default": reply, "demo": bool, "counts": the tokens of each input, or none}``. The queue is used up first. A rule is chosen by the last user
message and its step by how many rounds of tool calls followed it, so that a replayed call gets
the same answer; past its steps, the last one. A reply:

    text | json              what is said
    tool_calls               [{"name", "arguments" (object, or text as it is), "id"?}, …]
    reasoning, refusal       beside the text
    items                    output items as they are, after the others (Responses only)
    tokens, delay_s          text of that many tokens; seconds between tokens
    latency_s                seconds before the first byte
    held                     true: not before ``release`` is called, or another script is set
    usage                    [input, output, cached]
    status, headers, error   an error answer
    fault                    "reset" | "half" (close in mid-answer) | "malformed" | "empty"
                             | "silent" (the head, then nothing) | "cut" (the last events missing)
                             | "unframed" (ended by closing)
"""

import argparse
import asyncio
import hashlib
import json
import re
import ssl
import sys
from collections.abc import Callable
from typing import Any

Json = dict[str, Any]
OK = b"HTTP/1.1 200 OK\r\n"
SSE = OK + b"content-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
DEFAULT_REPLY: Json = {"text": "Hello from the model server."}


class ModelServer:
    """The server, in this process. ``calls`` are the request bodies in the order they came."""

    def __init__(
        self,
        *,
        queue: list[Json] | None = None,
        rules: list[Json] | None = None,
        default: Json | None = None,
        demo: bool = False,
        host: str = "127.0.0.1",
        port: int = 0,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self.tls = tls
        self._address = (host, port)
        self.raw_calls: list[tuple[str, dict[str, str], bytes]] = []
        self.open: set[_Peer] = set()
        self.let_go = asyncio.Event()
        self.on_change: Callable[[], None] = lambda: None
        """Called when a request has come and when a connection has gone."""
        self.script({"queue": queue or [], "rules": rules or [], "default": default, "demo": demo})

    def release(self) -> None:
        """Let every answer go that is ``held`` now, and those of this script to come."""
        self.let_go.set()

    def script(self, script: Json) -> None:
        self.release()
        self.let_go = asyncio.Event()
        self.queue: list[Json] = list(script.get("queue") or [])
        self.rules = [(re.compile(r["match"], re.I | re.S), r) for r in script.get("rules") or []]
        self.default: Json = script.get("default") or DEFAULT_REPLY
        self.counts: int | None = script.get("counts")
        self.counted: list[Json] = []
        self.demo = bool(script.get("demo", getattr(self, "demo", False)))
        self.rendered: dict[tuple[str, bool, int], bytes] = {}

    @property
    def unanswered(self) -> int:
        """Requests whose answer is still being written, on connections that are open."""
        return sum(peer.task is not None for peer in self.open)

    @property
    def calls(self) -> list[Json]:
        return [json.loads(body) if body else {} for _, _, body in self.raw_calls]

    @property
    def headers(self) -> list[dict[str, str]]:
        return [headers for _, headers, _ in self.raw_calls]

    @property
    def targets(self) -> list[str]:
        return [target for target, _, _ in self.raw_calls]

    async def __aenter__(self) -> "ModelServer":
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(lambda: _Peer(self), *self._address, ssl=self.tls)
        self.port: int = self._server.sockets[0].getsockname()[1]
        self.base_url = f"http{'s' if self.tls else ''}://127.0.0.1:{self.port}/v1"
        return self

    async def __aexit__(self, *exc: object) -> None:
        self._server.close()
        for peer in list(self.open):
            peer.abort()
        await self._server.wait_closed()

    def choose(self, api: str, raw: bytes) -> Json:
        """The reply to the request ``raw``."""
        if self.queue:
            return self.queue.pop(0)
        if not self.rules and not self.demo:
            return self.default
        body = json.loads(raw)
        items = items_of(api, body)
        if self.demo:
            return demo_reply(api, body, items)
        said, rounds = last_user_turn(items)
        for pattern, rule in self.rules:
            if pattern.search(said):
                steps = rule.get("steps") or [rule["reply"]]
                return dict(steps[min(rounds, len(steps) - 1)])
        return self.default


class _Peer(asyncio.Protocol):
    """One client connection; answers its requests in order."""

    def __init__(self, server: ModelServer) -> None:
        self.server = server
        self.buffer = b""
        self.task: asyncio.Task[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        self.server.open.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self.server.open.discard(self)
        if self.task is not None:
            self.task.cancel()
        self.server.on_change()

    def abort(self) -> None:
        self.transport.abort()

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        while self.task is None:
            end = self.buffer.find(b"\r\n\r\n")
            if end < 0:
                return
            lines = self.buffer[:end].decode("latin-1").split("\r\n")
            headers = {
                k.strip().lower(): v.strip() for k, v in (x.split(":", 1) for x in lines[1:])
            }
            size = int(headers.get("content-length", 0))
            if len(self.buffer) < end + 4 + size:
                return
            body = self.buffer[end + 4 : end + 4 + size]
            self.buffer = self.buffer[end + 4 + size :]
            method, target, _ = lines[0].split(" ", 2)
            self.handle(method, target, headers, body)

    def handle(self, method: str, target: str, headers: dict[str, str], body: bytes) -> None:
        path = target.split("?")[0]
        if path.endswith("/responses") or path.endswith("/chat/completions"):
            self.server.raw_calls.append((target, headers, body))
            api = "responses" if path.endswith("/responses") else "chat"
            self.answer(api, body)
            self.server.on_change()
        elif path.endswith("/responses/input_tokens") and self.server.counts is not None:
            self.server.counted.append(json.loads(body))
            value = {"object": "response.input_tokens", "input_tokens": self.server.counts}
            self.plain(200, value)
        elif path.endswith("/embeddings"):
            texts = json.loads(body)["input"]
            vectors = [{"index": n, "embedding": [3.0, 4.0, len(t)]} for n, t in enumerate(texts)]
            self.plain(200, {"data": vectors})
        elif path == "/calls":
            calls = self.server.calls
            models: dict[str, int] = {}
            for call in calls:
                models[call.get("model", "")] = models.get(call.get("model", ""), 0) + 1
            self.plain(200, {"count": len(calls), "models": models, "calls": calls})
        elif path == "/script" and method == "POST":
            self.server.script(json.loads(body))
            self.plain(200, {})
        elif path == "/reset":
            self.server.raw_calls.clear()
            self.plain(200, {})
        else:
            self.plain(404, {"error": {"message": f"no route {target!r}"}})

    def plain(self, status: int, value: Any, headers: Json | None = None) -> None:
        self.transport.write(whole(status, json.dumps(value).encode(), headers))

    def answer(self, api: str, body: bytes) -> None:
        reply = self.server.choose(api, body)
        stream = b'"stream":true' in body or b'"stream": true' in body
        slow = reply.get("latency_s") or reply.get("held") or (stream and reply.get("delay_s"))
        if not slow and reply.get("fault") is None and "status" not in reply:
            key = (api, stream, id(reply))
            ready = self.server.rendered.get(key)
            if ready is None:
                ready = b"".join(self.parts(api, stream, body, reply))
                if reply is self.server.default and not reply.get("tool_calls"):
                    self.server.rendered[key] = ready
            self.transport.write(ready)
            return
        self.task = asyncio.get_running_loop().create_task(self.slowly(api, stream, body, reply))

    def parts(self, api: str, stream: bool, body: bytes, reply: Json) -> list[bytes]:
        request: Json = json.loads(body)
        if not stream:
            value = (response_of if api == "responses" else completion_of)(request, reply)
            return [whole(200, json.dumps(value).encode())]
        events = (response_events if api == "responses" else chat_events)(request, reply)
        return [SSE, *(chunk(event) for event in events), b"0\r\n\r\n"]

    async def slowly(self, api: str, stream: bool, body: bytes, reply: Json) -> None:
        fault, write = reply.get("fault"), self.transport.write
        await asyncio.sleep(reply.get("latency_s", 0))
        if reply.get("held"):
            await self.server.let_go.wait()
        if "status" in reply:
            error = reply.get("error") or {"message": "scripted error", "code": None}
            self.plain(reply["status"], {"error": error}, reply.get("headers"))
        elif fault == "reset":
            if stream:
                write(b"".join(self.parts(api, stream, body, reply)[:3]))
            self.transport.abort()
        elif fault == "half":
            whole_answer = self.parts(api, stream, body, reply)
            if stream:
                write(b"".join(whole_answer[: max(3, len(whole_answer) // 2)]))
            else:
                write(whole_answer[0][:-20])
            self.transport.close()
        elif fault == "cut":  # a stream that ends properly for HTTP but lacks its last events
            write(b"".join(self.parts(api, stream, body, reply)[:4]) + b"0\r\n\r\n")
        elif fault == "malformed":
            write(
                SSE + chunk(b'data: {"type": "resp\n\n') + b"0\r\n\r\n"
                if stream
                else whole(200, b'{"id": "x", "output": [')
            )
        elif fault == "unframed":  # no length and no chunks: the end is where the socket ends
            write(OK + b"connection: close\r\n\r\n")
            value = (response_of if api == "responses" else completion_of)(json.loads(body), reply)
            write(json.dumps(value).encode())
            self.transport.close()
        elif fault == "empty":
            write(SSE + b"0\r\n\r\n" if stream else whole(200, b""))
        elif fault == "silent":
            write(SSE if stream else OK + b"content-length: 100\r\n\r\n")
            await asyncio.Event().wait()
        else:
            for part in self.parts(api, stream, body, reply):
                write(part)
                if reply.get("delay_s"):
                    await asyncio.sleep(reply["delay_s"])
        self.task = None
        if self.buffer:
            self.data_received(b"")


def whole(status: int, body: bytes, headers: Json | None = None) -> bytes:
    extra = "".join(f"{name}: {value}\r\n" for name, value in (headers or {}).items())
    head = (
        f"HTTP/1.1 {status} X\r\ncontent-type: application/json\r\nx-request-id: req_1\r\n{extra}"
    )
    return f"{head}content-length: {len(body)}\r\n\r\n".encode() + body


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


# What the two APIs say


def tokens_of(reply: Json) -> list[str]:
    if reply.get("tokens"):
        return [f"tok{i} " for i in range(reply["tokens"])]
    text = json.dumps(reply["json"]) if "json" in reply else reply.get("text", "")
    return re.findall(r"\S+\s*|\s+", text)


def calls_of(request: Json, reply: Json) -> list[Json]:
    """The tool calls with their ids: derived, and new at each point of a conversation."""
    point = json.dumps(request.get("input") or request.get("messages"), sort_keys=True)
    made = []
    for n, call in enumerate(reply.get("tool_calls") or ()):
        digest = hashlib.sha256(f"{point}/{n}".encode()).hexdigest()[:20]
        arguments = call.get("arguments", {})
        text = arguments if isinstance(arguments, str) else json.dumps(arguments)
        made.append(
            {"id": call.get("id") or f"call_{digest}", "name": call["name"], "arguments": text}
        )
    return made


def usage_of(reply: Json) -> tuple[int, int, int]:
    counts = reply.get("usage") or [10, max(1, len(tokens_of(reply))), 0]
    return counts[0], counts[1], counts[2] if len(counts) > 2 else 0


def response_of(request: Json, reply: Json) -> Json:
    taken, given, cached = usage_of(reply)
    output: list[Json] = []
    if reply.get("reasoning"):
        summary = [{"type": "summary_text", "text": reply["reasoning"]}]
        output.append({"id": "rs_1", "type": "reasoning", "summary": summary})
    parts: list[Json] = []
    if text := "".join(tokens_of(reply)):
        parts.append({"type": "output_text", "text": text, "annotations": [], "logprobs": []})
    if reply.get("refusal"):
        parts.append({"type": "refusal", "refusal": reply["refusal"]})
    if parts:
        output.append(
            {
                "id": "msg_1",
                "type": "message",
                "role": "assistant",
                "status": "completed",
                "content": parts,
            }
        )
    for call in calls_of(request, reply):
        output.append(
            {
                "id": f"fc_{call['id'][5:]}",
                "type": "function_call",
                "status": "completed",
                "call_id": call["id"],
                "name": call["name"],
                "arguments": call["arguments"],
            }
        )
    output += reply.get("items") or ()
    return {
        "id": "resp_1",
        "object": "response",
        "created_at": 1700000000,
        "model": request.get("model", "mock"),
        "status": reply.get("ended", "completed"),
        "error": reply.get("ended_error"),
        "incomplete_details": reply.get("incomplete_details"),
        "output": output,
        "parallel_tool_calls": True,
        "tool_choice": "auto",
        "tools": [],
        "usage": {
            "input_tokens": taken,
            "output_tokens": given,
            "total_tokens": taken + given,
            "input_tokens_details": {"cached_tokens": cached, "cache_write_tokens": 0},
            "output_tokens_details": {"reasoning_tokens": 0},
        },
    }


def response_events(request: Json, reply: Json) -> list[bytes]:
    full = response_of(request, reply)
    events: list[Json] = [
        {"type": "response.created", "response": {**full, "status": "in_progress", "output": []}}
    ]
    for index, item in enumerate(full["output"]):
        place = {"item_id": item["id"], "output_index": index}
        if item["type"] == "message":
            events.append(
                {
                    "type": "response.output_item.added",
                    "output_index": index,
                    "item": {**item, "content": [], "status": "in_progress"},
                }
            )
            for n, part in enumerate(item["content"]):
                where = {**place, "content_index": n}
                if part["type"] == "refusal":
                    events.append(
                        {"type": "response.refusal.delta", **where, "delta": part["refusal"]}
                    )
                    continue
                events.append(
                    {"type": "response.content_part.added", **where, "part": {**part, "text": ""}}
                )
                events += [
                    {"type": "response.output_text.delta", **where, "delta": token, "logprobs": []}
                    for token in tokens_of(reply)
                ]
                events.append(
                    {
                        "type": "response.output_text.done",
                        **where,
                        "text": part["text"],
                        "logprobs": [],
                    }
                )
                events.append({"type": "response.content_part.done", **where, "part": part})
        elif item["type"] == "function_call":
            events.append(
                {
                    "type": "response.output_item.added",
                    "output_index": index,
                    "item": {**item, "arguments": "", "status": "in_progress"},
                }
            )
            kind = "response.function_call_arguments"
            events.append({"type": f"{kind}.delta", **place, "delta": item["arguments"]})
            events.append({"type": f"{kind}.done", **place, "arguments": item["arguments"]})
        events.append({"type": "response.output_item.done", "output_index": index, "item": item})
    ended = reply.get("ended", "completed")
    events.append({"type": f"response.{ended}", "response": full})
    return [
        f"event: {e['type']}\ndata: {json.dumps({**e, 'sequence_number': n})}\n\n".encode()
        for n, e in enumerate(events)
    ]


def chat_usage(reply: Json) -> Json:
    taken, given, cached = usage_of(reply)
    return {
        "prompt_tokens": taken,
        "completion_tokens": given,
        "total_tokens": taken + given,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


def chat_calls(request: Json, reply: Json) -> list[Json]:
    return [
        {
            "id": c["id"],
            "type": "function",
            "function": {"name": c["name"], "arguments": c["arguments"]},
        }
        for c in calls_of(request, reply)
    ]


def finish_of(reply: Json) -> str:
    return str(reply.get("finish_reason") or ("tool_calls" if reply.get("tool_calls") else "stop"))


def completion_of(request: Json, reply: Json) -> Json:
    message: Json = {"role": "assistant", "content": "".join(tokens_of(reply)) or None}
    if reply.get("refusal"):
        message["refusal"] = reply["refusal"]
    if reply.get("reasoning"):
        message["reasoning_content"] = reply["reasoning"]
    if calls := chat_calls(request, reply):
        message["tool_calls"] = calls
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1700000000,
        "model": request.get("model", "mock"),
        "usage": chat_usage(reply),
        "choices": [{"index": 0, "message": message, "finish_reason": finish_of(reply)}],
    }


def chat_events(request: Json, reply: Json) -> list[bytes]:
    head = {
        "id": "chatcmpl-1",
        "object": "chat.completion.chunk",
        "created": 1700000000,
        "model": request.get("model", "mock"),
    }
    deltas: list[Json] = [{"role": "assistant", "content": ""}]
    if reply.get("reasoning"):
        deltas.append({"reasoning_content": reply["reasoning"]})
    deltas += [{"content": token} for token in tokens_of(reply)]
    if reply.get("refusal"):
        deltas.append({"refusal": reply["refusal"]})
    for n, call in enumerate(chat_calls(request, reply)):
        text = call["function"]["arguments"]
        half = len(text) // 2
        start = {"name": call["function"]["name"], "arguments": text[:half]}
        deltas.append({"tool_calls": [{**call, "index": n, "function": start}]})
        deltas.append({"tool_calls": [{"index": n, "function": {"arguments": text[half:]}}]})
    choices: list[Json] = [{"index": 0, "delta": delta, "finish_reason": None} for delta in deltas]
    choices.append({"index": 0, "delta": {}, "finish_reason": finish_of(reply)})
    lines: list[Json] = [{**head, "choices": [choice]} for choice in choices]
    if (request.get("stream_options") or {}).get("include_usage"):
        lines.append({**head, "choices": [], "usage": chat_usage(reply)})
    return [f"data: {json.dumps(line)}\n\n".encode() for line in lines] + [b"data: [DONE]\n\n"]


# What was said to it


def items_of(api: str, body: Json) -> list[Json]:
    """The conversation as Responses input items."""
    if api == "responses":
        given = body.get("input") or []
        return [{"role": "user", "content": given}] if isinstance(given, str) else list(given)
    items: list[Json] = []
    for message in body.get("messages") or []:
        if message["role"] == "tool":
            items.append(
                {
                    "type": "function_call_output",
                    "call_id": message["tool_call_id"],
                    "output": message["content"],
                }
            )
            continue
        if message.get("content") is not None and message["role"] != "system":
            items.append({"role": message["role"], "content": message["content"]})
        for call in message.get("tool_calls") or ():
            items.append({"type": "function_call", "call_id": call["id"], **call["function"]})
    return items


def last_user_turn(items: list[Json]) -> tuple[str, int]:
    """The last user message's text, and how many rounds of tool calls came after it."""
    start = max((i for i, item in enumerate(items) if item.get("role") == "user"), default=-1)
    content = items[start].get("content", "") if start >= 0 else ""
    if not isinstance(content, str):
        content = "\n".join(part.get("text", "") for part in content)
    rounds, before = 0, ""
    for item in items[start + 1 :]:
        kind = item.get("type", "")
        rounds += kind == "function_call_output" and before != kind
        before = kind
    return content, rounds


def demo_reply(api: str, body: Json, items: list[Json]) -> Json:
    """What the demo model would say."""
    from agent_server.inference.demo_reply import Offered, reply

    tools, instructions, schema = [], body.get("instructions"), None
    for tool in body.get("tools") or ():
        said = tool.get("function", tool)
        if tool.get("type") == "function":
            description = said.get("description") or ""
            tools.append(Offered(said["name"], description, said.get("parameters") or {}))
    if api == "responses":
        form = (body.get("text") or {}).get("format") or {}
        schema = form.get("schema")
    else:
        form = body.get("response_format") or {}
        schema = (form.get("json_schema") or {}).get("schema")
        first = (body.get("messages") or [{}])[0]
        instructions = first.get("content") if first.get("role") == "system" else None
    choice = body.get("tool_choice")
    answer = reply(instructions, items, tools, schema, choice if isinstance(choice, str) else None)
    if answer.calls:
        return {
            "tool_calls": [
                {"id": c.call_id, "name": c.name, "arguments": c.arguments} for c in answer.calls
            ]
        }
    return {"text": answer.text}


async def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--demo", action="store_true", help="answer as the demo model does")
    parser.add_argument("--script", help="a script, as JSON")
    options = parser.parse_args()
    server = ModelServer(demo=options.demo, host=options.host, port=options.port)
    if options.script:
        server.script(json.loads(options.script))
    async with server:
        print(server.port, flush=True)
        await asyncio.Event().wait()


if __name__ == "__main__":
    try:
        asyncio.run(main())
    except KeyboardInterrupt:
        sys.exit(0)
