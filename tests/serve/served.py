"""What the replica's tests share: records as fold workers write them, replicas in this process, and one process to ask over HTTP."""

from __future__ import annotations

import http.client
import json
import re
import subprocess
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from crossrep import kafka
from crossrep.columnar.records import RecordLayout
from crossrep.keys import Keys
from crossrep.spec import Space
from serve.replica import Place, Replica
from state.store import Memory, Room
from tests.cluster import Workers, wait_for

NOW = 1.7e9


class Records:
    """Writes records of one entity, each with random values, in transactions."""

    def __init__(self, space: Space, bootstrap: str, entity: str = "user"):
        self._space, self._layout = space, RecordLayout(space, entity)
        self._topic = space.representations_topic(entity)
        self._random = np.random.default_rng(0)
        self._producer = kafka.transactional_producer(bootstrap, f"test.{self._topic}", 30.0)
        self._producer.init_transactions(30)

    def put(self, ids: list[Any], count: int = 1) -> None:
        records = self._layout.empty(len(ids))
        times = NOW + self._random.integers(0, 7200, len(ids))
        records["count"], records["event_time"], records["source_offset"] = count, times, 5
        for name, column in self._layout.columns.items():
            records[f"{name}_time"] = times - 60
            if column.half_life is not None:
                records[f"{name}_weight"] = self._random.exponential(10, len(ids))
            if column.dim:
                records[name] = self._random.normal(size=(len(ids), column.dim))
        self._send(ids, [record.tobytes() for record in records])

    def delete(self, ids: list[Any]) -> None:
        self._send(ids, [None] * len(ids))

    def send_garbage(self) -> None:
        self._send(["x"], [b"garbage"])

    def _send(self, ids: list[Any], values: list[bytes | None]) -> None:
        keys = Keys.of(ids)
        self._producer.begin_transaction()
        for key, partition, value in zip(keys.tolist(), keys.partitions(self._space.partitions).tolist(), values):
            self._producer.produce(self._topic, value, key, partition=partition)
        self._producer.commit_transaction(30)


@contextmanager
def replica(space: Space, bootstrap: str, folder: Path, slots: int = 10_000, entity: str = "user") -> Iterator[Replica]:
    """A replica, caught up."""
    folder.mkdir(exist_ok=True)
    opened = Replica(space, entity, bootstrap, Place(folder, Memory.of(16 << 20), Room(folder, 1 << 20)), slots)
    try:
        opened.wait(60)
        yield opened
    finally:
        opened.close()


class Server:
    """A `crossrep serve` process."""

    def __init__(self, workers: Workers, space: Space | str, data: Path, *options: str):
        name = space if isinstance(space, str) else space.name
        self.process: subprocess.Popen[bytes] = workers.start("serve", name, "--port", "0", "--data", str(data), *options)
        self._log = workers.folder / f"{len(workers.running) - 1}-serve.log"
        wait_for(lambda: self._address() is not None or self.process.poll() is not None, "it listens", 30)
        assert self.process.poll() is None, self.log
        address = self._address()
        assert address is not None
        self.port = int(address)

    @property
    def log(self) -> str:
        return self._log.read_text()

    def _address(self) -> str | None:
        found = re.search(r"serving \S+ on https?://\S+:(\d+)", self.log)
        return found[1] if found else None

    def wait(self) -> None:
        wait_for(lambda: self.ask("GET", "/ready")[0] == 200, "it is ready", 30)

    def raw(self, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, dict[str, str], bytes]:
        """Status, headers, body."""
        text = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        with closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)) as connection:
            connection.request(method, path, text, {name.replace("_", "-"): value for name, value in headers.items()})
            answer = connection.getresponse()
            return answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read()

    def ask(self, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, Any]:
        """Status, and the JSON that came."""
        try:
            status, _, answer = self.raw(method, path, body, **headers)
        except ConnectionRefusedError:
            return 0, None
        return status, json.loads(answer)

    def metric(self, name: str, entity: str = "user") -> float:
        text = self.raw("GET", "/metrics")[2].decode()
        found = re.search(rf'^crossrep_serve_{name}{{entity="{entity}"}} (\S+)$', text, re.MULTILINE)
        assert found, text
        return float(found[1])
