"""A bad model's hours taken back: the state as it was, and the events since made again, each once."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from random import Random

import numpy as np
import pytest
from confluent_kafka import TopicPartition

from crossrep import LocalView, kafka
from crossrep.columnar.records import RecordLayout
from crossrep.control import groups, lineage, spaces
from crossrep.control.lineage import Source
from crossrep.errors import StateError
from crossrep.spec import Space, frame_group, infer_group
from state import history
from state.history import Undo
from state.progress import Point, Progress
from streams import topics
from streams.operations import rewind
from tests import cluster
from tests.cluster import ROOT, Load, Workers, free_port, new_space, prove, settled, wait_for
from tests.streams.bad_samples import sample
from tests.streams.small_model import SPEC, Feed, consumed, inferred, nothing_open, small_dataset, start_infer

SHORT = SPEC.replace("[inputs]", 'history = "1m"\n[inputs]')  # a rewind point every 5 s


def snapshot(space: Space, bootstrap: str) -> dict[str, dict[str, tuple[int, bytes]]]:
    """What readers see: entity -> id -> count and bytes of all vectors."""
    found = {}
    for entity in space.entities:
        with LocalView(entity, space.name, bootstrap) as view:
            view.wait(60)
            ids = sorted(view.ids())
            answer = view.get(ids)
            vectors = [values.vectors for values in answer.values()]
            found[entity] = {id: (int(answer.counts[i]), b"".join(v[i].tobytes() for v in vectors)) for i, id in enumerate(ids)}
    return found


def same(one: dict[str, dict[str, tuple[int, bytes]]], other: dict[str, dict[str, tuple[int, bytes]]]) -> bool:
    """Counts equal, vectors equal to the rounding that folding in other batches brings."""
    for entity, keys in one.items():
        if keys.keys() != other[entity].keys():
            return False
        for id, (count, vectors) in keys.items():
            a, b = np.frombuffer(vectors, "<f4"), np.frombuffer(other[entity][id][1], "<f4")
            if count != other[entity][id][0] or not np.allclose(a, b, rtol=1e-3, atol=2e-3):
                return False
    return True


def stop(*processes: subprocess.Popen[bytes]) -> None:
    for process in processes:
        process.send_signal(signal.SIGTERM)
    for process in processes:
        assert process.wait(30) == 0


def planned(space: Space, bootstrap: str, to: int, keep_frames: bool = False) -> rewind.Plan:
    """A plan, as soon as the workers' sessions are over."""
    deadline = time.monotonic() + 30
    while True:
        try:
            return rewind.plan(space, bootstrap, to, not keep_frames)
        except StateError as error:
            if "are running" not in str(error) or time.monotonic() > deadline:
                raise
            time.sleep(0.5)


def rewound(space: Space, bootstrap: str, to: int, keep_frames: bool = False) -> rewind.Plan:
    plan = planned(space, bootstrap, to, keep_frames)
    rewind.apply(space, bootstrap, plan)
    return plan


@pytest.mark.parametrize("disk", ["kept", "lost"])
def test_events_since_are_made_again_each_once(bootstrap: str, workers: Workers, tmp_path: Path, disk: str) -> None:
    space, path = new_space(bootstrap, tmp_path, SHORT)
    feed = Feed(space, small_dataset(), bootstrap)
    fold, infer = workers.fold(path), start_infer(workers, path)
    for _ in range(20):  # some rewind points
        feed.send(50)
        time.sleep(0.35)
    wait_for(lambda: inferred(space, bootstrap) and settled(space, bootstrap), "all folded", 90)
    good = feed.events
    time.sleep(2.1)
    to = int(time.time())
    before = snapshot(space, bootstrap)
    for _ in range(10):
        feed.send(50)
        time.sleep(0.35)
    wait_for(lambda: inferred(space, bootstrap) and settled(space, bootstrap), "the nonsense is folded", 90)
    after = snapshot(space, bootstrap)
    with pytest.raises(StateError, match="are running"):
        rewind.plan(space, bootstrap, to)
    stop(fold, infer)
    if disk == "lost":
        shutil.rmtree(tmp_path / "home" / "fold")
    plan = rewound(space, bootstrap, to)
    assert plan.foreign == 0 and plan.rereads
    assert sum(step.end - step.cut for step in plan.steps) > 0
    worker = workers.fold(path)
    wait_for(lambda: settled(space, bootstrap), "the good frames are folded again")
    assert same(before, snapshot(space, bootstrap)), "the state is not what it was"
    stop(worker)
    rewound(space, bootstrap, to)  # the same again changes nothing
    workers.fold(path)
    start_infer(workers, path)
    wait_for(lambda: inferred(space, bootstrap) and settled(space, bootstrap), "the events since are made again", 90)
    prove(space, bootstrap, feed.counts)
    assert feed.events > good
    assert same(after, snapshot(space, bootstrap)), "the same model must lead to the same state"
    feed.send(100)
    wait_for(lambda: inferred(space, bootstrap) and settled(space, bootstrap), "and on it goes", 90)
    prove(space, bootstrap, feed.counts)


