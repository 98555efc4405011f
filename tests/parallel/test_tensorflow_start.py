"""Starting TensorFlow on real ranks: nothing but the script's own lines on the screen, and threads as settled."""

from __future__ import annotations

import json

from tests.launcher import launch

# What each rank does before it joins -> operations it then runs at once ("setting": as runtime_settings() says,
# None: as TensorFlow likes), who chose.
CASES = [
    ("", "setting", "hvdscale"),
    ("tf.config.threading.set_inter_op_parallelism_threads(5)", 5, "hvdscale"),
    ("tf.zeros([2]) + 1", None, "late"),
]

SCRIPT = """
import json, os
import hvdscale.tensorflow as hvd
import tensorflow as tf
exec(CASES[int(os.environ["OMPI_COMM_WORLD_RANK"])])
hvd.init()
tf.zeros([2]) + 1
tasks = "/proc/self/task"
names = [open(f"{tasks}/{t}/comm").read().strip() for t in os.listdir(tasks)]
ours = [s for s in hvd.runtime_settings() if s.name.startswith("TF_NUM_")]
said = {"used": names.count("tf_Compute"), "set": {int(s.value) for s in ours}, "by": {s.origin for s in ours}}
lines = hvd.allgather_object(json.dumps(said, default=sorted))
if hvd.rank() == 0:
    print("\\n".join(lines))
hvd.shutdown()
"""


def test_threads_and_silence() -> None:
    script = SCRIPT.replace("CASES", repr([before for before, _, _ in CASES]))
    env = {"TF_CPP_MIN_LOG_LEVEL": "1"}  # what an import of hvdscale.tensorflow sets; the test launcher hides more
    output = launch(["-c", script], ranks=len(CASES), env=env, deadline_seconds=400).check()
    seen = [json.loads(line) for line in output.splitlines()]  # a line of anyone else's fails here
    for (_, wanted, origin), said in zip(CASES, seen, strict=True):
        (threads,) = said["set"]
        assert said["by"] == [origin]
        assert wanted is None or said["used"] == (threads if wanted == "setting" else wanted)
