"""One process of the bench of central updates in TensorFlow: the Keras GPT, its update made as ``--way`` says.

The optimizer is AdamW, and every way trains both ranks' batches in a step. TensorFlow's own strategies are timed by the
one process that directs them; a worker or parameter server ends when that one has left its result.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

import keras
import tensorflow as tf

from ci.bench.workers.ranks import digest, leave_result, median_seconds, meet
from ci.bench.workers.tensorflow_step import Step, batch, gpt, loss_of, plain_step

WORKERS = 2


def ours(way: str) -> tuple[int, int, keras.Model, Step]:
    import hvdscale.tensorflow as hvd

    hvd.init()
    model = gpt()
    optimizer = hvd.DistributedOptimizer(keras.optimizers.AdamW(3e-4), model=model, sync=hvd.EveryStep(way))
    return hvd.rank(), hvd.size(), model, plain_step(model, optimizer, *batch(hvd.rank()))


def central_storage() -> tuple[int, int, keras.Model, Step]:
    """One process with a device for each rank; variables, and AdamW's state, lie on the first."""
    [cpu] = tf.config.list_physical_devices("CPU")
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * WORKERS)
    devices = [f"/cpu:{i}" for i in range(WORKERS)]
    central = tf.distribute.experimental.CentralStorageStrategy(devices, parameter_device=devices[0])
    mean = tf.distribute.ReduceOp.MEAN
    with central.scope():
        model, optimizer = gpt(), keras.optimizers.AdamW(3e-4)
        optimizer.build(model.trainable_variables)

    def of_each(part: int) -> Any:
        return central.experimental_distribute_values_from_function(
            lambda context: batch(context.replica_id_in_sync_group)[part]
        )

    def replica(ids: tf.Tensor, targets: tf.Tensor) -> tuple[tf.Tensor, list[tf.Tensor]]:
        with tf.GradientTape() as tape:
            loss = loss_of(model, ids, targets)
        return loss, tape.gradient(loss, model.trainable_variables)

    ids, targets = of_each(0), of_each(1)

    @tf.function
    def step() -> tf.Tensor:
        loss, gradients = central.run(replica, (ids, targets))
        # Keras 3 leaves the sum over replicas to its caller.
        optimizer.apply([central.reduce(mean, g, axis=None) for g in gradients], model.trainable_variables)
        return central.reduce(mean, loss, axis=None)

    return 0, 1, model, step


def parameter_server() -> tuple[int, int, keras.Model, Step]:
    """Both workers' gradients one after the other, as TensorFlow's parameter server takes them: two updates a step."""
    place, ports = int(os.environ["BENCH_RANK"]), os.environ["BENCH_PORTS"].split(",")
    roles = [("chief", 0), *(("worker", i) for i in range(WORKERS)), ("ps", 0)]
    cluster: dict[str, list[str]] = {}
    for (role, _), port in zip(roles, ports, strict=True):
        cluster.setdefault(role, []).append(f"127.0.0.1:{port}")
    role, index = roles[place]
    os.environ["TF_CONFIG"] = json.dumps({"cluster": cluster, "task": {"type": role, "index": index}})
    resolver = tf.distribute.cluster_resolver.TFConfigClusterResolver()
    if role != "chief":
        _serve(resolver, role, index)
    servers = tf.distribute.ParameterServerStrategy(resolver)
    coordinator = tf.distribute.coordinator.ClusterCoordinator(servers)
    with servers.scope():
        model, optimizer = gpt(), keras.optimizers.AdamW(3e-4)
        optimizer.build(model.trainable_variables)
    batches = [tuple(part.numpy() for part in batch(i)) for i in range(WORKERS)]

    def replica(ids: tf.Tensor, targets: tf.Tensor) -> tf.Tensor:
        with tf.GradientTape() as tape:
            loss = loss_of(model, ids, targets)
        optimizer.apply(tape.gradient(loss, model.trainable_variables), model.trainable_variables)
        return loss

    @tf.function
    def worker_step(ids: tf.Tensor, targets: tf.Tensor) -> tf.Tensor:
        return servers.run(replica, (ids, targets))

    def step() -> None:
        for both in batches:
            coordinator.schedule(worker_step, args=both)
        coordinator.join()

    return 0, 1, model, step


def _serve(resolver: Any, role: str, index: int) -> None:
    """What a worker or parameter server does until the chief's result is there. Does not return."""
    server = tf.distribute.Server(resolver.cluster_spec(), job_name=role, task_index=index, protocol="grpc")
    while not (Path(os.environ["BENCH_FOLDER"]) / "result-0.json").exists():
        time.sleep(0.5)  # server.join() would hold the interpreter's lock for ever
    del server
    os._exit(0)  # a server has no way to stop


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--way", required=True)
    parser.add_argument("--steps", type=int, required=True)
    options = parser.parse_args()
    keras.utils.set_random_seed(0)
    peers = {way.__name__: way for way in (central_storage, parameter_server)}
    rank, ranks, model, step = peers[options.way]() if options.way in peers else ours(options.way)
    meet(rank, ranks)
    seconds = median_seconds(step, options.steps, warmup=3)
    leave_result(rank, digest(v.numpy() for v in model.trainable_variables), step=seconds)
    if options.way == "parameter_server":
        os._exit(0)  # the coordinator's threads wait for servers that are gone


if __name__ == "__main__":
    main()
