"""``/v1/files`` over a real socket, and files that messages name by id."""

import base64
import json
from typing import Any

import openai
import pytest

from tests.e2e.kit import Api
from tests.openai_api.schemas import check
from tests.support.model_thread import ModelThread, rule

PIXEL = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)
BIG = bytes(range(256)) * 4_000


def test_a_file_is_uploaded_listed_read_and_deleted(api: Api, client: openai.OpenAI) -> None:
    before = [f.id for f in client.files.list(order="asc")]
    made = client.files.create(
        file=("ä big.bin", BIG, "application/x-thing"),
        purpose="user_data",
        expires_after={"anchor": "created_at", "seconds": 3_600},
    )
    shown = api.http.get(f"/v1/files/{made.id}").json()
    check("OpenAIFile", shown)
    assert shown == json.loads(made.to_json())
    assert (shown["bytes"], shown["filename"]) == (len(BIG), "ä big.bin")
    assert shown["expires_at"] == shown["created_at"] + 3_600
    got = client.files.content(made.id)
    assert got.content == BIG
    assert got.response.headers["content-type"] == "application/octet-stream"
    assert got.response.headers["content-disposition"] == "attachment"
    others = [client.files.create(file=("x.txt", b"x"), purpose="vision") for _ in range(3)]
    listed = api.http.get("/v1/files?limit=2&order=asc").json()
    check("ListFilesResponse", listed)
    assert listed["has_more"]
    assert [f.id for f in client.files.list(limit=1, order="asc")] == [
        *before,
        made.id,
        *(other.id for other in others),
    ]
    ours = {f.id for f in client.files.list(purpose="vision")} - set(before)
    assert ours == {other.id for other in others}
    check("DeleteFileResponse", json.loads(client.files.delete(made.id).to_json()))
    for path in (f"/v1/files/{made.id}", f"/v1/files/{made.id}/content"):
        assert api.http.get(path).status_code == 404


@pytest.mark.parametrize("store", [True, False])
def test_a_message_that_names_files_reaches_the_model_with_their_bytes(
    api: Api, client: openai.OpenAI, models: ModelThread, store: bool
) -> None:
    image = client.files.create(file=("dot.png", PIXEL), purpose="vision")
    paper = client.files.create(file=("paper.pdf", b"%PDF-1.4 x"), purpose="user_data")
    models.script(rule("look", {"text": "A dot."}))
    content: Any = [
        {"type": "input_text", "text": "look"},
        {"type": "input_image", "file_id": image.id, "detail": "low"},
        {"type": "input_file", "file_id": paper.id},
    ]
    response = client.responses.create(
        model="agent/clerk", input=[{"role": "user", "content": content}], store=store
    )
    assert response.output_text == "A dot."
    sent = models.calls[-1]["input"][-1]["content"]
    assert sent[1] == {
        "type": "input_image",
        "detail": "low",
        "image_url": "data:image/png;base64," + base64.b64encode(PIXEL).decode(),
    }
    assert sent[2]["filename"] == "paper.pdf"
    assert base64.b64decode(sent[2]["file_data"].partition("base64,")[2]) == b"%PDF-1.4 x"
    if not store:
        return
    items = api.http.get(f"/v1/responses/{response.id}/input_items").json()
    check("ResponseItemList", items)
    assert items["data"][0]["content"][1]["file_id"] == image.id
    steps = api.http.get("/api/v1/runs/run_" + response.id.removeprefix("resp_") + "/steps").text
    assert image.id in steps and base64.b64encode(PIXEL).decode() not in steps
    client.files.delete(image.id)
    after = client.responses.create(
        model="agent/clerk", input="look again", previous_response_id=response.id
    )
    assert after.status == "failed" and after.error is not None and image.id in after.error.message


def test_a_chat_names_a_file_too(client: openai.OpenAI, models: ModelThread) -> None:
    paper = client.files.create(file=("paper.pdf", b"%PDF-1.4 x"), purpose="user_data")
    models.script(rule("look", {"text": "Fine."}))
    content: Any = [
        {"type": "text", "text": "look"},
        {"type": "file", "file": {"file_id": paper.id}},
    ]
    client.chat.completions.create(
        model="agent/clerk", messages=[{"role": "user", "content": content}]
    )
    assert models.calls[-1]["input"][-1]["content"][1]["filename"] == "paper.pdf"


def form(**fields: Any) -> Any:
    """The parts of a form, a file among them unless it is None."""
    given = {"file": ("x.txt", b"x"), "purpose": (None, "user_data"), **fields}
    return {name: value for name, value in given.items() if value is not None}


@pytest.mark.parametrize(
    ("fields", "status", "param"),
    [
        ({"purpose": (None, "batch")}, 400, "purpose"),
        ({"purpose": (None, "fun")}, 400, "purpose"),
        ({"purpose": None}, 400, "purpose"),
        ({"file": None}, 400, "file"),
        ({"file": (None, "no name")}, 400, "file"),
        ({"wibble": (None, "1")}, 400, "wibble"),
        ({"expires_after[seconds]": (None, "10")}, 400, "expires_after"),
        ({"file": ("x.bin", b"x" * 1_200_000)}, 413, None),
        ({"file": ("x.bin", b"x" * 1_060_000)}, 413, None),
    ],
)
def test_a_form_that_does_not_fit_is_refused(
    api: Api, fields: Any, status: int, param: str | None
) -> None:
    answer = api.http.post("/v1/files", files=form(**fields))
    assert answer.status_code == status, answer.text
    check("ErrorResponse", answer.json())
    assert answer.json()["error"]["param"] == param


def test_forms_are_read_nowhere_else_and_files_need_one(api: Api) -> None:
    assert api.http.post("/v1/responses", files=form()).status_code == 415
    assert api.http.post("/api/v1/runs", files=form()).status_code == 415
    assert api.http.post("/v1/files", json={"purpose": "user_data"}).status_code == 415
    broken = {"content-type": "multipart/form-data; boundary=b"}
    for body in (b"--b\r\nnonsense", b"nothing"):
        answer = api.http.post("/v1/files", content=body, headers=broken)
        assert answer.status_code == 400, answer.text
        check("ErrorResponse", answer.json())


@pytest.mark.parametrize(
    "part",
    [
        {"type": "input_image", "file_id": "file_" + "0" * 32},
        {"type": "input_file", "file_id": "file_" + "0" * 32},
        {"type": "input_file"},
        {"type": "input_file", "file_id": "x", "file_data": "data:text/plain;base64,eA=="},
        {"type": "input_image", "image_url": 7},
    ],
)
def test_a_file_that_is_not_there_is_refused_before_anything_runs(
    api: Api, part: dict[str, Any]
) -> None:
    said = [{"role": "user", "content": [part]}]
    answer = api.http.post("/v1/responses", json={"model": "agent/clerk", "input": said})
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"].startswith("input[0].content[0]")


def test_a_goal_refuses_what_it_cannot_read(api: Api, client: openai.OpenAI) -> None:
    paper = client.files.create(file=("paper.pdf", b"%PDF-1.4 x"), purpose="user_data")
    content = [
        {"type": "input_text", "text": "look"},
        {"type": "input_file", "file_id": paper.id},
    ]
    said = [{"role": "user", "content": content}]
    answer = api.http.post("/v1/responses", json={"model": "goal", "input": said})
    assert answer.status_code == 400 and "goal" in answer.json()["error"]["message"]
