"""What the demo model says: plans, tool calls and answers from the words of the conversation.

Leans on ``demo_fill`` for values that fit a schema. Pure: the same conversation gives the same
reply, and nothing but the instructions, items, tools and schema that any model sees is looked
at. Refuses to know the SDK's objects, so that a test server can speak with the same voice.
"""

import ast
import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from agent_server.inference.demo_fill import Filler, resolve

LABEL = "[demo model]"
MAX_CALLS = 2

_EXPRESSION = re.compile(
    r"(?<![\w.])[(\-]*\d[\d.]*(?:\s*(?:\*\*|//|[-+*/%^])\s*[(\-]*\d[\d.]*\)*)+"
)
_DATE = re.compile(r"\d{4}-\d{1,2}-\d{1,2}|\d{1,2}/\d{1,2}/\d{2,4}")
_CLOCK_WORDS = re.compile(r"\b(time|date|today|now|clock|o'clock|weekday|day is it)\b", re.I)
_COUNT_WORDS = re.compile(
    r"\b(statistics?|word count|how many (?:words|characters|sentences|letters)|"
    r"count (?:the )?(?:words|characters|sentences|letters)|how long is)\b",
    re.I,
)
_LISTED = re.compile(r"^[ \t]*[-*][ \t]+(tool|agent)[ \t]+[`'\"]?([\w.-]+)", re.I | re.M)
_GOAL = re.compile(r"^\s*(?:the )?goal\s*:\s*(.+?)(?=\n\s*\n|\Z)", re.I | re.M | re.S)
_RESULTS = re.compile(r"^(?:results?|outputs?)\b[^\n]*:[ \t]*$", re.I | re.M)
_RESULT = re.compile(r"<result\b[^>]*?task=\"([^\"]*)\"[^>]*>\s*(.*?)\s*</result>", re.S)
_FRAME = re.compile(
    r"^(?:expected (?:result|output)|role to take|the larger goal|context)\b[^\n]*:", re.I | re.M
)
_SCHEMA_ASKED = re.compile(r"JSON Schema:\s*(?=\{)")
_OPTIONS = re.compile(
    r"\b(?:compare|between|choose|either|decide)\b[^:.?]*?[: ]\s*(.+)", re.I | re.S
)
_SEVERAL = re.compile(
    r"\bcompare\s+((?:two|three|four|five|six|several|some|\d+)\s+.+?)"
    r"(?=,?\s+and\s+(?:recommend|choose|pick|say|tell|decide|explain)\b|[.?!]|$)",
    re.I | re.S,
)
_WORD = re.compile(r"[A-Za-zÀ-ÿ]{2,}")
_BUILDS_ON = "What this builds on:"
_STOP = frozenset(
    "about after also answer because before being could does doing each every from given gives "
    "have having into make more most need other please return returns should some such than that "
    "their them then there these they this those tool uses using value what when where which "
    "while will with would your function string number input output name text".split()
)


@dataclass(frozen=True)
class Offered:
    """A tool as a model sees it."""

    name: str
    description: str
    parameters: Mapping[str, Any]


@dataclass(frozen=True)
class Call:
    call_id: str
    name: str
    arguments: str


@dataclass(frozen=True)
class Reply:
    """Either calls or a text."""

    text: str = ""
    calls: tuple[Call, ...] = ()


def reply(
    instructions: str | None,
    items: Sequence[Mapping[str, Any]],
    tools: Sequence[Offered] = (),
    schema: Mapping[str, Any] | None = None,
    tool_choice: str | None = None,
) -> Reply:
    """The next turn of the conversation ``items`` (Responses input items)."""
    talk = _Talk(items)
    if schema is not None and _is_plan(schema):
        return Reply(text=_plan(talk.said, (instructions or "") + "\n" + talk.said, schema))
    if tools and tool_choice != "none" and not talk.outputs:
        calls = _calls(talk, tools, tool_choice)
        if calls:
            return Reply(calls=calls)
    wanted = schema or _schema_in(talk.said)
    if wanted is not None:
        filler = Filler(talk.task, free_text=_sentence(talk))
        return Reply(text=json.dumps(filler.value(wanted), ensure_ascii=False))
    return Reply(text=_answer(talk))


