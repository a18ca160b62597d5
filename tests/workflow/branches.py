"""What a run's events and tasks say of each branch, and what must hold of them in any order.

Leans on the shape of paths alone: a branch is one list of nodes, and its path is what its nodes'
paths begin with. Refuses to know who carried the run out and what died on the way.
"""

import json
import re
from typing import Any

from agent_server.domain.base import JsonObject

from .drafts import Draft

ENDS = ("task.completed", "task.failed", "task.skipped")
_MOMENT = re.compile(r"20\d\d-\d\d-\d\dT[0-9:.]+(Z|\+00:00)")
_ATTEMPT = re.compile(r"@\d+$")

Branches = dict[str, list[tuple[str, str, str, Any]]]
"""Of each branch how its nodes ended, in order: path, node, event, and what it gave."""


def timeless(value: Any) -> Any:
    """``value`` with all its moments the same."""
    return json.loads(_MOMENT.sub("a moment", json.dumps(value)))


def branches_of(events: list[JsonObject]) -> Branches:
    found: Branches = {}
    for event in events:
        if event["type"] in ENDS:
            error = event.get("error")
            gave = event.get("output") if error is None else error["message"]
            entry = (event["path"], event["node"], event["type"], timeless(gave))
            found.setdefault(event["path"].rpartition(".")[0], []).append(entry)
    return found


def same_branches(one: Branches, other: Branches, draft: Draft) -> None:
    """Each branch went the same way. What was broken off may have come further in one of them; in
    a calm draft nothing is."""
    if draft.calm:
        assert one.keys() == other.keys()
    for branch in one.keys() & other.keys():
        mine, theirs = one[branch], other[branch]
        if any(node in draft.depends_on for _, node, _, _ in mine):
            # A graph: what does not depend on one another ends in any order.
            ended = {path: entry for path, *entry in mine}
            for path, *entry in theirs:
                assert path not in ended or ended[path] == entry, branch
            assert not draft.calm or len(mine) == len(theirs), branch
        else:
            upto = max(len(mine), len(theirs)) if draft.calm else min(len(mine), len(theirs))
            assert mine[:upto] == theirs[:upto], branch


def in_order(events: list[JsonObject], draft: Draft) -> None:
    """No number is missing, nothing ends twice, and each node begins after what it depends on."""
    assert [event["seq"] for event in events] == list(range(1, len(events) + 1))
    ended: dict[str, int] = {}
    begun: dict[str, int] = {}
    of: dict[tuple[str, str], list[str]] = {}
    for event in events:
        path = event.get("path", "")
        if event["type"] in ENDS:
            assert path not in ended, f"{path} ended twice"
            ended[path] = event["seq"]
            of.setdefault((path.rpartition(".")[0], event["node"]), []).append(path)
        elif event["type"] == "task.started":
            begun.setdefault(path, event["seq"])
    for (branch, node), paths in of.items():
        for needed in draft.depends_on.get(node, ()):
            for before in of.get((branch, needed), ()):
                for path in paths:
                    if path in begun:
                        assert ended[before] < begun[path], f"{path} began before {before} ended"


def scopes_of(nodes: list[JsonObject], path: str, before: str = "") -> set[str]:
    """What the paths of all nodes begin with that are undone with the one at ``path`` while its
    workflow goes on: where a failure is handled or repeated, or a branch can lose."""
    part, _, rest = path.removeprefix(before).partition(".")
    node = nodes[int(_ATTEMPT.sub("", part)) - 1]
    here = f"{before}{part}."
    if not rest:
        return set()
    if node["type"] == "workflow":  # It undoes its own.
        return scopes_of(node["workflow"]["nodes"], path, here)
    inside = f"{here}{rest.partition('.')[0]}."
    found = {here} if node["on_error"] != "fail" or "retry" in node else set()
    if node.get("on_item_error", "fail") != "fail" or {"join", "first"} & node.keys():
        found.add(inside)
    ways = [case["nodes"] for case in node.get("cases", ())] + [node.get("else", [])]
    lists = {"parallel": node.get("branches"), "branch": ways}.get(node["type"])
    inner = node["nodes"] if lists is None else lists[int(rest.partition(".")[0]) - 1]
    return found | scopes_of(inner, path, inside)


def undone(
    events: list[JsonObject], tasks: list[JsonObject], status: str, output: Any, draft: Draft
) -> None:
    """In each workflow that failed or was cancelled, what had succeeded and can be undone was, the
    last first; in one that succeeded, only what stood in something that failed or lost."""
    nodes = draft.definition["nodes"]
    states = {task["path"]: task["status"] for task in tasks}
    scopes = {t["path"]: t["status"] for t in tasks if t["kind"] == "workflow"} | {"": status}
    ended = {e["path"]: e["seq"] for e in events if e["type"] in ENDS}
    begun: dict[str, int] = {}
    for event in events:
        if event["type"] == "task.started":
            begun.setdefault(event["path"], event["seq"])
    done: dict[str, list[tuple[str, str]]] = {}
    for task in tasks:
        path = task["path"]
        if task["node"] not in draft.undone_by or task["status"] != "succeeded":
            continue
        scope = max((s for s in scopes if not s or path.startswith(f"{s}.")), key=len)
        undo = f"{_ATTEMPT.sub('', path)}!.1"
        if scopes[scope] == "succeeded":
            outermost = nodes[int(path.partition(".")[0].partition("@")[0]) - 1]["id"]
            if undo not in states:
                lost = not scope and output[outermost]["status"] == "failed"
                assert not lost, f"{path} was not undone"
                continue
            assert scopes_of(nodes, path), f"{path} was undone in a workflow that succeeded"
        assert states.get(undo) in ("succeeded", "failed"), f"{path} was not undone"
        done.setdefault(scope, []).append((path, undo))
    for pairs in done.values():
        for path, undo in pairs:
            for later, its_undo in pairs:
                if begun[later] > ended[path] and scopes_of(nodes, path) <= scopes_of(nodes, later):
                    assert ended[its_undo] < begun[undo], f"{path} was undone before {later}"
