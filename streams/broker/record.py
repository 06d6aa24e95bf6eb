"""What is known of the Kafka of a folder: broker.json."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from streams.broker.jars import KAFKA_VERSION
from streams.broker.server import HOST, Place


@dataclass(frozen=True)
class Record:
    """Of each node its broker's port, its controller's, and the pid it had when last started."""

    ports: tuple[int, ...] = ()
    controllers: tuple[int, ...] = ()
    pids: tuple[int, ...] = ()

    @classmethod
    def of(cls, folder: Path) -> Record:
        """What the folder holds; an empty one where it holds none, or what cannot be read."""
        try:
            known = json.loads((folder / "broker.json").read_text())
            pids = tuple(map(int, known["pids"] if "pids" in known else [known["pid"]]))  # the latter from when there was but one
            ports = tuple(int(address.rpartition(":")[2]) for address in known["bootstrap"].split(","))
            return cls(ports, tuple(map(int, known.get("controllers", ()))), pids) if len(ports) == len(pids) else cls()
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return cls()

    def write(self, folder: Path) -> None:
        temporary = folder / "broker.json.new"
        known = {"bootstrap": self.bootstrap, "pids": self.pids, "controllers": self.controllers, "kafka": KAFKA_VERSION}
        temporary.write_text(json.dumps(known) + "\n")
        temporary.replace(folder / "broker.json")

    @property
    def bootstrap(self) -> str:
        return ",".join(f"{HOST}:{port}" for port in self.ports)

    def places(self, folder: Path) -> list[Place]:
        alone = len(self.ports) == 1
        return [
            Place(folder if alone else folder / f"node-{number}", number, port, self.controllers)
            for number, port in enumerate(self.ports, 1)
        ]