class _Talk:
    """The conversation since the last thing a user said."""

    def __init__(self, items: Sequence[Mapping[str, Any]]) -> None:
        self.items = items
        start = max((i for i, item in enumerate(items) if item.get("role") == "user"), default=-1)
        self.said = text_of(items[start].get("content")) if start >= 0 else ""
        head = _RESULTS.search(self.said)
        before = self.said[: head.start()] if head else self.said
        frame = _FRAME.search(before)
        self.framed = bool(frame or head)
        """Whether the message is a task of a larger piece of work."""
        task = (before[: frame.start()] if frame else before).strip() or self.said
        self.task = task.split("Answer with JSON alone")[0].strip()
        self.earlier = _earlier(self.said[head.end() :]) if head else []
        names: dict[str, str] = {}
        asked: dict[str, str] = {}
        self.outputs: list[tuple[str, str, str]] = []
        for item in items[start + 1 :]:
            call_id = str(item.get("call_id", ""))
            if item.get("type") == "function_call":
                names[call_id] = str(item.get("name", "tool"))
                asked[call_id] = str(item.get("arguments", ""))
            elif item.get("type") == "function_call_output":
                output = text_of(item.get("output"))
                self.outputs.append((names.get(call_id, "tool"), asked.get(call_id, ""), output))


def _earlier(text: str) -> list[str]:
    """What earlier tasks gave, a line for each."""
    plain = text.replace(LABEL, "")
    tagged = [
        f"{name}: {_short(value.split(_BUILDS_ON)[0], 300)}"
        for name, value in _RESULT.findall(plain)
    ]
    return tagged or ([_short(plain, 1200)] if plain.strip() else [])


def text_of(content: Any) -> str:
    """The text of a message's content, or of a tool's output."""
    if isinstance(content, str):
        return content
    if isinstance(content, Iterable) and not isinstance(content, Mapping):
        parts = [p.get("text") or p.get("refusal") or "" for p in content if isinstance(p, Mapping)]
        return "\n".join(part for part in parts if part)
    return "" if content is None else json.dumps(content, ensure_ascii=False, default=str)


def identity(items: Sequence[Mapping[str, Any]], *more: Any) -> str:
    """24 hexadecimal digits that name this point of this conversation."""
    text = json.dumps([list(items), *more], sort_keys=True, default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:24]


# Tool calls


def _calls(talk: _Talk, tools: Sequence[Offered], tool_choice: str | None) -> tuple[Call, ...]:
    text = talk.task
    chosen: list[tuple[Offered, dict[str, Any]]] = []
    for tool in tools:
        hints = _hints(tool, text)
        if hints is not None:
            chosen.append((tool, hints))
    forced = tool_choice not in (None, "auto", "none")
    if forced:
        named = [tool for tool in tools if tool.name == tool_choice]
        if named:
            chosen = [(named[0], _hints(named[0], text) or {})]
        elif not chosen:
            chosen = [(tools[0], {})]
    # What hands the conversation over goes alone: beside it, another call would be lost.
    leading = [pair for pair in chosen if pair[0].name.startswith("transfer_to_")]
    chosen = leading[:1] or chosen[:MAX_CALLS]
    chosen = [(tool, {**_named(tool, text), **hints}) for tool, hints in chosen]
    return tuple(
        Call(
            "call_" + identity(talk.items, index, tool.name),
            tool.name,
            json.dumps(Filler(text, hints=hints).object(tool.parameters), ensure_ascii=False),
        )
        for index, (tool, hints) in enumerate(chosen)
    )


def _hints(tool: Offered, text: str) -> dict[str, Any] | None:
    """Arguments that the text gives for ``tool``, or None if the tool does not fit it."""
    name = tool.name.lower()
    if name == "calculator":
        expression = find_expression(text)
        return None if expression is None else {"expression": expression}
    if name in ("current_time", "clock"):
        return {"timezone": "UTC"} if _CLOCK_WORDS.search(text) else None
    if name == "text_statistics":
        return {"text": text[:2000]} if _COUNT_WORDS.search(text) else None
    words = {word.lower() for word in _WORD.findall(text)}
    in_name = {w for w in re.split(r"[_\W\d]+", name) if len(w) > 2 and w not in _STOP}
    in_name -= {"transfer", "get", "set", "run", "ask", "call"}
    if in_name & words or any(_akin(a, b) for a in in_name for b in words):
        return {}
    described = {w.lower() for w in _WORD.findall(tool.description) if len(w) > 4} - _STOP
    return {} if len(described & words) >= 2 else None


