"""A language model as a policy: all histories of a stage are read together, and actions are scored, not sampled.

The demonstrations of a task are read once; every history shares their keys and values and has only those of its own steps, which
it takes over from the history that it continues. The action is the one whose tokens are likeliest; an action of one token needs
no more than the logits at the end of the history. Beside it stands whether the likeliest of all tokens would have been no action.

`load_policy` reads a run of `lindm sft` or a model's directory.
"""

from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.experimental import multihost_utils
from jax.typing import DTypeLike
from scipy.special import log_softmax

from lindm import validate
from lindm.choices import Rewards
from lindm.datasets import Dataset, TextFormat, text_format
from lindm.datasets.columns import sizes_of
from lindm.datasets.reader import DescribedTasks
from lindm.datasets.text import check_rewards
from lindm.errors import DataError
from lindm.evaluation.environments import PolicyTask, double_precision
from lindm.evaluation.policy import Observation, Policy, one_hot
from lindm.families.registry import NamedProblem
from lindm.io.verification import verify_file_list
from lindm.llm.attention import KVCache
from lindm.llm.io import weights
from lindm.llm.model import Decoder
from lindm.llm.parallel.sharding import make_mesh
from lindm.llm.sft.options import drawn_description, run_options
from lindm.llm.tokens import action_tokens, document_prefix, encode, load_tokenizer
from lindm.text import Document, Template, find_template, render
from lindm.types import APOMDP

BUCKET = 4  # tokens of a call are a multiple of this, so that few programs are compiled


class TextOptions(NamedTuple):
    """How the episodes of a task become text, where that depends on the task: the options of `lindm.datasets.text_format`."""

    template: str | Template | None = None
    rewards: Rewards = "auto"
    names: bool = False


class _State(NamedTuple):
    """n histories that the model has read."""

    text: TextFormat
    actions: Sequence[Sequence[int]]  # the tokens of each action
    horizon: int
    shared: tuple[KVCache, np.ndarray]  # of the demonstrations of each task, and their lengths in tokens
    cache: KVCache | None = None  # of the histories' own tokens; rows of one task are neighbors, as many for each task
    row: np.ndarray = np.zeros(1, int)  # [n] row of the cache of each history
    length: np.ndarray = np.zeros(1, np.int32)  # [n] own tokens of each history
    invalid: np.ndarray = np.zeros(1, bool)  # [n] whether the likeliest of all tokens are no action
    log_p: np.ndarray | None = None  # [n, A] of the actions; at the temperature 1 where the policy's is 0


