"""Throughput of meta-training: milliseconds of processor time per task and inner step, one thread.

The paper's 31-feature optimizer on a 64-32-10 network, batches of 64, T = 20 steps, exact second-order reverse mode,
its meta-loss after the last step. With ``--jax`` also the same computation in JAX (jitted, vmapped, scanned), where it
is installed. With ``--memory`` instead the peak memory of one meta-gradient of so many tasks, in this process (Linux).

    python tests/benchmarks/meta_training.py [--tasks 1 8 32] [--repeats 3] [--jax]
    python tests/benchmarks/meta_training.py --memory --tasks 64 --steps 100 [--mode segmented]

Processor time rather than wall time, so that a busy machine says something too; caches shared with other processes
still make it slower than an idle one.
"""

from __future__ import annotations

import argparse
import resource
import time
from importlib.util import find_spec

import torch

from lightning_l2l import MetaTraining, MLPOptimizer, Unroll
from lightning_l2l.exact.estimators import Mode
from lightning_l2l.tasks import ImageClassification

STEPS = 20


def images() -> ImageClassification:
    """Random pixels: only the shapes matter here."""
    generator = torch.Generator().manual_seed(0)
    return ImageClassification(torch.rand(1200, 8, 8, generator=generator), torch.arange(1200) % 10)


def meta_training(tasks: int, steps: int, mode: Mode) -> MetaTraining:
    """What is measured."""
    torch.manual_seed(0)
    return MetaTraining(
        MLPOptimizer(initialisation="scaled"), images(), unroll_steps=steps, tasks_at_once=tasks,
        estimator=Unroll(objective="naive", mode=mode), meta_data="train",
    )  # fmt: skip


def ours(tasks: int, repeats: int, steps: int = STEPS, mode: Mode = "reverse") -> float:
    """Milliseconds per task and inner step."""
    measured = meta_training(tasks, steps, mode)
    measured.training_step(None)
    seconds = []
    for _ in range(repeats):
        begun = time.process_time()
        measured.training_step(None).backward()
        seconds.append(time.process_time() - begun)
    return min(seconds) * 1e3 / (tasks * steps)


def peak(tasks: int, steps: int, mode: Mode) -> tuple[float, float]:
    """Megabytes of the process before and at the peak of one meta-gradient."""
    measured = meta_training(tasks, steps, mode)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    measured.training_step(None)
    return before, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def in_jax(tasks: int, repeats: int) -> tuple[float, float]:
    """Milliseconds per task and inner step, and seconds of compiling."""
    import jax
    import jax.numpy as jnp

    decays = jnp.array([0.5, 0.9, 0.99, 0.999, 0.9999])
    scales = jnp.array([3.0, 10, 30, 100, 300, 1000, 3000, 10000, 300000])

    def loss(w: dict, batch: tuple) -> jax.Array:
        logits = jax.nn.relu(batch[0] @ w["w0"] + w["b0"]) @ w["w1"] + w["b1"]
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), batch[1][:, None], 1).mean()

    def update(theta: dict, w: jax.Array, g: jax.Array, m: jax.Array, v: jax.Array, t: jax.Array) -> tuple:
        shape = (-1, *[1] * w.ndim)
        d = decays.reshape(shape)
        m, v = d * m + (1 - d) * g, d * v + (1 - d) * g**2
        r = jax.lax.rsqrt(v + 1e-6)
        x = jnp.concatenate([g[None], m * r, w[None], m, v, r])
        x = x * jax.lax.rsqrt(1e-5 + (x**2).mean(tuple(range(1, x.ndim)), keepdims=True))
        bias = theta["b0"] + jnp.tanh(t / scales - 1) @ theta["w0"][22:]
        hidden = jax.nn.relu(jnp.moveaxis(x, 0, -1) @ theta["w0"][:22] + bias)
        out = hidden @ theta["w1"] + theta["b1"]
        return w - 1e-3 * out[..., 0] * jnp.exp(1e-3 * out[..., 1]), m, v

    def unroll(theta: dict, w: dict, batches: tuple) -> jax.Array:
        def step(carry: tuple, batch: tuple) -> tuple:
            w, m, v, t = carry
            g = jax.grad(loss)(w, batch)
            moved = {name: update(theta, w[name], g[name], m[name], v[name], t) for name in w}
            return tuple({n: out[i] for n, out in moved.items()} for i in range(3)) + (t + 1,), None

        zeros = {name: jnp.zeros((5, *tensor.shape)) for name, tensor in w.items()}
        last, _ = jax.lax.scan(step, (w, zeros, zeros, jnp.ones(())), batches)
        return loss(last[0], jax.tree_util.tree_map(lambda x: x[0], batches))

    keys = iter(jax.random.split(jax.random.PRNGKey(0), 9))
    normal = lambda *shape: jax.random.normal(next(keys), shape)  # noqa: E731
    theta = {"w0": normal(31, 32) / 5, "b0": jnp.zeros(32), "w1": normal(32, 2) / 5, "b1": jnp.zeros(2)}
    w = {"w0": normal(tasks, 64, 32) / 8, "b0": jnp.zeros((tasks, 32)),
         "w1": normal(tasks, 32, 10) / 5, "b1": jnp.zeros((tasks, 10))}  # fmt: skip
    batches = (normal(tasks, STEPS, 64, 64), jnp.zeros((tasks, STEPS, 64), int))
    gradient = jax.jit(jax.grad(lambda theta: jax.vmap(unroll, (None, 0, 0))(theta, w, batches).mean()))
    begun = time.process_time()
    jax.block_until_ready(gradient(theta))
    compiling, seconds = time.process_time() - begun, []
    for _ in range(repeats):
        begun = time.process_time()
        jax.block_until_ready(gradient(theta))
        seconds.append(time.process_time() - begun)
    return min(seconds) * 1e3 / (tasks * STEPS), compiling


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--jax", action="store_true")
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--steps", type=int, default=STEPS, help="inner steps, without JAX (%(default)s)")
    parser.add_argument("--mode", default="reverse", choices=["reverse", "segmented"], help="%(default)s")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.jax and find_spec("jax") is None:
        parser.error("--jax needs jax, which is not installed.")
    if options.memory:
        before, highest = peak(max(options.tasks), options.steps, options.mode)
        print(f"{max(options.tasks)} tasks x {options.steps} steps: {highest:.0f} MB, {before:.0f} MB before")
        return
    for tasks in options.tasks:
        found = ours(tasks, options.repeats, options.steps, options.mode)
        line = f"{tasks:3d} task(s): {found:.2f} ms per task and step"
        if options.jax:
            found, compiling = in_jax(tasks, options.repeats)
            line += f"; JAX {found:.2f} ms after {compiling:.0f} s of compiling"
        print(line, flush=True)


if __name__ == "__main__":
    main()
