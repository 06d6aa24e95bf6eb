"""A real Apache Kafka on a machine that has only Python: one broker, or a cluster of three that can lose any one of them.

Everything it owns lies in one folder. One broker lives right in it, three in subfolders (`server.py` says what is there):

    broker.json            addresses and process ids of the nodes last started here
    node-1, node-2, ...    the nodes of a cluster

Data and ports outlive a restart, and the data outlive everything but `wipe`.
"""

from streams.broker.cluster import Broker, Node, down, start_node, status, stop_node, up, wipe
from streams.broker.jars import KAFKA_VERSION, BrokerError
from streams.broker.ports import free_port

__all__ = [
    "KAFKA_VERSION",
    "Broker",
    "BrokerError",
    "Node",
    "down",
    "free_port",
    "start_node",
    "status",
    "stop_node",
    "up",
    "wipe",
]
