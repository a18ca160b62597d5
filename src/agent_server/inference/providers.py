"""Which model a name means: the demo model, the configured provider, or an adapter of the SDK.

Leans on the settings and on the models of this folder. Makes no request of its own. Refuses to
know who asks.
"""

from typing import Any

from agents import Model, ModelProvider, MultiProvider

from agent_server.domain.errors import UnknownModel
from agent_server.inference.chat_model import ChatModel
from agent_server.inference.demo import NAME as DEMO
from agent_server.inference.demo import DemoModel
from agent_server.inference.responses_model import ResponsesModel
from agent_server.inference.wire import Wire
from agent_server.settings import Settings

MAX_KEPT = 256
"""Models kept ready beside those with a meaning of their own: callers name what they like."""
_ADAPTERS = {"litellm": "openai-agents[litellm]", "any-llm": "openai-agents[any-llm]"}


class Providers(ModelProvider):
    """Every model by name. One per process; a model is made once."""

    def __init__(self, settings: Settings) -> None:
        key = settings.openai_api_key
        self._default = settings.effective_model
        self._chat = settings.openai_api == "chat_completions"
        self._wire = Wire(
            settings.openai_base_url,
            key.get_secret_value() if key is not None else None,
            timeout_s=settings.model_timeout_s,
        )
        self._models: dict[str, Model] = {DEMO: DemoModel()}
        self._ready: dict[str, Model] = {}
        self._adapters: MultiProvider | None = None

    @property
    def default(self) -> str:
        """The name that None stands for."""
        return self._default

    def get_model(self, model_name: str | None = None) -> Model:
        """The model called ``model_name``; None is the default. Raises ``UnknownModel``.

        Any name that is not ours is the provider's: whether it has that model, its answer says.
        """
        name = model_name or self._default
        model = self._models.get(name) or self._ready.get(name)
        if model is None:
            model = self._make(name)
            if len(self._ready) >= MAX_KEPT:
                del self._ready[next(iter(self._ready))]
            self._ready[name] = model
        return model

    def register(self, name: str, model: Model) -> None:
        """Let ``name`` mean ``model`` from now on."""
        self._models[name] = model

    def describe(self) -> list[dict[str, Any]]:
        """The models with a meaning here, for ``GET /models``: ``id``, ``provider``, ``default``.

        Not those that some caller happened to name.
        """
        names = dict.fromkeys([self._default, *self._models])
        return [
            {"id": name, "provider": self.provider(name), "default": name == self._default}
            for name in names
        ]

    async def aclose(self) -> None:
        """Close what is open."""
        await self._wire.aclose()
        if self._adapters is not None:
            await self._adapters.aclose()

    def _make(self, name: str) -> Model:
        prefix, slash, rest = name.partition("/")
        if slash and prefix in _ADAPTERS:
            if not rest:
                raise UnknownModel(
                    f"{name!r} names no model after {prefix + slash!r}.",
                    hint=f"Write it as '{prefix}/<provider>/<model>'.",
                )
            try:
                self._adapters = self._adapters or MultiProvider(openai_api_key="unused")
                return self._adapters.get_model(name)
            except ImportError as error:
                raise UnknownModel(
                    f"The model {name!r} needs an adapter that is not installed.",
                    hint=f"pip install '{_ADAPTERS[prefix]}'",
                ) from error
        # `openai/gpt-5` is gpt-5 at OpenAI, but at a gateway the whole may be the model's name.
        if prefix == "openai" and rest and self._wire.official:
            name = rest
        return (ChatModel if self._chat else ResponsesModel)(name, self._wire)

    def provider(self, name: str) -> str:
        model = self._models.get(name)
        prefix = name.partition("/")[0]
        if isinstance(model, DemoModel) or name == DEMO:
            return "demo"
        if prefix in _ADAPTERS:
            return prefix
        if model is not None and not isinstance(model, (ChatModel, ResponsesModel)):
            return "registered"
        return "openai" if self._wire.official else self._wire.host
