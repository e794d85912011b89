"""The thread behind every explorer: of many requests the newest wins, and nothing is lost or left behind."""

import threading
import time

import pytest

from mbkit.widgets.worker import Worker


@pytest.fixture
def worker():
    made = []

    def make(start, draw=lambda: None):
        made.append(Worker(start, draw))
        return made[-1]

    yield make
    for each in made:
        each.close()


def held(gate, seen):
    """A run whose every step waits until `gate` is set."""

    def start(number):
        for step in range(5):
            gate.wait(10)
            seen.append((number, step))
            yield

    return start


def test_of_many_requests_the_newest_wins_and_the_others_never_start(worker):
    gate, seen = threading.Event(), []
    worker = worker(held(gate, seen))
    for number in range(20):
        worker.request({"number": number})
        time.sleep(0.001)
    gate.set()
    assert worker.wait(10)
    assert worker.state == "idle"
    assert [step for number, step in seen if number == 19] == [0, 1, 2, 3, 4]
    dropped = [number for number, _ in seen if number != 19]
    assert len(dropped) <= 1  # the one that was held when the others came, for the one step that it was in


def test_a_run_that_was_dropped_is_not_drawn_any_more(worker):
    gate, seen, drawn = threading.Event(), [], []
    worker = worker(held(gate, seen), lambda: drawn.append(seen[-1][0]))
    worker.request({"number": 1})
    time.sleep(0.05)
    worker.request({"number": 2})
    gate.set()
    assert worker.wait(10)
    assert seen[0] == (1, 0)
    assert set(drawn) == {2}


def test_the_last_step_is_always_drawn(worker):
    seen, drawn = [], []
    worker = worker(lambda: (seen.append(step) for step in range(200)), lambda: drawn.append(len(seen)))
    worker.request({})
    assert worker.wait(10)
    assert drawn[0] == 1
    assert drawn[-1] == 200
    worker.redraw()
    assert worker.wait(10)
    assert len(seen) == 200
    assert drawn[-2:] == [200, 200]


def test_a_run_that_is_paused_at_once_makes_the_one_step_that_there_is_to_show(worker):
    gate, seen, drawn = threading.Event(), [], []
    worker = worker(held(gate, seen), lambda: drawn.append(seen[-1]))
    worker.request({"number": 1}, paused=True)
    gate.set()
    assert worker.wait(10)
    assert worker.state == "paused"
    assert seen == [(1, 0)]
    assert set(drawn) == {(1, 0)}
    assert worker.drawn == worker.generation == 1


def test_nothing_is_drawn_where_nothing_was_trained(worker):
    def fail():
        raise RuntimeError("no memory")
        yield

    drawn = []
    worker = worker(fail, lambda: drawn.append(1))
    worker.redraw()
    assert worker.wait(10)
    worker.request({})
    for _ in range(2):
        with pytest.raises(RuntimeError, match="no memory"):
            worker.wait(10)
        worker.redraw()
    assert drawn == []
