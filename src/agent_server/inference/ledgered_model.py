"""Every model call of a durable run as a step of the ledger.

Leans on the SDK's ``Model``, on ``models.respond`` and on the journal's port. Refuses to know
which provider answers and how the journal stores: it asks once, records the answer, and gives
the recorded answer on replay without events.
"""

import json
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from decimal import Decimal
from hashlib import sha256
from typing import Any, cast

from agents import (
    AgentOutputSchemaBase,
    Handoff,
    Model,
    ModelResponse,
    ModelSettings,
    ModelTracing,
    RunContextWrapper,
    Tool,
)
from agents.agent import Agent as SdkAgent
from agents.items import TResponseInputItem, TResponseOutputItem, TResponseStreamEvent
from agents.models.interface import ModelProvider
from agents.retry import ModelRetryAdvice, ModelRetryAdviceRequest
from openai._models import construct_type
from openai.types.responses import (
    Response,
    ResponseCompletedEvent,
    ResponseFunctionToolCall,
    ResponseOutputItem,
    ResponseOutputMessage,
    ResponseReasoningItem,
    ResponseTextDeltaEvent,
    ResponseUsage,
)
from openai.types.responses.response_prompt_param import ResponsePromptParam
from pydantic import BaseModel, ValidationError
from pydantic_core import to_jsonable_python

from agent_server.domain.base import JsonObject
from agent_server.domain.errors import ModelIncomplete, error_info
from agent_server.domain.events import MessageCompleted, ReasoningCompleted
from agent_server.domain.options import RunOptions
from agent_server.domain.runs import Usage
from agent_server.execution.ephemeral import add_usage
from agent_server.execution.ports import NO_USAGE, StepRecord, Suspend
from agent_server.inference.approvals import foresee
from agent_server.inference.attachments import attach, check_links
from agent_server.inference.audit import AUDIT
from agent_server.inference.counting import InputCounted, input_tokens
from agent_server.inference.durable_run import Place
from agent_server.inference.estimate import estimate
from agent_server.inference.ledgered_tool import instrument
from agent_server.inference.models import ModelRequest, make_usage, respond, retrying
from agent_server.inference.steered import Steered
from agent_server.inference.tailored import OverDefaults, model_defaults, sets_nothing

Items = list[TResponseInputItem]


class History:
    """The part of a run's input that its session already holds, as the first items of it."""

    def __init__(self, session_id: str, items: Sequence[JsonObject]) -> None:
        self.session_id = session_id
        self.items = items


