"""Slow proof: a network trained on points of a known mixture recovers its analytic score.

    python tests/score_of_mixture.py            minutes on one core; a table, and exit status 1 above 5 %

The network is the family's own U-Net at a single pixel of two channels. The error is |network - score| over
|score|, both root mean squares over noisy points; the levels are times of the SDE.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))      # to be run from any folder

import torch
from small_score import Mixture

from distributions import Pixels
from families.score.config import ScoreModelConfig
from families.score.model import ScoreModel
from families.score.sde import SDES
from training.config import Schedule, TrainConfig
from training.optimization import average_of

FLAGS = {'nf': 64, 'blocks_down': (3,), 'blocks_up': (), 'conv_size': 1, 'norm_num_groups': 1,
         'time_embedding_sz': 16, 'fourier_scale': 0.25, 'sigma_min': 0.01, 'sigma_max': 20.0}
TIMES = (0.1, 0.3, 0.4, 0.5, 0.6, 0.7, 0.9)
MIDDLE = (0.4, 0.5, 0.6)
LIMIT = 0.05
STEPS = {'vesde': 4000, 'vpsde': 1500, 'subvpsde': 1500}     # VE spends most levels where the score is simple
BATCH, RATE = 512, 4e-3


def mixture() -> Mixture:
    """Three clouds of unequal weight and width in the plane, as one pixel of two channels."""
    means = torch.tensor([[-0.5, -0.4], [0.6, -0.2], [0.0, 0.6]]).reshape(3, 2, 1, 1)
    return Mixture(means, torch.tensor([0.02, 0.04]).reshape(2, 1, 1), torch.tensor([0.2, 0.3, 0.5]))


def train(name: str, steps: int, seed: int = 0) -> ScoreModel:
    """The averaged weights after `steps` steps of Adam on fresh points of the mixture."""
    torch.manual_seed(seed)
    data = mixture()
    model = ScoreModel((2, 1, 1), ScoreModelConfig(sde=name, **FLAGS), Pixels())
    config = TrainConfig(epochs=steps, warmup_epochs=0, warmup_steps=100, learning_rate=RATE,
                         learning_rate_min=RATE / 100, ema_decay=0.999, ema_ramp=True)
    schedule, average = Schedule(config, 1), average_of(model, config)
    optimizer = torch.optim.Adam(model.parameters())
    for step in range(steps):
        optimizer.param_groups[0]['lr'] = schedule.learning_rate(step)
        loss, _ = model.objective(model((data.sample(BATCH) + 1) / 2), progress=step / steps)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        average.update_parameters(model)
    return average.module.eval()


@torch.no_grad()
def errors(model: ScoreModel, times: tuple[float, ...] = TIMES, points: int = 20000) -> list[float]:
    """Relative errors of the model's score at these times."""
    torch.manual_seed(1)
    data, sde, result = mixture(), model.sde, []
    for time in times:
        t = torch.full((points,), time)
        x = data.sample(points)
        x = sde.perturb(x, t, torch.randn_like(x))
        expected = data.noisy(sde, x, t)[1]
        given = model.score((x + 1) / 2, sde.std(t))
        result.append(((given - expected).norm() / expected.norm()).item())
    return result


def main() -> int:
    print('SDE       ' + ''.join(f't = {time:<6}' for time in TIMES), flush=True)
    worst = 0.0
    for name in SDES:
        values = errors(train(name, STEPS[name]))
        print(f'{name:10}' + ''.join(f'{value:<10.2%}' for value in values), flush=True)
        worst = max(worst, *(value for time, value in zip(TIMES, values) if time in MIDDLE))
    print(f'largest error from t = {MIDDLE[0]} to {MIDDLE[-1]}: {worst:.2%}')
    return int(worst >= LIMIT)


if __name__ == '__main__':
    sys.exit(main())
