"""When a model may be asked: by the rates that are set, and by what its provider says.

Leans on ``execution.rates``, where all nodes book their calls, and on the journal. Refuses to know
how a provider is asked. A short wait takes no worker slot; a long one is durable: the task stands
still, where it can be seen, until the moment has come, and no attempt has failed.
"""

import asyncio
from collections.abc import Callable, Mapping
from datetime import timedelta

from agent_server.domain.base import utcnow
from agent_server.domain.errors import ModelRateLimited
from agent_server.domain.runs import ModelRate, WaitingFor
from agent_server.execution.permits import idle
from agent_server.execution.ports import StepRecord, Suspend
from agent_server.execution.rates import Rate, Rates
from agent_server.inference.durable_run import DurableRun
from agent_server.inference.models import as_model_error

SHORT = timedelta(seconds=2)
"""The longest wait for which the task is kept at hand."""
NONE = timedelta(0)


class Throttle:
    """One per process."""

    def __init__(
        self,
        rates: Rates,
        limits: Mapping[str, ModelRate],
        *,
        provider: Callable[[str], str],
        patience: timedelta,
    ) -> None:
        """``provider`` names that of a model; ``patience`` is how long a call waits for one that
        says it is asked too often."""
        self._rates = rates
        self._limits = {
            name: Rate(limit.requests_per_minute, limit.tokens_per_minute)
            for name, limit in limits.items()
        }
        self._provider = provider
        self._patience = patience
        self._closed: dict[str, float] = {}

    def counts_tokens(self, model: str) -> bool:
        """Whether it matters how many tokens a call of the model takes."""
        return any(rate.amount is not None for _, rate in self._of(model))

    async def turn(self, run: DurableRun, step: StepRecord, tokens: int) -> None:
        """Return when the model call ``step`` may be made; raises ``Suspend`` where that is long
        from now, and returns at once when it is taken up again."""
        holder = f"{run.journal.run_id}/{step.key}"
        while True:
            left_s = self._closed.get(self._provider(step.name), 0.0) - self._now_s()
            wait = timedelta(seconds=max(0.0, left_s))
            for name, rate in self._of(step.name):
                wait = max(wait, await self._rates.book(name, rate, tokens, holder))
            if wait <= NONE:
                return
            await self._wait(run, step, wait)

    async def settle(self, model: str, more: int) -> None:
        """The call took that many more tokens than ``turn`` was told."""
        for name, rate in self._of(model):
            if rate.amount is not None:
                await self._rates.settle(name, more)

    async def refused(self, run: DurableRun, step: StepRecord, error: Exception) -> None:
        """The provider did not take the call. Where it said when to come back, nobody asks it
        before; and where that is long from now, the task stands still until then."""
        said = as_model_error(error)
        if not (isinstance(said, ModelRateLimited) and said.retryable and said.retry_after_s):
            return
        wait = timedelta(seconds=said.retry_after_s)
        provider = self._provider(step.name)
        self._closed[provider] = max(
            self._closed.get(provider, 0.0), self._now_s() + wait.total_seconds()
        )
        for name, _ in self._of(step.name):
            await self._rates.close(name, wait)
        if wait <= SHORT or not run.journal.stores:
            return
        before = run.journal.recorded(f"{step.key}/refused/")
        first = min((record.started_at for record in before.values()), default=utcnow())
        if utcnow() + wait - first > self._patience:
            return  # It fails after its retries, and says so.
        record = StepRecord(
            key=f"{step.key}/refused/{len(before) + 1}", kind="value", name="refused"
        )
        await run.write(run.journal.finish(record.done(said.retry_after_s)))
        await self._wait(run, step, wait)

    async def _wait(self, run: DurableRun, step: StepRecord, wait: timedelta) -> None:
        if wait <= SHORT or not run.journal.stores:
            with idle(run.ctx):
                await asyncio.sleep(wait.total_seconds())
            return
        moment = utcnow() + wait
        waiting_for = WaitingFor(
            kind="timer",
            detail=f"The rate limit of {self._provider(step.name)!r} lets {step.name!r} be asked "
            "again then.",
            step=step.key,
            until=moment,
        )
        suspend = Suspend(waiting_for, wake_at=moment)
        await run.suspend(step.key, suspend)
        raise suspend

    def _of(self, model: str) -> list[tuple[str, Rate]]:
        names = dict.fromkeys((self._provider(model), model))
        return [(name, self._limits[name]) for name in names if name in self._limits]

    @staticmethod
    def _now_s() -> float:
        return asyncio.get_running_loop().time()
