"""The page's server: whom it answers, and what."""

from __future__ import annotations

import http.client
import json
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from job.errors import UsageError
from job.inference import play
from job.inference.play import Player
from job.inference.sample import TextModel
from job.inference.sources import Source


@pytest.fixture(scope="module")
def player(make_source: Callable[[str], Source]) -> Iterator[Player]:
    source = make_source("head")
    server = Player(TextModel(source.model(), source.tokenizer))
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def asked(player: Player, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, str, Any]:
    """Status, body and headers of the answer."""
    connection = http.client.HTTPConnection("127.0.0.1", player.server_address[1], timeout=20)
    connection.request(method, path, body if isinstance(body, bytes | None) else json.dumps(body), headers)
    answer = connection.getresponse()
    return answer.status, answer.read().decode(), answer.headers


ASK = {"prompt": "The import", "ids": [], "temperature": 0, "tokens": 5, "seed": 1}


def tokens(player: Player, **changes: Any) -> list[dict[str, Any]]:
    status, body, _ = asked(player, "POST", "/", ASK | changes, **{"X-Token": player.token})
    assert status == 200, body
    return [json.loads(line) for line in body.splitlines()]


def test_the_page_needs_the_token_and_nothing_from_elsewhere(player: Player) -> None:
    status, page, headers = asked(player, "GET", f"/?token={player.token}")
    assert status == 200 and "<textarea" in page and "//" not in page.replace("://", "") and "http" not in page
    assert "default-src 'none'" in headers["Content-Security-Policy"]


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::1]", "localhost:9000"])
def test_a_browser_comes_by_port_80_or_through_a_tunnel(player: Player, host: str) -> None:
    headers = {"X-Token": player.token, "Host": host, "Origin": f"http://{host}"}
    assert asked(player, "POST", "/", ASK, **headers)[0] == 200


@pytest.mark.parametrize(
    ("headers", "said"),
    [
        ({}, "token is missing"),
        ({"X-Token": "wrong"}, "token is missing or wrong"),
        ({"X-Token": "TOKEN", "Origin": "http://evil.example"}, "for its own page"),
        ({"X-Token": "TOKEN", "Origin": "null"}, "for its own page"),
        ({"X-Token": "TOKEN", "Host": "evil.example:80"}, "for its own page"),
        ({"X-Token": "TOKEN", "Host": "127.0.0.1.evil.example"}, "for its own page"),
    ],
)
def test_whoever_has_no_right_is_refused(player: Player, headers: dict[str, str], said: str) -> None:
    headers = {name: player.token if value == "TOKEN" else value for name, value in headers.items()}
    status, body, _ = asked(player, "POST", "/", ASK, **headers)
    assert status == 403 and said in body
    assert asked(player, "GET", "/")[0] == 403 and asked(player, "GET", "/else")[0] == 404


def test_tokens_come_with_probabilities_and_go_on_from_any_point(player: Player) -> None:
    whole = tokens(player)
    assert len(whole) == 5
    for one in whole:
        shares = [other["p"] for other in one["others"]]
        assert one["id"] == one["others"][0]["id"] and one["p"] == shares[0] == max(shares) and sum(shares) <= 1
    ids = [one["id"] for one in whole]
    assert [one["id"] for one in tokens(player, ids=ids[:2], tokens=3)] == ids[2:]
    assert len(tokens(player, tokens=10_000)) < 64
    hot = [tokens(player, temperature=2, seed=seed, tokens=8) for seed in (1, 1, 2)]
    assert hot[0] == hot[1] != hot[2]


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        (ASK | {"temperature": -1}, 400, "temperature is -1: it must not be negative"),
        (ASK | {"prompt": "x " * 200}, 400, "shorten the prompt"),
        (ASK | {"ids": [500]}, 400, "there are no such tokens"),
        (b"{", 400, "Expecting"),
        (b"[" * 200_000, 400, "recursion"),
        (ASK | {"tokens": float("inf")}, 400, "infinity"),
        ([1], 400, "indices"),
        (b" " * ((1 << 20) + 1), 413, "at most a megabyte"),
    ],
)
def test_requests_that_make_no_sense(player: Player, body: Any, status: int, said: str) -> None:
    found = asked(player, "POST", "/", body, **{"X-Token": player.token})
    assert found[0] == status and said in found[1]


def test_clients_that_never_send_or_read_hold_up_nobody(player: Player, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(play.Handler, "timeout", 0.3)
    silent = socket.create_connection(player.server_address[:2])
    unread = socket.create_connection(player.server_address[:2])
    body = json.dumps(ASK | {"tokens": 50}).encode()
    head = f"POST / HTTP/1.0\r\nHost: 127.0.0.1:1\r\nX-Token: {player.token}\r\nContent-Length: {len(body)}\r\n\r\n"
    unread.sendall(head.encode() + body)
    assert len(tokens(player)) == 5
    silent.settimeout(20)
    assert silent.recv(1) == b"", "the server ends the connection"
    silent.close()
    unread.close()


def test_a_port_that_is_taken_is_said(player: Player) -> None:
    with pytest.raises(UsageError, match=r"cannot be used .*: choose another --port"):
        Player(player.model, port=player.server_address[1])