class LedgeredModel(Model):
    """Stands in for every model of one ``Runner.run`` inside a durable run.

    It is the run configuration's model, so it answers for each agent that becomes active;
    ``agent`` and ``context`` are set before each call by the run's hooks. ``override`` is a model that the run's
    own configuration named for all agents. One instance is never used by two calls at once.
    """

    def __init__(
        self,
        place: Place,
        provider: ModelProvider,
        override: str | Model | None = None,
        history: History | None = None,
        steered: Steered | None = None,
    ) -> None:
        self.agent: SdkAgent[Any] | None = None
        self.context: RunContextWrapper[Any] | None = None
        self.override = override
        self.provider = provider
        self._place = place
        self._history = history
        self._steered = steered
        self._given: Items = []
        self._call_ids: dict[str, int] = {}
        self._asked: Items = []
        self._asker = ""
        self._asked_hash = sha256()
        self._asked_key: str | None = None
        self._instructions: str | None = None
        self._question: JsonObject = {}
        self._digest = ""

    async def get_response(
        self,
        system_instructions: str | None,
        input: str | Items,
        model_settings: ModelSettings,
        tools: list[Tool],
        output_schema: AgentOutputSchemaBase | None,
        handoffs: list[Handoff[Any, Any]],
        tracing: ModelTracing,
        *,
        previous_response_id: str | None,
        conversation_id: str | None,
        prompt: ResponsePromptParam | None,
    ) -> ModelResponse:
        request = ModelRequest(
            system_instructions,
            input,
            model_settings,
            tools,
            output_schema,
            handoffs,
            tracing,
            previous_response_id,
            conversation_id,
            prompt,
        )
        return await self._answer(request)

    async def stream_response(
        self,
        system_instructions: str | None,
        input: str | Items,
        model_settings: ModelSettings,
        tools: list[Tool],
        output_schema: AgentOutputSchemaBase | None,
        handoffs: list[Handoff[Any, Any]],
        tracing: ModelTracing,
        *,
        previous_response_id: str | None,
        conversation_id: str | None,
        prompt: ResponsePromptParam | None,
    ) -> AsyncIterator[TResponseStreamEvent]:
        """For a user's own ``Runner.run_streamed``: the answer at once, as two events.

        The run's readers get each piece as it comes, by the journal.
        """
        answer = await self.get_response(
            system_instructions,
            input,
            model_settings,
            tools,
            output_schema,
            handoffs,
            tracing,
            previous_response_id=previous_response_id,
            conversation_id=conversation_id,
            prompt=prompt,
        )
        text = text_of(answer)
        if text:
            yield ResponseTextDeltaEvent.model_construct(
                type="response.output_text.delta",
                sequence_number=0,
                output_index=0,
                content_index=0,
                item_id="",
                delta=text,
                logprobs=[],
            )
        yield ResponseCompletedEvent.model_construct(
            type="response.completed", sequence_number=1, response=_as_response(answer)
        )

    def get_retry_advice(self, request: ModelRetryAdviceRequest) -> ModelRetryAdvice | None:
        return self._resolve()[0].get_retry_advice(request)

    def _supports_default_prompt_cache_key(self) -> bool:
        supports = getattr(self._resolve()[0], "_supports_default_prompt_cache_key", None)
        return bool(supports()) if callable(supports) else False

    async def _cleanup_on_run_end(self, owner: object) -> None:
        if isinstance(self.override, Model):
            await self.override._cleanup_on_run_end(owner)
        elif self.agent is not None and isinstance(self.agent.model, Model):
            await self.agent.model._cleanup_on_run_end(owner)

    def _resolve(self) -> tuple[Model, str]:
        """The model that answers for the active agent, and its name."""
        chosen = self.override or (self.agent.model if self.agent else None)
        if isinstance(chosen, Model):
            return chosen, str(getattr(chosen, "model", type(chosen).__name__))
        name = chosen or self._place.run.default_model
        return self.provider.get_model(name), name

    def _settings(self, given: ModelSettings, name: str) -> ModelSettings:
        """``given``, with the defaults of the model ``name`` where its agent set nothing.

        The SDK does this by the name in its run configuration, which holds this object instead.
        """
        agent = self.agent
        if agent is None or isinstance(self.override or agent.model, Model):
            return given
        if not isinstance(agent.model_settings, OverDefaults) and not sets_nothing(agent):
            return given
        return model_defaults(name).resolve(given)

    async def _answer(self, request: ModelRequest) -> ModelResponse:
        run = self._place.run
        run.check()
        instrument(run, request.tools)
        agent = self.agent.name if self.agent is not None else ""
        items = request.input
        if isinstance(items, str):
            items = [{"role": "user", "content": items}]
        if not self._given or items != self._given or agent != self._asker:
            self._given = items
            if self._steered is not None:
                items = await self._steered.next_input(items, self.context)
            self._describe(items, agent, request.system_instructions)
        if self._steered is not None:
            request = replace(request, input=self._asked)
        asked, digest = self._question, self._digest
        key, earlier = self._place.scope.model_call(digest, agent)
        self._asked_key = key
        audit = AUDIT.get()
        if audit is not None:
            now = StepRecord(key=key, kind="model", name="", agent=agent, input=asked)
            offered = {tool.name for tool in request.tools}
            offered |= {handoff.tool_name for handoff in request.handoffs}
            recorded = self._place.scope.ledger.earlier.get(key)
            audit.model(now, recorded, earlier is not None, offered)
            earlier = recorded
        if earlier is not None and earlier.status == "done":
            return await self._foreseen(request, response_from_json(earlier.output))
        model, name = self._resolve()
        settings = self._settings(request.model_settings, name)
        if settings is not request.model_settings:
            request = replace(request, model_settings=settings)
        step = StepRecord(
            key=key,
            kind="model",
            name=name,
            agent=agent,
            input=asked,
            input_hash=digest,
            attempts=earlier.attempts + 1 if earlier is not None else 1,
        )
        return await self._foreseen(request, await run.at_home(self._ask(model, request, step)))

    async def _foreseen(self, request: ModelRequest, response: ModelResponse) -> ModelResponse:
        """``response``, after the SDK was told what was decided about the calls in it.

        A call id that comes again gets a number: to the SDK it would be the call that was decided.
        """
        output = list(response.output)
        for place, item in enumerate(output):
            if not isinstance(item, ResponseFunctionToolCall):
                continue
            again = self._call_ids[item.call_id] = self._call_ids.get(item.call_id, 0) + 1
            if again > 1:
                output[place] = item.model_copy(update={"call_id": f"{item.call_id}~{again}"})
        response = replace(response, output=output)
        await foresee(self._place, self.agent, self.context, request.tools, response)
        return response

    async def _ask(self, model: Model, request: ModelRequest, step: StepRecord) -> ModelResponse:
        run, agent = self._place.run, step.agent
        journal = run.journal
        if not run.private_links:
            check_links(request.input)
        request = await attach(request, run.ctx.run.tenant, run.fetch)
        options = run.ctx.run.request.options
        expected = None
        if options is not None and options.count:
            expected = estimate(request, step.name, run.prices, run.assumed_output_tokens)
            taken = Usage(input_tokens=await input_tokens(model, request, expected))
            ended = InputCounted("The model was not asked: its input was to be counted alone.")
            await run.write(journal.finish(step.failed(ended.info(), taken), commit=False))
            raise ended
        throttle = run.throttle
        counted = throttle is not None and throttle.counts_tokens(step.name)
        if run.ctx.run.budget is not None or counted:
            expected = estimate(request, step.name, run.prices, run.assumed_output_tokens)
        tokens = expected.tokens if expected is not None else 0
        if throttle is not None:
            await run.write(throttle.turn(run, step, tokens))
        most = await run.write(journal.begin(step, commit=False, estimate=expected))
        tries, spent = 0, NO_USAGE

        given: list[str] = []
        kept = options is not None and (options.pieces or options.max_output_tokens is not None)

        def on_text(text: str) -> None:
            if kept:
                given.append(text)
            journal.delta(step.key, agent, text)

        async def once() -> ModelResponse:
            nonlocal tries, most
            if tries:
                if throttle is not None:
                    await run.write(throttle.turn(run, step, tokens))
                most = await run.write(journal.again(step, expected, spent))
            tries += 1
            try:
                return await respond(model, held_to(request, most), on_text)
            except Exception as error:
                if throttle is not None:
                    await run.write(throttle.refused(run, step, error))
                raise

        async def whole() -> ModelResponse:
            """An answer, and another where that was cut short by what it was held to."""
            nonlocal spent
            while True:
                answer = None
                try:
                    answer = await retrying(once, run.model_retries)
                except ModelIncomplete:
                    if most is None:
                        raise
                if answer is not None and (most is None or answer.usage.output_tokens < most):
                    return answer
                assert most is not None and expected is not None
                used = make_usage(expected.input_tokens, most) if answer is None else answer.usage
                given.clear()
                spent = add_usage(
                    spent,
                    Usage(
                        input_tokens=used.input_tokens,
                        output_tokens=used.output_tokens,
                        cost_usd=run.prices.cost_usd(step.name, used),
                    ),
                )

        try:
            response = await whole()
        except Suspend:
            journal.cut_off(step)
            raise
        except Exception as error:
            # A provider does not bill what failed; what it would have cost is known or not.
            cost = Decimal(0) if run.prices.known(step.name) else None
            used_up = add_usage(spent, Usage(model_calls=tries, cost_usd=cost))
            failed = replace(step, attempts=step.attempts + tries - 1)
            if given and isinstance(error, ModelIncomplete):
                said = "".join(given)
                journal.emit(
                    MessageCompleted(
                        step=step.key,
                        agent=agent,
                        text=said,
                        incomplete=True,
                        pieces=_pieces(given, said, options),
                    )
                )
            await run.write(journal.finish(failed.failed(error_info(error), used_up), commit=False))
            raise
        except BaseException:
            journal.cut_off(step)
            raise
        used = response.usage
        if throttle is not None and counted:
            await run.write(throttle.settle(step.name, used.total_tokens - tokens))
        usage = add_usage(
            spent,
            Usage(
                model_calls=tries,
                input_tokens=used.input_tokens,
                output_tokens=used.output_tokens,
                cost_usd=run.prices.cost_usd(step.name, used),
            ),
        )
        text = text_of(response)
        if text:
            pieces = _pieces(given, text, options)
            journal.emit(MessageCompleted(step=step.key, agent=agent, text=text, pieces=pieces))
        thought = thought_of(response)
        if thought:
            journal.emit(ReasoningCompleted(step=step.key, agent=agent, text=thought))
        done = replace(step, attempts=step.attempts + tries - 1).done(
            response_to_json(response),
            usage,
            cached_tokens=used.input_tokens_details.cached_tokens,
            reasoning_tokens=used.output_tokens_details.reasoning_tokens,
        )
        await run.write(journal.finish(done, commit=False))
        run.check()
        return response

    def _describe(self, items: Items, agent: str, instructions: str | None) -> None:
        """Note the step's input, without what earlier steps hold, and its digest.

        Called when the question is a new one: the SDK repeats a failed call with the same. The
        digest covers the agent's name and the input items, not the instructions, which may
        hold the time of day. Items of a session are named by their number: they cannot change
        while the run goes on.
        """
        prefix: JsonObject = {"step": None, "session": None, "items": 0}
        known = len(self._asked)
        history = self._history
        if known and items[:known] == self._asked:
            prefix = {"step": self._asked_key, "session": None, "items": known}
            hasher = self._asked_hash.copy()
        elif history and history.items and items[: len(history.items)] == history.items:
            known = len(history.items)
            prefix = {"step": None, "session": history.session_id, "items": known}
            hasher = sha256(f"{history.session_id}\0{known}".encode())
        else:
            known = 0
            hasher = sha256()
        new = items[known:] if known else items
        try:
            hasher.update(json.dumps(new, sort_keys=True).encode())
        except (TypeError, ValueError):
            new = to_jsonable_python(new, fallback=str)
            hasher.update(json.dumps(new, sort_keys=True).encode())
        final = hasher.copy()
        final.update(b"\0" + agent.encode())
        question: JsonObject = {"prefix": prefix, "items": new}
        if prefix["step"] is None or instructions != self._instructions:
            question["instructions"] = instructions
        self._asked, self._asked_hash, self._asker = items, hasher, agent
        self._instructions = instructions
        self._question, self._digest = question, final.hexdigest()


