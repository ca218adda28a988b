"""One writer at a time: a second one is refused or waits, a living holder is never taken for dead, a dead one never stands in the way."""

import json
import os
import signal
import socket
import threading
import time

import psutil
import pytest

from align.common import locks
from align.common.errors import LeaseError
from align.common.files import writer_name
from align.common.locks import Lease, locked
from align.common.preemption import noted
from tests.support.forking import fork


def hold(folder, job, ready):
    with Lease(folder, job):
        ready.write_text("")
        signal.pause()


def test_a_second_job_is_refused_naming_the_holder_and_a_dead_one_is_taken_over(tmp_path):
    ready = tmp_path / "ready"
    holder = fork(hold, tmp_path / "store", "first", ready)
    while not ready.exists():
        assert psutil.pid_exists(holder)
    with pytest.raises(LeaseError, match=f"process {holder} on .* .job first"), Lease(tmp_path / "store", "second"):
        pass
    with Lease(tmp_path / "store", "first") as shared:  # the same job shares the work
        assert shared.claim(3) and not shared.claim(3)
        shared.release(3)
        assert shared.claim(3)
    os.kill(holder, signal.SIGKILL)
    os.waitpid(holder, 0)
    with Lease(tmp_path / "store", "second") as lease:
        assert lease.claim(3)


def leave_a_lease(folder, job, **changed):
    """Write the lease of a holder that is not this process."""
    place = folder / ".work" / "leases" / "another.json"
    place.parent.mkdir(parents=True)
    holder = {"job": job, "host": "another", "pid": os.getpid(), "boot": "another", "space": locks._space(), "started": "1"}
    place.write_text(json.dumps({**holder, **changed}))
    return place


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(locks, "STALE_SECONDS", 1.0)
    monkeypatch.setattr(locks, "HEARTBEAT_SECONDS", 0.2)


@pytest.mark.parametrize("clock", [-86400, 0, 86400])  # seconds that the other machine's clock is off
def test_a_holder_on_another_machine_is_dead_only_after_a_silence_seen_here(tmp_path, impatient, clock):
    place, waited = leave_a_lease(tmp_path, "first"), []
    os.utime(place, (time.time() + clock, time.time() + clock))
    began = time.monotonic()
    with Lease(tmp_path, "second", waited.append):
        assert not place.exists() and time.monotonic() - began > 1
    assert len(waited) == 1 and "process" in waited[0] and "on another" in waited[0]


def test_a_holder_on_another_machine_that_gives_a_sign_of_life_is_not_taken_over(tmp_path, impatient):
    place = leave_a_lease(tmp_path, "first")
    beat = threading.Timer(0.3, os.utime, (place,))
    beat.start()
    with pytest.raises(LeaseError, match="on another .job first"), Lease(tmp_path, "second"):
        pass
    assert place.exists()


def test_a_living_holder_whose_process_cannot_be_seen_is_not_taken_over(tmp_path, forked):
    """A container has process numbers of its own, and often the host's name."""
    ready = tmp_path / "ready"
    holder = fork(hold, tmp_path, "first", ready)
    while not ready.exists():
        assert psutil.pid_exists(holder)
    [place] = (tmp_path / ".work/leases").glob("*.json")
    hidden = json.loads(place.read_text()) | {"space": "pid:[1]", "pid": 1 << 30}
    os.truncate(place, 0)
    with open(place, "r+") as file:
        file.write(json.dumps(hidden))
    os.utime(place, (0, 0))  # and a clock that is far behind
    try:
        with pytest.raises(LeaseError, match="job first"), Lease(tmp_path, "second"):
            pass
    finally:
        os.kill(holder, signal.SIGKILL)
        os.waitpid(holder, 0)
    with Lease(tmp_path, "second"):
        assert not place.exists()


