"""Every name of Faust and aiokafka that crossrep leans on without a promise: when one moves, this fails, not a production rebalance."""

from __future__ import annotations

import ast
import asyncio
import inspect
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import aiokafka
import faust
import pytest
from aiokafka import TopicPartition
from aiokafka.consumer import fetcher, group_coordinator
from faust.app.base import App
from faust.tables import recovery
from faust.transport import conductor, consumer
from faust.transport.drivers import aiokafka as driver
from faust.types import TP
from faust.types.tuples import ConsumerMessage

from streams.stateful import faust_transport
from streams.stateful.fetch import BUFFERED, Run

VERSIONS = f"faust {faust.__version__}, aiokafka {aiokafka.__version__}"
MEMBER = Path(faust_transport.__file__).with_name("membership.py")


@pytest.mark.parametrize(
    ("function", "parameters"),
    [
        (driver.AIOKafkaConsumerThread.on_partitions_assigned, ["self", "assigned", "generation_id"]),
        (driver.AIOKafkaConsumerThread.verify_event_path, ["self", "now", "tp"]),
        (driver.AIOKafkaConsumerThread._ensure_consumer, ["self"]),
        (driver.Consumer._new_consumer_thread, ["self"]),
        (driver.Consumer.perform_seek, ["self"]),
        (driver.Consumer.getmany, ["self", "timeout"]),
        (aiokafka.AIOKafkaConsumer.pause, ["self", "partitions"]),
        (faust.App.finalize, ["self"]),
        (faust.App.wait_until_stopped, ["self"]),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_is_overridden_or_called_takes_the_same_arguments(function: Any, parameters: list[str]) -> None:
    assert list(inspect.signature(function).parameters) == parameters, f"{VERSIONS}: {function.__qualname__}"


@pytest.mark.parametrize(
    ("caller", "call"),
    [
        (driver.Transport.create_consumer, "self.Consumer("),
        (consumer.ThreadDelegateConsumer.__init__, "self._new_consumer_thread()"),
        (driver.ConsumerRebalanceListener.on_partitions_assigned, "await self._thread.on_partitions_assigned("),
        (driver.Consumer.verify_event_path, "self._thread.verify_event_path("),
        (consumer.Consumer.verify_all_partitions_active, "self.verify_event_path("),
        (consumer.Consumer._drain_messages, "getmany = self.getmany\n"),
        (consumer.Consumer._drain_messages, "getmany(timeout="),
        (recovery.Recovery._resume_streams, "consumer.perform_seek()"),
        (App._on_partitions_revoked, "await T(self.on_partitions_revoked.send)("),
        (App._on_partitions_assigned, "await T(self.on_partitions_assigned.send)("),
        (App._new_consumer, "self.transport.create_consumer("),
        (conductor.ConductorCompiler.build, "queue = chan.queue\n"),  # `_runs` counts what waits there
    ],
    ids=lambda value: getattr(value, "__qualname__", value),
)
def test_faust_calls_what_we_override_or_connect_to(caller: Any, call: str) -> None:
    """An override that nobody calls any more would be silent."""
    assert call in inspect.getsource(caller), f"{VERSIONS}: {caller.__qualname__}"


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (faust_transport._Thread, driver.AIOKafkaConsumerThread),
        (faust_transport._Consumer, driver.Consumer),
        (faust_transport.Transport, driver.Transport),
    ],
    ids=lambda value: value.__name__,
)
def test_our_overrides_override_something(ours: type, theirs: type) -> None:
    assert issubclass(ours, theirs)
    for name in (name for name, value in vars(ours).items() if inspect.isfunction(value)):
        if (ours, name) == (faust_transport._Consumer, "_to_message"):
            continue  # Faust's, of another shape, is called only by the `getmany` that we replace
        assert hasattr(theirs, name), f"{VERSIONS}: {theirs.__name__}.{name} has moved; {ours.__name__}.{name} overrides nothing"
        for kind in inspect.iscoroutinefunction, inspect.isasyncgenfunction:
            assert kind(getattr(ours, name)) == kind(getattr(theirs, name)), f"{VERSIONS}: {name} is another kind of function now"


def test_nothing_is_given_between_our_restart_and_the_flow() -> None:
    """Faust drops what it gets before, and empties its queues. In one step, since two steps of the loop bring no new frames."""
    source = inspect.getsource(recovery.Recovery._resume_streams)
    between = source.split("consumer.perform_seek()")[1].split("consumer.resume_flow()")[0]
    assert "app.flow_control.resume()" in between and "await" not in between, VERSIONS


def test_a_member_that_fetches_nothing_stays_a_member() -> None:
    """aiokafka compares `max_poll_interval` with nothing but the time since something was fetched."""
    uses = [line.strip() for line in inspect.getsource(group_coordinator).splitlines() if "self._max_poll_interval" in line]
    assert uses[0] == "self._max_poll_interval = max_poll_interval_ms / 1000", VERSIONS
    assert uses[1:] and all("idle_time" in line for line in uses[1:]), f"{VERSIONS}: {uses}"
    source = inspect.getsource(group_coordinator)
    assert source.count("idle_time = self._subscription.fetcher_idle_time") == source.count("idle_time = "), VERSIONS
    source = inspect.getsource(driver.AIOKafkaConsumerThread._create_worker_consumer)
    assert "max_poll_interval = conf.broker_max_poll_interval" in source, VERSIONS
    assert "max_poll_interval_ms=int(max_poll_interval * 1000.0)" in source, VERSIONS
    assert "rebalance_timeout_ms=int(rebalance_timeout * 1000.0)" in source, f"{VERSIONS}: it would be the poll interval"