class LanguageModelPolicy(Policy):
    """A decoder that reads the demonstrations and the history as text, and scores the tokens of every action.

    Args:
      model, tokenizer: of one vocabulary.
      text: how episodes are written.
      name: of the model, in errors.
      training: the dataset that it was trained on: the sizes and names of tasks whose problem is not known.
      temperature: 0 takes the likeliest action; otherwise probabilities are proportional to p(tokens)^(1/temperature).
      dtype: of the computation.
    """

    batch_size = 256  # caches take memory

    def __init__(
        self,
        model: Decoder,
        tokenizer: Any,
        text: TextFormat | TextOptions,
        *,
        name: str = "the model",
        training: Dataset | None = None,
        temperature: float = 0.0,
        dtype: DTypeLike = jnp.float32,
    ):
        self.temperature = validate.nonnegative(temperature, "temperature")
        self.name, self.training, self.max_length = name, training, model.config.max_position_embeddings
        rope = model.config.rope_parameters
        if rope.rope_type == "longrope":  # a cache keeps its rotations, and the length of an episode is not known in advance
            self.max_length = min(self.max_length, rope.original_max_position_embeddings)
        self.graphdef, self.weights = nnx.split(model)
        self.tokenizer, self.text, self.dtype = tokenizer, text, dtype

    @cached_property
    def problem(self) -> NamedProblem | Dataset | None:
        """What `act` knows where no problem is given: the one of the training data, or their sizes and names."""
        if self.training is None or self.training.suite is not None or isinstance(self.training, DescribedTasks):
            return self.training
        with double_precision():
            problem = next(iter(self.training)).problem()
        return NamedProblem(problem=problem, **{part: tuple(words) for part, words in self.training.names.items()})

    def init(self, tasks: Sequence[PolicyTask]) -> _State:
        about = self._about(tasks[0])
        text = self.text if isinstance(self.text, TextFormat) else text_format(about, *self.text)
        prompts = [self.prompt(task, text) for task in tasks]
        longest = max(self._longest(task, prompt) for task, prompt in zip(tasks, prompts, strict=True))
        if longest > self.max_length:
            rule = f"texts must have at most the {self.max_length} tokens of the model"
            raise DataError(f"{self.name}: {rule}; the longest has about {longest}")
        lengths = np.array([len(prompt) for prompt in prompts], np.int32)
        ids = np.zeros((len(prompts), _rounded(int(lengths.max()))), np.int32)
        for row, prompt in zip(ids, prompts, strict=True):
            row[: len(prompt)] = prompt
        return _State(
            text=text,
            actions=action_tokens(self.tokenizer, text.template, about.num_actions),
            horizon=about.horizon,
            shared=(_read(self.graphdef, self.weights, ids, self.dtype), lengths),
        )

    def step(self, state: _State, observation: Observation) -> tuple[_State, np.ndarray]:
        tokens = [self.new_tokens(observation, row, state.text) for row in range(len(observation))]
        tasks, lengths = len(state.shared[1]), np.array([len(x) for x in tokens], np.int32)
        counts = np.bincount(observation.task, minlength=tasks)
        each = _power(int(counts.max()))  # rows of the cache for each task: few sizes, so that few programs are compiled
        row = observation.task * each + np.arange(len(tokens)) - np.repeat(np.cumsum(counts) - counts, counts)
        width = _rounded(int(lengths.max()))
        ids, starts, ends = np.zeros((tasks * each, width), np.int32), *np.zeros((2, tasks * each), np.int32)
        for i, new in zip(row, tokens, strict=True):
            ids[i, : len(new)] = new
        if state.cache is None:
            slots = _rounded(self._room(state, int(lengths.max())) + BUCKET)
            cache = nnx.merge(self.graphdef, self.weights).init_cache(len(ids), slots, self.dtype)
        else:
            parents = np.zeros(len(ids), int)
            parents[row] = state.row[observation.parent]
            starts[row] = state.length[observation.parent]
            cache = _grown(jax.tree.map(lambda x: x[:, parents], state.cache), int(starts.max()) + width)
        ends[row] = starts[row] + lengths
        if (longest := int((ends[row] + state.shared[1][observation.task]).max())) > self.max_length:
            rule = f"demonstrations and history must have at most the {self.max_length} tokens of the model's context"
            raise DataError(f"{self.name}: {rule}; got {longest}")
        hidden, cache = _extend(self.graphdef, self.weights, ids, starts, ends - starts, cache, state.shared, self.dtype)
        scores, valid = (_on_host(x)[row] for x in self._scores(hidden, cache, state, ends))
        if observation.legal is not None:
            scores = np.where(observation.legal, scores, -np.inf)
        log_p = log_softmax(scores.astype(float) / (self.temperature or 1.0), axis=-1)
        new_state = state._replace(cache=cache, row=row, length=ends[row], invalid=~valid, log_p=log_p)
        if self.temperature == 0:
            return new_state, one_hot(scores.argmax(-1), len(state.actions))
        return new_state, np.exp(log_p)

    def prompt(self, task: PolicyTask, text: TextFormat) -> list[int]:
        """The tokens of a task's demonstrations, and of what opens the episode in progress."""
        if "reward" in text.fields and task.demonstrations:
            task.required_demonstrations(rewards=True)
        episodes = tuple(text.demonstration_steps(steps) for steps in task.demonstrations)
        pieces = [piece.text for piece in render(Document(episodes), text.template)]
        return [*document_prefix(self.tokenizer), *_joined(encode(self.tokenizer, pieces))]

    def new_tokens(self, observation: Observation, row: int, text: TextFormat) -> list[int]:
        """The tokens of a history behind those of its parent: the action taken, what followed, the step up to the next one."""
        steps = [observation.open_step(row)]
        if observation.stage:
            steps.insert(0, observation.last_step(row))
        pieces = [piece for piece in render(Document((), text.query_steps(steps)), text.template) if piece.step is not None]
        if observation.stage:  # what stands in front of the action taken has been read
            taken = next(i for i, piece in enumerate(pieces) if piece.action is not None)
            pieces = pieces[taken:]
        return _joined(encode(self.tokenizer, [piece.text for piece in pieces]))

    def _about(self, task: PolicyTask) -> Any:
        """The facts of a dataset of this task: kind, horizon, sizes and names."""
        if task.environment is not None:
            sizes = {"num_observations": 0, "num_models": 0} | sizes_of(task.environment.problem)
            problem = task.environment.problem
            legal = (problem.models if isinstance(problem, APOMDP) else problem).legal
            return SimpleNamespace(**sizes, names=task.names, directory=self.name, illegal_actions=legal is not None)
        if self.training is None:
            raise ValueError(f"problem must be given: the dataset that {self.name} was trained on is not known, or is gone")
        return self.training

    def _longest(self, task: PolicyTask, prompt: Sequence[int]) -> int:
        """Tokens of the longest text, about: of the demonstrations and one more episode like them."""
        n = max(len(task.demonstrations), 1)
        return -(-len(prompt) * (n + 1) // n)

    def _room(self, state: _State, first: int) -> int:
        """Tokens of a whole episode, judged by its first step; the cache grows where that is too few."""
        return state.horizon * (3 * first + max(map(len, state.actions)) + BUCKET)

    def _scores(self, hidden: Array, cache: KVCache, state: _State, ends: np.ndarray) -> tuple[Array, Array]:
        """log p of each action [rows, A], and whether the likeliest tokens spell one [rows]; hidden: the state in front of it."""
        log_p = _log_p(self.graphdef, self.weights, hidden)
        firsts = np.array([tokens[0] for tokens in state.actions])
        scores, spelled = log_p[:, firsts], log_p.argmax(-1)[:, None] == firsts[None]
        if max(map(len, state.actions)) == 1:
            return scores, spelled.any(-1)
        columns, spells = [], []
        for a, tokens in enumerate(state.actions):
            score, spell = scores[:, a], spelled[:, a]
            if len(tokens) > 1:
                width = _rounded(len(tokens) - 1)
                ids = np.zeros((hidden.shape[0], width), np.int32)
                ids[:, : len(tokens) - 1] = tokens[:-1]
                room = _grown(cache, int(ends.max()) + width)
                after = np.array([*tokens[1:], *[0] * (width - len(tokens) + 1)], np.int32)
                rest, likeliest = _log_p_of(
                    self.graphdef, self.weights, ids, ends, room, state.shared, after, len(tokens) - 1, self.dtype
                )
                score, spell = score + rest, spell & likeliest
            columns.append(score)
            spells.append(spell)
        return jnp.stack(columns, axis=-1), jnp.stack(spells, axis=-1).any(-1)


def load_policy(
    directory: str | Path,
    *,
    template: str | None = None,
    rewards: str | None = None,
    temperature: float = 0.0,
    name: str | None = None,
) -> LanguageModelPolicy:
    """The policy of a run of `lindm sft`, or of a model in a directory of Hugging Face's format.

    Args:
      template, rewards: of the texts, as of `lindm sft` [default: as the run was trained, or as `lindm sft` would train].
      temperature: 0 takes the likeliest action.
      name: of the model, in errors [default: the directory].

    Raises:
      ValueError: a template or a word for rewards that does not exist.
      DataError: the directory holds no model, or a damaged one.

    >>> from lindm.text import Step
    >>> policy = ld.load_policy("run")
    >>> demonstration = [Step(1, state=0, reward=0.5), Step(0, state=1, reward=1.0)]
    >>> policy.act([demonstration], [Step(None, state=0)]).probabilities.tolist().count(1.0)
    1
    """
    directory = Path(directory)
    options = run_options(directory) or {}
    options |= {key: value for key, value in (("template", template), ("rewards", rewards)) if value is not None}
    text = TextOptions(find_template(options.get("template")), options.get("rewards", "auto"), options.get("names", False))
    check_rewards(text.rewards)
    path, device = model_directory(directory), jax.devices()[:1]
    return LanguageModelPolicy(
        weights.load(path, mesh=make_mesh({"fsdp": 1}, device)),
        load_tokenizer(path),
        text,
        name=name or str(directory),
        training=training_data(directory, options),
        temperature=temperature,
        dtype=jnp.float32 if device[0].platform == "cpu" else jnp.bfloat16,
    )


def model_directory(directory: Path) -> Path:
    """The model of a run of `lindm sft`, or the directory itself. DataError where there is none."""
    run = run_options(directory) is not None
    model = directory / "model" if run else directory
    if not model.is_dir():
        what = "is not a directory" if model.exists() else "does not exist"
        hint = ": the run is not finished; repeat its `lindm sft` command to finish it" if run else ""
        hint = "; `lindm model import` makes one of it" if model.suffix == ".gguf" and model.exists() else hint
        raise DataError(f"{model} {what}{hint}")
    verify_file_list(model, lambda name: False, required=run)
    return model


def training_data(directory: Path, options: Mapping[str, Any]) -> Dataset | None:
    """The dataset that a run was trained on, where it is a dataset and still there; of drawn tasks, what they are.

    Args:
      options: of the run in the directory; empty where it is no run.
    """
    if (draw := options.get("draw")) is not None:
        description = drawn_description(directory)
        return None if description is None else DescribedTasks(draw, description)
    data = options.get("data")
    return Dataset(Path(data)) if data is not None and (Path(data) / "manifest.json").is_file() else None


def _on_host(x: Array) -> np.ndarray:
    """All of an array, in every process."""
    return np.asarray(x if x.is_fully_addressable else multihost_utils.process_allgather(x, tiled=True))


def _joined(lists: Sequence[Sequence[int]]) -> list[int]:
    return [token for tokens in lists for token in tokens]


def _rounded(n: int) -> int:
    return -(-n // BUCKET) * BUCKET


def _power(n: int) -> int:
    return 1 << (n - 1).bit_length()


def _grown(cache: KVCache, slots: int) -> KVCache:
    """The same cache with room for at least this many tokens."""
    short = _rounded(max(slots - cache.keys.shape[2], 0))
    return jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (0, 0), (0, short), (0, 0), (0, 0))), cache) if short else cache


