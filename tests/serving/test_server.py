"""The completion server, called by OpenAI's client and by plain HTTP."""

from __future__ import annotations

import http.client
import json
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from serving.conftest import KEY

from gpt_lightning import load

openai = pytest.importorskip("openai", reason="the package openai is not installed")


@pytest.fixture
def client(server: Any) -> Any:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0, timeout=60) as client:
        yield client


def ask(server: Any, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, bytes]:
    """A request as it stands: no library tidies the path."""
    with closing(http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=60)) as connection:
        data = json.dumps(body) if isinstance(body, (dict, list)) else body
        common = {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}"}
        connection.request(method, path, data, {**common, **headers})
        response = connection.getresponse()
        return response.status, response.read()


def requests(server: Any) -> int:
    return int(json.loads(ask(server, "GET", "/health")[1])["requests"])


def wait_until(condition: Callable[[], bool]) -> None:
    for _ in range(600):
        if condition():
            return
        time.sleep(0.05)
    raise AssertionError("it did not happen within 30 s")


def test_completion_equals_generate_in_python(client: Any, checkpoint: Path) -> None:
    answer = client.completions.create(
        model="letters", prompt="abc", max_tokens=30, temperature=0.7, top_p=0.9, seed=5
    )
    expected = load(checkpoint, "cpu").generate(
        "abc", max_new_tokens=30, temperature=0.7, top_k=None, top_p=0.9, seed=5
    )
    assert answer.choices[0].text == expected
    assert len(set(expected)) > 3
    assert answer.choices[0].finish_reason == "length"
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (
        3,
        30,
        33,
    )


def test_prompts_and_samples_come_in_order(client: Any, checkpoint: Path) -> None:
    answer = client.completions.create(model="letters", prompt=["a", "bc"], n=2, max_tokens=9, seed=3)
    expected = load(checkpoint, "cpu").generate(
        ["a", "bc"], num_samples=2, max_new_tokens=9, temperature=1.0, top_k=None, seed=3
    )
    assert [choice.text for choice in answer.choices] == expected
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (3, 36)


def test_null_means_the_default_of_every_key(server: Any) -> None:
    given = {"prompt": "a", "max_tokens": 4, "seed": 1}
    nulls = {"n": None, "stream": None, "temperature": None, "stop": None, "echo": None, "logprobs": None}
    plain, with_nulls = (ask(server, "POST", "/v1/completions", body) for body in (given, {**given, **nulls}))
    assert (plain[0], with_nulls[0]) == (200, 200)
    assert json.loads(with_nulls[1])["choices"] == json.loads(plain[1])["choices"]


def test_two_requests_without_a_seed_differ(client: Any) -> None:
    texts = {client.completions.create(model="letters", prompt="").choices[0].text for _ in range(2)}
    assert len(texts) == 2
    assert {len(text) for text in texts} == {16}  # OpenAI's default of max_tokens


def test_stop_string_ends_the_text_before_it(client: Any) -> None:
    whole = client.completions.create(model="letters", prompt="x", max_tokens=60, seed=1).choices[0].text
    answer = client.completions.create(
        model="letters", prompt="x", max_tokens=60, seed=1, stop=["zz", whole[20:23]]
    )
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].text == whole[: whole.index(whole[20:23])]


def test_stream_has_the_text_of_the_whole_answer_in_pieces(client: Any) -> None:
    settings = {"model": "letters", "prompt": ["a", "b"], "max_tokens": 40, "seed": 2}
    whole = client.completions.create(**settings)
    parts = list(client.completions.create(**settings, stream=True, stream_options={"include_usage": True}))
    texts = ["", ""]
    for part in parts[:-1]:
        texts[part.choices[0].index] += part.choices[0].text
    assert texts == [choice.text for choice in whole.choices]
    assert len(parts) == 81  # every token is a letter, and the usage comes last
    assert [part.choices[0].finish_reason for part in parts[-3:-1]] == ["length", "length"]
    assert parts[-1].usage == whole.usage


def test_stream_ends_with_done(server: Any) -> None:
    status, body = ask(server, "POST", "/v1/completions", {"prompt": "a", "max_tokens": 2, "stream": True})
    events = body.decode().split("\n\n")
    assert status == 200
    assert events[-2:] == ["data: [DONE]", ""]
    assert all(
        json.loads(event.removeprefix("data: "))["object"] == "text_completion" for event in events[:-2]
    )


