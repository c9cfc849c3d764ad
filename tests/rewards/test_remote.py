"""http and judge against a real server that answers well, badly, late, or not at all."""

import asyncio
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from megatron_rl.config.errors import SettingsError
from megatron_rl.config.reward_settings import ScoringSettings
from megatron_rl.rewards.base import Scored
from tests.rewards.samples import QUESTION, scored

QUICK = {"timeout": 60.0, "backoff": 0.01, "retries": 2}


class Server:
    """Answers by a function of the request; keeps what it was asked."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.answer: Callable[[int], tuple[int, bytes]] = lambda count: (200, b'{"score": 0.5}')
        self.extra: dict[str, str] = {}
        self.patience = threading.Event()
        self.most_at_once = self.at_once = 0
        self.lock = threading.Lock()
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                server.handle(self)

            def log_message(self, format: str, *arguments: Any) -> None:
                return

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}"
        threading.Thread(target=self.http.serve_forever, args=(0.05,), daemon=True).start()

    def handle(self, handler: BaseHTTPRequestHandler) -> None:
        body = json.loads(handler.rfile.read(int(handler.headers["content-length"])))
        with self.lock:
            self.asked.append({"path": handler.path, **body})
            self.headers.append({name.lower(): value for name, value in handler.headers.items()})
            self.at_once += 1
            self.most_at_once = max(self.most_at_once, self.at_once)
            count = len(self.asked)
        status, text = self.answer(count)
        with self.lock:
            self.at_once -= 1
        if status == 0:  # hang up
            handler.connection.close()
            return
        try:
            handler.send_response(status)
            for name, value in {"content-length": str(len(text)), **self.extra}.items():
                handler.send_header(name, value)
            handler.end_headers()
            handler.wfile.write(text)
        except OSError:  # the client has gone
            return

    def close(self) -> None:
        self.patience.set()
        self.http.shutdown()
        self.http.server_close()


@pytest.fixture
def server() -> Iterator[Server]:
    running = Server()
    yield running
    running.close()


def ask(server: Server, *texts: str, fields: dict[str, Any] | None = None, **options: Any) -> list[Scored]:
    part = {"name": "http", "options": {"url": f"{server.url}/score", **QUICK, **options}}
    return asyncio.run(scored([part], fields or {}, *texts))


def judge(server: Server, *texts: str, fields: dict[str, Any] | None = None, **options: Any) -> list[Scored]:
    part = {"name": "judge", "options": {"url": f"{server.url}/v1/", "model": "wise", **QUICK, **options}}
    return asyncio.run(scored([part], fields or {}, *texts))


def says(*contents: str) -> Callable[[int], tuple[int, bytes]]:
    """Chat completions, one after the other."""

    def answer(count: int) -> tuple[int, bytes]:
        message = {"role": "assistant", "content": contents[(count - 1) % len(contents)]}
        return 200, json.dumps({"choices": [{"message": message, "finish_reason": "stop"}]}).encode()

    return answer


# -- http --------------------------------------------------------------------------------------------------------------


def test_what_is_sent_and_what_is_read(server: Server, tmp_path: Path) -> None:
    server.answer = lambda count: (200, b'[{"embedding": [-1.25]}]')
    (tmp_path / "key").write_text("secret\n")
    body = {"text": "{prompt} -> {response}", "chat": "{conversation}", "gold": "{gold}", "deep": [{"n": 1, "h": "{messages}"}]}
    options = {"body": body, "score": "0.embedding.0", "api_key_file": str(tmp_path / "key")}
    [answer] = ask(server, "{gold} {prompt}", fields={"gold": [1, 2]}, **options)
    assert answer.reward == -1.25 and answer.failure is None and answer.rewards == {"http": -1.25}
    messages = [{"role": "system", "content": "Be good."}, {"role": "user", "content": QUESTION}]
    assert server.asked == [
        {
            "path": "/score",
            "text": f"{QUESTION} -> {{gold}} {{prompt}}",  # what a model writes is never filled in again
            "chat": [*messages, {"role": "assistant", "content": "{gold} {prompt}"}],
            "gold": [1, 2],
            "deep": [{"n": 1, "h": messages}],
        }
    ]
    assert server.headers[0]["authorization"] == "Bearer secret"


@pytest.mark.parametrize("fault", [500, 503, 429, 0])
def test_passing_faults_are_tried_again(server: Server, fault: int) -> None:
    server.answer = lambda count: (200, b'{"score": 2}') if count == 3 else (fault, b"busy")
    [answer] = ask(server, "x")
    assert answer.reward == 2 and len(server.asked) == 3


@pytest.mark.parametrize(
    "status, text, message, tries",
    [
        (500, b"broken", "answered 500: 'broken' (tried 3 times)", 3),
        (404, b"nothing here", "answered 404: 'nothing here'", 1),
        (302, b"", "answered 302", 1),
        (0, b"", "RemoteProtocolError", 3),
        (200, b"<html>", "no JSON", 1),
        (200, b"[" * 100_000, "no JSON", 1),
        (200, b"\xff\xfe", "no JSON", 1),
        (200, b'{"points": 1}', "answered without 'score'", 1),
        (200, b"[1]", "answered without 'score'", 1),
        (200, b"7", "answered without 'score'", 1),
        (200, b'{"score": "7"}', "must be a finite number", 1),
        (200, b'{"score": null}', "must be a finite number", 1),
        (200, b'{"score": NaN}', "must be a finite number", 1),
        (200, b'{"score": 1e999}', "must be a finite number", 1),
        (200, b'{"score": true}', "answered with True where a number should stand", 1),
        (200, b" " * (5 << 20), "more than 4 MiB", 1),
    ],
)
def test_lasting_faults_fail_the_sample_with_what_was_wrong(
    server: Server, status: int, text: bytes, message: str, tries: int
) -> None:
    server.answer = lambda count: (status, text)
    [answer] = ask(server, "x")
    assert answer.failure is not None and answer.failure.startswith("http: ") and message in answer.failure
    assert answer.reward == 0 and answer.rewards == {} and len(server.asked) == tries


def test_a_server_that_never_answers_is_left(server: Server) -> None:
    def never(count: int) -> tuple[int, bytes]:
        server.patience.wait(30)
        return 200, b'{"score": 1}'

    server.answer = never
    [answer] = ask(server, "x", timeout=0.2, retries=1)
    assert answer.failure is not None and "did not answer within 0.2 s (tried 2 times)" in answer.failure


def test_a_server_that_is_not_there(server: Server) -> None:
    server.close()
    [answer] = ask(server, "x")
    assert answer.failure is not None and "ConnectError" in answer.failure and "(tried 3 times)" in answer.failure


def test_one_bad_answer_fails_one_sample(server: Server) -> None:
    server.answer = lambda count: (200, b'{"score": 1}') if server.asked[count - 1]["response"] != "b" else (400, b"no")
    answers = ask(server, "a", "b", "c", concurrency=1)
    assert [answer.reward for answer in answers] == [1, 0, 1]
    assert [answer.failure is None for answer in answers] == [True, False, True]


def test_no_more_requests_at_once_than_allowed(server: Server) -> None:
    three = threading.Barrier(3, timeout=60)  # nobody is answered before three have asked

    def together(count: int) -> tuple[int, bytes]:
        three.wait()
        return 200, b'{"score": 1}'

    server.answer = together
    answers = ask(server, *"abcdefghijkl", concurrency=3, timeout=60.0)
    assert sum(answer.reward for answer in answers) == 12 and server.most_at_once == 3


def test_a_key_that_cannot_be_read_is_told_before_work_starts(server: Server) -> None:
    with pytest.raises(SettingsError, match=r"http: api_key_file = nowhere/key: cannot be read: No such file"):
        ask(server, "x", api_key_file="nowhere/key")


# -- judge -------------------------------------------------------------------------------------------------------------


def test_the_judge_is_asked_and_its_score_is_scaled(server: Server) -> None:
    server.answer = says("Fine.\nScore: 7.5")
    [answer] = judge(server, "my {prompt}", low=5, high=10, system="Strict.", more={"seed": 3}, fields={})
    assert answer.reward == pytest.approx(0.5) and answer.failure is None
    [asked] = server.asked
    assert asked["path"] == "/v1/chat/completions" and asked["model"] == "wise" and asked["seed"] == 3
    assert asked["temperature"] == 0 and asked["messages"][0] == {"role": "system", "content": "Strict."}
    assert QUESTION in asked["messages"][1]["content"] and "my {prompt}" in asked["messages"][1]["content"]


@pytest.mark.parametrize(
    "said, message",
    [
        ("Great!", "gave no scores where one is asked for"),
        ("", "gave no scores"),
        ("Score: 3\nScore: 9", "gave 2 scores"),
        ("Score: ten", "gave no scores"),
        ("I would say Score: 8", "gave no scores"),
        ("Score: 8/10", "gave no scores"),
        ("Score: 11", "score 11 is not between 0 and 10"),
        ("Score: -1", "score -1 is not between 0 and 10"),
    ],
)
def test_a_judgement_is_read_strictly(server: Server, said: str, message: str) -> None:
    server.answer = says(said)
    [answer] = judge(server, "x")
    assert answer.failure is not None and message in answer.failure and answer.reward == 0


@pytest.mark.parametrize("text", [b"{}", b'{"choices": []}', b'{"choices": [{"message": {"content": null}}]}', b"[]"])
def test_what_is_no_completion_is_a_failure(server: Server, text: bytes) -> None:
    server.answer = lambda count: (200, text)
    [answer] = judge(server, "x")
    assert answer.failure is not None and ("no chat completion" in answer.failure or "said nothing" in answer.failure)


def test_a_failure_has_the_reward_that_the_settings_say(server: Server) -> None:
    server.answer = says("no")
    part = {"name": "judge", "options": {"url": server.url, "model": "wise", **QUICK}}
    [answer] = asyncio.run(scored([part], {}, "x", scoring=ScoringSettings(failure_reward=-1.0)))
    assert answer.reward == -1 and answer.failure is not None
