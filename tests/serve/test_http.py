"""A `crossrep serve` process as its clients meet it: answers, refusals, and what it does when things go wrong."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load
from served import NOW, Records, Server

from crossrep import LocalView
from crossrep.cli import main
from crossrep.spec import Space
from crossrep.views.answers import Representations
from streams import broker
from tests.cluster import Workers, new_space, wait_for

IDS = [f"k{i}" for i in range(300)]
ASKED = ["a", "nobody", "17", "ünï", "a/b", *IDS]


@dataclass
class World:
    """A space with users, one replica of it, and a view of the same."""

    space: Space
    bootstrap: str
    server: Server
    view: LocalView
    folder: Path
    workers: Workers


@pytest.fixture(scope="module")
def world(bootstrap: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("serve")
    workers = Workers(folder)
    space, _ = new_space(bootstrap, folder)
    Records(space, bootstrap).put(["a", 17, "ünï", "a/b", "batch", *IDS])
    server = Server(workers, space, folder / "disk", "--max-keys", "500", "--client-timeout", "1")
    with LocalView("user", space.name, bootstrap) as view:
        view.wait(60)
        server.wait()
        yield World(space, bootstrap, server, view, folder, workers)
    workers.kill_all()


def assert_same(said: dict[str, Any], theirs: Representations) -> None:
    """A batch's JSON beside a view's answer: counts and times exactly, vectors to the last bit of float32."""
    assert said["found"] == theirs.found.tolist() and said["count"] == theirs.counts.tolist() and said["at"] == theirs.at
    never = [None if time == -np.inf else time for time in theirs.event_times]
    assert said["event_time"] == never
    for name, values in theirs.items():
        column = said["columns"][name]
        assert [time or -np.inf for time in column["time"]] == values.times.tolist()
        assert ("weight" in column) == (not np.isnan(values.weights).any())
        if "weight" in column:
            assert column["weight"] == values.weights.tolist()
        if values.vectors.shape[1]:
            np.testing.assert_array_equal(np.array(column["vector"], np.float32), values.vectors)


def test_answers(world: World) -> None:
    ask = world.server.ask
    status, said = ask("POST", "/v1/user/batch", {"ids": ASKED})
    assert status == 200 and said["space"] == world.space.name and said["hash"] == world.space.hash.hex()
    assert said["lag"]["records"] == 0 and 0 <= said["lag"]["seconds"] < 60
    assert_same(said, world.view.get(ASKED))
    for at in (NOW, NOW + 5000.25, 0):
        assert_same(ask("POST", "/v1/user/batch", {"ids": ASKED, "at": at})[1], world.view.get(ASKED, at))
    status, said = ask("POST", "/v1/user/batch", {"ids": ["a"], "columns": ["ur"]})
    assert list(said["columns"]) == ["ur"] and "weight" not in said["columns"]["ur"]
    assert ask("POST", "/v1/user/batch", {"ids": []})[1]["found"] == []
    for id, path in (("a", "a"), ("ünï", "%C3%BCn%C3%AF"), ("a/b", "a%2Fb")):
        status, said = ask("GET", f"/v1/user/{path}?at=1.7e9&columns=cr,clicks")
        one = world.view.get([id], 1.7e9)
        assert status == 200 and said["id"] == id and said["count"] == 1 and said["event_time"] == one.event_times[0]
        assert set(said["columns"]) == {"cr", "clicks"} and said["columns"]["cr"]["weight"] == one["cr"].weights[0]
        assert np.float32(said["columns"]["cr"]["vector"]).tobytes() == one["cr"].vectors[0].tobytes()
    status, said = ask("GET", "/v1/space")
    assert said["spec"]["entities"].keys() == {"user", "item"} and said["entities"]["user"]["stream_time"] == world.view.stream_time
    assert ask("GET", "/healthz") == (200, {"alive": True})
    assert world.server.metric("applied_records_total") == 305 and world.server.metric("ready") == 1
    assert 'crossrep_serve_requests_total{route="batch",status="200"}' in world.server.raw("GET", "/metrics")[2].decode()


def test_binary_answers_are_exact(world: World) -> None:
    kind = "application/x-safetensors"
    status, headers, body = world.server.raw("POST", "/v1/user/batch", {"ids": ASKED, "at": NOW}, accept=kind)
    assert status == 200 and headers["content-type"] == kind
    tensors, theirs = load(body), world.view.get(ASKED, NOW)
    assert tensors["found"].tolist() == theirs.found.tolist() and tensors["count"].tolist() == theirs.counts.tolist()
    assert tensors["event_time"].tobytes() == theirs.event_times.tobytes()
    for name, values in theirs.items():
        assert tensors[f"{name}.time"].tobytes() == values.times.tobytes()
        assert (f"{name}.weight" in tensors) == (name != "ur") and (f"{name}.vector" in tensors) == (name != "clicks")
        if name != "ur":
            assert tensors[f"{name}.weight"].tobytes() == values.weights.tobytes()
        if name != "clicks":
            assert tensors[f"{name}.vector"].tobytes() == values.vectors.tobytes()
    said = json.loads(body[8 : 8 + int.from_bytes(body[:8], "little")])["__metadata__"]
    assert said["space"] == world.space.name and said["lag_records"] == "0" and float(said["at"]) == NOW
    one = load(world.server.raw("GET", "/v1/user/a", accept=kind)[2])
    assert one["cr.vector"].tobytes() == theirs["cr"].vectors[:1].tobytes()


def test_nearest(world: World) -> None:
    expected = world.view.nearest("cr", "a", 7)
    status, said = world.server.ask("GET", "/v1/user/a/nearest?column=cr&k=7")
    assert status == 200 and [pair["id"] for pair in said["nearest"]] == [name for name, _ in expected]
    np.testing.assert_allclose([pair["cosine"] for pair in said["nearest"]], [cosine for _, cosine in expected], rtol=1e-5)
    assert len(world.server.ask("GET", "/v1/user/a/nearest")[1]["nearest"]) == 10


REFUSED = [
    ("GET", "/v1/user/nobody", None, 404, "no user 'nobody'"),
    ("GET", "/v1/advertiser/1", None, 404, "has user, item"),
    ("GET", "/v1/user/", None, 400, "0 bytes"),
    ("GET", "/v1/user/" + "x" * 65, None, 400, "65 bytes"),
    ("GET", "/v1/user/%FF", None, 400, "UTF-8"),
    ("GET", "/v1/user/a?at=nan", None, 400, "seconds since 1970"),
    ("GET", "/v1/user/a?at=1e999", None, 400, "seconds since 1970"),
    ("GET", "/v1/user/a?columns=cr,typo", None, 400, "cr, ur, clicks"),
    ("GET", "/v1/user/a?colums=cr", None, 400, "parameter"),
    ("GET", "/v1/user/a/nearest?column=clicks", None, 400, "no vectors 'clicks'"),
    ("GET", "/v1/user/a/nearest?k=0", None, 400, "1 to 100"),
    ("GET", "/v1/user/nobody/nearest", None, 404, "no user"),
    ("GET", "/v2/user", None, 404, "openapi"),
    ("GET", "/v1/user/batch", None, 405, "POST"),
    ("DELETE", "/v1/user/a", None, 405, "GET"),
    ("POST", "/v1/user/batch", None, 400, "not JSON"),
    ("POST", "/v1/user/batch", b"{", 400, "not JSON"),
    ("POST", "/v1/user/batch", b'{"ids": [NaN]}', 400, "not JSON"),
    ("POST", "/v1/user/batch", ["a"], 400, "object"),
    ("POST", "/v1/user/batch", {"ids": ["a"], "colums": []}, 400, "object"),
    ("POST", "/v1/user/batch", {"ids": "a"}, 400, "list"),
    ("POST", "/v1/user/batch", {"ids": [17]}, 400, "list"),
    ("POST", "/v1/user/batch", {"ids": ["a", ""]}, 400, "at 1 has 0 bytes"),
    ("POST", "/v1/user/batch", {"ids": ["ü" * 33]}, 400, "66 bytes"),
    ("POST", "/v1/user/batch", {"ids": ["a"], "at": "now"}, 400, "seconds"),
    ("POST", "/v1/user/batch", {"ids": ["a"], "columns": ["typo"]}, 400, "cr, ur, clicks"),
    ("POST", "/v1/user/batch", {"ids": ["a"] * 501}, 413, "500 at most"),
    ("POST", "/v1/user/batch", b" " * 1_000_000, 413, "larger than"),
]


@pytest.mark.parametrize(("method", "path", "body", "status", "says"), REFUSED)
def test_refusals_say_what_to_do(world: World, method: str, path: str, body: Any, status: int, says: str) -> None:
    got, said = world.server.ask(method, path, body)
    assert got == status and said.keys() == {"error", "fix"} and said["error"] and said["fix"]
    assert re.search(says, f"{said['error']}; {said['fix']}"), said
    assert world.server.ask("GET", "/v1/user/a")[0] == 200


def test_schemathesis_finds_nothing(world: World) -> None:
    command = [sys.executable, "-m", "schemathesis.cli", "run", f"http://127.0.0.1:{world.server.port}/openapi.json"]
    options = ["--max-examples", "15", "--seed", "1", "--suppress-health-check", "all", "--no-color"]
    done = subprocess.run([*command, *options], capture_output=True, text=True, timeout=120, cwd=world.folder)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert world.server.process.poll() is None and "failed" not in world.server.log


def test_slow_clients_are_cut_off(world: World) -> None:
    started = time.monotonic()
    idle, in_head, in_body = (socket.create_connection(("127.0.0.1", world.server.port), 5) for _ in range(3))
    in_head.sendall(b"GET /v1/user/a HTT")
    in_body.sendall(b"POST /v1/user/batch HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n{")
    for client in (idle, in_head, in_body):
        with client:
            assert client.recv(100) == b"" and 0.9 < time.monotonic() - started < 3
    body = json.dumps({"ids": IDS}).encode()
    with socket.socket() as client:  # asks and asks, and takes no answer
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.settimeout(5)
        client.connect(("127.0.0.1", world.server.port))
        request = b"POST /v1/user/batch HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(body) + body
        with pytest.raises((ConnectionResetError, BrokenPipeError)):
            client.sendall(request * 10_000)
    with socket.create_connection(("127.0.0.1", world.server.port), 5) as client:
        client.sendall(b"GET / HTTP/1.1\r\nx: ")
        started = time.monotonic()
        with pytest.raises((ConnectionResetError, BrokenPipeError)):
            client.sendall(b"y" * 100_000_000)
        assert time.monotonic() - started < 0.9  # before its time is up
    with socket.create_connection(("127.0.0.1", world.server.port), 5) as client:
        client.sendall(b"nonsense\r\n\r\n")
        assert b"400" in client.recv(100)
    assert world.server.ask("GET", "/v1/user/a")[0] == 200


def test_a_second_replica_answers_the_same_and_survives_a_kill(world: World) -> None:
    disk = world.folder / "second"
    server = Server(world.workers, world.space, disk, "--memory-mb", "1")
    server.wait()
    asked = {"ids": ASKED, "at": NOW}

    def columns(of: Server) -> Any:
        return {name: part for name, part in of.ask("POST", "/v1/user/batch", asked)[1].items() if name != "lag"}

    assert columns(server) == columns(world.server)
    server.process.kill()
    server.process.wait()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        started = world.workers.start("serve", world.space.name, "--port", str(taken.getsockname()[1]), "--data", str(disk))
        assert started.wait(30) == 1 and "cannot be listened on" in world.workers.logs()
    server = Server(world.workers, world.space, disk)
    server.wait()
    assert columns(server) == columns(world.server)
    assert server.metric("applied_records_total") == 0 and server.metric("resumed_records") == 305
    clash = world.workers.start("serve", world.space.name, "--port", "0", "--data", str(disk))
    assert clash.wait(30) == 1 and "open in another process" in world.workers.logs()
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(15) == 0


def test_overload_and_a_replica_that_is_not_ready(world: World) -> None:
    # A disk that never has room keeps it from catching up.
    server = Server(world.workers, world.space, world.folder / "third", "--min-free-mb", "1000000000", "--max-waiting", "5")
    status, headers, body = server.raw("GET", "/ready")
    assert status == 503 and headers["retry-after"] == "5" and not json.loads(body)["ready"]
    status, headers, body = server.raw("GET", "/v1/user/a")
    assert status == 503 and headers["retry-after"] == "5" and "reading" in json.loads(body)["error"]
    clients = [http.client.HTTPConnection("127.0.0.1", server.port, timeout=10) for _ in range(10)]
    for client in clients:  # each is heard, and waits for the rest of its body
        client.putrequest("POST", "/v1/user/batch")
        client.putheader("Content-Length", "50")
        client.endheaders(b"{")
    wait_for(lambda: "waiting" in str(server.ask("GET", "/v1/user/a")[1]), "it is overloaded", 5)
    assert server.raw("GET", "/v1/user/a")[1]["retry-after"] == "1"
    assert server.ask("GET", "/healthz")[0] == 200
    for client in clients:
        client.close()


def test_tokens_and_tls(world: World) -> None:
    token, other = "0123456789abcdef", "fedcba9876543210"
    file, cert, key = (world.folder / name for name in ("tokens", "cert.pem", "key.pem"))
    file.write_text(f"{token}\n{other}\n")
    subject = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
    made = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "1", *subject]
    subprocess.run([*made, "-keyout", key, "-out", cert], check=True, capture_output=True)
    tls = ["--tls-cert", str(cert), "--tls-key", str(key)]
    server = Server(world.workers, world.space, world.folder / "fourth", "--host", "0.0.0.0", "--token-file", str(file), *tls)

    def ask(path: str, header: dict[str, str]) -> tuple[int, dict[str, str]]:
        trusted = ssl.create_default_context(cafile=str(cert))
        client = http.client.HTTPSConnection("localhost", server.port, timeout=10, context=trusted)
        client.request("GET", path, headers=header)
        answer = client.getresponse()
        answer.read()
        client.close()
        return answer.status, {name.lower(): value for name, value in answer.getheaders()}

    wait_for(lambda: ask("/ready", {})[0] == 200, "it is ready", 30)
    for path in ("/v1/user/a", "/metrics", "/openapi.json", "/nothing"):
        for header in ({}, {"Authorization": f"Bearer {token}x"}, {"Authorization": f"Basic {token}"}, {"Authorization": "Bearer ü"}):
            status, headers = ask(path, {name: value.encode().decode("latin-1") for name, value in header.items()})
            assert status == 401 and headers["www-authenticate"] == "Bearer"
    for good in (token, other):
        assert ask("/v1/user/a", {"Authorization": f"Bearer {good}"})[0] == 200
    assert token not in server.log


@pytest.mark.parametrize(
    ("options", "code", "says"),
    [
        (["--host", "0.0.0.0"], 1, "--token-file"),
        (["--host", "no.such.host.invalid", "--insecure"], 1, "cannot be listened on"),
        (["--tls-cert", "/nowhere"], 2, "go together"),
        (["--tls-cert", "/nowhere", "--tls-key", "/nowhere"], 1, "--tls-cert /nowhere"),
        (["--token-file", "/nowhere"], 1, "--token-file /nowhere"),
        (["--token-file", "/dev/null"], 1, "holds no token"),
        (["--data", "/dev/null/x"], 1, "folder /dev/null/x"),
    ],
)
def test_what_cannot_be_served_is_said_at_once(
    world: World, options: list[str], code: int, says: str, capfd: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["crossrep", "serve", world.space.name, "--port", "0", *options])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == code and says in capfd.readouterr().err


def test_an_unknown_space(world: World) -> None:
    started = world.workers.start("serve", "nowhere", "--port", "0")
    assert started.wait(30) == 1 and "no space 'nowhere'" in world.workers.logs()


def test_it_answers_while_the_cluster_is_away(tmp_path: Path, workers: Workers, monkeypatch: pytest.MonkeyPatch) -> None:
    running = broker.up(tmp_path / "kafka", progress=False)
    try:
        monkeypatch.setenv("KAFKA_BOOTSTRAP", running.bootstrap)
        space, _ = new_space(running.bootstrap, tmp_path)
        records = Records(space, running.bootstrap)
        records.put(IDS)
        server = Server(workers, space, tmp_path / "disk", "--max-lag", "2")
        server.wait()
        os.kill(running.pid, signal.SIGSTOP)
        wait_for(lambda: server.ask("GET", "/ready")[0] == 503, "it is too far behind", 20)
        status, said = server.ask("GET", "/v1/user/k1")
        assert status == 200 and said["count"] == 1 and said["lag"]["seconds"] > 2
        os.kill(running.pid, signal.SIGCONT)
        records.put(IDS, 2)
        wait_for(lambda: server.ask("GET", "/ready")[0] == 200, "it is back", 30)
        wait_for(lambda: server.ask("GET", "/v1/user/k1")[1]["count"] == 2, "it follows", 30)
    finally:
        os.kill(running.pid, signal.SIGCONT)
        broker.down(tmp_path / "kafka", kill=True)