def held_to(request: ModelRequest, most: int | None) -> ModelRequest:
    """``request`` with an answer of at most so many tokens."""
    if most is None:
        return request
    return replace(request, model_settings=replace(request.model_settings, max_tokens=most))


def text_of(response: ModelResponse) -> str:
    """All text of an answer, joined."""
    return "".join(
        part.text or ""
        for item in response.output
        if isinstance(item, ResponseOutputMessage)
        for part in item.content
        if part.type == "output_text"
    )


def thought_of(response: ModelResponse) -> str:
    """The model's summary of its reasoning; empty where it gave none."""
    return "\n\n".join(
        part.text
        for item in response.output
        if isinstance(item, ResponseReasoningItem)
        for part in item.summary
        if part.text
    )


def _pieces(given: list[str], text: str, options: RunOptions | None) -> tuple[int, ...] | None:
    """Where the message was cut; None where nobody asked, or an attempt was given up midway."""
    if options is None or not options.pieces or "".join(given) != text:
        return None
    return tuple(map(len, given))


def response_to_json(response: ModelResponse) -> JsonObject:
    """A model's answer as the ledger holds it."""
    usage = response.usage
    return {
        "output": [
            (
                item.model_dump(mode="json", exclude_unset=True, warnings=False)
                if isinstance(item, BaseModel)
                else item
            )
            for item in response.output
        ],
        "response_id": response.response_id,
        "usage": {
            "input_tokens": usage.input_tokens,
            "output_tokens": usage.output_tokens,
            "total_tokens": usage.total_tokens,
            "cached": usage.input_tokens_details.cached_tokens,
            "reasoning": usage.output_tokens_details.reasoning_tokens,
        },
    }