def test_models_are_listed_and_others_are_unknown(client: Any) -> None:
    assert [model.id for model in client.models.list()] == ["letters"]
    with pytest.raises(openai.NotFoundError, match="this server has 'letters'") as caught:
        client.completions.create(model="gpt-3.5-turbo-instruct", prompt="a")
    assert caught.value.code == "model_not_found"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("{", "JSON"),
        ("[]", "valid dictionary"),
        ({"prompt": 5}, "prompt: "),
        ({"prompt": []}, "0 texts"),
        ({"prompt": ["a"] * 17}, "17 texts"),
        ({"prompt": "a" * 2001}, "2001 characters; at most 2000"),
        ({"prompt": ["a" * 1001] * 2}, "2002 characters; at most 2000"),
        ({"max_tokens": 0}, "max_tokens=0 must be"),
        ({"max_tokens": True}, "max_tokens: "),
        ({"max_tokens": 100001}, "use at most 100000"),
        ({"temperature": -1}, "temperature=-1"),
        ('{"temperature": NaN}', "temperature=nan"),
        ({"temperature": 1e-45}, "temperature=1e-45 must be a number from 1e-20"),
        ({"top_p": 1e-300}, "top_p=1e-300 must be a number from 1e-20"),
        ({"repetition_penalty": 1e-308}, "repetition_penalty=1e-308 must be a number from 0.01"),
        ({"top_p": 0}, "top_p=0"),
        ({"n": 17}, "n: "),
        ({"n": 10**30}, "n: "),
        ({"seed": -1}, "seed=-1"),
        ({"seed": 2**64}, "seed="),
        ({"stop": [""]}, "at least one character"),
        ({"stop": list("vwxyz")}, "use 4 of 100 characters"),
        ({"stop": "z" * 101}, "use 4 of 100 characters"),
        ({"prompt": "\ud800"}, "surrogate"),
        ("[" * 60_000, "parsing the body"),
        ('{"seed": 1' + "0" * 5000 + "}", "parsing the body"),
        ({"logprobs": 5}, "logprobs: "),
        ({"echo": True}, "echo: "),
        ({"presence_penalty": 0.5}, "presence_penalty: "),
        ({"checkpoint": "/etc/passwd"}, "checkpoint: "),
    ],
)
def test_wrong_request_is_answered_in_openai_format(server: Any, body: Any, message: str) -> None:
    status, answer = ask(server, "POST", "/v1/completions", body)
    error = json.loads(answer)["error"]
    assert status == 400
    assert message in error["message"]
    assert error["type"] == "invalid_request_error"
    assert error.keys() == {"message", "type", "param", "code"}
    assert requests(server) == 0


def test_request_larger_than_any_prompt_is_not_read(server: Any) -> None:
    assert ask(server, "POST", "/v1/completions", "x" * 200_000)[0] == 413
    chunked = {"Transfer-Encoding": "chunked", "Content-Length": "2"}
    body = (b"3e8\r\n" + b"x" * 1000 + b"\r\n") * 200 + b"0\r\n\r\n"
    assert ask(server, "POST", "/v1/completions", body, **chunked)[0] == 413
    assert ask(server, "POST", "/gradio_api/queue/join", "x" * 200_000)[0] == 413


def test_full_queue_refuses_requests_until_a_stream_is_closed(client: Any) -> None:
    longest = {"model": "letters", "prompt": "a", "max_tokens": 100_000, "stream": True}
    first = client.completions.create(**longest)
    assert next(first).choices[0].text
    done: list[str] = []

    def wait() -> None:
        done.append(client.completions.create(model="letters", prompt="a", max_tokens=5).choices[0].text)

    waiting = [threading.Thread(target=wait) for _ in range(2)]
    for thread in waiting:
        thread.start()
    wait_until(lambda: client.with_options().get("../health", cast_to=object)["requests"] == 3)
    with pytest.raises(openai.RateLimitError, match="3 requests are being answered"):
        client.completions.create(model="letters", prompt="a")
    assert next(first).choices[0].text
    assert done == []
    first.close()  # 100,000 tokens would take minutes
    for thread in waiting:
        thread.join(60)
    assert [len(text) for text in done] == [5, 5]


def test_disconnected_client_ends_the_computation(server: Any, client: Any) -> None:
    with pytest.raises(openai.APITimeoutError):
        client.with_options(timeout=0.5).completions.create(model="letters", prompt="a", max_tokens=100_000)
    wait_until(lambda: requests(server) == 0)


def test_disconnected_client_leaves_the_queue(server: Any, client: Any) -> None:
    with client.completions.create(model="letters", prompt="a", max_tokens=100_000, stream=True) as first:
        next(first)
        with pytest.raises(openai.APITimeoutError):
            client.with_options(timeout=0.5).completions.create(model="letters", prompt="a")
        wait_until(lambda: requests(server) == 1)
        assert next(first).choices[0].text
    wait_until(lambda: requests(server) == 0)


@pytest.mark.parametrize(
    "path",
    [
        "/gradio_api/file=/etc/passwd",
        "/gradio_api/file/etc/passwd",
        "/file=/etc/passwd",
        "/file=conf/demo.yaml",
        "/gradio_api/file=http://127.0.0.1/",
        "/gradio_api/proxy=http://127.0.0.1/",
        "/static/../../../../../../../../etc/passwd",
        "/assets/%2e%2e/%2e%2e/%2e%2e/%2e%2e/%2e%2e/%2e%2e/%2e%2e/%2e%2e/%2e%2e/etc/passwd",
        "/static//etc/passwd",
        "/gradio_api/stream/a/b/c/playlist-file",
        "/docs",
        "/v1/completions/../../etc/passwd",
    ],
)
def test_no_path_from_the_network_is_opened(server: Any, path: str) -> None:
    status, body = ask(server, "GET", path)
    assert status in (403, 404)
    assert b"root:" not in body
    assert ask(server, "POST", path, b"{}")[0] in (403, 404, 405)


