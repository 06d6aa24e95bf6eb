"""Look-ups of a `crossrep serve` replica: latency at a fixed rate, keys a second, beside a Redis with the same vectors."""

from __future__ import annotations

import csv
import shutil
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click
import numpy as np

from benchmarks.common import Process, Worker, cluster, conditions, in_process, report, space_of, worker
from benchmarks.fold import BATCH, DIM, declared
from benchmarks.paced import paced
from benchmarks.restore import fill
from crossrep import kafka
from crossrep.cli import bootstrap_option
from crossrep.columnar.records import RecordLayout
from crossrep.errors import CrossrepError
from crossrep.keys import Keys
from crossrep.spec import Space
from streams.broker import free_port

SETTLE = 5.0  # seconds after the first start, in which RocksDB and the broker put in order what was just written
SCRIPT = Path(__file__).parent / "batch.lua"
KINDS = {"JSON": "application/json", "safetensors": "application/x-safetensors"}


def drawn(keys: int, ids: int, batches: int, seed: int) -> list[list[str]]:
    """Batches of keys, all alike."""
    return [list(map(str, row)) for row in np.random.default_rng(seed).integers(0, ids, (batches, keys)).tolist()]


def http_request(ids: list[str], accept: str) -> bytes:
    body = ('{"ids":["' + '","'.join(ids) + '"]}').encode()
    return f"POST /v1/user/batch HTTP/1.1\r\nhost: x\r\naccept: {accept}\r\ncontent-length: {len(body)}\r\n\r\n".encode() + body


def command(*words: bytes) -> bytes:
    """A Redis command on the wire."""
    return b"*%d\r\n" % len(words) + b"".join(b"$%d\r\n%b\r\n" % (len(word), word) for word in words)


def answer_size(keys: int, value: int) -> int:
    """Bytes of Redis' answer to an MGET of keys that exist."""
    return len(b"*%d\r\n" % keys) + keys * (len(b"$%d\r\n" % value) + value + 2)


@contextmanager
def redis(folder: Path, ids: int, seed: int) -> Iterator[tuple[Process, int]]:
    """A Redis that holds the vectors `fill` wrote, and its port."""
    port, vectors = free_port(), np.random.default_rng(seed).normal(size=(BATCH, DIM)).astype("<f4")
    options = ["--port", str(port), "--save", "", "--appendonly", "no", "--bind", "127.0.0.1"]
    running = Process(["redis-server", *options], folder / "redis.log", folder)
    try:
        running.wait(lambda: "Ready to accept" in running.log.read_text(), "redis starts")
        with socket.create_connection(("127.0.0.1", port)) as client, client.makefile("rb") as answers:
            for first in range(0, ids, 1000):
                some = range(first, min(first + 1000, ids))
                client.sendall(b"".join(command(b"SET", b"%d" % i, vectors[i % BATCH].tobytes()) for i in some))
                for _ in some:
                    assert answers.readline() == b"+OK\r\n"
        yield running, port
    finally:
        running.kill()


def wrk(port: int, keys: int, ids: int, accept: str, seconds: int) -> float:
    """Keys a second of 8 connections that each ask again as soon as they are answered."""
    url = f"http://127.0.0.1:{port}/v1/user/batch"
    asked = ["wrk", "-t1", "-c8", f"-d{seconds}s", "-s", str(SCRIPT), url, "--", str(keys), str(ids), accept]
    said = subprocess.run(asked, capture_output=True, text=True, check=True).stdout
    if "Non-2xx" in said or "Socket errors" in said:
        raise CrossrepError(said)
    return keys * float(said.partition("Requests/sec:")[2].split()[0])


def redis_benchmark(port: int, batch: list[str], requests: int) -> float:
    """The same of Redis, by its own tool; it asks for one batch again and again."""
    asked = ["redis-benchmark", "-p", str(port), "-c", "8", "-n", str(requests), "--csv", "MGET", *batch]
    rows = list(csv.DictReader(subprocess.run(asked, capture_output=True, text=True, check=True).stdout.splitlines()))
    return len(batch) * float(rows[-1]["rps"])


