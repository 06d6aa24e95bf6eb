"""Every name of Faust and aiokafka that crossrep leans on without a promise: when one moves, this fails, not a production rebalance."""

from __future__ import annotations

import asyncio
import inspect
import textwrap
from typing import Any

import aiokafka
import faust
import pytest
from aiokafka import TopicPartition
from aiokafka.consumer import fetcher
from faust.tables import recovery
from faust.transport import consumer
from faust.transport.drivers import aiokafka as driver
from faust.types import TP

from streams import faust_transport

VERSIONS = f"faust {faust.__version__}, aiokafka {aiokafka.__version__}"


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (driver, "AIOKafkaConsumerThread"),
        (driver, "Consumer"),
        (driver, "Transport"),
        (driver.AIOKafkaConsumerThread, "_create_worker_consumer"),
        (driver.AIOKafkaConsumerThread, "_seek_wait"),
        (driver.Consumer, "_new_consumer_thread"),
        (driver.Consumer, "perform_seek"),
        (driver.Consumer, "seek_wait"),
        (driver.Consumer, "assignment"),
        (driver.Consumer, "pause_partitions"),
        (driver.Consumer, "resume_partitions"),
        (driver.Consumer, "_to_message"),
        (driver.Transport, "Consumer"),
        (fetcher, "FetchError"),
        (faust.App, "page"),
        (faust.App, "on_partitions_assigned"),
        (faust.App, "on_partitions_revoked"),
        (faust.App, "finalize"),
    ],
    ids=lambda value: value if isinstance(value, str) else getattr(value, "__name__", str(value)),
)
def test_the_name_is_still_there(owner: Any, name: str) -> None:
    assert hasattr(owner, name), f"{VERSIONS}: {owner.__name__}.{name} has moved"