def _named(tool: Offered, text: str) -> dict[str, Any]:
    """Optional arguments that the text names, as in ``under the key ana/flight``."""
    optional = set(tool.parameters.get("properties") or ()) - set(
        tool.parameters.get("required") or ()
    )
    found = {name: re.search(rf"\b{re.escape(name)}[ =:]+([\w/.-]*\w)", text) for name in optional}
    return {name: match.group(1) for name, match in found.items() if match}


def _akin(one: str, other: str) -> bool:
    """True for forms of one word, such as ``invoice`` and ``invoices``."""
    short, long = sorted((one, other), key=len)
    return len(short) > 3 and len(long) - len(short) <= 3 and long.startswith(short)


def find_expression(text: str) -> str | None:
    """The longest arithmetic expression in ``text`` whose parentheses match."""
    found = _EXPRESSION.findall(_DATE.sub(" ", text))
    fair = [_balanced(expression.strip().rstrip(".")) for expression in found]
    return max((e for e in fair if e), key=len, default=None)


def _balanced(expression: str) -> str:
    while expression.count(")") > expression.count("(") and expression.endswith(")"):
        expression = expression[:-1]
    while expression.count("(") > expression.count(")") and expression.startswith("("):
        expression = expression[1:]
    return expression if expression.count("(") == expression.count(")") else ""


# Plans


def _is_plan(schema: Mapping[str, Any]) -> bool:
    tasks = resolve((schema.get("properties") or {}).get("tasks"), schema)
    return tasks.get("type") == "array"


def _plan(said: str, everything: str, schema: Mapping[str, Any]) -> str:
    """A plan for the goal in ``said``: some tasks side by side, then what builds on them."""
    goal = _goal(said)
    tools = {name for kind, name in _LISTED.findall(everything) if kind.lower() == "tool"}
    agents = [name for kind, name in _LISTED.findall(everything) if kind.lower() == "agent"]
    taken = set(re.findall(r"^- ([\w-]+): ", said, re.M))
    subject = goal.rstrip(".?!")
    options = _options(goal)
    weights = (40, 35, 25)
    sides: list[tuple[str, str, tuple[str, ...]]]
    if options:
        sides = [
            (f"option{n}", f"Collect what speaks for and against {option}. The goal: {goal}", ())
            for n, option in enumerate(options, 1)
        ]
    else:
        several = _SEVERAL.search(goal)
        what = f"list {several.group(1)}, and" if several else "collect"
        text = f"As of today's date, {what} what is known about: {subject}"
        sides = [("facts", text, ("current_time",))]
    weighing = f"({weights[0]} + {weights[1]} + {weights[2]}) / 100"
    sides.append(
        (
            "criteria",
            f"Name three criteria for a good result and check that their weights {weighing} make 1. "
            f"Count the words of the goal: {goal}",
            ("calculator", "text_statistics"),
        ),
    )
    score = "4 * 0.40 + 3 * 0.35 + 5 * 0.25"
    names = _fresh([side[0] for side in sides] + ["score", "answer"], taken)
    ids = [names[side[0]] for side in sides]
    drafts: list[tuple[str, str, tuple[str, ...], list[str], str]] = [
        (names[key], text, wants, [], "A short list.") for key, text, wants in sides
    ]
    drafts.append(
        (
            names["score"],
            f"Score the leading possibility against the criteria: {score}",
            ("calculator",),
            ids,
            "One number and what it stands for.",
        )
    )
    drafts.append(
        (
            names["answer"],
            f"Write the answer, with its reasons: {goal}",
            (),
            [*ids, names["score"]],
            "The answer to the goal.",
        )
    )
    item = resolve(schema["properties"]["tasks"], schema).get("items", {})
    tasks = []
    for task_id, text, wants, needs, expected in drafts:
        agent = next((a for a in agents if _mentions(goal, a)), None) if not wants else None
        hints: dict[str, Any] = {
            "id": task_id,
            "description": text,
            "tools": [tool for tool in wants if tool in tools],
            "depends_on": needs,
            "expected_output": expected,
            "on_failure": "retry",
            "agent": agent,
            "when": None,
        }
        tasks.append(_fitted(item, schema, hints))
    plan = Filler(goal, hints={"tasks": tasks, "actions": []}).object(schema)
    return json.dumps(plan, ensure_ascii=False)