def test_folding_the_same_frames_again(bootstrap: str, workers: Workers, tmp_path: Path) -> None:
    space, path = new_space(bootstrap, tmp_path, SHORT)
    load, worker = Load(space, bootstrap), workers.fold(path)
    for _ in range(20):
        load.send(50)
        time.sleep(0.35)
    wait_for(lambda: settled(space, bootstrap), "folded")
    stop(worker)
    plan = planned(space, bootstrap, int(time.time()) - 3, keep_frames=True)
    assert any(step.records for step in plan.steps)
    topics.publish(replace(spaces.find(space.name, bootstrap), rewinding=rewind.called(plan)), bootstrap)  # killed right after it began
    assert workers.fold(path).wait(30) == 1, "no worker starts on half a rewind"
    assert f"crossrep rewind {space.name} --to 20" in workers.logs() and "--keep-frames" in workers.logs()
    rewind.apply(space, bootstrap, plan)
    workers.fold(path)
    wait_for(lambda: settled(space, bootstrap), "folded again")
    prove(space, bootstrap, load.counts)


def test_a_worker_that_slept_through_a_rewind_knows_nothing_any_more(bootstrap: str, workers: Workers, tmp_path: Path) -> None:
    """It wakes to the offset at which it fell asleep: the rewind left out the frames behind its cut, and they were passed over since."""
    space, path = new_space(bootstrap, tmp_path, SHORT, partitions=1)
    load, port = Load(space, bootstrap), cluster.free_port()
    sleeper = workers.fold(path, "sleeper", port=port)
    for _ in range(10):
        load.send(50)
        time.sleep(0.35)
    wait_for(lambda: settled(space, bootstrap), "folded")
    good = dict(load.counts)
    time.sleep(2.1)
    to = int(time.time())
    load.send(50)
    wait_for(lambda: settled(space, bootstrap), "the nonsense is folded")
    time.sleep(1)  # and flushed: its memory is clean
    sleeper.send_signal(signal.SIGSTOP)
    assert rewound(space, bootstrap, to).foreign > 0
    heir = workers.fold(path, "heir")
    wait_for(lambda: settled(space, bootstrap), "what is left out is passed over")
    prove(space, bootstrap, good)
    sleeper.send_signal(signal.SIGCONT)
    stop(heir)
    if sleeper.poll() is not None:  # ended by its session's end, as a supervisor would see it
        workers.fold(path, "sleeper", port=port)
    wait_for(lambda: cluster.ready(port), "the sleeper owns the partition again")
    before = dict(load.counts)
    load.send(200)
    wait_for(lambda: settled(space, bootstrap), "folded on")
    prove(space, bootstrap, {entity: count + load.counts[entity] - before[entity] for entity, count in good.items()})


def test_events_read_again_before_are_not_lost(bootstrap: str, workers: Workers, tmp_path: Path) -> None:
    """The same batch is made twice, and the second rewind goes to the time in between."""
    space, path = new_space(bootstrap, tmp_path, partitions=1)
    producer, topic = kafka.producer(bootstrap), space.inference_topic
    for number in range(50):
        producer.produce(topic, sample(space, keys={"user": f"u{number}", "item": "i"}), partition=0)
    assert producer.flush(30) == 0

    def framing() -> subprocess.Popen[bytes]:
        options = ["--name", "f", "--port", str(free_port()), "--session-timeout", "3", "--max-delay", "1"]
        process = workers.start("frame", str(path), *options)
        wait_for(lambda: consumed([topic], frame_group(space), bootstrap) and nothing_open(space.frames_topic, bootstrap), "in frames")
        return process

    to = int(time.time())
    for _ in range(2):
        stop(framing())
        plan = rewound(space, bootstrap, to)
        assert sum(step.end - step.cut for step in plan.steps) > 0
        to = int(time.time())
    framing()
    workers.fold(path)
    made_of = [lineage.decode(m) for m in kafka.messages(bootstrap, space.frames_topic, kafka.bounds(bootstrap, space.frames_topic))]
    assert all(source.spans == made_of[0].spans for source in made_of), "the batches were to be the same"
    wait_for(lambda: settled(space, bootstrap), "folded")
    prove(space, bootstrap, {"user": 50, "item": 50})


