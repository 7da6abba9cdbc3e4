"""What is measured during training: the held-out loss, and what the model's decisions lose on held-out tasks."""

from collections.abc import Sequence
from typing import Any

import jax
from flax import nnx
from jax.sharding import NamedSharding

from lindm.evaluation.losses import Asked, Played, Policy, double_precision, play_all, quality, vote, world
from lindm.io import signals
from lindm.llm.config import ModelConfig
from lindm.llm.parallel import sharding
from lindm.llm.policy import Reader
from lindm.llm.sft import packing
from lindm.llm.sft.loss import lm_loss
from lindm.llm.sft.setup import Prepared

EPISODES = 8  # sampled of a task whose histories are too many
LISTED = 512  # histories of a stage of a task that are not too many
AT_ONCE = 256  # histories that are asked about in one call, unless a single task has more: their caches take memory


class Interrupted(Exception):
    """An evaluation was left because this run was asked to stop."""


class Evaluator:
    """Evaluations of one run: always on the same rows, tasks and episodes.

    One that lasts must not keep a process that is asked to stop from saving, so it is left; among several processes it goes on
    to its end, since all of them must do the same.
    """

    def __init__(self, prepared: Prepared, graphdef: Any):
        self.prepared, self.graphdef = prepared, graphdef
        self.batches = list(self._batches())
        compute, mesh = prepared.compute, prepared.mesh
        self.eval_loss = jax.jit(lambda params, frozen, batch: lm_loss(nnx.merge(graphdef, params, frozen), batch, compute, mesh))
        self.baseline: dict[str, float] | None = None
        if prepared.decisions is not None:
            with double_precision():
                problems = [task.problem() for task in prepared.decisions.tasks]
            self.worlds = [world(problem, prepared.decisions.text.shows_rewards) for problem in problems]

    def __call__(self, params: nnx.State, frozen: nnx.State) -> dict[str, Any]:
        """loss and accuracy of the held-out labels; gap, its interval, and what belongs to it, if decisions are measured."""
        found: dict[str, Any] = {}
        if self.batches:
            totals = []
            for batch in self.batches:
                _go_on()
                totals.append(jax.device_get(self.eval_loss(params, frozen, batch)))
            labels = sum(int((e.target >= 0).sum()) for row in self.prepared.held for e in row)
            found["loss"] = float(sum(float(loss) for loss, _ in totals) / labels)
            found["accuracy"] = float(sum(float(right) for _, right in totals) / labels)
        if self.prepared.decisions is not None:
            found |= self._decide(params, frozen)
        return found

    def _batches(self):
        """All held-out rows, in batches of one shape."""
        p, mesh = self.prepared, self.prepared.mesh
        batch_sharding = NamedSharding(mesh, sharding.BATCH_SPEC)
        for at in range(0, len(p.held), p.options.batch):
            rows = p.held[at : at + p.options.batch]
            filled = packing.make_batch([*rows, *[[]] * (p.options.batch - len(rows))], p.T, p.L)
            yield jax.tree.map(lambda x: sharding.shard_array(x, batch_sharding), filled)

    def _decide(self, params: nnx.State, frozen: nnx.State) -> dict[str, Any]:
        p = self.prepared
        assert p.decisions is not None
        A, horizon = p.decisions.tasks[0].num_actions, p.decisions.tasks[0].horizon
        reader = Reader(nnx.merge(self.graphdef, params, frozen), p.tokenizer, p.decisions.text.template, A, p.compute.dtype)

        def policy(demonstrations: Any) -> Policy:
            answer = reader.policy(demonstrations, horizon)

            def unless_asked(stage: int, level: list[list[Asked]]) -> Sequence[Sequence[int]]:
                _go_on()
                return answer(stage, level)

            return unless_asked

        played = self._played(policy)
        if not played:
            return {}
        if self.baseline is None:
            self.baseline = {"vote_gap": quality(self._played(lambda demos: vote(demos, A)))["gap"]}
        return quality(played) | self.baseline

    def _played(self, policy: Any) -> list[Played]:
        """What a policy loses on each task, a few tasks at a time; ambiguous tasks with too many histories are left out."""
        d, seed = self.prepared.decisions, self.prepared.options.seed
        assert d is not None
        how = {"episodes": EPISODES, "seed": seed, "listed": LISTED, "at_once": AT_ONCE}
        return [one for one in play_all(self.worlds, d.demonstrations, policy, **how) if one is not None]

    def tell(self, values: dict[str, Any]) -> str:
        parts = []
        if "loss" in values:
            parts.append(f"held-out loss {values['loss']:.4g}, accuracy {values['accuracy']:.1%}")
        if "gap" in values:
            low, high = values["gap_ci"]
            parts.append(
                f"gap {values['gap']:.2%} of random play's [{low:.2%}, {high:.2%}] ({values['method']}, n={values['n']})"
            )
            parts.append(f"majority of the demonstrations {values['vote_gap']:.2%}")
        return "; ".join(parts)


def _go_on() -> None:
    if signals.stop_requested() and jax.process_count() == 1:
        raise Interrupted


def flops_of_step(config: ModelConfig, method: str, rows: int, T: int, L: int) -> float:
    """Floating point operations of the model's own arithmetic in one step, recomputation not counted.

    Matrices of the blocks: 2 a token and weight forward, and as many backward for each of the two gradients, of which adapters
    need one; attention over all T keys; the head at labelled positions only.
    """
    q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    weights = config.num_layers * (config.hidden_size * (2 * q + 2 * kv) + 3 * config.hidden_size * config.intermediate_size)
    attention = config.num_layers * 4 * T * q
    times = 3 if method == "full" else 2
    return rows * (T * (times * 2 * weights + 3 * attention) + L * times * 2 * config.hidden_size * config.vocab_size)
