"""Sequences of users over two domains of items, read from a folder in the form of ABXI (Bian et al., WWW 2025).

    sequences.txt    a user a line: the user's number, then `item|time` in time order, separated by blanks
    item_map.json    {"B00004S1C5": [3, 0], ...}: a product's name, its item number, its domain, 0 or 1

Times are integers of any unit. Events of one time are ties: their order in the line means nothing (in Amazon's reviews, whose times
are days, they stand by item number), so whoever predicts one of them must not see the others.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from crossrep.errors import DataError

LONGEST = 50  # events of a user, the newest; the authors' own limit


@dataclass(frozen=True)
class Sequences:
    """The events of U users, E in all, user after user, each in time order.

    Items are numbered anew: those of domain 0 first, each domain by ascending number of the map.
    """

    start: NDArray[np.int64]  # [U + 1]: the events of user u are start[u]:start[u + 1]
    item: NDArray[np.int64]  # [E]
    time: NDArray[np.int64]  # [E]
    sizes: tuple[int, int]  # items of each domain

    @property
    def domain(self) -> NDArray[np.int64]:
        """[E], 0 or 1."""
        return (self.item >= self.sizes[0]).astype(np.int64)

    @property
    def user(self) -> NDArray[np.int64]:
        """[E]"""
        return np.repeat(np.arange(len(self.start) - 1), np.diff(self.start))

    def fingerprint(self) -> str:
        """Of the content: figures of one data set must not pass for another's."""
        digest = hashlib.sha256(repr(self.sizes).encode())
        for array in (self.start, self.item, self.time):
            digest.update(array.tobytes())
        return digest.hexdigest()[:16]


def load(folder: Path, longest: int = LONGEST) -> Sequences:
    """Read a folder; of each user the newest `longest` events, and with the oldest of them all its ties that fit.

    Raises:
        DataError: the folder or a file is not of this form; says which line and which word.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder; one with sequences.txt and item_map.json is needed")
    numbers = _read_map(_only(folder, "item_map.json"))
    path = _only(folder, "sequences.txt")
    start, items, times = [0], list[int](), list[int]()
    users = set[int]()
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            words = line.split()
            if not words:
                continue
            user = _integer(words[0], f"{path}, line {number}: the user")
            if user in users:
                raise DataError(f"{path}, line {number}: user {user} has had a line before; a user's events belong in one")
            users.add(user)
            events = [_event(word, numbers, f"{path}, line {number}") for word in words[1:]]
            if not events:
                raise DataError(f"{path}, line {number}: user {user} has no events; leave the line out")
            for (_, before), (_, after) in pairwise(events):
                if after < before:
                    raise DataError(f"{path}, line {number}: time {after} comes after {before}; a user's events must be in time order")
            items += [item for item, _ in events[-longest:]]
            times += [time for _, time in events[-longest:]]
            start.append(len(items))
    if not users:
        raise DataError(f"{path} holds no user")
    domains = list(numbers.values())
    order = sorted(numbers, key=lambda item: (numbers[item], item))
    index = {item: at for at, item in enumerate(order)}
    sizes = (domains.count(0), domains.count(1))
    return Sequences(np.array(start), np.array([index[item] for item in items]), np.array(times), sizes)


def _read_map(path: Path) -> dict[int, int]:
    """Item number -> domain."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise DataError(f"{path} must hold one JSON object: a product's name -> [item number, domain]")
    numbers: dict[int, int] = {}
    for name, entry in content.items():
        if not (isinstance(entry, list) and len(entry) == 2 and all(type(value) is int for value in entry) and entry[1] in (0, 1)):
            raise DataError(f"{path}: {name!r} is mapped to {entry!r}; it must be [item number, domain], and the domain 0 or 1")
        if entry[0] in numbers:
            raise DataError(f"{path}: item {entry[0]} occurs more than once, at last for {name!r}")
        numbers[entry[0]] = entry[1]
    for domain in (0, 1):
        if domain not in numbers.values():
            raise DataError(f"{path}: no item of domain {domain}; two domains are needed")
    return numbers


def _event(word: str, numbers: dict[int, int], place: str) -> tuple[int, int]:
    item, bar, time = word.partition("|")
    if not bar:
        raise DataError(f"{place}: {word!r} is not item|time")
    event = _integer(item, f"{place}: the item of {word!r}"), _integer(time, f"{place}: the time of {word!r}")
    if event[0] not in numbers:
        raise DataError(f"{place}: item {event[0]} is not in item_map.json")
    return event


def _integer(word: str, what: str) -> int:
    try:
        return int(word)
    except ValueError:
        raise DataError(f"{what} is no integer: {word!r}") from None


def _only(folder: Path, name: str) -> Path:
    """The file of that name, or else the folder's only one with its ending."""
    ending = Path(name).suffix
    found = [folder / name] if (folder / name).is_file() else sorted(folder.glob(f"*{ending}"))
    if len(found) != 1:
        raise DataError(f"{folder} has {len(found)} {ending} files and no {name}; it must have that one")
    return found[0]