def test_faust_knows_the_settings_of_our_workers() -> None:
    made = [
        node for node in ast.walk(ast.parse(MEMBER.read_text())) if isinstance(node, ast.Call) and ast.unparse(node.func) == "faust.App"
    ]
    given = {keyword.arg for call in made for keyword in call.keywords if keyword.arg}
    assert {"broker_max_poll_interval", "stream_buffer_maxsize", "stream_wait_empty"} <= given
    assert given <= set(faust.Settings.SETTINGS), f"{VERSIONS}: {given - set(faust.Settings.SETTINGS)}"


@pytest.fixture
def app() -> faust.App:
    return faust.App("test-transport", broker="kafka://127.0.0.1:1", stream_buffer_maxsize=100_000, broker_max_poll_interval=1e9)


def frames_topic(app: faust.App) -> Any:
    return app.topic("frames", key_type=bytes, value_type=bytes, key_serializer="raw", value_serializer="raw", acks=False)


async def nothing(*args: Any, **kwargs: Any) -> None:
    pass


def consumer_of(app: faust.App, callback: Any = nothing) -> Any:
    return app.transport.create_consumer(callback=callback, on_partitions_revoked=nothing, on_partitions_assigned=nothing)


def test_install_puts_our_transport_into_an_app(app: faust.App) -> None:
    async def check() -> None:
        restarts: list[str] = []
        faust_transport.install(app, "frames", nothing, lambda: restarts.append("restart"))  # type: ignore[arg-type]
        assert isinstance(app.transport, faust_transport.Transport)
        member = consumer_of(app)
        assert isinstance(member, faust_transport._Consumer) and isinstance(member._thread, faust_transport._Thread)
        member._thread.verify_event_path(0.0, TP("frames", 0))  # of a thread that never started: Faust's own would raise
        await member.perform_seek()
        assert restarts == ["restart"]

    asyncio.run(check())


def test_faust_passes_on_every_run_as_it_is(app: faust.App) -> None:
    """Also when a partition went back, and behind an empty answer; Faust must not take a run for bytes that it can read."""
    runs = [Run(partition, flow, []) for flow, partition in enumerate((0, 1, 0, 0, 2, 1))]
    answers = [runs[:1], runs[1:4], [], runs[4:]]
    given: list[ConsumerMessage] = []

    async def check() -> None:
        async def fetch() -> list[Run]:
            if not answers:
                member._stopped.set()
                return []
            return answers.pop(0)

        async def callback(message: ConsumerMessage) -> None:
            given.append(message)

        faust_transport.install(app, "frames", fetch, lambda: None)
        member = consumer_of(app, callback)
        app.consumer_generation_id = 7
        await asyncio.wait_for(member._drain_messages(member._thread), 10)
        topic = frames_topic(app)
        assert [(await topic.decode(message, propagate=True)).value for message in given] == runs

    asyncio.run(check())
    assert [message.tp for message in given] == [TP("frames", run.partition) for run in runs]
    assert {message.generation_id for message in given} == {7}  # the agent would skip another


def test_faust_still_drops_what_is_not_behind_the_offset_it_last_saw() -> None:
    """Why runs are counted. Once it no longer does, they need not be."""
    assert "if r_offset is None or offset >= r_offset:" in inspect.getsource(consumer.Consumer._drain_messages), VERSIONS


def test_a_queue_of_as_many_runs_as_wait_is_never_full(app: faust.App) -> None:
    async def check() -> None:
        queue = frames_topic(app).stream().channel.queue
        assert queue.maxsize == 100_000 and queue.pressure_high_size > 100 * BUFFERED
        queue.force_put_nowait("run")
        assert queue.qsize() == 1

    asyncio.run(check())


def test_the_member_pauses_what_it_is_assigned_before_anybody_hears_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[Any] = []
    tps = {TP("frames", 0), TP("frames", 3)}

    async def check() -> None:
        client = aiokafka.AIOKafkaConsumer(bootstrap_servers="127.0.0.1:1")
        client.assign([TopicPartition(*tp) for tp in tps])

        async def assigned(self: Any, tps: Iterable[TP], generation_id: int = 0) -> None:
            heard.append((tps, generation_id, client.paused()))

        monkeypatch.setattr(driver.AIOKafkaConsumerThread, "_ensure_consumer", lambda self: client)
        monkeypatch.setattr(driver.AIOKafkaConsumerThread, "on_partitions_assigned", assigned)
        await object.__new__(faust_transport._Thread).on_partitions_assigned(tps, 5)
        await client.stop()

    asyncio.run(check())
    assert heard == [(tps, 5, {TopicPartition(*tp) for tp in tps})]
    assert "elif tp_state.paused:" in inspect.getsource(fetcher.Fetcher._get_actions_per_node), VERSIONS