class Batch:
    """A batch of events as an inference worker writes it: its frames, in one transaction."""

    def __init__(self, space: Space, bootstrap: str, name: str, number: int, span: tuple[int, int]):
        self._topic, self._headers = space.frames_topic, lineage.encode(Source(infer_group(space), {(space.inputs.clicks, number): span}))
        self._producer = kafka.transactional_producer(bootstrap, f"{space.name}.{name}", 30.0)
        self._producer.init_transactions(30)
        self._producer.begin_transaction()

    def frame(self, partition: int) -> None:
        self._producer.produce(self._topic, b"frame", partition=partition, headers=self._headers)
        assert self._producer.flush(30) == 0

    def commit(self) -> None:
        self._producer.commit_transaction(30)


@pytest.mark.parametrize("skew", [0.0, 4.0])
def test_after_any_rewinds_every_event_counts_once(skew: float) -> None:
    """Random lives of two workers, one an event partition, or one with both. `skew`: by how many seconds brokers' clocks are wrong."""
    for seed in range(200):
        random, clock, rewound = Random(seed), 100.0, 0
        wrong = [random.uniform(-skew, skew) for _ in range(2)]
        inferred_to = {("events", 0): 0, ("events", 1): 0}
        log: list[list[tuple[bytes, float, int]]] = [[], []]  # partition of frames -> header, append time, turn
        left_out: list[set[int]] = [set(), set()]
        for turn in range(40):
            if random.random() < 0.8:
                sent = []
                for places in random.choice([[[0]], [[1]], [[0], [1]], [[0, 1]]]):
                    spans = {("events", n): (inferred_to["events", n], inferred_to["events", n] + 5) for n in places}
                    inferred_to |= {place: end for place, (_, end) in spans.items()}
                    ((_, header),) = lineage.encode(Source("g", spans, rewound))
                    sent += [(header, number) for number in random.choices([0, 1], k=random.randint(1, 3))]
                for header, number in random.sample(sent, len(sent)):
                    clock += random.random()
                    log[number].append((header, clock + wrong[number], turn))
                continue
            to = clock - random.choice([3, 10, 40]) * random.random()
            at = {turn for frames in log for _, time, turn in frames if time >= to}
            batches: dict[bytes, rewind.Spans] = {}
            for number, frames in enumerate(log):
                for offset, (header, _, _) in enumerate(frames):
                    first, _ = batches.setdefault(header, {}).get(number, (offset, offset))
                    batches[header][number] = first, offset
            late = {number: sum(time < to for _, time, _ in frames) for number, frames in enumerate(log)}
            cuts, rereads = rewind._behind(batches, late)
            for number, cut in cuts.items():
                left_out[number] |= set(range(cut, len(log[number])))
                assert skew or at.issuperset(turn for _, _, turn in log[number][cut:]), "more is left out than must be"
            inferred_to |= {place: min(inferred_to[place], first) for place, first in rereads.get("g", {}).items()}
            rewound += 1
            stays = [header for n, frames in enumerate(log) for offset, (header, _, _) in enumerate(frames) if offset not in left_out[n]]
            for place, end in inferred_to.items():
                spans_of = sorted({s[place] for s in (lineage.parse(header).spans for header in stays) if place in s})
                assert [first for first, _ in spans_of] == list(range(0, end, 5)), f"seed {seed}: {place} is not made once up to {end}"
            gone = {header for n, offsets in enumerate(left_out) for header, _, _ in (log[n][offset] for offset in offsets)}
            assert gone.isdisjoint(stays), f"seed {seed}: a batch is cut apart"


def next_second() -> int:
    """The time, as soon as it is a whole second."""
    time.sleep(1.01 - time.time() % 1)
    return int(time.time())


def test_a_later_batch_of_events_that_are_read_again_does_not_stay(bootstrap: str, tmp_path: Path) -> None:
    """A batch that took long draws another worker's behind the cut, whose next one lies in front of it, in a partition of its own."""
    space, _ = new_space(bootstrap, tmp_path, SHORT, partitions=3)
    next_second()
    slow, drawn, later = (Batch(space, bootstrap, *of) for of in (("a", 0, (0, 100)), ("b", 1, (0, 50)), ("c", 1, (50, 90))))
    slow.frame(0)
    drawn.frame(0)
    drawn.commit()
    later.frame(1)
    later.commit()
    to = next_second()
    slow.frame(2)
    slow.commit()
    plan = rewind.plan(space, bootstrap, to)
    assert plan.rereads == {infer_group(space): {(space.inputs.clicks, 0): 0, (space.inputs.clicks, 1): 0}}
    assert [step.cut for step in plan.steps] == [0, 0, 0], "a frame stays whose events are read again"