def test_a_worker_that_was_forked_does_not_hold_the_lease_of_its_dead_parent(tmp_path):
    ready = tmp_path / "ready"

    def holder():
        with Lease(tmp_path, "first"):
            worker = os.fork()
            if worker == 0:
                time.sleep(60)
                os._exit(0)
            ready.write_text(str(worker))
            signal.pause()

    parent = fork(holder)
    while not ready.exists() or not ready.read_text():
        assert psutil.pid_exists(parent)
    os.kill(parent, signal.SIGKILL)
    os.waitpid(parent, 0)
    try:
        with Lease(tmp_path, "second"):
            pass
    finally:
        os.kill(int(ready.read_text()), signal.SIGKILL)


def test_a_holder_that_lost_its_lease_stops_without_saving(tmp_path, forked, impatient):
    def lose():
        with noted(), Lease(tmp_path, "first"):
            for path in (tmp_path / ".work/leases").glob("*.json"):
                path.unlink()
            try:
                time.sleep(30)
            except LeaseError as error:
                raise SystemExit(error.exit_code) from error

    assert forked(lose) == 6


def test_only_the_files_of_dead_writers_are_removed(tmp_path):
    ready = tmp_path / "ready"
    holder = fork(hold, tmp_path, "job", ready)
    while not ready.exists():
        assert psutil.pid_exists(holder)
    with Lease(tmp_path, "job") as lease:
        [other] = lease.living_writers() - {writer_name()}
        for name in (other, writer_name(), "123-dead"):
            (tmp_path / f"x.{name}.partial").write_text("")
        lease.remove_temporaries(tmp_path)
        assert sorted(path.name for path in tmp_path.glob("*.partial")) == sorted([f"x.{other}.partial", f"x.{writer_name()}.partial"])
        os.kill(holder, signal.SIGKILL)
        os.waitpid(holder, 0)
        lease.remove_temporaries(tmp_path)
        assert [path.name for path in tmp_path.glob("*.partial")] == [f"x.{writer_name()}.partial"]


@pytest.mark.parametrize("changed", [{"pid": 1 << 30}, {"started": "1"}, None])
def test_a_dead_process_a_reused_number_and_a_half_written_lease_stand_in_nobodys_way(tmp_path, changed):
    place = leave_a_lease(tmp_path, "first", **{"host": socket.gethostname(), "boot": locks._boot(), **(changed or {})})
    if changed is None:
        place.write_text('{"job": "fi')
    with Lease(tmp_path, "second"):
        assert not place.exists()


def sit(path, ready):
    with locked(path):
        ready.write_text("")
        signal.pause()


def test_a_locked_file_refuses_a_second_process_within_seconds_and_none_after_a_kill(tmp_path):
    path, ready = tmp_path / "x.lock", tmp_path / "ready"
    holder = fork(sit, path, ready)
    while not ready.exists():
        assert psutil.pid_exists(holder)
    began = time.monotonic()
    with pytest.raises(LeaseError, match="another process holds .*x.lock"), locked(path):
        pass
    assert 3 < time.monotonic() - began < 5
    waited = []

    def end_it():
        waited.append(1)
        os.kill(holder, signal.SIGKILL)
        os.waitpid(holder, 0)

    with locked(path, waiting=end_it):
        assert waited == [1]
    assert path.exists()


def count_inside(path, counted, times):
    for _ in range(times):
        with locked(path, waiting=lambda: None, keep=False):
            number = int(counted.read_text())
            time.sleep(0.001)
            counted.write_text(str(number + 1))


def test_processes_that_wait_for_a_lock_file_that_goes_away_still_go_in_one_by_one(tmp_path):
    (tmp_path / "counted").write_text("0")
    workers = [fork(count_inside, tmp_path / "x.lock", tmp_path / "counted", 20) for _ in range(4)]
    assert [os.waitpid(worker, 0)[1] for worker in workers] == [0] * 4
    assert (tmp_path / "counted").read_text() == "80" and not (tmp_path / "x.lock").exists()