def test_nothing_can_be_uploaded(server: Any) -> None:
    boundary = (
        '--x\r\nContent-Disposition: form-data; name="files"; filename="a.txt"\r\n\r\nhello\r\n--x--\r\n'
    )
    answer = ask(
        server, "POST", "/gradio_api/upload", boundary, **{"Content-Type": "multipart/form-data; boundary=x"}
    )
    assert answer[0] == 404


FILE = {"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({0: FILE}, "passwd"),  # taken for text
        ({0: "a" * 2001}, "2001 characters; at most 2000"),
        ({1: 5}, "maximum value 4"),
        ({1: 1.5}, "samples=1.5"),
        ({2: 100_001}, "maximum value 100000"),
        ({2: "x"}, ""),
        ({3: None}, ""),
        ({8: None}, "seed=None"),
    ],
)
def test_page_requests_are_subject_to_the_limits(server: Any, change: dict[int, Any], message: str) -> None:
    """What the page sends, with values that the page itself would not send."""
    values = ["a", 1, 5, 0.8, 50, 1, 0, 1, -1, ""]
    for position, value in change.items():
        values[position] = value
    body = {"data": values, "fn_index": 1, "session_hash": "test"}  # 0 makes its button "Stop" active
    assert ask(server, "POST", "/gradio_api/queue/join", body)[0] == 200
    with closing(http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=60)) as connection:
        key = {"Authorization": f"Bearer {KEY}"}
        connection.request("GET", "/gradio_api/queue/data?session_hash=test", headers=key)
        response, seen = connection.getresponse(), ""
        while "process_completed" not in seen:
            line = response.readline().decode()
            assert line, "the stream ended"
            seen += line
    assert message in seen
    assert ("root:" in seen, "Traceback" in seen) == (False, False)
    assert requests(server) == 0


def test_ctrl_c_ends_running_completions(serve: Callable[..., Any], checkpoint: Path) -> None:
    server = serve("-m", "gpt_lightning.demo", f"checkpoint={checkpoint}", "port=0", "max_new_tokens=100000")
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        stream = client.completions.create(model="letters", prompt="a", max_tokens=100_000, stream=True)
        next(stream)
        server.process.send_signal(signal.SIGINT)
        with pytest.raises(openai.APIError, match="the server is stopping"):
            list(stream)
        output, _ = server.process.communicate(timeout=60)
    assert server.process.returncode == 0
    assert output.splitlines()[-1] == "stopped"
    assert server.log.read_text() == ""


@pytest.mark.parametrize("header", [{"Origin": "http://evil.example"}, {"Host": "evil.example"}])
def test_page_of_another_site_is_refused(server: Any, header: dict[str, str]) -> None:
    for path in ("/config", "/v1/models"):
        assert ask(server, "GET", path, **header)[0] == 403
    assert ask(server, "OPTIONS", "/config", **header, **{"Access-Control-Request-Method": "GET"})[0] == 403


def test_nothing_is_answered_without_the_key(server: Any) -> None:
    for path in ("/", "/health", "/config", "/v1/models"):
        assert ask(server, "GET", path, Authorization="Bearer other")[0] == 401


def test_server_makes_no_outgoing_connections(server: Any, client: Any) -> None:
    client.completions.create(model="letters", prompt="a", max_tokens=2)
    assert ask(server, "GET", "/")[0] == 200
    assert set(server.watched.read_text().split("\n")) == {"watching", ""}


def test_server_listens_only_on_the_loopback_address(server: Any) -> None:
    port = int(server.url.rpartition(":")[2])
    assert server.url == f"http://127.0.0.1:{port}"
    with pytest.raises(ConnectionRefusedError):  # all of 127/8 is this machine, on Linux
        socket.create_connection(("127.0.0.2", port), timeout=5).close()


def demo(*arguments: str) -> tuple[int, str]:
    command = [sys.executable, "-m", "gpt_lightning.demo", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.stdout == ""
    return done.returncode, done.stderr


def test_port_in_use_is_reported_in_one_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, error = demo("checkpoint=any.ckpt", f"port={port}")
    assert code == 1
    assert (
        error == f"error: host=127.0.0.1 port={port}: Address already in use; choose another port or host\n"
    )


def test_missing_web_packages_name_the_extra() -> None:
    code = (
        "import sys, runpy; sys.modules['uvicorn'] = None; sys.argv[1:] = ['checkpoint=a', 'port=0'];"
        "runpy.run_module('gpt_lightning.demo', run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert done.stderr == "error: the package uvicorn is not installed; pip install 'gpt-lightning[demo]'\n"