def test_a_group_that_was_set_back_is_not_set_forward(bootstrap: str, tmp_path: Path) -> None:
    """Rewound too far, and at once again to a later time: the frames in between are left out for good, so their events must be made."""
    space, _ = new_space(bootstrap, tmp_path, SHORT, partitions=1)
    before = next_second()
    for name, span in (("a", (0, 50)), ("b", (50, 100))):
        batch, to = Batch(space, bootstrap, name, 0, span), next_second()
        batch.frame(0)
        batch.commit()
    groups.move(bootstrap, infer_group(space), {space.inputs.clicks: {0: 100}})
    rewind.apply(space, bootstrap, rewind.plan(space, bootstrap, before))
    assert rewind.plan(space, bootstrap, to).rereads == {infer_group(space): {(space.inputs.clicks, 0): 0}}


class Simulated:
    """A partition whose records tell all frames they count, folded, rewound and folded again as workers do it."""

    def __init__(self, random: Random, frames: list[bytes]):
        self.random, self.frames = random, frames  # frame i changes key frames[i]
        self.state: dict[bytes, bytes] = {}
        self.now = Progress(0, point=Point(0))
        self.recorded: set[bytes] = set()
        self.history: list[Undo] = []

    def fold(self) -> None:
        for _ in range(self.random.randrange(3, 40)):
            if self.random.random() < 0.15:
                self.now, self.recorded = replace(self.now, point=self.now.as_point()), set()
            at = self.now.offset
            if at == len(self.frames):
                return
            if not self.now.skips(at):
                key = self.frames[at]
                if key not in self.recorded:
                    self.history.append(Undo("user", self.now.point, [key], [self.state.get(key)]))
                    self.recorded.add(key)
                self.state[key] = self.state.get(key, b"") + bytes([at + 100])
            self.now = replace(self.now, offset=at + 1)

    def rewind(self, step: rewind.Step, leave_out: bool) -> None:
        if step.point is not None:
            for writes in step.records.values():
                self.state.update(zip(writes.keys.tolist(), (value.rstrip() for value in writes.values())))
            self.state = {key: record for key, record in self.state.items() if record}
            self.now, self.recorded = replace(self.now, offset=step.point.offset, point=step.point), set()
        if leave_out and step.cut < step.end:
            kept = tuple(span for span in self.now.skipped if span[0] < step.cut)
            self.now = replace(self.now, skipped=(*kept, (step.cut, step.end)))

    def must_be(self) -> dict[bytes, bytes]:
        found: dict[bytes, bytes] = {}
        for at, key in enumerate(self.frames[: self.now.offset]):
            if not self.now.skips(at):
                found[key] = found.get(key, b"") + bytes([at + 100])
        return found


def test_rewound_again_and_again(bootstrap: str, tmp_path: Path) -> None:
    """The points of an earlier rewind's future tell of a state that never was. 16 random lives, one a partition."""
    space, _ = new_space(bootstrap, tmp_path, SHORT, partitions=16)
    random, producer, size = Random(7), kafka.producer(bootstrap), RecordLayout(space, "user").size
    lives = [Simulated(random, [b"k%d" % random.randrange(6) for _ in range(150)]) for _ in range(space.partitions)]
    written, back = [0] * len(lives), 0
    for _ in range(5):
        for number, life in enumerate(lives):
            life.fold()
            for undo in life.history[written[number] :]:
                undo = replace(undo, records=[record and record.ljust(size, b" ") for record in undo.records])  # all are of one size
                for message in history.encode(undo):
                    producer.produce(space.history_topic, message, partition=number)
            written[number] = len(life.history)
        assert producer.flush(30) == 0
        for number, life in enumerate(lives):
            step = rewind.Step(number, life.now, random.randrange(life.now.offset + 1), min(len(life.frames), life.now.offset + 5))
            if step.cut < life.now.offset:
                rewind._find_former_state(space, bootstrap, step, 0)
                back += 1
            life.rewind(step, leave_out=random.random() < 0.5)
            assert life.state == life.must_be(), f"partition {number} rewound to {step.point}"
    assert back > 60


def test_too_far_back_is_refused_and_says_how_far_it_goes(bootstrap: str, workers: Workers, tmp_path: Path) -> None:
    space, path = new_space(bootstrap, tmp_path, SHORT, partitions=1)
    load, worker = Load(space, bootstrap), workers.fold(path)
    load.send(50)
    wait_for(lambda: settled(space, bootstrap), "folded")
    stop(worker)
    client = kafka.admin(bootstrap)
    end = kafka.bounds(bootstrap, space.history_topic)[0][1]
    for future in client.delete_records([TopicPartition(space.history_topic, 0, end)]).values():
        future.result()
    with pytest.raises(StateError, match="does not reach back"):
        planned(space, bootstrap, int(time.time()) - 3600, keep_frames=True)
    help = subprocess.run(
        [sys.executable, "-m", "crossrep", "rewind", space.name, "--bootstrap", bootstrap], cwd=ROOT, capture_output=True, text=True
    )
    assert help.returncode == 2 and "--to TIME or --ago" in help.stderr
