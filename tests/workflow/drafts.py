"""Random workflows: every cheap type of node, with failures, retries, races and compensation.

Leans on whoever chooses: hypothesis, which makes a failing one small, or a seed. Refuses to draft
what would end differently by chance: in a race of a draft that is not ``racing`` one branch alone
can win. Only the moments until which a node waited differ.
"""

from dataclasses import dataclass, field
from random import Random
from typing import Any, Protocol

from hypothesis import strategies as st

from agent_server.domain.base import JsonObject

PAST = "2020-01-31T09:00:00Z"
NEVER = "a signal that nobody sends"


class Choices(Protocol):
    """Whoever chooses."""

    def pick(self, *options: Any) -> Any: ...
    def number(self, least: int, most: int) -> int: ...


class Drawn:
    """Hypothesis chooses."""

    def __init__(self, draw: Any) -> None:
        self._draw = draw

    def pick(self, *options: Any) -> Any:
        return self._draw(st.sampled_from(options))

    def number(self, least: int, most: int) -> int:
        return int(self._draw(st.integers(least, most)))


class Seeded:
    """A seed chooses: the same each time."""

    def __init__(self, seed: int) -> None:
        self._random = Random(seed)

    def pick(self, *options: Any) -> Any:
        return self._random.choice(options)

    def number(self, least: int, most: int) -> int:
        return self._random.randint(least, most)


