"""The error tree. Every error knows its HTTP status and its stable ``code``.

Only ``api/problems.py`` renders them as HTTP; the command line prints ``detail`` and ``hint``.

    AgentServerError
    ├── InvalidRequest            422  invalid_request
    │   ├── UnknownAgent          422  unknown_agent
    │   ├── UnknownTool           422  unknown_tool
    │   ├── UnknownModel          422  unknown_model
    │   ├── UnknownApproach       422  unknown_approach
    │   ├── UnknownWorkflow       422  unknown_workflow
    │   ├── InvalidWorkflow       422  invalid_workflow
    │   ├── InvalidCursor         422  invalid_cursor
    │   ├── BudgetRefused         422  budget_refused
    │   ├── InvalidDocument       422  invalid_document
    │   └── IdempotencyMismatch   422  idempotency_mismatch
    ├── MalformedBody             400  malformed_body
    ├── Unauthorized              401  unauthorized
    ├── Forbidden                 403  forbidden
    ├── NotFound                  404  not_found
    ├── MethodNotAllowed          405  method_not_allowed
    ├── RequestTimeout            408  request_timeout
    ├── Conflict                  409  conflict
    │   ├── IdempotencyInFlight   409  idempotency_in_flight
    │   ├── RunEnded              409  run_ended
    │   ├── SessionBusy           409  session_busy
    │   ├── NotSteerable          409  not_steerable
    │   └── AlreadyDecided        409  already_decided
    ├── PreconditionFailed        412  precondition_failed
    ├── BodyTooLarge              413  body_too_large
    ├── UnsupportedMediaType      415  unsupported_media_type
    ├── HeadersTooLarge           431  headers_too_large
    ├── RateLimited               429  rate_limited
    ├── Unavailable               503  unavailable
    ├── TimedOut                  504  timed_out
    ├── StorageFull               507  storage_full
    ├── ConfigurationError        500  configuration
    │   ├── DatabaseUnavailable   503  database_unavailable
    │   ├── DataDirLocked         500  data_dir_locked
    │   └── AgentsFileError       500  agents_file
    └── RunError                  (recorded in the run, never an HTTP answer)
        ├── ModelError                 model_error
        │   ├── ModelUnauthorized      model_unauthorized
        │   ├── ModelRateLimited       model_rate_limited
        │   ├── ModelTimeout           model_timeout
        │   ├── ModelMalformed         model_malformed
        │   └── ModelIncomplete        model_incomplete
        ├── ToolError                  tool_error
        ├── GuardrailTripped           guardrail_tripped
        ├── MaxTurnsExceeded           max_turns
        ├── AgentsTooDeep              agents_too_deep
        ├── PlanInvalid                plan_invalid
        ├── OutputInvalid              output_invalid
        ├── TaskFailed                 task_failed
        ├── TaskTimeout                task_timeout
        ├── LoopBound                  loop_bound
        ├── WorkflowLimit              workflow_limit
        ├── ExpressionError            expression_error
        ├── BudgetExceeded             budget_exceeded
        ├── RunCancelled               cancelled
        ├── TaskCancelled              task_cancelled
        ├── ReplayDiffers              replay_differs
        ├── ApprovalUnsupported        approval_unsupported
        ├── ApprovalExpired            approval_expired
        ├── ApprovalRejected           approval_rejected
        ├── TooManyAttempts            too_many_attempts
        └── InternalError              internal
"""

from typing import Any, ClassVar

from pydantic import Field

from agent_server.domain.base import Frozen


class FieldError(Frozen):
    """One thing that is wrong: where (a JSON-pointer-like path), what, and a suggestion."""

    path: str
    message: str
    hint: str | None = None
    line: int | None = None


class ErrorInfo(Frozen):
    """An error as it is recorded in a run, a task, a step or an event."""

    code: str
    message: str
    hint: str | None = None
    errors: tuple[FieldError, ...] = Field(default=())