def _fitted(item: Any, schema: Mapping[str, Any], hints: dict[str, Any]) -> dict[str, Any]:
    """``hints`` as far as the task's schema knows them, and whatever else it requires."""
    resolved = resolve(item, schema)
    known = resolved.get("properties") or {}
    if not known:
        return hints
    rooted = {**resolved, "$defs": schema.get("$defs", {})}
    filled = Filler(hints["description"]).object(rooted)
    return {**filled, **{name: value for name, value in hints.items() if name in known}}


def _goal(said: str) -> str:
    found = _GOAL.search(said)
    text = found.group(1) if found else said.strip().split("\n\n")[0]
    return " ".join(text.split())[:1000] or "the goal"


def _options(goal: str) -> list[str]:
    """The things a goal names to choose between: ``A, B or C``, ``A vs B``."""
    found = _OPTIONS.search(goal)
    if found is None and not re.search(r"\bvs\b|\bversus\b", goal, re.I):
        return []
    listed = re.split(
        r"\.|\?|;| and (?:recommend|choose|pick|say|tell|decide|explain)\b",
        found.group(1) if found else goal.split(":")[-1],
    )[0]
    parts = re.split(r"\s*,\s*(?:and |or )?|\s+(?:or|vs\.?|versus|and)\s+", listed, flags=re.I)
    options = [part.strip(" :'\"") for part in parts]
    options = [option for option in options if 1 < len(option) <= 60]
    return options[:4] if len(options) > 1 else []


def _fresh(keys: Sequence[str], taken: set[str]) -> dict[str, str]:
    """An id for each key that no finished task has."""
    names: dict[str, str] = {}
    for key in keys:
        name, n = key, 2
        while name in taken:
            name, n = f"{key}-{n}", n + 1
        names[key] = name
    return names


def _mentions(text: str, name: str) -> bool:
    words = {word.lower() for word in _WORD.findall(text)}
    return any(part in words for part in re.split(r"[\W_]+", name.lower()) if len(part) > 3)


# Answers


def _schema_in(said: str) -> Mapping[str, Any] | None:
    """The JSON Schema that the message itself asks the answer to fit."""
    for found in _SCHEMA_ASKED.finditer(said):
        try:
            value, _ = json.JSONDecoder().raw_decode(said[found.end() :])
        except ValueError:
            continue
        if isinstance(value, dict):
            return value
    return None


def _answer(talk: _Talk) -> str:
    if not talk.said.strip():
        return f"{LABEL} There is nothing to answer yet: send me a message."
    if not talk.outputs and not talk.framed:
        return (
            f"{LABEL} Hello! You said: “{_short(talk.task, 300)}”. I am a stand-in without knowledge of "
            "my own: I plan, call tools and pass results on, always in the same way. Set "
            "OPENAI_API_KEY, or OPENAI_BASE_URL, for answers from a real model."
        )
    lines = [f"{LABEL} {_short(talk.task, 300)}"]
    if talk.outputs:
        lines += ["", "What the tools gave:"]
        for name, arguments, output in talk.outputs:
            told = _contents(output)
            lines.append(
                f"- {name} {_short(arguments, 60)} → {'' if told else _short(output, 300)}"
            )
            lines += [f"  - {line}" for line in told]
    if talk.earlier:
        lines += ["", _BUILDS_ON, *(f"- {line}" for line in talk.earlier)]
    if not talk.outputs and not talk.earlier:
        lines.append("(A real model would say more here.)")
    return "\n".join(lines)


def _contents(output: str) -> list[str]:
    """The things that a tool found, a line each, where it gave a list with ``content``."""
    try:
        value = ast.literal_eval(output)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return []
    lists = [v for v in value.values() if isinstance(v, list)] if isinstance(value, dict) else []
    things = [t for found in lists for t in found if isinstance(t, dict) and "content" in t]
    return [
        _short(str(thing["content"]), 160) + (f" ({thing['source']})" if "source" in thing else "")
        for thing in things[:MAX_CALLS]
    ]


def _sentence(talk: _Talk) -> str:
    found = "; ".join(_short(output, 100) for _, _, output in talk.outputs)
    return f"{LABEL} {_short(talk.task, 160)}" + (f" — {found}" if found else "")


def _short(text: str, limit: int) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= limit else flat[: limit - 1].rstrip() + "…"
