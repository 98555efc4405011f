"""Ranks with nothing to tell each other leave their cores alone."""

from __future__ import annotations

import json

from tests.launcher import launch

# Processor seconds of a second of sleep, after each of several starts: how the beats of two ranks lie is settled there.
SCRIPT = """
import json, time
import hvdscale.torch as hvd
used = []
for _ in range(4):
    hvd.init()
    before = time.process_time()
    time.sleep(1)
    used.append(time.process_time() - before)
    rank = hvd.rank()
    hvd.shutdown()
if rank == 0:
    print(json.dumps(used))
"""


def test_waiting_for_the_next_message_takes_little_of_a_core() -> None:
    output = launch(["-c", SCRIPT], ranks=2, deadline_seconds=300).check()
    assert max(json.loads(output.splitlines()[-1])) < 0.2