class AgentServerError(Exception):
    """The root. ``detail`` says what happened with which value; ``hint`` what to do next."""

    status: ClassVar[int] = 500
    code: ClassVar[str] = "internal"
    title: ClassVar[str] = "Internal error"

    def __init__(
        self,
        detail: str,
        *,
        hint: str | None = None,
        errors: tuple[FieldError, ...] | list[FieldError] = (),
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(detail)
        self.detail = detail
        self.hint = hint
        self.errors = tuple(errors)
        self.headers = headers or {}

    def info(self) -> ErrorInfo:
        return ErrorInfo(code=self.code, message=self.detail, hint=self.hint, errors=self.errors)


class InvalidRequest(AgentServerError):
    status = 422
    code = "invalid_request"
    title = "The request is not valid"


class UnknownAgent(InvalidRequest):
    code = "unknown_agent"
    title = "No such agent"


class UnknownTool(InvalidRequest):
    code = "unknown_tool"
    title = "No such tool"


class UnknownModel(InvalidRequest):
    code = "unknown_model"
    title = "No such model"


class UnknownApproach(InvalidRequest):
    code = "unknown_approach"
    title = "No such approach"


class UnknownWorkflow(InvalidRequest):
    code = "unknown_workflow"
    title = "No such workflow"


class InvalidWorkflow(InvalidRequest):
    code = "invalid_workflow"
    title = "The workflow is not valid"


class BudgetRefused(InvalidRequest):
    """The run cannot have, or cannot keep, the budget that it asks for."""

    code = "budget_refused"
    title = "The budget is not possible"


class InvalidCursor(InvalidRequest):
    code = "invalid_cursor"
    title = "The cursor is not valid"


class InvalidDocument(InvalidRequest):
    code = "invalid_document"
    title = "The document cannot be read"


class IdempotencyMismatch(InvalidRequest):
    code = "idempotency_mismatch"
    title = "The idempotency key was used with another body"


class MalformedBody(AgentServerError):
    status = 400
    code = "malformed_body"
    title = "The body cannot be read"


class Unauthorized(AgentServerError):
    status = 401
    code = "unauthorized"
    title = "Authentication is required"


class Forbidden(AgentServerError):
    status = 403
    code = "forbidden"
    title = "Not allowed"


class NotFound(AgentServerError):
    status = 404
    code = "not_found"
    title = "Not found"


class MethodNotAllowed(AgentServerError):
    status = 405
    code = "method_not_allowed"
    title = "The method is not allowed here"


class RequestTimeout(AgentServerError):
    status = 408
    code = "request_timeout"
    title = "The request took too long to arrive"


class Conflict(AgentServerError):
    status = 409
    code = "conflict"
    title = "Conflict"


class IdempotencyInFlight(Conflict):
    code = "idempotency_in_flight"
    title = "A request with this idempotency key is still in flight"


class RunEnded(Conflict):
    code = "run_ended"
    title = "The run has ended"


class SessionBusy(Conflict):
    """A run is under way on the session, and the new one does not want to wait for it."""

    code = "session_busy"
    title = "The session is busy"


class NotSteerable(Conflict):
    """The run under way on the session takes no message of this kind."""

    code = "not_steerable"
    title = "The run cannot be steered so"


class PreconditionFailed(AgentServerError):
    """``If-Match`` names a version that is not the newest: somebody else was quicker."""

    status = 412
    code = "precondition_failed"
    title = "It was changed meanwhile"


class AlreadyDecided(Conflict):
    """Nothing waits for this decision any more."""

    code = "already_decided"


class BodyTooLarge(AgentServerError):
    status = 413
    code = "body_too_large"
    title = "The body is too large"


class UnsupportedMediaType(AgentServerError):
    status = 415
    code = "unsupported_media_type"
    title = "The body has a type that is not read here"


class HeadersTooLarge(AgentServerError):
    status = 431
    code = "headers_too_large"
    title = "The headers are too large"


class RateLimited(AgentServerError):
    status = 429
    code = "rate_limited"
    title = "Too many requests"


class Unavailable(AgentServerError):
    status = 503
    code = "unavailable"
    title = "Not available now"


class TimedOut(AgentServerError):
    status = 504
    code = "timed_out"
    title = "It took longer than the call would wait"


class StorageFull(AgentServerError):
    status = 507
    code = "storage_full"
    title = "The disk is full"


class ConfigurationError(AgentServerError):
    code = "configuration"
    title = "The configuration is not valid"


class DatabaseUnavailable(ConfigurationError):
    status = 503
    code = "database_unavailable"
    title = "The database cannot be reached"


class DataDirLocked(ConfigurationError):
    code = "data_dir_locked"
    title = "Another process uses this data directory"


class AgentsFileError(ConfigurationError):
    code = "agents_file"
    title = "The agents file cannot be loaded"


class RunError(AgentServerError):
    """What ends a run or a task; recorded, and told to the reader as ``ErrorInfo``."""

    code = "run_error"
    title = "The run failed"


class ModelError(RunError):
    """The model's answer was an error. ``retryable`` and ``retry_after_s`` steer the retry."""

    code = "model_error"

    def __init__(
        self,
        detail: str,
        *,
        hint: str | None = None,
        retryable: bool = False,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(detail, hint=hint)
        self.retryable = retryable
        self.retry_after_s = retry_after_s


class ModelUnauthorized(ModelError):
    code = "model_unauthorized"


class ModelRateLimited(ModelError):
    code = "model_rate_limited"


class ModelTimeout(ModelError):
    code = "model_timeout"


class ModelMalformed(ModelError):
    code = "model_malformed"


class ModelIncomplete(ModelError):
    """The answer reached its ceiling of tokens, or a content filter."""

    code = "model_incomplete"


class ToolError(RunError):
    code = "tool_error"


class GuardrailTripped(RunError):
    code = "guardrail_tripped"


class MaxTurnsExceeded(RunError):
    code = "max_turns"


class AgentsTooDeep(RunError):
    """Agents call agents that call agents, further down than is allowed."""

    code = "agents_too_deep"


class PlanInvalid(RunError):
    code = "plan_invalid"


class OutputInvalid(RunError):
    code = "output_invalid"


class TaskFailed(RunError):
    code = "task_failed"


class TaskTimeout(RunError):
    code = "task_timeout"


class LoopBound(RunError):
    """A workflow's loop would go on after its bound."""

    code = "loop_bound"


class WorkflowLimit(RunError):
    """A workflow would run more nodes than the server allows in one run."""

    code = "workflow_limit"


class ExpressionError(RunError):
    code = "expression_error"


class BudgetExceeded(RunError):
    """``errors`` name the field of the budget that was reached, ``/budget/max_tokens``."""

    code = "budget_exceeded"

    @property
    def limit(self) -> str | None:
        """The field that was reached, where it is known."""
        return self.errors[0].path.rpartition("/")[2] if self.errors else None


class ReplayDiffers(RunError):
    """The present code does not do what a recorded run did."""

    code = "replay_differs"
    title = "The replay differs from the record"


class RunCancelled(RunError):
    code = "cancelled"


class TaskCancelled(RunError):
    """Somebody cancelled this one task; what its node's policy says of failures holds."""

    code = "task_cancelled"


class ApprovalUnsupported(RunError):
    code = "approval_unsupported"


class ApprovalExpired(RunError):
    """Nobody decided in time, and the run was to fail then."""

    code = "approval_expired"


class ApprovalRejected(RunError):
    """Somebody said no to an approval node of a workflow, which was to fail then."""

    code = "approval_rejected"


class TooManyAttempts(RunError):
    code = "too_many_attempts"


class InternalError(RunError):
    code = "internal"


LASTING = frozenset(
    error.code
    for error in (
        ApprovalExpired,
        ApprovalRejected,
        ApprovalUnsupported,
        ExpressionError,
        InvalidWorkflow,
        LoopBound,
        ModelUnauthorized,
        TaskCancelled,
        UnknownAgent,
        UnknownApproach,
        UnknownModel,
        UnknownTool,
        UnknownWorkflow,
        WorkflowLimit,
    )
)
"""Codes of errors that a repeat meets again: nobody retries them unless told to."""


def error_info(error: BaseException) -> ErrorInfo:
    """``error`` as it is recorded; an error that is not ours is named by its type."""
    if isinstance(error, AgentServerError):
        return error.info()
    text = str(error) or type(error).__name__
    return ErrorInfo(code=InternalError.code, message=f"{type(error).__name__}: {text}")


def error_codes() -> dict[str, type[AgentServerError]]:
    """Every stable code and its class, walked from the tree."""
    found: dict[str, type[AgentServerError]] = {}
    todo: list[type[Any]] = [AgentServerError]
    while todo:
        cls = todo.pop()
        found.setdefault(cls.code, cls)
        todo.extend(cls.__subclasses__())
    return found