@dataclass
class Draft:
    """One workflow, and what a test must know of it.

    ``racing``: it may depend on who is faster who wins. ``calm``: no failure breaks anything off,
    so that the same tasks end in each branch in whatever order. ``waits``: with nodes that stand
    still for a moment, which a test without a clock cannot have.
    """

    choose: Choices
    racing: bool = False
    calm: bool = False
    waits: bool = True
    depends_on: dict[str, list[str]] = field(default_factory=dict)
    """By id, for the nodes of lists that are graphs."""
    undone_by: dict[str, str] = field(default_factory=dict)
    """By id, the one node that undoes it."""
    definition: JsonObject = field(default_factory=dict)
    _ids: int = 0

    def workflow(self, depth: int = 2) -> JsonObject:
        """The definition; its output tells how each of its outermost nodes ended."""
        self.definition = self._definition("w", depth, {"x": "0"})
        return self.definition

    def _definition(self, name: str, depth: int, variables: JsonObject) -> JsonObject:
        nodes = self.nodes(depth, [])
        told = {n["id"]: "{{ nodes." + n["id"] + " }}" for n in nodes}
        output = {"x": "{{ vars.x }}", **told}
        return {"name": name, "variables": variables, "nodes": nodes, "output": output}

    def _seldom(self, one_in: int) -> bool:
        return self.choose.number(1, one_in) == one_in

    def _new_id(self) -> str:
        self._ids += 1
        return f"n{self._ids}"

    def nodes(self, depth: int, seen: list[str]) -> list[JsonObject]:
        """One list, in which ``seen`` may be looked at."""
        graph = self.choose.pick(False, True)
        made: list[JsonObject] = []
        for _ in range(self.choose.number(1, 4)):
            visible = list(seen)
            depends_on = None
            if graph:
                depends_on = [n["id"] for n in made if self.choose.pick(False, True)]
                visible += self._before(made, depends_on)
            else:
                visible += [n["id"] for n in made]
            node = self.node(depth, visible)
            if depends_on is not None:
                node["depends_on"] = depends_on
                self.depends_on[node["id"]] = depends_on
            made.append(node)
        for index, node in enumerate(made[:-1]):
            if self._seldom(5):
                node["on_error"] = made[self.choose.number(index + 1, len(made) - 1)]["id"]
        return made

    def _before(self, made: list[JsonObject], names: list[str]) -> list[str]:
        found = set(names)
        for node in reversed(made):
            if node["id"] in found:
                found.update(node["depends_on"])
        return sorted(found)

    def node(self, depth: int, seen: list[str]) -> JsonObject:
        """One node, with nodes inside it down to ``depth``."""
        id_ = self._new_id()
        kinds = ["tool", "tool", "tool", "set", "action"]
        if self.waits:
            kinds.append("wait")
        if depth:
            kinds += ["parallel", "branch", "map", "loop", "workflow"]
            kinds += [] if self.calm else ["race"]
        kind = self.choose.pick(*kinds)
        node: JsonObject = {"id": id_, "type": "parallel" if kind == "race" else kind}
        node["on_error"] = "continue" if self.calm else self.choose.pick("fail", "continue")
        if self._seldom(6):
            node["retry"] = {"max_attempts": 2, "backoff_s": self.choose.pick(0, 0.01)}
        if self._seldom(8):
            node["when"] = "vars.x != 'n1'"
        if self._seldom(8):
            node["output"] = "x"
        if self._seldom(8) and kind not in ("set", "wait"):
            node["timeout_s"] = 600
        looked_at = (f"[nodes.{name}.status, nodes.{name}.output]" for name in seen)
        used = self.choose.pick("vars.x", *looked_at)
        getattr(self, f"_{kind}")(node, depth, seen, "{{ " + used + " }}")
        if kind in ("tool", "action", "workflow") and self._seldom(4):
            undo = self._new_id()
            value = "{{ ['undo', nodes." + id_ + ".output] }}"
            how = {"tool": self.choose.pick("echo", "echo", "fail"), "arguments": {"value": value}}
            node["compensate"] = [{"id": undo, "type": "tool", **how}]
            self.undone_by[id_] = undo
        return node

    def _tool(self, node: JsonObject, depth: int, seen: list[str], used: str) -> None:
        node["tool"] = self.choose.pick("echo", "echo", "pay", "fail", "fail_until")
        node["arguments"] = {"value": used, "attempt": 2}

    def _action(self, node: JsonObject, depth: int, seen: list[str], used: str) -> None:
        node["action"] = "tool"
        name = self.choose.pick("echo", "echo", "fail")
        node["parameters"] = {"name": name, "arguments": {"value": used}}

    def _set(self, node: JsonObject, depth: int, seen: list[str], used: str) -> None:
        named = "{{ str(vars.x) + '" + node["id"] + "' }}"
        node["variables"] = {"x": self.choose.pick(node["id"], named, used)}

    def _wait(self, node: JsonObject, depth: int, seen: list[str], used: str) -> None:
        how = self.choose.pick("past", "moment", "moment", "late")
        if how == "past":
            node["until"] = PAST
        elif how == "moment":
            node["duration_s"] = self.choose.pick(0, 0.005, 0.02)
        else:
            node |= {"signal": NEVER, "timeout_s": 0.01}

    def _parallel(self, node: JsonObject, depth: int, seen: list[str], used: str) -> None:
        count = self.choose.number(1, 3)
        node["branches"] = [self.nodes(depth - 1, seen) for _ in range(count)]
        node["max_parallel"] = self.choose.pick(None, 1, 2)
        if self.racing:
            node |= self.choose.pick({"join": "any"}, {"first": count}, {"first": 1})

    def _race(self, node: JsonObject, depth: int, seen: list[str], used: str) -> None:
        if self.racing:
            self._parallel(node, depth, seen, used)
            return
        winner = {**self.node(depth - 1, seen), "on_error": "continue"}
        ways = [[winner]]
        for _ in range(self.choose.number(1, 2)):
            fails = {"id": self._new_id(), "type": "tool", "tool": "fail"}
            lasts = {"id": self._new_id(), "type": "wait", "signal": NEVER}
            if self.waits:
                ways.append(
                    self.choose.pick([fails], [lasts], [fails | {"on_error": "continue"}, lasts])
                )
            else:
                ways.append([fails])
        turn = self.choose.number(0, len(ways) - 1)
        node["branches"] = ways[turn:] + ways[:turn]
        node |= self.choose.pick({"join": "any"}, {"first": 1})

    def _branch(self, node: JsonObject, depth: int, seen: list[str], used: str) -> None:
        when = self.choose.pick("vars.x == vars.x", "vars.x == 7", "len(str(vars.x)) > 2")
        node["cases"] = [{"when": when, "nodes": self.nodes(depth - 1, seen)}]
        node["cases"].append({"when": "len(str(vars.x)) < 4", "nodes": [self.node(0, seen)]})
        node["choose"] = self.choose.pick("first", "all")
        node["else"] = self.nodes(depth - 1, seen)

    def _map(self, node: JsonObject, depth: int, seen: list[str], used: str) -> None:
        node["over"] = list(range(self.choose.number(0, 3)))
        node["max_parallel"] = self.choose.pick(None, 1, 2)
        tolerant = ("continue", "drop")
        node["on_item_error"] = self.choose.pick(*tolerant, *(() if self.calm else ("fail",)))
        if node["on_item_error"] != "fail":
            node["max_failures"] = self.choose.pick(None, 1)
        node["nodes"] = self.nodes(depth - 1, seen)

    def _loop(self, node: JsonObject, depth: int, seen: list[str], used: str) -> None:
        rounds = self.choose.number(0, 2)
        node |= self.choose.pick(
            {"while": f"iteration <= {rounds}"}, {"until": f"iteration >= {rounds}"}
        )
        node["max_iterations"] = self.choose.pick(1, 2, 2)
        node["nodes"] = self.nodes(depth - 1, seen)

    def _workflow(self, node: JsonObject, depth: int, seen: list[str], used: str) -> None:
        inner = self._definition("inner", depth - 1, {"x": "{{ inputs.v }}"})
        node["workflow"] = inner
        node["input"] = {"v": used}


@st.composite
def drafts(draw: Any, **kind: Any) -> JsonObject:
    """Definitions that hypothesis chose."""
    return Draft(Drawn(draw), **kind).workflow()


def seeded(seed: int, **kind: Any) -> tuple[Draft, JsonObject]:
    """A definition that ``seed`` chose, and what is to be known of it."""
    draft = Draft(Seeded(seed), **kind)
    return draft, draft.workflow()