@partial(jax.jit, static_argnames=("graphdef", "dtype"))
def _read(graphdef, weights, ids: Array, dtype: DTypeLike) -> KVCache:
    """The cache of whole prefixes [N, P]."""
    model = nnx.merge(graphdef, weights)
    start = jnp.zeros(ids.shape[0], jnp.int32)
    return model.forward_with_cache(ids, start, model.init_cache(*ids.shape, dtype), dtype=dtype, unroll=False)[1]


@partial(jax.jit, static_argnames=("graphdef", "dtype"), donate_argnames="cache")
def _extend(graphdef, weights, ids, starts, counts, cache: KVCache, shared, dtype: DTypeLike) -> tuple[Array, KVCache]:
    """Hidden states [rows, D] at the last of the `counts` new tokens of each row, and the cache."""
    model = nnx.merge(graphdef, weights)
    hidden, cache = model.forward_with_cache(ids, starts, cache, shared, dtype=dtype, unroll=False)
    last = jnp.maximum(counts - 1, 0)[:, None, None]
    return jnp.take_along_axis(hidden, last, axis=1)[:, 0], cache


@partial(jax.jit, static_argnames="graphdef")
def _log_p(graphdef, weights, hidden: Array) -> Array:
    return jax.nn.log_softmax(nnx.merge(graphdef, weights).logits(hidden))


@partial(jax.jit, static_argnames=("graphdef", "n", "dtype"))
def _log_p_of(
    graphdef, weights, ids, starts, cache: KVCache, shared, after: Array, n: int, dtype: DTypeLike
) -> tuple[Array, Array]:
    """log p [rows] of after[:n], each token given the ids before it, and whether each is the likeliest."""
    model = nnx.merge(graphdef, weights)
    hidden, _ = model.forward_with_cache(ids, starts, cache, shared, dtype=dtype, unroll=False)
    log_p = jax.nn.log_softmax(model.logits(hidden[:, :n]))
    chosen = jnp.take_along_axis(log_p, jnp.broadcast_to(after[None, :n, None], (*log_p.shape[:2], 1)), axis=-1)
    return chosen.sum((1, 2)), (log_p.argmax(-1) == after[None, :n]).all(-1)