@contextmanager
def updating(space: Space, bootstrap: str, ids: int, rate: int, seed: int) -> Iterator[None]:
    """Meanwhile write `rate` records a second, five transactions a second, as fold workers that flush every 200 ms do."""
    stopped = threading.Event()
    layout, random = RecordLayout(space, "user"), np.random.default_rng(seed)
    producer = kafka.transactional_producer(bootstrap, f"bench.updating.{space.name}", 60.0)
    producer.init_transactions(kafka.REQUEST_TIMEOUT)

    def write() -> None:
        while not stopped.wait(0.2):
            records = layout.empty(rate // 5)
            records["count"], records["event_time"], records["cr_time"], records["cr_weight"] = 2, 1.6e9, 1.6e9, 1
            records["cr"] = random.normal(size=(len(records), DIM))
            keys = Keys.of(random.integers(0, ids, len(records)).tolist())
            producer.begin_transaction()
            for key, partition, record in zip(keys.tolist(), keys.partitions(space.partitions).tolist(), records):
                producer.produce(space.representations_topic("user"), record.tobytes(), key, partition)
            producer.commit_transaction()

    thread = threading.Thread(target=write)
    if rate:
        thread.start()
    try:
        yield
    finally:
        stopped.set()
        if rate:
            thread.join()


def of_replica(process: Worker, keys: int, ids: int, rate: float, seconds: int, seed: int) -> dict[str, float]:
    figures: dict[str, float] = {}
    for kind, accept in KINDS.items():
        requests = [http_request(batch, accept) for batch in drawn(keys, ids, 500, seed)]
        before = process.cpu()
        latency = in_process(paced, process.port, requests, rate, float(seconds))
        cpu = (process.cpu() - before) / (latency["requests"] + rate) / keys * 1e6
        figures |= {f"{kind}_{name}": value for name, value in latency.items()} | {f"{kind}_cpu_us_a_key": cpu}
        figures[f"{kind}_keys_per_s"] = wrk(process.port, 1000, ids, accept, seconds)
    return figures


def of_redis(folder: Path, keys: int, ids: int, rate: float, seconds: int, seed: int) -> dict[str, float]:
    with redis(folder, ids, seed) as (process, port):
        batches = drawn(keys, ids, 500, seed)
        requests = [command(b"MGET", *(id.encode() for id in batch)) for batch in batches]
        before = process.cpu()
        latency = in_process(paced, port, requests, rate, float(seconds), 16, answer_size(keys, 4 * DIM))
        cpu = (process.cpu() - before) / (latency["requests"] + rate) / keys * 1e6
        closed = redis_benchmark(port, drawn(1000, ids, 1, seed)[0], 500 * seconds)
    return {f"redis_{name}": value for name, value in latency.items()} | {"redis_cpu_us_a_key": cpu, "redis_keys_per_s": closed}


@click.command()
@click.option("--ids", default=200_000, show_default=True, help="Users in the space, 64 float32 each.")
@click.option("--keys", default=100, show_default=True, help="Keys of a request at the fixed rate.")
@click.option("--rate", default=2000.0, show_default=True, help="Requests a second at the fixed rate.")
@click.option("--seconds", default=10, show_default=True, help="Of each measurement.")
@click.option("--updates", default=0, show_default=True, help="Records a second written meanwhile, which the replica follows.")
@click.option("--memory-mb", default=1024, show_default=True, help="Of the replica; 20 holds a third of the default ids.")
@click.option("--seed", default=0, show_default=True)
@bootstrap_option
def main(ids: int, keys: int, rate: float, seconds: int, updates: int, memory_mb: int, seed: int, bootstrap: str | None) -> None:
    """Fill a space through Kafka, let a replica follow it, and ask: at a fixed rate (open loop), and as fast as it answers (wrk).

    Redis holds the same vectors and is asked for the same keys, one after the other on the same machine. It answers vectors alone; the
    replica also says event times, counts and weights decayed to the stream's time.
    """
    for tool in ("wrk", "redis-server", "redis-benchmark"):
        if shutil.which(tool) is None:
            raise CrossrepError(f"{tool} is not installed: apt install wrk redis")
    about = {**conditions(), "ids": ids, "keys": keys, "rate": rate, "seconds": seconds, "updates": updates, "memory_mb": memory_mb}
    with tempfile.TemporaryDirectory() as named, cluster(bootstrap) as address, space_of(declared(4, "200ms"), address) as space:
        folder = Path(named)
        fill(space, address, ids, seed)
        asked = ["serve", space.name, "--bootstrap", address, "--data", f"{folder}/data", "--memory-mb", str(memory_mb)]
        with worker(folder, *asked) as process:
            process.wait(process.ready, "not ready")
            figures = {"first_start_seconds": time.time() - process.started}
            time.sleep(SETTLE)
            with updating(space, address, ids, updates, seed):
                figures |= of_replica(process, keys, ids, rate, seconds, seed)
            figures |= {"memory_bytes": process.memory().rss, "keys_in_memory": process.metrics()["serve_keys_in_memory"][0]}
            process.stop()
        with worker(folder, *asked) as process:
            process.wait(process.ready, "not ready")
            figures |= {
                "restart_seconds": time.time() - process.started,
                "restart_records": process.metrics()["serve_applied_records_total"][0],
            }
        figures |= of_redis(folder, keys, ids, rate, seconds, seed)
    lines = [
        (
            f"{kind}, {keys} keys",
            f"p50 {figures[f'{kind}_p50_ms']:.2f} ms, p99 {figures[f'{kind}_p99_ms']:.2f} ms, p99.9 {figures[f'{kind}_p999_ms']:.2f} ms",
            f"at {rate:,.0f} requests/s, sent {figures[f'{kind}_sent_late_p99_ms']:.2f} ms late (p99); "
            f"{figures[f'{kind}_cpu_us_a_key']:.2f} µs CPU a key",
        )
        for kind in (*KINDS, "redis")
    ]
    lines += [
        (f"{kind}, 1000 keys", f"{figures[f'{kind}_keys_per_s']:,.0f} keys/s", "8 connections, closed loop") for kind in (*KINDS, "redis")
    ]
    lines += [
        ("first start", f"{figures['first_start_seconds']:.1f} s", f"{ids:,} records read"),
        ("restart", f"{figures['restart_seconds']:.1f} s", f"{figures['restart_records']:.0f} records read"),
        ("memory", f"{figures['memory_bytes'] / 2**20:,.0f} MiB", f"{figures['keys_in_memory']:,.0f} of {ids:,} keys in memory"),
    ]
    report(f"serve: {ids:,} users of {DIM} float32 (Redis answers vectors alone)", lines, {**about, **figures})


if __name__ == "__main__":
    main()
