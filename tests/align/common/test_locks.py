"""One writer at a time: a second one is refused or waits, a living holder is never taken for dead, a dead one never stands in the way."""

import json
import os
import signal
import socket
import time

import psutil
import pytest

from align.common import locks
from align.common.errors import LeaseError
from align.common.locks import Lease, locked
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
    holder = {"job": job, "host": "another", "pid": os.getpid(), "started": 0.0}
    place.write_text(json.dumps({**holder, **changed}))
    return place


def test_a_holder_on_another_machine_is_dead_only_after_a_long_silence(tmp_path):
    place = leave_a_lease(tmp_path, "first")
    with pytest.raises(LeaseError, match="on another"), Lease(tmp_path, "second"):
        pass
    silent = time.time() - locks.STALE_SECONDS - 1
    os.utime(place, (silent, silent))
    with Lease(tmp_path, "second"):
        assert not place.exists()


@pytest.mark.parametrize("changed", [{"pid": 1 << 30}, {"started": 1.0}, None])
def test_a_dead_process_a_reused_number_and_a_half_written_lease_stand_in_nobodys_way(tmp_path, changed):
    place = leave_a_lease(tmp_path, "first", **{"host": socket.gethostname(), **(changed or {})})
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
