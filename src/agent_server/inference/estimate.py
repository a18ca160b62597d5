"""What a model call will use, guessed before it is made, so that a budget can hold room for it.

Leans on the request alone and on the price list. Refuses a tokenizer: four bytes of UTF-8 count
as a token, which is near enough for English and code, and too much rather than too little for
most other scripts.
"""

import json
import re
from math import ceil
from typing import Any

from agents import FunctionTool
from pydantic_core import to_jsonable_python

from agent_server.execution.ports import Estimate
from agent_server.inference.models import ModelRequest
from agent_server.inference.prices import Prices

BYTES_PER_TOKEN = 4
MEDIA_TOKENS = 1_000
"""For an image or a file inside a message, whose bytes are no measure."""
_MEDIA = re.compile(r"data:[\w/+.\-]*;base64,[A-Za-z0-9+/=]+")


def tokens_of(value: Any) -> int:
    """About how many tokens ``value`` (text, or JSON that is sent as text) is."""
    if value is None:
        return 0
    if not isinstance(value, str):
        value = json.dumps(to_jsonable_python(value, fallback=str), ensure_ascii=False)
    text, media = _MEDIA.subn("", value)
    return ceil(len(text.encode(errors="replace")) / BYTES_PER_TOKEN) + media * MEDIA_TOKENS


def estimate(request: ModelRequest, model: str, prices: Prices, assumed_output: int) -> Estimate:
    """For a call of ``model``; ``assumed_output`` stands in where the agent sets no maximum."""
    schema = request.output_schema
    tools = [
        [tool.name, tool.description, tool.params_json_schema]
        for tool in request.tools
        if isinstance(tool, FunctionTool)
    ]
    tools += [
        [one.tool_name, one.tool_description, one.input_json_schema] for one in request.handoffs
    ]
    taken = (
        tokens_of(request.system_instructions)
        + tokens_of(request.input)
        + (tokens_of(tools) if tools else 0)
        + (0 if schema is None or schema.is_plain_text() else tokens_of(schema.json_schema()))
    )
    most = request.model_settings.max_tokens
    given = assumed_output if most is None else most
    return Estimate(
        model=model,
        input_tokens=taken,
        output_tokens=given,
        bounded=most is not None,
        input_cost_usd=prices.of_tokens(model, taken, 0),
        output_cost_usd=prices.of_tokens(model, 0, given),
    )