_COMMON: dict[str, type[BaseModel]] = {
    "message": ResponseOutputMessage,
    "function_call": ResponseFunctionToolCall,
    "reasoning": ResponseReasoningItem,
}


def response_from_json(value: JsonObject) -> ModelResponse:
    """The inverse of ``response_to_json``."""
    return ModelResponse(
        output=[_output_item(item) for item in value["output"]],
        usage=make_usage(**value["usage"]),
        response_id=value["response_id"],
    )


def _output_item(value: JsonObject) -> TResponseOutputItem:
    kind = _COMMON.get(value.get("type", ""))
    if kind is not None:
        try:
            return cast(TResponseOutputItem, kind.model_validate(value))
        except ValidationError:
            pass  # a provider's own shape: taken as it is, like the first time
    return cast(TResponseOutputItem, construct_type(type_=ResponseOutputItem, value=value))


def _as_response(answer: ModelResponse) -> Response:
    usage = answer.usage
    return Response.model_construct(
        id=answer.response_id or "",
        object="response",
        created_at=0,
        model="",
        output=list(answer.output),
        parallel_tool_calls=True,
        tool_choice="auto",
        tools=[],
        usage=ResponseUsage.model_construct(
            input_tokens=usage.input_tokens,
            output_tokens=usage.output_tokens,
            total_tokens=usage.total_tokens,
            input_tokens_details=usage.input_tokens_details,
            output_tokens_details=usage.output_tokens_details,
        ),
    )
