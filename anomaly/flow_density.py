"""A density of features by a normalizing flow. N images, D features each."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from anomaly.density import Density

HELD_OUT = 0.1               # of the images: they determine when the training ends
BATCH = 128
CHECK_EVERY = 25             # steps between evaluations of the held-out images
PATIENCE = 5                 # evaluations without a gain after which it ends


@dataclass(eq=False)
class Flow(Density):
    """-log density of the standardized features under a masked autoregressive flow, nats.

    Feature i of D is normal, with a mean and standard deviation that a masked network computes from features
    1 to i - 1 (Papamakarios et al. 2017); several such transforms may follow one another. Trained on nine
    tenths of the images, with early stopping by the log density of the others; determined by `seed`.
    """
    hidden: tuple[int, ...] = (128, 128)        # widths of the layers of each network
    transforms: int = 1                         # networks
    steps: int = 1000                           # batches of 128, at most
    learning_rate: float = 3e-3
    seed: int = 0
    learned, least, folds = ('mean', 'std', 'hidden', 'transforms', 'weights'), 4, 5
    takes_training = False

    def network(self, features: int) -> Any:
        """zuko's flow of D `features`, its base a standard normal."""
        import zuko
        return zuko.flows.MAF(features, transforms=int(self.transforms), activation=torch.nn.ELU,
                              hidden_features=[int(width) for width in self.hidden])

    def learn(self, features: np.ndarray) -> None:
        z = torch.from_numpy(self.standardize(features)).float()                                      # (N, D)
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            torch.manual_seed(self.seed)
            flow = self.network(z.shape[1])
            self.train(flow, z[torch.randperm(len(z))])

    def train(self, flow: Any, z: Tensor) -> None:
        """Sets the weights with which the log density of the first tenth of z (N, D) was largest."""
        number = max(1, int(HELD_OUT * len(z)))
        held_out, z = z[:number], z[number:]
        optimizer = torch.optim.Adam(flow.parameters(), self.learning_rate)
        best, last_gain = -torch.inf, 0
        for step in range(self.steps + 1):
            if step % CHECK_EVERY == 0:
                with torch.no_grad():
                    reached = flow().log_prob(held_out).mean().item()
                if reached > best:
                    best, last_gain = reached, step
                    self.weights = parameters_to_vector(flow.parameters()).detach().numpy()
                if step - last_gain >= PATIENCE * CHECK_EVERY:
                    return
            batch = z[torch.randint(len(z), (min(BATCH, len(z)),))]
            optimizer.zero_grad()
            (-flow().log_prob(batch).mean()).backward()
            optimizer.step()

    def energy(self, features: Tensor) -> Tensor:
        with torch.random.fork_rng(devices=[]):                         # the initial weights are replaced
            flow = self.network(len(self.mean)).double().requires_grad_(False)
        vector_to_parameters(self.tensor('weights'), flow.parameters())
        return -flow().log_prob(self.standardized(features))
