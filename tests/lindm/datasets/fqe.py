"""d3rlpy's DiscreteFQE on Minari datasets: run by `test_parity.py` with the interpreter of d3rlpy's own environment.

    python fqe.py POLICY.json DIRECTORY ...

The policy is a list of actions [H][S], a directory is a Minari dataset of an MDP. Prints the estimates of the policy's value as
JSON, one for each dataset: the mean of Q over the first states. Rewards and their discount are those of the dataset.
"""

# pyright: reportMissingImports=false

import json
import sys

import d3rlpy
import minari
import numpy as np
import torch
from d3rlpy.algos import DQNConfig
from d3rlpy.dataset import Episode, FIFOBuffer, ReplayBuffer
from d3rlpy.models import VectorEncoderFactory
from d3rlpy.ope import DiscreteFQE, FQEConfig
from d3rlpy.optimizers import AdamFactory, CosineAnnealingLRFactory

STEPS = 1500


def estimate(directory: str, table: np.ndarray) -> float:
    """The value of a policy [H, S], estimated from the episodes of a dataset."""
    d3rlpy.seed(0)
    dataset = minari.MinariDataset(directory)
    H, S = table.shape
    features = np.eye(H * S, dtype=np.float32)  # one for each stage and state: values change with the stage
    # the loss is Huber's, which is minimized by the mean only where errors are below one
    scale = 0.5 / max(np.abs(one.rewards).max() for one in dataset)

    def episode(one) -> Episode:
        observations = features[np.arange(H) * S + one.observations[:H]]
        return Episode(observations, one.actions[:, None], scale * one.rewards[:, None].astype(np.float32), terminated=True)

    episodes = [episode(one) for one in dataset]
    buffer = ReplayBuffer(FIFOBuffer(limit=len(episodes) * H), episodes=episodes, action_size=int(dataset.action_space.n))
    algo = DQNConfig().create(device="cpu:0")
    algo.build_with_dataset(buffer)
    actions = torch.tensor(table.reshape(-1))
    algo.impl.inner_predict_best_action = lambda x: actions[x.argmax(-1)]  # in place of the network: the policy
    config = FQEConfig(
        gamma=dataset.storage.metadata["discount"],
        learning_rate=0.01,
        optim_factory=AdamFactory(lr_scheduler_factory=CosineAnnealingLRFactory(T_max=STEPS)),
        batch_size=256,
        target_update_interval=100,
        encoder_factory=VectorEncoderFactory([16]),
    )
    fqe = DiscreteFQE(algo=algo, config=config, device="cpu:0")
    logger = d3rlpy.logging.NoopAdapterFactory()
    fqe.fit(buffer, n_steps=STEPS, n_steps_per_epoch=STEPS, logger_adapter=logger, show_progress=False, save_interval=STEPS)
    first = np.array([one.observations[0] for one in episodes])
    return float(fqe.predict_value(first, actions[first.argmax(-1)].numpy()).mean()) / scale


if __name__ == "__main__":
    torch.set_num_threads(1)
    with open(sys.argv[1]) as file:
        policy = np.array(json.load(file))
    print(json.dumps([estimate(directory, policy) for directory in sys.argv[2:]]))