@pytest.mark.parametrize(
    ("function", "parameters"),
    [
        (driver.AIOKafkaConsumerThread._create_worker_consumer, ["self", "transport"]),
        (driver.AIOKafkaConsumerThread._seek_wait, ["self", "consumer", "partitions"]),
        (driver.Consumer._new_consumer_thread, ["self"]),
        (driver.Consumer.perform_seek, ["self"]),
        (driver.Consumer.seek_wait, ["self", "partitions"]),
        (driver.Consumer.pause_partitions, ["self", "tps"]),
        (driver.Consumer.resume_partitions, ["self", "tps"]),
        (driver.Consumer._to_message, ["self", "tp", "record"]),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_is_overridden_or_called_takes_the_same_arguments(function: Any, parameters: list[str]) -> None:
    assert list(inspect.signature(function).parameters) == parameters, f"{VERSIONS}: {function.__qualname__}"


def called_in(function: Any) -> str:
    return textwrap.dedent(inspect.getsource(function))


def test_faust_calls_what_we_override() -> None:
    """An override that nobody calls any more would be silent."""
    assert "self._create_worker_consumer(" in called_in(driver.AIOKafkaConsumerThread._create_consumer)
    assert "self._seek_wait" in called_in(driver.AIOKafkaConsumerThread.seek_wait)
    assert "self._new_consumer_thread()" in called_in(consumer.ThreadDelegateConsumer.__init__)
    assert "consumer.perform_seek()" in inspect.getsource(recovery.Recovery)
    assert "self.Consumer(" in called_in(driver.Transport.create_consumer)


def test_our_overrides_override_something() -> None:
    for ours, theirs in (
        (faust_transport._Thread, driver.AIOKafkaConsumerThread),
        (faust_transport._Consumer, driver.Consumer),
        (faust_transport.Transport, driver.Transport),
    ):
        assert issubclass(ours, theirs)
        own = [name for name, value in vars(ours).items() if inspect.isfunction(value)]
        for name in own:
            assert hasattr(theirs, name), f"{VERSIONS}: {theirs.__name__}.{name} has moved; {ours.__name__}.{name} overrides nothing"
            kinds = [inspect.iscoroutinefunction(getattr(c, name)) for c in (ours, theirs)]
            assert kinds[0] == kinds[1], f"{VERSIONS}: {name} is a coroutine on one side only"


def test_the_settings_of_an_aiokafka_consumer_are_read_when_it_starts() -> None:
    async def look() -> None:
        client = aiokafka.AIOKafkaConsumer(bootstrap_servers="127.0.0.1:1")
        for name in ("_isolation_level", "_auto_offset_reset", "_fetch_max_wait_ms"):
            assert hasattr(client, name), f"{VERSIONS}: AIOKafkaConsumer.{name} has moved"
            assert f"self.{name}" in inspect.getsource(aiokafka.AIOKafkaConsumer.start), f"{VERSIONS}: {name} is read elsewhere now"
        assert hasattr(client, "_fetcher")  # None before the start
        await client.stop()

    asyncio.run(look())


def test_the_fetcher_keeps_errors_in_its_queue_of_records() -> None:
    source = inspect.getsource(fetcher.Fetcher)
    assert "self._records = " in source, f"{VERSIONS}: Fetcher._records has moved"
    assert "self._records[" in source and "FetchError(" in source, f"{VERSIONS}: errors are no longer queued as FetchError"


def test_an_error_left_in_the_queue_does_not_survive_a_seek(monkeypatch: pytest.MonkeyPatch) -> None:
    errored, other = TP("frames", 0), TP("frames", 1)
    records = {TopicPartition(*errored): fetcher.FetchError(error=ValueError(), backoff=0.0), TopicPartition(*other): "records"}
    client = type("Consumer", (), {"_fetcher": type("Fetcher", (), {"_records": records})})
    seeks = []

    async def seek_wait(self: Any, consumer: Any, partitions: Any) -> None:
        seeks.append(partitions)

    monkeypatch.setattr(driver.AIOKafkaConsumerThread, "_seek_wait", seek_wait)
    thread = object.__new__(faust_transport._Thread)
    asyncio.run(thread._seek_wait(client, {errored: 5, other: 7}))  # type: ignore[arg-type]
    assert list(records) == [TopicPartition(*other)]
    assert seeks == [{errored: 5, other: 7}]


def test_only_what_is_restored_flows_after_a_rebalance() -> None:
    done: list[Any] = []
    a, b = TP("frames", 0), TP("frames", 1)

    class Fake(faust_transport._Consumer):  # type: ignore[misc]
        def __init__(self) -> None:
            pass

        transport = type("Transport", (), {"positions": staticmethod(lambda: {0: 42, 9: 1})})()

        def assignment(self) -> set[TP]:
            return {a, b}

        async def seek_wait(self, partitions: Any) -> None:
            done.append(("seek", partitions))

        def pause_partitions(self, tps: Any) -> None:
            done.append(("pause", tps))

    asyncio.run(Fake().perform_seek())
    assert done == [("seek", {a: 42}), ("pause", {b})]


def test_a_moved_setting_stops_the_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver.AIOKafkaConsumerThread, "_create_worker_consumer", lambda self, transport: object())
    thread = object.__new__(faust_transport._Thread)
    with pytest.raises(AttributeError, match=r"crossrep must be adapted"):
        thread._create_worker_consumer(None)


def test_install_puts_our_transport_into_an_app() -> None:
    app = faust.App("test-transport", broker="kafka://127.0.0.1:1")
    faust_transport.install(app, lambda: {0: 1}, lambda: 7)
    assert isinstance(app.transport, faust_transport.Transport)
    assert app.transport.positions() == {0: 1} and app.transport.backlog() == 7
    assert app.transport.Consumer is faust_transport._Consumer


def record(offset: int, size: int) -> Any:
    return type("Record", (), {"offset": offset, "value": b"x" * size if size else None, "timestamp": 1500, "timestamp_type": 1})()


def test_a_run_is_about_a_mebibyte_of_frames_and_none_is_lost() -> None:
    sizes = [600_000, 600_000, 0, 3 << 20, 5, 7]
    runs = list(faust_transport._runs([record(i, size) for i, size in enumerate(sizes)]))
    assert [[each.offset for each in run] for run in runs] == [[0, 1], [2, 3], [4, 5]]
    assert list(faust_transport._runs([])) == []


def test_a_run_is_one_message_of_faust() -> None:
    consumer = object.__new__(faust_transport._Consumer)
    consumer.app = type("App", (), {"consumer_generation_id": 3})()
    run = [record(5, 10), record(9, 10)]
    message = consumer._to_message(TP("frames", 2), run)
    assert (message.topic, message.partition, message.offset, message.timestamp, message.generation_id) == ("frames", 2, 9, 1.5, 3)
    assert message.value is run and message.tp == TP("frames", 2)


def test_the_next_runs_are_fetched_when_the_agent_has_nearly_none(monkeypatch: pytest.MonkeyPatch) -> None:
    backlog = iter([100, faust_transport.BUFFERED + 1, faust_transport.BUFFERED])
    tp, found = TP("frames", 0), [record(0, 10)]

    async def fetch(self: Any, active: Any, timeout: float) -> Any:
        assert next(backlog, None) is None, "too early"
        return {tp: found}

    monkeypatch.setattr(driver.Consumer, "_getmany", fetch)
    consumer = object.__new__(faust_transport._Consumer)
    consumer._seeks = faust_transport.Counter()
    consumer.transport = type("Transport", (), {"backlog": staticmethod(lambda: next(backlog)), "positions": staticmethod(dict)})()
    monkeypatch.setattr(faust_transport._Consumer, "_get_active_partitions", lambda self: {tp})
    assert asyncio.run(consumer._getmany({tp}, 1.0)) == {tp: [found]}
