"""Every knob, with its unit and default, in one place.

Read from ``AGENT_SERVER_*`` environment variables and ``.env``, built once (``load_settings``)
and passed down. ``AGENT_SERVER_X_FILE`` names a file that holds the secret ``X``. Leans on
pydantic-settings; refuses to know what the knobs turn.
"""

import difflib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SecretStr,
    ValidationError,
    ValidationInfo,
    field_validator,
)
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
)

from agent_server.domain.errors import ConfigurationError, FieldError
from agent_server.domain.ids import DEFAULT_TENANT, Tenant
from agent_server.domain.runs import Budget, ModelPrice, ModelRate

PREFIX = "AGENT_SERVER_"
CLIENT_VARIABLES = frozenset({"AGENT_SERVER_URL"})
"""Read by the command line, not by the server."""
PRINCIPALS = frozenset({"anonymous", "api_key"})
"""Names that callers without a named key have."""
Named = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.@-]{0,99}$")]


class TenantKey(BaseModel):
    """A key that opens one tenant's data alone."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    key: SecretStr = Field(min_length=8)
    tenant: Annotated[Tenant, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,99}$")] = DEFAULT_TENANT


class Settings(BaseSettings):
    """The server's configuration. Every field is ``AGENT_SERVER_<FIELD>`` in the environment."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX,
        env_nested_delimiter="__",
        extra="ignore",
        frozen=True,
        env_ignore_empty=True,
    )

    # Where it listens
    host: str = Field(default="127.0.0.1", description="Address to listen on.")
    port: int = Field(default=8000, ge=0, le=65535, description="Port to listen on; 0 picks one.")
    env: Literal["development", "production"] = Field(
        default="development", description="Production refuses to start without an API key."
    )
    reload: bool = Field(
        default=False, description="Reload agents and code when files change; development only."
    )
    allowed_hosts: str = Field(
        default="",
        description="Host headers answered besides loopback names, comma-separated; `*` for any.",
    )
    allowed_origins: str = Field(
        default="", description="Origins that browsers may call from, comma-separated."
    )

    # Who may call
    api_key: SecretStr | None = Field(
        default=None, min_length=8, description="Key that every call but the probes must carry."
    )
    tenant_keys: dict[Named, TenantKey] = Field(
        default_factory=dict,
        description="Further keys, each for one tenant's data, as JSON by the name that limits and "
        'approvers know it by: `{"ann": {"tenant": "acme", "key": "…"}}`.',
    )

    # Where it keeps things
    data_dir: Path = Field(
        default=Path(".agent-server"), description="Folder of the embedded database."
    )
    database_url: SecretStr | None = Field(
        default=None,
        description="`sqlite:///path` or `postgresql://…`; default: a SQLite file in DATA_DIR.",
    )
    database_pool_size: int = Field(
        default=10, ge=1, description="PostgreSQL connections of this process."
    )
    blobs: str = Field(
        default="database",
        description="Where large values of runs are kept: `database`, `file:///folder` (seen by every "
        "node) or `s3://bucket/prefix` (extra `s3`).",
    )
    blobs_also: str = Field(
        default="",
        description="Where else large values are looked for, comma-separated, as in BLOBS: where they "
        "were kept before, or will be (`agent-server db move-blobs`).",
    )
    blob_threshold_bytes: int = Field(
        default=65_536,
        ge=0,
        description="Size of a JSON value from which it is kept outside its row (at least 1,024); 0 "
        "keeps all in their rows.",
    )
    blob_timeout_s: float = Field(default=30.0, gt=0, description="Seconds a call to S3 may take.")

    # What it serves
    agents: str | None = Field(
        default=None,
        description="Files, folders or modules with agents, comma-separated; default: `agents.py` "
        "or `agents/` in the working folder, if there.",
    )
    model: str | None = Field(
        default=None,
        description="Model of every agent that names none; default: gpt-5.2 when OPENAI_API_KEY or "
        "OPENAI_BASE_URL is set, else the built-in demo model.",
    )
    openai_api: Literal["responses", "chat_completions"] = Field(
        default="responses", description="Which of OpenAI's two APIs the provider speaks."
    )
    openai_api_key: SecretStr | None = Field(
        default=None, validation_alias="OPENAI_API_KEY", description="The provider's key."
    )
    openai_base_url: str | None = Field(
        default=None,
        validation_alias="OPENAI_BASE_URL",
        description="The provider's address; any OpenAI-compatible server works.",
    )

    # How memories are found
    embedder: Literal["none", "openai", "minilm"] = Field(
        default="none",
        description="What makes vectors of memories: `openai` is any compatible `/embeddings`, "
        "`minilm` runs in the process (extra `minilm`).",
    )
    embedder_model: str | None = Field(
        default=None, description="With `openai`: its model; default text-embedding-3-small."
    )
    embedder_base_url: str | None = Field(
        default=None, description="With `openai`: its address; default OPENAI_BASE_URL."
    )
    embedder_api_key: SecretStr | None = Field(
        default=None, description="With `openai`: its key; default OPENAI_API_KEY."
    )
    embedder_dimension: int | None = Field(
        default=None,
        ge=1,
        le=16_000,
        description="With `openai`: numbers in a vector, if asked for.",
    )
    embedder_timeout_s: float = Field(
        default=30.0, gt=0, description="Seconds the embedder may take to answer."
    )

    # How it works
    role: Literal["all", "api", "worker"] = Field(
        default="all", description="Answer calls, carry out runs, or both."
    )
    worker_concurrency: int = Field(
        default=100, ge=1, description="Tasks this process carries out at once."
    )
    tenant_concurrency: dict[str, Annotated[int, Field(ge=1)]] = Field(
        default_factory=dict,
        description="Tasks of one tenant at work at once, on all processes together, as JSON: "
        '`{"acme": 200, "*": 20}`; `*` is every tenant that is not named.',
    )
    model_rates: dict[str, ModelRate] = Field(
        default_factory=dict,
        description="What a provider (as `GET /api/v1/models` names it) or a model may be asked in a "
        "minute by all processes together, as JSON: "
        '`{"openai": {"requests_per_minute": 500, "tokens_per_minute": 200000}}`.',
    )
    model_rate_patience_s: float = Field(
        default=3_600.0,
        gt=0,
        description="Seconds that a model call waits for a provider that limits the rate.",
    )
    probe_timeout_s: float = Field(
        default=2.0, gt=0, description="Seconds a check of `/readyz` may take."
    )
    shutdown_grace_s: float = Field(
        default=5.0, ge=0, le=300, description="Seconds tasks get to finish on SIGTERM."
    )
    drain_delay_s: float = Field(
        default=0.0,
        ge=0,
        le=300,
        description="Seconds to go on answering after SIGTERM, not ready, until the load balancer "
        "has noticed.",
    )
    lease_s: float = Field(
        default=8.0, ge=1, description="Seconds without a heartbeat until a worker counts as dead."
    )
    max_attempts: int = Field(
        default=10, ge=1, description="Times that a task's worker may die before its run is failed."
    )
    retention_days: int = Field(
        default=0,
        ge=0,
        description="Days until runs that succeeded or were cancelled are deleted; 0 keeps them.",
    )
    retention_failed_days: int = Field(
        default=0,
        ge=0,
        description="Days until runs that failed or exceeded their budget are deleted; 0 keeps them.",
    )
    retention_detail_days: int = Field(
        default=0,
        ge=0,
        description="Days until the events and steps of any ended run are deleted; 0 keeps them.",
    )
    model_timeout_s: float = Field(
        default=120.0, gt=0, description="Seconds without a byte until a model call is given up."
    )
    model_retries: int = Field(
        default=3, ge=0, description="Repeats of a model call that failed in passing."
    )
    tool_timeout_s: float = Field(
        default=300.0, gt=0, description="Seconds a tool call may take, unless its policy says."
    )
    tool_grace_s: float = Field(
        default=2.0,
        ge=0,
        le=60,
        description="Seconds a running tool that must not be repeated gets to finish when its run "
        "is paused or cancelled.",
    )
    tool_threads: int = Field(
        default=40, ge=1, description="Threads for tools that are not coroutines."
    )
    mcp_timeout_s: float = Field(
        default=30.0, gt=0, description="Seconds to connect to an MCP server or call its tool."
    )
    http_action_timeout_s: float = Field(
        default=30.0, gt=0, description="Seconds for the HTTP action."
    )
    http_allow_private: bool = Field(
        default=False, description="Let the HTTP action reach private and loopback addresses."
    )
    max_turns: int = Field(default=50, ge=1, description="Model calls in one agent's loop.")
    max_agent_depth: int = Field(
        default=10, ge=0, le=100, description="Agents inside agents, by their tools, at most."
    )
    max_plan_tasks: int = Field(default=50, ge=1, description="Tasks in one plan.")
    max_plan_repairs: int = Field(
        default=2, ge=0, description="Times a faulty plan goes back to the model."
    )
    max_plan_revisions: int = Field(
        default=2, ge=0, description="Times what is left of a plan may be revised."
    )
    max_task_retries: int = Field(
        default=2, ge=0, description="Repeats of a planned task that failed."
    )
    max_parallel_tasks: int = Field(
        default=100, ge=1, description="Tasks of one run at the same time."
    )
    max_run_nodes: int = Field(
        default=10_000,
        ge=1,
        description="Nodes that a run's workflows may carry out (iterations, items, attempts and "
        "sub-workflows counted), and tasks that a run may begin.",
    )

    # What a run may use
    default_budget: Budget | None = Field(
        default=None,
        description='Ceilings of a run that sets none, as JSON: `{"max_model_calls": 200}`.',
    )
    max_budget: Budget | None = Field(
        default=None, description="The most that a run may set, as JSON; it holds for every run."
    )
    budget_warn_share: float = Field(
        default=0.8, gt=0, le=1, description="Share of a ceiling at which `budget.warning` is said."
    )
    budget_output_tokens: int = Field(
        default=4_096,
        ge=1,
        description="Output tokens that are reserved for a model call whose agent sets no maximum; "
        "the most that such calls of a run with a budget may ask for side by side.",
    )
    prices: dict[str, ModelPrice] = Field(
        default_factory=dict,
        description="Prices in US dollars per million tokens, as JSON, before the built-in list: "
        '`{"my-model": {"input_per_mtok": 0.5, "output_per_mtok": 1.5}}`.',
    )

    # What it remembers
    session_max_items: int | None = Field(
        default=None,
        ge=1,
        description="Items of a session that a model is shown; default: all. Nothing is deleted.",
    )
    session_max_tokens: int | None = Field(
        default=None,
        ge=100,
        description="Tokens (four characters each) of a session that a model is shown; default: all.",
    )
    session_summaries: bool = Field(
        default=False,
        description="Tell in short, by a model call, what a model is not shown of a session.",
    )

    memory_sessions: bool = Field(
        default=True, description="Remember what is said in sessions, turn by turn."
    )
    memory_experience: bool = Field(
        default=True,
        description="Remember how goals went, and show planners and their tasks what is like them.",
    )
    memory_consolidation: bool = Field(
        default=False,
        description="Look through what each run said for facts worth keeping, by a run of its own "
        "that costs a model call; never with the demo model.",
    )
    memory_consolidation_tokens: int = Field(
        default=20_000, ge=1_000, description="Tokens that one consolidation may use."
    )
    memory_chunk_characters: int = Field(
        default=1_200, ge=100, le=20_000, description="Length of a piece of a document."
    )
    memory_chunk_overlap: int = Field(
        default=150,
        ge=0,
        le=2_000,
        description="Characters that a piece repeats of the one before.",
    )

    # What it accepts
    max_body_bytes: int = Field(default=1_048_576, ge=1024, description="Size of a request body.")
    max_document_bytes: int = Field(
        default=16_777_216, ge=1024, description="Size of a body that writes memories."
    )
    document_read_s: float = Field(
        default=60,
        gt=0,
        description="Seconds that reading the PDFs of one request may take.",
    )
    document_read_bytes: int = Field(
        default=1_073_741_824,
        ge=134_217_728,
        description="Memory that reading one PDF may take, in a process of its own.",
    )
    max_file_bytes: int = Field(
        default=33_554_432, ge=1024, description="Size of a file that is uploaded to `/v1/files`."
    )
    max_files_bytes: int = Field(
        default=1_073_741_824, ge=0, description="Size of all files of one tenant together."
    )
    max_json_depth: int = Field(default=64, ge=4, description="Nesting of a JSON body.")
    header_timeout_s: float = Field(
        default=10.0, gt=0, description="Seconds the headers of a request may take to arrive."
    )
    body_timeout_s: float = Field(
        default=30.0,
        gt=0,
        description="Seconds a request body may take to arrive, for each MiB that it has.",
    )
    openai_approaches: bool = Field(
        default=False,
        description="List agents and goals under `/v1/models` with each approach, too.",
    )
    max_streams: int = Field(default=10_000, ge=1, description="Event streams open at once.")
    max_streams_per_key: int | None = Field(
        default=None,
        ge=1,
        description="Event streams that one key has open at once; default: MAX_STREAMS, and half of "
        "it where there are TENANT_KEYS.",
    )
    stream_queue_size: int = Field(
        default=1_000, ge=10, description="Events held for a slow reader before it is cut off."
    )
    stream_ping_s: float = Field(default=15.0, gt=0, description="Seconds between pings.")

    # What it says
    log_format: Literal["auto", "json", "console"] = Field(
        default="auto", description="`auto`: coloured on a terminal, JSON elsewhere."
    )
    access_log: bool = Field(default=True, description="Log one line for every call.")
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = Field(
        default="INFO", description="Least level that is logged."
    )

    @field_validator("tenant_keys", mode="before")
    @classmethod
    def _from_a_file(cls, value: Any) -> Any:
        return json.loads(value) if isinstance(value, str) else value

    @field_validator("tenant_keys")
    @classmethod
    def _one_holder_of_each_key(
        cls, value: dict[str, TenantKey], info: ValidationInfo
    ) -> dict[str, TenantKey]:
        taken = PRINCIPALS & value.keys()
        if taken:
            raise ValueError(f"the name {min(taken)!r} is the server's own")
        keys = [one.key for one in value.values()]
        own = info.data.get("api_key") or SecretStr("")
        if len({key.get_secret_value() for key in (*keys, own)}) <= len(keys):
            raise ValueError("two keys are the same (AGENT_SERVER_API_KEY is one of them, too)")
        return value

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return init_settings, env_settings, dotenv_settings

    @property
    def database(self) -> str:
        """The effective database URL, credentials included."""
        if self.database_url is not None:
            return self.database_url.get_secret_value()
        return f"sqlite:///{self.data_dir / 'agent-server.db'}"

    @property
    def has_key(self) -> bool:
        """Whether a caller needs a key."""
        return self.api_key is not None or bool(self.tenant_keys)

    @property
    def streams_per_key(self) -> int:
        """How many event streams one key may have open."""
        fair = max(self.max_streams // 2, 1) if self.tenant_keys else self.max_streams
        return self.max_streams_per_key or fair

    @property
    def effective_model(self) -> str:
        """The model of every agent that names none."""
        if self.model:
            return self.model
        return "gpt-5.2" if self.openai_api_key or self.openai_base_url else "demo"


def load_settings(
    overrides: Mapping[str, Any] | None = None, env_file: str | None = ".env"
) -> Settings:
    """The settings of this process. Raises ``ConfigurationError`` that names each bad value."""
    values = dict(overrides or {})
    for name in Settings.model_fields:
        path = os.environ.get(f"{PREFIX}{name.upper()}_FILE")
        if path and name not in values:
            try:
                values[name] = Path(path).read_text(encoding="utf-8").strip()
            except OSError as error:
                raise ConfigurationError(
                    f"{PREFIX}{name.upper()}_FILE names {path!r}, which cannot be read: "
                    f"{error.strerror}."
                ) from error
    try:
        return Settings(_env_file=env_file, **values)  # type: ignore[call-arg]  # an initialiser's option
    except ValidationError as error:
        problems = [
            FieldError(path=PREFIX + "__".join(str(p) for p in e["loc"]).upper(), message=e["msg"])
            for e in error.errors()
        ]
        lines = "; ".join(f"{p.path}: {p.message}" for p in problems)
        raise ConfigurationError(
            f"The configuration is not valid. {lines}",
            hint="`agent-server config` lists every setting with its unit and default.",
            errors=problems,
        ) from error
    except SettingsError as error:
        field = next(iter(re.findall(r'field "(\w+)"', str(error))), "")
        raise ConfigurationError(
            f"The configuration is not valid. {PREFIX}{field.upper()} does not hold JSON.",
            hint="`agent-server config` lists every setting with its unit and default.",
        ) from error


def unknown_variables(environ: Mapping[str, str]) -> dict[str, str | None]:
    """Each ``AGENT_SERVER_`` variable that no knob reads, and the nearest name that one does."""
    known = {PREFIX + name.upper() for name in Settings.model_fields}
    known |= {name + "_FILE" for name in known} | CLIENT_VARIABLES
    unknown = [
        name
        for name in environ
        if name.startswith(PREFIX) and re.sub(r"(?<=\w)__\w+$", "", name) not in known
    ]
    return {
        name: next(iter(difflib.get_close_matches(name, sorted(known), n=1)), None)
        for name in sorted(unknown)
    }
