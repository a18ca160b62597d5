"""A model that thinks by a rule, and a harness that replays a run from every prefix of its ledger.

Leans on the in-memory journal of ``agent_server.testing``. Refuses to know any single scenario.
"""

from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from agents import Agent, Model, ModelProvider, ModelResponse, Usage
from agents.testing import assistant_message, function_call

from agent_server.execution.ports import StepRecord, Suspend
from agent_server.inference.agent_loop import AgentLoop, AgentResult
from agent_server.settings import Settings
from agent_server.testing.journal import RecordingJournal, memory_context, prefixes

say = assistant_message


def call(name: str, arguments: dict[str, Any], call_id: str) -> Any:
    """The model's wish to call a tool."""
    return function_call(name, arguments, call_id=call_id)


Rule = Callable[[str, list[Any]], Sequence[Any] | Awaitable[Sequence[Any]]]
"""From the instructions and the input items to the output items."""


class RuleModel(Model):
    """Answers by a rule, so that it gives the same answer to the same question on replay."""

    def __init__(self, rule: Rule) -> None:
        self.rule = rule
        self.asked: list[tuple[str, list[Any]]] = []
        self.settings: list[Any] = []

    async def get_response(
        self, system_instructions: Any, input: Any, model_settings: Any, *rest: Any, **more: Any
    ) -> ModelResponse:
        items = [{"role": "user", "content": input}] if isinstance(input, str) else list(input)
        self.asked.append((system_instructions or "", items))
        self.settings.append(model_settings)
        output = self.rule(system_instructions or "", items)
        if isinstance(output, Awaitable):
            output = await output
        usage = Usage(requests=1, input_tokens=10, output_tokens=5, total_tokens=15)
        return ModelResponse(output=list(output), usage=usage, response_id="resp")

    async def respond(self, request: Any, on_text: Any) -> ModelResponse:
        """The fast door: text goes out word by word."""
        answer = await self.get_response(
            request.system_instructions, request.input, request.model_settings
        )
        for item in answer.output:
            for part in getattr(item, "content", None) or ():
                for word in part.text.split(" ") if on_text else ():
                    on_text(word)
        return answer

    def stream_response(self, *args: Any, **kwargs: Any) -> Any:
        raise AssertionError("the fast door is used")


class OneModel(ModelProvider):
    """Gives the same model under every name, and remembers the names."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.names: list[str | None] = []

    def get_model(self, model_name: str | None) -> Model:
        self.names.append(model_name)
        return self.model


def settings(**changes: Any) -> Settings:
    return Settings(_env_file=None, **{"model": "rule", "model_retries": 0, **changes})


def loop_for(rule: Rule, **options: Any) -> tuple[AgentLoop, RuleModel]:
    model = RuleModel(rule)
    knobs = options.pop("knobs", {})
    return AgentLoop(OneModel(model), settings(**knobs), **options), model


def outputs_of(items: list[Any]) -> dict[str, Any]:
    """The tool outputs in a model's input, by call id."""
    return {
        item["call_id"]: item["output"]
        for item in items
        if item.get("type") == "function_call_output"
    }


@dataclass
class Scene:
    """One way to use the SDK. ``make`` builds it afresh, as a process that starts does."""

    agent: Agent[Any]
    rule: Rule
    tool_calls: Counter[str] = field(default_factory=Counter)
    input: Any = "hi"
    context: Any = None
    options: dict[str, Any] = field(default_factory=dict)


@dataclass
class Played:
    """What came of one attempt."""

    journal: RecordingJournal
    model: RuleModel
    scene: Scene
    result: AgentResult | None = None
    error: BaseException | None = None


async def play(make: Callable[[], Scene], recorded: Sequence[StepRecord] = ()) -> Played:
    """One attempt, with what earlier ones recorded."""
    scene = make()
    loop, model = loop_for(scene.rule, **scene.options)
    ctx, journal = memory_context(recorded=recorded)
    played = Played(journal, model, scene)
    try:
        played.result = await loop.run(ctx, scene.agent, scene.input, context=scene.context)
    except Exception as error:
        played.error = error
    return played


async def replay_from_every_prefix(make: Callable[[], Scene]) -> Played:
    """Run once, then again after a crash at each boundary; what is finished is not repeated."""
    first = await play(make)
    final = {step.key: step for step in first.journal.writes}
    for held in prefixes(first.journal.writes):
        done = {step.key for step in held if step.status in ("done", "failed")}
        doubtful = [step for step in held if step.status == "started"]
        again = await play(make, held)
        expected_tools: Counter[str] = Counter()
        missing_models = 0
        for key, step in final.items():
            inside_done = any(key.startswith(f"{other}/") for other in done)
            if key in done or inside_done:
                continue
            if step.kind == "model":
                missing_models += 1
            elif step.kind == "tool":
                expected_tools[step.name] += 1
        if doubtful:
            assert isinstance(again.error, Suspend), (doubtful, again.error)
            assert again.error.waiting_for.kind == "reconciliation"
            assert not again.scene.tool_calls - expected_tools
            for step in doubtful:
                expected_tools[step.name] -= 1
            assert not again.scene.tool_calls - expected_tools, "a call in doubt was repeated"
            continue
        assert type(again.error) is type(first.error), again.error
        assert str(again.error) == str(first.error)
        if first.result is not None:
            assert again.result is not None
            assert again.result.output == first.result.output
            assert again.result.new_items == first.result.new_items
            assert again.result.last_agent == first.result.last_agent
        assert len(again.model.asked) == missing_models
        counted = Counter(
            {name: n for name, n in expected_tools.items() if name in first.scene.tool_calls}
        )
        assert again.scene.tool_calls == counted
    return first
