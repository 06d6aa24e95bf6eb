"""The page: the state it is given against what was written, its headers, and the page itself in a real browser."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import CHROMIUM, Browser, browser
from served import Records, Server

from crossrep import kafka
from crossrep.errors import BadRecord
from crossrep.spec import Space
from state import dead_letters
from tests.cluster import Load, Workers, free_port, new_space, ready, wait_for

HOSTILE = "<img src=x onerror=document.title='mine'>"
TOKEN = "0123456789abcdef0123456789abcdef"


class World:
    """A space with one fold worker and a replica of it, some frames, hostile ids and dead letters."""

    def __init__(self, bootstrap: str, folder: Path, workers: Workers):
        self.bootstrap, self.folder, self.workers = bootstrap, folder, workers
        self.space, path = new_space(bootstrap, folder)
        self.port = free_port()
        workers.fold(path, "w0", port=self.port)
        wait_for(lambda: ready(self.port), "the worker flows")
        Records(self.space, bootstrap, "item").put([HOSTILE, "a/b", "ü"])
        self.load = Load(self.space, bootstrap)
        self.load.send(500)
        self.refuse("schema", HOSTILE, b"\xff\x00<script>", 3)
        self.refuse("time", "too late", b"x", 1)
        self.server = Server(
            workers, self.space, folder / "disk", "--worker", f"http://127.0.0.1:{self.port}", "--worker", "http://127.0.0.1:1"
        )
        self.server.wait()

    def refuse(self, reason: str, detail: str, value: bytes, times: int) -> None:
        producer = kafka.producer(self.bootstrap)
        for offset in range(times):
            letter = dead_letters.encode("events.x", 2, offset, b"<b>", value, BadRecord(reason, detail))
            producer.produce(self.space.dead_letters_topic, letter)
        assert producer.flush(20) == 0

    def status(self) -> dict[str, Any]:
        status, said = self.server.ask("GET", "/v1/status")
        assert status == 200
        return dict(said)


@pytest.fixture(scope="module")
def world(bootstrap: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("page")
    workers = Workers(folder)
    try:
        yield World(bootstrap, folder, workers)
    finally:
        workers.kill_all()


def settled(world: World) -> dict[str, Any]:
    """The state once all is folded, in the replica, and seen."""
    wait_for(lambda: _is_settled(world.status(), sum(world.load.counts.values())), "all is folded and seen", 30)
    return world.status()


def _is_settled(said: dict[str, Any], rows_sent: int) -> bool:
    flow = said["flow"]
    if not flow or len(flow["dead_letters"]["reasons"]) < 2 or not flow["stages"]["fold"]["members"]:
        return False
    rows = [partition["worker"] for partition in flow["partitions"]]
    return flow["stages"]["fold"]["lag"] == 0 and all(rows) and sum(row["rows_total"] for row in rows) == rows_sent


def test_the_state_is_what_was_written(world: World) -> None:
    said = settled(world)
    flow = said["flow"]
    assert said["space"] == world.space.name and said["error"] is None and said["looked"] < 5
    bounds = kafka.bounds(world.bootstrap, world.space.frames_topic)
    assert flow["topics"][world.space.frames_topic]["end"] == sum(end for _, end in bounds.values())
    for number, partition in enumerate(flow["partitions"]):
        assert partition["number"] == number and partition["owner"] == "w0" and partition["end"] == bounds[number][1]
        assert partition["position"] == bounds[number][1] and partition["lag"] == 0 and partition["worker"]["flowing"] == 1
    assert [(m["name"], m["partitions"]) for m in flow["stages"]["fold"]["members"]] == [("w0", 4)]
    assert flow["stages"]["infer"]["members"] == [] and flow["stages"]["infer"]["used"] is False
    assert [bool(worker["error"]) for worker in flow["workers"]] == [False, True]
    counts = {reason["reason"]: reason["count"] for reason in flow["dead_letters"]["reasons"]}
    assert counts == {"schema": 3, "time": 1}
    example = flow["dead_letters"]["reasons"][0]["example"]
    assert (example["topic"], example["partition"], example["offset"]) == ("events.x", 2, 2) and example["detail"] == HOSTILE
    assert example["bytes"] == 10 and example["value"] == "··<script>" and example["key"] == "<b>"
    item = said["entities"]["item"]
    assert item["keys_exact"] and item["record_bytes"] > 50 and item["disk_bytes"] > 0 and item["columns"]["cr"]["half_life"] == 172800
    assert said["weights"] == {"impression": 1, "click": 4}


def test_rates_freshness_and_lag_follow_the_stream(world: World) -> None:
    settled(world)

    def seen() -> bool:
        world.load.send(100)
        flow = world.status()["flow"]
        rates = [flow["topics"][world.space.frames_topic]["per_second"], flow["stages"]["fold"]["per_second"], flow["rows_per_second"]]
        return all(rate is not None and rate > 1 for rate in rates) and 0 < (flow["freshness"]["seconds"] or 0) < 20

    wait_for(seen, "rates and freshness are told", 20)


def test_nobody_looks_then_nothing_is_asked(world: World) -> None:
    """No test of time: what begins the looking is the question."""
    server = Server(world.workers, world.space, world.folder / "disk2", "--token-file", _tokens(world.folder))
    assert server.raw("GET", "/")[0] == 200 and server.ask("GET", "/v1/status")[0] == 401
    shown = {"authorization": f"Bearer {TOKEN}"}
    first = server.ask("GET", "/v1/status", **shown)[1]
    assert first["flow"] is None and first["looked"] is None
    wait_for(lambda: server.ask("GET", "/v1/status", **shown)[1]["flow"] is not None, "it has looked", 20)


def _tokens(folder: Path) -> str:
    file = folder / "tokens"
    file.write_text(TOKEN)
    return str(file)


def test_the_page_may_load_and_run_nothing_else(world: World) -> None:
    kinds = {"/": "text/html", "/page/page.css": "text/css", "/page/page.js": "text/javascript", "/page/flow.js": "text/javascript"}
    for path, kind in kinds.items():
        status, headers, body = world.server.raw("GET", path)
        assert status == 200 and headers["content-type"].startswith(kind) and headers["x-content-type-options"] == "nosniff"
        policy = headers["content-security-policy"]
        assert "default-src 'none'" in policy and "unsafe" not in policy and "frame-ancestors 'none'" in policy
        assert b"http://" not in body.replace(b"http://www.w3.org/2000/svg", b"") and b"https://" not in body and b"innerHTML" not in body
    for path in ("/page/", "/page/..%2fpage.py", "/page/nothing.js", "/page/%ff"):
        assert world.server.ask("GET", path)[0] == 404
    assert world.server.ask("POST", "/")[0] == 405


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("chromium is not installed: apt-get install --no-install-recommends chromium")
    with browser(tmp_path_factory.mktemp("browser") / "profile") as opened:
        yield opened


def test_in_a_browser(world: World, tab: Browser) -> None:
    settled(world)
    tab.look_like(360, 700, "dark")
    tab.open(f"http://127.0.0.1:{world.server.port}/")
    tab.wait("document.querySelector('#flow svg') && document.querySelectorAll('#letters tbody tr').length == 2")
    text = tab.run("document.body.innerText")
    assert (
        world.space.name in text
        and "w0 (127.0.0.1)" in text
        and HOSTILE in text
        and "no worker" in tab.run("document.querySelector('svg').textContent")
    )
    assert "Stopped: infer" in tab.run("document.querySelector('[role=status]').textContent")
    # By keyboard: the first stop skips to the content; then the form, whose key is hostile.
    tab.press("Tab")
    assert tab.run("document.activeElement.className") == "skip"
    tab.run("document.getElementById('entity').value = 'item'; document.getElementById('id').focus()")
    tab.type(HOSTILE)
    tab.press("Enter")
    tab.wait("document.querySelectorAll('#found .near a').length >= 2")
    assert tab.run("decodeURIComponent(location.hash)") == f"#/item/{HOSTILE}"
    assert HOSTILE in tab.run("document.getElementById('found').innerText")
    tab.press("Tab")
    assert tab.run("document.activeElement.textContent") == "Look up"
    assert tab.run("getComputedStyle(document.activeElement).outlineStyle") != "none"
    other = tab.run("document.querySelector('#found .near a').textContent")
    tab.run("document.querySelector('#found .near a').click()")
    tab.wait(f"document.querySelector('#found h3').textContent == {json.dumps('item ' + other)}")
    for width in (360, 390, 768, 1280):
        tab.look_like(width, 800)
        assert tab.run("document.documentElement.scrollWidth") <= width
    assert tab.run("document.images.length") == 0 and "mine" not in tab.run("document.title") and not tab.problems


def test_numbers_of_a_key_are_the_algebra_s(world: World, tab: Browser) -> None:
    tab.open("about:blank")
    tab.open(f"http://127.0.0.1:{world.server.port}/#/item/a%2Fb")
    tab.wait("document.querySelectorAll('#found figure').length == 2")
    column = world.server.ask("GET", "/v1/item/a%2Fb")[1]["columns"]["cr"]
    said = tab.run("document.querySelector('#found section p').textContent")
    weight = column["weight"]
    assert said.startswith(f"Weight {weight:,.3f}".rstrip("0").rstrip("."))
    assert f"{weight / (weight + 4):.3f}".rstrip("0") in said and "(click)" in said


def test_a_token_is_asked_for_and_kept_in_the_tab(world: World, tab: Browser) -> None:
    server = Server(world.workers, world.space, world.folder / "disk3", "--token-file", _tokens(world.folder))
    server.wait()
    tab.open(f"http://127.0.0.1:{server.port}/")
    tab.wait("!document.getElementById('token').hidden && document.activeElement.id == 'token-input'")
    assert tab.run("document.getElementById('content').hidden")
    for token in ("wrong", TOKEN):
        tab.type(token)
        tab.press("Enter")
        tab.wait("document.querySelector('#flow svg')" if token == TOKEN else "document.getElementById('token-problem').textContent")
        tab.run("document.getElementById('token-input').focus()")
    assert tab.run("[localStorage.length, document.cookie, sessionStorage.getItem('token')]") == [0, "", TOKEN]


def test_without_the_cluster_the_page_says_so(tmp_path: Path) -> None:
    from serve.status import Status

    space = Space.parse('name = "s"\npartitions = 1\n[entities.user.columns.cr]\nsource = "cr"\ndim = 2\naggregate = "latest"')
    status = Status(space, "127.0.0.1:1", {}, tmp_path, ())
    assert status.said()["error"] is None
    wait_for(lambda: "cannot be asked" in (status.said()["error"] or ""), "it says so", 15)
    assert status.said()["flow"] is None
