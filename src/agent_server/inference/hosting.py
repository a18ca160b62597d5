"""Unchanged SDK agents made durable: the runner that every ``Runner.run`` of the process meets.

Leans on the SDK's own runner, which it extends. Refuses to touch a run outside a durable one:
without a place in the context, everything passes straight through.
"""

import dataclasses
from typing import Any, cast

from agents import Agent, ModelProvider, RunConfig, RunHooks, Tool, set_trace_provider
from agents.items import ModelResponse
from agents.models.multi_provider import MultiProvider
from agents.result import RunResult, RunResultStreaming
from agents.run import AgentRunner, get_default_agent_runner, set_default_agent_runner
from agents.tracing.provider import DefaultTraceProvider

from agent_server.inference.durable_run import PLACE, Place
from agent_server.inference.ledgered_model import History, LedgeredModel
from agent_server.inference.steered import Steered

_TEMPLATE = RunConfig(tool_not_found_behavior="return_error_to_model")
"""Of a run that brings no configuration. A tool that does not exist is told to the model, which
may recover within its turns."""


def install() -> None:
    """Host durable runs in this process. Call it before agents run; again is harmless.

    A trace provider without processors comes before the SDK's own is made, whose exporter would
    send traces out and costs a client and its certificates at every start.
    """
    if not isinstance(get_default_agent_runner(), DurableRunner):
        set_default_agent_runner(DurableRunner())
        set_trace_provider(DefaultTraceProvider())


async def run_at(
    place: Place,
    agent: Agent[Any],
    input: str | list[Any],
    *,
    history: History | None,
    context: Any,
    max_turns: int,
    hooks: RunHooks[Any] | None,
    steered: Steered | None = None,
) -> RunResult:
    """The outermost run of a durable one. ``history`` is what ``input`` begins with; ``steered``
    what is said into it."""
    model = LedgeredModel(place, place.run.provider, history=history, steered=steered)
    return await _PLAIN.run(
        agent,
        input,
        context=context,
        max_turns=max_turns,
        hooks=_hooked(model, hooks),
        run_config=_configured(place, model, _TEMPLATE),
    )


class DurableRunner(AgentRunner):
    """The SDK's runner; inside a durable run, every model is ledgered."""

    async def run(self, starting_agent: Agent[Any], input: Any, **kwargs: Any) -> RunResult:
        place = PLACE.get()
        if place is not None:
            place.run.check()
            kwargs.update(_nested(place, kwargs.get("run_config"), kwargs.get("hooks")))
        return await super().run(starting_agent, input, **kwargs)

    def run_streamed(
        self, starting_agent: Agent[Any], input: Any, **kwargs: Any
    ) -> RunResultStreaming:
        place = PLACE.get()
        if place is not None:
            place.run.check()
            kwargs.update(_nested(place, kwargs.get("run_config"), kwargs.get("hooks")))
        return super().run_streamed(starting_agent, input, **kwargs)


_PLAIN = AgentRunner()


def _nested(
    place: Place, given: RunConfig | dict[str, Any] | None, hooks: RunHooks[Any] | None
) -> dict[str, Any]:
    """Configuration and hooks of a run inside a durable one, each model call a step at ``place``.

    An agent as a tool inherits the configuration of the run around it, its ledgered model
    included; a configuration of the user's own keeps its model and its provider.
    """
    config = RunConfig(**given) if isinstance(given, dict) else given or _TEMPLATE
    outer = config.model
    if isinstance(outer, LedgeredModel):
        model = LedgeredModel(place, outer.provider, outer.override)
    else:
        model = LedgeredModel(place, _provider(place, config), outer)
    return {"run_config": _configured(place, model, config), "hooks": _hooked(model, hooks)}


def _configured(place: Place, model: LedgeredModel, base: RunConfig) -> RunConfig:
    """``base`` with ``model`` for every agent."""
    return dataclasses.replace(
        base,
        model=model,
        model_provider=model.provider,
        tracing_disabled=base.tracing_disabled or place.run.tracing_disabled,
    )


def _hooked(model: LedgeredModel, hooks: RunHooks[Any] | None) -> RunHooks[Any]:
    """``hooks``, and ``model`` told which agent it answers for."""
    return _Hooks(model) if hooks is None else _ForwardingHooks(model, hooks)


def _provider(place: Place, config: RunConfig) -> ModelProvider:
    """The run's own provider, if its configuration brings one; else ours.

    A ``MultiProvider`` counts as none, since the SDK puts one into every configuration.
    """
    if type(config.model_provider) is MultiProvider:
        return place.run.provider
    return config.model_provider


class _Hooks(RunHooks[Any]):
    def __init__(self, model: LedgeredModel) -> None:
        self._model = model

    async def on_llm_start(
        self, context: Any, agent: Agent[Any], system_prompt: str | None, input_items: list[Any]
    ) -> None:
        self._model.agent, self._model.context = agent, context


class _ForwardingHooks(_Hooks):
    """The user's own hooks behind ours."""

    def __init__(self, model: LedgeredModel, hooks: RunHooks[Any]) -> None:
        super().__init__(model)
        self._hooks = hooks

    async def on_llm_start(
        self, context: Any, agent: Agent[Any], system_prompt: str | None, input_items: list[Any]
    ) -> None:
        self._model.agent, self._model.context = agent, context
        await self._hooks.on_llm_start(context, agent, system_prompt, input_items)

    async def on_llm_end(self, context: Any, agent: Agent[Any], response: ModelResponse) -> None:
        await self._hooks.on_llm_end(context, agent, response)

    async def on_agent_start(self, context: Any, agent: Any) -> None:
        await self._hooks.on_agent_start(context, agent)

    async def on_agent_end(self, context: Any, agent: Any, output: Any) -> None:
        await self._hooks.on_agent_end(context, agent, output)

    async def on_handoff(self, context: Any, from_agent: Any, to_agent: Any) -> None:
        await self._hooks.on_handoff(context, from_agent, to_agent)

    async def on_tool_start(self, context: Any, agent: Any, tool: Tool) -> None:
        await self._hooks.on_tool_start(context, agent, tool)

    async def on_tool_end(self, context: Any, agent: Any, tool: Tool, result: object) -> None:
        await self._hooks.on_tool_end(context, agent, tool, cast(Any, result))
