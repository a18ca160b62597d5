"""MiniLM as we wrote its graph, against the model spelt out in numpy with 64-bit numbers.

Runs where the extra and the weights are installed: `agent_server.memory.minilm.INSTALL`.
"""

import math
from typing import Any

import pytest

from agent_server.domain.errors import ConfigurationError
from agent_server.memory import minilm

TEXTS = [
    "The cello, since I was six.",
    "Which instrument do you play?",
    "x",
    "Ünïcödé, 北京 and an emoji 🎉 " * 6,
    "",
]

try:
    minilm.model_folder()
    np: Any = pytest.importorskip("numpy")
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
except ConfigurationError as error:
    pytest.skip(f"{error.detail} {error.hint}", allow_module_level=True)


def reference(w: dict[str, Any], ids: list[int]) -> Any:
    """One text, without padding or batch."""
    w = {name: values.astype(np.float64) for name, values in w.items()}

    def norm(x: Any, name: str) -> Any:
        spread = np.sqrt(x.var(-1, keepdims=True) + 1e-12)
        return (x - x.mean(-1, keepdims=True)) / spread * w[f"{name}.weight"] + w[f"{name}.bias"]

    def dense(x: Any, name: str) -> Any:
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    gelu = np.vectorize(lambda x: 0.5 * x * (1 + math.erf(x / math.sqrt(2))))
    e = "embeddings"
    x = w[f"{e}.word_embeddings.weight"][ids] + w[f"{e}.position_embeddings.weight"][: len(ids)]
    x = norm(x + w[f"{e}.token_type_embeddings.weight"][0], f"{e}.LayerNorm")
    for layer in range(6):
        at = f"encoder.layer.{layer}"
        q, k, v = (
            dense(x, f"{at}.attention.self.{n}").reshape(len(ids), 12, 32).transpose(1, 0, 2)
            for n in ("query", "key", "value")
        )
        scores = q @ k.transpose(0, 2, 1) / math.sqrt(32)
        share = np.exp(scores - scores.max(-1, keepdims=True))
        share /= share.sum(-1, keepdims=True)
        seen = (share @ v).transpose(1, 0, 2).reshape(len(ids), 384)
        x = norm(
            x + dense(seen, f"{at}.attention.output.dense"), f"{at}.attention.output.LayerNorm"
        )
        wide = gelu(dense(x, f"{at}.intermediate.dense"))
        x = norm(x + dense(wide, f"{at}.output.dense"), f"{at}.output.LayerNorm")
    mean = x.mean(0)
    return mean / np.linalg.norm(mean)


async def test_vectors_are_those_of_the_model() -> None:
    model = minilm.MiniLM()
    vectors = [np.frombuffer(v, dtype="<f4") for v in await model.embed(TEXTS)]
    w = minilm.weights(minilm.model_folder() / "model.safetensors")
    for text, vector in zip(TEXTS, vectors, strict=True):
        expected = reference(w, model._tokenizer.encode(text).ids)
        assert float(vector @ expected) >= 0.99999, text
    await model.close()
