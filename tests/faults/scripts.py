"""Training in each framework, in which ``go_wrong()`` is called on rank 1 while its peers go on to wait for it."""

from __future__ import annotations

__all__ = ["COLLECTIVE", "CONTROL", "KERAS", "TENSORFLOW", "TORCH", "script"]

TORCH = """
import torch, hvdscale.torch as hvd
hvd.init()
model = torch.nn.Linear(4, 4)
optimizer = hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model=model)
for step in range(3):
    if step == 2 and hvd.rank() == 1:
        go_wrong()
    model(torch.ones(1, 4)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()
"""

TENSORFLOW = """
import tensorflow as tf, hvdscale.tensorflow as hvd
hvd.init()
weights = tf.Variable(tf.ones([4, 4]))

@tf.function
def train():
    with hvd.DistributedGradientTape(tf.GradientTape()) as tape:
        loss = tf.reduce_sum((tf.ones([1, 4]) @ weights) ** 2)
    weights.assign_sub(0.1 * tape.gradient(loss, weights))

for step in range(3):
    if step == 2 and hvd.rank() == 1:
        go_wrong()
    train()
"""

KERAS = """
import keras, numpy as np, hvdscale.keras as hvd
hvd.init()
model = keras.Sequential([keras.Input([4]), keras.layers.Dense(4)])
model.compile(hvd.DistributedOptimizer(keras.optimizers.SGD(0.1), model=model), "mse")

def at_step(step, logs):
    if step == 2 and hvd.rank() == 1:
        go_wrong()

data = np.ones([12, 4], "float32")
watch = keras.callbacks.LambdaCallback(on_train_batch_begin=at_step)
model.fit(data, data, batch_size=4, verbose=0, callbacks=[watch])
"""

# Peers wait in a collective of the user's, or in one of the small control messages.
COLLECTIVE = """
import torch, hvdscale.torch as hvd
hvd.init()
hvd.allreduce(torch.ones(3))
if hvd.rank() == 1:
    go_wrong()
hvd.allreduce(torch.ones(3))
"""

CONTROL = """
import torch, hvdscale.torch as hvd
hvd.init()
if hvd.rank() == 1:
    go_wrong()
hvd.broadcast_optimizer_state(torch.optim.SGD([torch.ones(2)]), root_rank=0)
"""


def script(body: str, deed: str) -> str:
    """``body``, in which going wrong means ``deed``; the time of it is printed just before."""
    return (
        "import sys, time\n"
        "def go_wrong():\n"
        "    print(f'failing at {time.time()}', flush=True)\n"
        f"    {deed}\n" + body + "print('a rank went on')\n"
    )
