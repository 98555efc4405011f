"""Gradient tapes: training on several ranks is training on all their batches."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

import hvdscale.tensorflow as hvd
from tests.contract import oracle
from tests.contract.drivers.tensorflow import Driver

STEPS = 4

# How the tape is told to reduce -> how many times the mean gradient it gives.
REDUCTIONS = {
    "average": (lambda v: {}, lambda n: 1),
    "sum": (lambda v: {"op": hvd.Sum}, lambda n: n),
    "predivide": (lambda v: {"gradient_predivide_factor": 4.0}, lambda n: 1),
    "two groups": (lambda v: {"groups": 2}, lambda n: 1),
    "num_groups": (lambda v: {"num_groups": 3}, lambda n: 1),
    "groups of variables": (lambda v: {"groups": [[v[0], v[3]]], "gradient_predivide_factor": 2.0}, lambda n: 1),
    "sparse as dense": (lambda v: {"sparse_as_dense": True}, lambda n: 1),
}


def rank_value(tensor: Any) -> np.ndarray:
    return np.asarray(tf.convert_to_tensor(tensor), np.float64)


def mean_of_ranks() -> float:
    """The mean of 1, 2, ..., size: what averaging ``rank + 1`` gives."""
    return (hvd.size() + 1) / 2


@pytest.mark.parametrize("mode", ["eager", "function"])
@pytest.mark.parametrize("name", REDUCTIONS)
def test_training_equals_the_oracle(driver: Driver, name: str, mode: str) -> None:
    arguments, factor = REDUCTIONS[name]
    start = oracle.initial_weights()
    model = driver.model(start)
    update = oracle.sgd(0.05)
    distributed = driver.distribute(keras.optimizers.SGD(0.05), model, **arguments(model.trainable_variables))
    step = driver.step if mode == "eager" else tf.function(driver.step)
    expected = start
    for number in range(STEPS):
        every = [oracle.batches(STEPS, rank)[number] for rank in range(hvd.size())]
        expected = update(expected, [factor(hvd.size()) * g for g in oracle.mean_gradients(expected, every)])
        mine = [tf.constant(a, tf.float32) for a in every[hvd.rank()]]
        step(model, distributed, [tuple(mine)])
    for ours, theirs in zip(driver.weights(model), expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


def test_compressed_gradients_travel_in_half_precision(driver: Driver) -> None:
    x = tf.Variable([1.0, 2.0])
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(x * (1.0 + 2.0**-12))
    (gradient,) = hvd.DistributedGradientTape(tape, compression=hvd.Compression.fp16).gradient(loss, [x])
    assert gradient.dtype == tf.float32
    expected = 1.0 + 2.0**-12 if hvd.size() == 1 else 1.0  # the last bits do not fit in 16
    np.testing.assert_array_equal(gradient, [expected, expected])


def test_adasum_of_equal_gradients_is_the_gradient(driver: Driver) -> None:
    x = tf.Variable([1.0, 2.0])
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(3.0 * x)
    tape = hvd.DistributedGradientTape(tape, op=hvd.Adasum)
    if hvd.size() > 1 and not hvd.mpi_enabled():
        with pytest.raises(hvd.PlanError, match="Adasum needs MPI"):
            tape.gradient(loss, [x])
    else:
        np.testing.assert_allclose(tape.gradient(loss, [x])[0], [3.0, 3.0])


@pytest.mark.parametrize("wrap", ["around", "after"])
@pytest.mark.parametrize("mode", ["eager", "function"])
def test_sources_keep_their_structure(driver: Driver, wrap: str, mode: str) -> None:
    a, b, unused = tf.Variable(2.0), keras.Variable(3.0), tf.Variable(1.0)

    def gradients(weight: tf.Tensor) -> Any:
        tape = tf.GradientTape(persistent=True)
        if wrap == "around":
            tape = hvd.DistributedGradientTape(tape)
        with tape:
            c = tf.constant(1.0)
            tape.watch(c)
            y = weight * (a * a + 5.0 * b + 7.0 * c)
        if wrap == "after":
            tape = hvd.DistributedGradientTape(tape)
        assert isinstance(tape, tf.GradientTape)
        nested = tape.gradient(y, {"pair": [a, b], "watched": c})
        single = tape.gradient(y, a, output_gradients=tf.constant(10.0))
        missing = tape.gradient(y, [unused, a])
        zero = tape.gradient(y, [unused], unconnected_gradients=tf.UnconnectedGradients.ZERO)
        assert missing[0] is None
        return nested, single, missing[1], zero

    if mode == "function":
        gradients = tf.function(gradients)
    nested, single, other, zero = gradients(tf.constant(float(hvd.rank() + 1)))
    mean = mean_of_ranks()
    np.testing.assert_allclose(
        [nested["pair"][0], nested["pair"][1], nested["watched"]], [4 * mean, 5 * mean, 7 * mean]
    )
    np.testing.assert_allclose([single, other, zero[0]], [40 * mean, 4 * mean, 0])


@pytest.mark.parametrize("arguments", [{}, {"sparse_as_dense": True}, {"groups": 2}], ids=str)
@pytest.mark.parametrize("mode", ["eager", "function"])
def test_embedding_gradients_equal_the_dense_reference(driver: Driver, arguments: dict[str, Any], mode: str) -> None:
    rows, width = 6, 3
    tables = [tf.Variable(tf.ones([rows, width])), tf.Variable(tf.ones([rows, 2], tf.bfloat16))]
    scale = tf.Variable(2.0)
    ids = [[0, 1, 1], [1, 5, 2]][hvd.rank() % 2]  # rows shared between ranks and rows of one rank

    def gradients() -> list[Any]:
        with tf.GradientTape() as tape:
            loss = scale * (
                tf.reduce_sum(tf.gather(tables[0], ids)) + tf.reduce_sum(tf.gather(tf.cast(tables[1], tf.float32), ids))
            )
            loss += scale * tf.cast(tf.reduce_sum(tf.gather(tables[1], ids)), tf.float32)
        return hvd.DistributedGradientTape(tape, **arguments).gradient(loss, [scale, *tables])

    result = (tf.function(gradients) if mode == "function" else gradients)()
    counts = np.zeros(rows)
    for rank in range(hvd.size()):
        np.add.at(counts, [[0, 1, 1], [1, 5, 2]][rank % 2], 2.0 / hvd.size())
    np.testing.assert_allclose(rank_value(result[1]), np.tile(counts[:, None], (1, width)))
    np.testing.assert_allclose(rank_value(result[2]), np.tile(2 * counts[:, None], (1, 2)))
    assert result[2].dtype == tf.bfloat16


@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("mode", ["eager", "function"])
def test_local_layers_keep_their_own_gradients(driver: Driver, scaled: bool, mode: str) -> None:
    model = driver.model(oracle.initial_weights())
    x, y = oracle.batches(1, hvd.rank())[0]
    shared_layer, local_layer = model.layers

    def gradients() -> Any:
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean((model(tf.constant(x, tf.float32)) - tf.constant(y, tf.float32)) ** 2)
        tape = hvd.PartialDistributedGradientTape(tape, local_layers=local_layer, scale_local_gradients=scaled)
        local, shared = tape.get_local_and_global_gradients(loss, model.trainable_variables)
        assert [v.path for v, _ in local] == [v.path for v in local_layer.trainable_variables]
        assert [v.path for v, _ in shared] == [v.path for v in shared_layer.trainable_variables]
        return [g for _, g in shared], [g for _, g in local]

    shared, local = (tf.function(gradients) if mode == "function" else gradients)()
    start = oracle.initial_weights()
    mean = oracle.mean_gradients(start, [oracle.batches(1, rank)[0] for rank in range(hvd.size())])
    own = oracle.gradients(start, (x, y))
    for ours, theirs in zip(shared, mean[:2], strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6)
    for ours, theirs in zip(local, own[2:], strict=True):
        np.testing.assert_allclose(ours, theirs / (hvd.size() if scaled else 1), rtol=1e-4, atol=1e-6)


def test_a_layer_without_weights_yet_is_local_once_it_has_them(driver: Driver) -> None:
    layer = keras.layers.Dense(1, use_bias=False, kernel_initializer="ones")
    tape = hvd.PartialDistributedGradientTape(tf.GradientTape(), local_layers=[layer])
    with tape:
        loss = tf.reduce_sum(layer(tf.fill([1, 2], float(hvd.rank() + 1))))
    (gradient,) = tape.gradient(loss, layer.trainable_variables)
    np.testing.assert_allclose(gradient, np.full([2, 1], (hvd.rank() + 1) / hvd.size()))


def test_bfloat16_is_summed_in_float32(driver: Driver) -> None:
    # 256 + 1 is not a bfloat16: summed in that type it would be lost before the division.
    value = 256.0 if hvd.rank() == 0 else 2.0
    x = tf.Variable(tf.zeros([3], tf.bfloat16))
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(x * tf.cast(value, tf.bfloat16))
    (gradient,) = hvd.DistributedGradientTape(tape).gradient(loss, [x])
    assert gradient.dtype == tf.bfloat16
    expected = tf.cast((256.0 + 2.0 * (hvd.size() - 1)) / hvd.size(), tf.bfloat16)
    np.testing.assert_array_equal(tf.cast(gradient, tf.float32), tf.fill([3], tf.cast(expected, tf.float32)))


@pytest.mark.parametrize("mode", ["eager", "function"])
def test_empty_variables_and_mixed_dtypes(driver: Driver, mode: str) -> None:
    shapes = [((0, 3), tf.float32), ((2, 2), tf.float64), ((1,), tf.float16), ((), tf.float32)]
    variables = [tf.Variable(tf.zeros(s, d)) for s, d in shapes]

    def gradients() -> list[tf.Tensor]:
        with tf.GradientTape() as tape:
            loss = tf.add_n([tf.cast(tf.reduce_sum(v), tf.float32) for v in variables]) * (hvd.rank() + 1.0)
        return hvd.DistributedGradientTape(tape).gradient(loss, variables)

    result = (tf.function(gradients) if mode == "function" else gradients)()
    for gradient, (shape, dtype) in zip(result, shapes, strict=True):
        assert gradient.dtype == dtype
        np.testing.assert_allclose(gradient, np.full(shape, mean_of_ranks()))


@pytest.mark.parametrize("mode", ["eager", "function"])
def test_only_the_ranks_of_a_process_set_exchange(driver: Driver, mode: str) -> None:
    x = tf.Variable(0.0)
    table = tf.Variable(tf.zeros([2, 1]))

    def gradients() -> list[Any]:
        with tf.GradientTape() as tape:
            loss = (x + tf.reduce_sum(tf.gather(table, [1]))) * (hvd.rank() + 1.0)
        return hvd.DistributedGradientTape(tape, process_set=driver.even_ranks).gradient(loss, [x, table])

    first, rows = (tf.function(gradients) if mode == "function" else gradients)()
    peers = range(0, hvd.size(), 2) if hvd.rank() % 2 == 0 else [hvd.rank()]
    mean = sum(r + 1.0 for r in peers) / len(peers)
    np.testing.assert_allclose(first, mean)
    np.testing.assert_allclose(tf.convert_to_tensor(rows), [[0.0], [mean]])


BROKEN = {
    "a variable of another shape": (lambda: [tf.Variable(tf.zeros([2 + hvd.rank()]), name="w")], {}, r"w float32\[2\]"),
    "another dtype": (
        lambda: [tf.Variable(tf.zeros([2], [tf.float32, tf.float64][hvd.rank() > 0]), name="w")],
        {},
        r"w float64\[2\]",
    ),
    "one variable more": (lambda: [tf.Variable(0.0) for _ in range(1 + (hvd.rank() > 0))], {}, "number of parameters"),
    "another name": (lambda: [tf.Variable(0.0, name=f"rank{hvd.rank()}")], {}, "rank0 float32"),
    "another plan": (lambda: [tf.Variable(0.0)], {"gradient_predivide_factor": 1.0}, "predivide=2.0"),
}


@pytest.mark.parametrize("mode", ["eager", "function"])
@pytest.mark.parametrize("what", BROKEN)
def test_ranks_that_differ_are_told_before_anything_moves(driver: Driver, what: str, mode: str) -> None:
    make, arguments, text = BROKEN[what]
    variables = make()
    if arguments and hvd.rank() > 0:
        arguments = {"gradient_predivide_factor": 2.0}

    def gradients() -> list[tf.Tensor]:
        with tf.GradientTape() as tape:
            loss = tf.add_n([tf.cast(tf.reduce_sum(v), tf.float32) for v in variables])
        return hvd.DistributedGradientTape(tape, **arguments).gradient(loss, variables)

    run = tf.function(gradients) if mode == "function" else gradients
    if hvd.size() == 1:
        assert len(run()) == len(variables)
        return
    with pytest.raises(hvd.DesyncError, match=text) as caught:
        run()
    texts = hvd.allgather_object(str(caught.value))
    assert len(set(texts)) == 1
    assert "DistributedGradientTape" in texts[0]


def test_names_may_count_models_made_before(driver: Driver) -> None:
    if hvd.rank() == 0:
        driver.model(oracle.initial_weights())  # one more here: "dense_2" becomes "dense_4"
    model = driver.model(oracle.initial_weights())
    momentum = keras.optimizers.SGD(0.1, momentum=0.9)
    momentum.build(model.trainable_variables)
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(model(tf.ones([1, oracle.INPUTS])))
    gradients = hvd.DistributedGradientTape(tape).gradient(loss, model.trainable_variables)
    np.testing.assert_allclose(gradients[-1], [1.0])
    hvd.broadcast_variables([model.variables, momentum.variables], root_rank=0)


REFUSED = {
    "a plan that is none": lambda tape: hvd.DistributedGradientTape(tape, sync="sometimes"),
    "wrapped twice": lambda tape: hvd.DistributedGradientTape(hvd.DistributedGradientTape(tape)),
    "predivide without average": lambda tape: hvd.DistributedGradientTape(
        tape, op=hvd.Sum, gradient_predivide_factor=2.0
    ),
    "an op without meaning": lambda tape: hvd.DistributedGradientTape(tape, op=hvd.Max),
    "no groups": lambda tape: hvd.DistributedGradientTape(tape, groups=0),
    "groups that are no number": lambda tape: hvd.DistributedGradientTape(tape, groups=2.5),
    "groups of numbers": lambda tape: hvd.DistributedGradientTape(tape, groups=[[1, 2]]),
    "groups that are variables": lambda tape: hvd.DistributedGradientTape(tape, groups=[tf.Variable([0.0])]),
    "local layers that are none": lambda tape: hvd.PartialDistributedGradientTape(
        tape, local_layers=[tf.Variable(0.0)]
    ),
    "unconnected gradients by position": lambda tape: hvd.DistributedGradientTape(tape).gradient(
        None, [], None, tf.UnconnectedGradients.ZERO
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_is_refused(driver: Driver, what: str) -> None:
    with pytest.raises(hvd.PlanError):
        REFUSED[what](tf.GradientTape())


def test_agreement_is_asked_for_once(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    from hvdscale.tensorflow import gradients as module

    asked: list[str] = []
    agree_on = module.agree_on
    monkeypatch.setattr(module, "agree_on", lambda *a: (asked.append(a[2]), agree_on(*a)))
    x = tf.Variable(1.0)
    for _ in range(3):
        with tf.GradientTape() as tape:
            loss = 2.0 * x
        assert hvd.DistributedGradientTape(tape).gradient(loss, [x])[0] == 2.0
    assert len(asked) == (hvd.size() > 1)
