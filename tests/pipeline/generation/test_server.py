"""The client of a ``vllm serve``: errors that say what to do, a key that is never shown, retries for the connection alone."""

import copy
import http.server
import threading
from collections.abc import Callable, Iterator

import pytest
import torch

from pipeline.generation import Request, Sampling, server
from pipeline.generation.agreement import Checked
from pipeline.generation.server import ServerError, ServerGenerate

SECRET = "key-of-the-test"
TEN = Sampling(temperature=0.8, max_new_tokens=10)


@pytest.fixture
def connect(server_url: str, sampled, monkeypatch) -> Iterator[Callable[..., ServerGenerate]]:
    """Makes clients of the running server, with its key in the environment."""
    monkeypatch.setenv("KEY", SECRET)
    made = []

    def make(url: str = server_url, **options: object) -> ServerGenerate:
        made.append(ServerGenerate(url, sampled, **{"key_variable": "KEY"} | options))
        return made[-1]

    yield make
    for client in made:
        client.close()


@pytest.fixture
def flaky() -> Iterator[Callable[[int], str]]:
    """Starts servers that hang up on the first so many requests and then answer with an error of their own."""
    started = []

    def start(times: int) -> str:
        class Handler(http.server.BaseHTTPRequestHandler):
            asked = 0

            def do_GET(self) -> None:
                Handler.asked += 1
                if Handler.asked > times:
                    self.send_error(500, "full")

            def log_message(self, *_: object) -> None:
                pass

        started.append((http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler), Handler))
        threading.Thread(target=started[-1][0].serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{started[-1][0].server_address[1]}"

    start.started = started
    yield start
    for one, _ in started:
        one.shutdown()
        one.server_close()


def test_its_draws_are_those_of_vllm_in_process(connect, vllm_engine, sampled):
    """The same requests give the same completions in process and through the server."""
    vllm_engine.load(sampled)
    requests = [Request(f"p{i}", tuple(range(2, 3 + i)), 3, 0) for i in range(5)]
    ours, theirs = (
        {g.request.prompt_uid: g.completion_ids for g in e(requests, TEN)} for e in (vllm_engine, connect())
    )
    assert ours == theirs


def test_a_wrong_key_is_refused_and_none_is_shown(connect, monkeypatch):
    """Without the right key the error names the environment variable, and never shows what it holds."""
    connect()
    monkeypatch.setenv("KEY", "another-secret")
    with pytest.raises(ServerError, match="environment variable KEY") as refused:
        connect()
    assert "another-secret" not in str(refused.value)


def test_a_model_that_is_not_served_is_named(connect):
    """The error lists what is served; the address may end in /v1."""
    with pytest.raises(ServerError, match=r"generation.model = 'large'.*serves \['small'\]"):
        connect(model="large")
    assert connect(model="small").model == "small"


def test_what_the_server_refuses_is_not_asked_again(connect, monkeypatch):
    """An answer of 400 ends the call at once, with the prompt and the server's own words."""
    monkeypatch.setattr(server, "WAITS", (60.0,))
    client = connect()
    client.context = 10**6
    with pytest.raises(ServerError, match=r"prompt long: .* answered 400: .*32"):
        list(client([Request("long", (2,) * 40, 1, 0)], TEN))


def test_finished_groups_come_before_an_error(connect):
    """One refused prompt costs none of the groups that were asked for with it: all of them come, then its error."""
    client, found = connect(), []
    client.context = 10**6
    requests = [Request("long", (2,) * 40, 1, 0), *(Request(f"p{i}", (2, 3), 2, i) for i in range(20))]
    with pytest.raises(ServerError, match="prompt long"):
        for group in client(requests, TEN):
            found.append(group.request.prompt_uid)
    assert sorted(found) == sorted(r.prompt_uid for r in requests[1:])


def test_trouble_with_the_connection_is_tried_again(flaky, connect, monkeypatch):
    """A server that hangs up twice is asked a third time; what it then answers is not tried again."""
    monkeypatch.setattr(server, "WAITS", (0.01, 0.01, 0.01))
    url = flaky(2)
    with pytest.raises(ServerError, match=r"the list of models: .* answered 500"):
        connect(url)
    assert flaky.started[0][1].asked == 3


def test_a_server_that_is_not_there_is_named(connect, monkeypatch):
    """After the last try the error has the address, the number of tries and the setting."""
    monkeypatch.setattr(server, "WAITS", (0.01, 0.01))
    with pytest.raises(ServerError, match=r"127.0.0.1:9 cannot be reached after 3 tries.*generation.url"):
        connect("http://127.0.0.1:9")


def test_a_server_with_other_weights_is_refused(connect, sampled):
    """The first group is compared with the policy, and the error says that the server holds other weights."""
    other = copy.deepcopy(sampled)
    with torch.no_grad():
        other.model.lm_head.weight.mul_(1.2)
    with pytest.raises(ValueError, match="the server does not sample from this policy"):
        next(Checked(connect(), other, "the server")([Request("p", (2, 3), 8, 0)], TEN))
    assert next(Checked(connect(), sampled, "the server")([Request("p", (2, 3), 8, 0)], TEN))
