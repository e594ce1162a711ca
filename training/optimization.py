"""The update of the weights: optimizer, average, steps that are not finite; passes in bfloat16 or as a CUDA
graph.
"""

import statistics
import time
import warnings
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from distributed import launch
from training.config import Schedule, TrainConfig
from utils import UserError

OPTIMIZERS = {'adamax': partial(torch.optim.Adamax, eps=1e-3),       # eps of the published NVAE
              'adam': torch.optim.Adam, 'adamw': torch.optim.AdamW, 'radam': torch.optim.RAdam}
ROUNDS = 3                          # measurements of each precision, by turns, after one that does not count
MOST_SKIPPED = 100                  # steps in a row that are not finite; then the run goes back (recovery.py)


class Optimization:
    """The weights of a model and what moves them; `network` is the model in all processes.

    A gradient that is not finite changes nothing, neither weights nor running statistics. Gradients are
    averaged over processes, so all come to the same verdict.
    """

    def __init__(self, model: nn.Module, schedule: Schedule):
        self.model, self.schedule, self.config = model, schedule, schedule.config
        # Filters of 1 x 1 are in both memory formats at once; DDP notes each as a lost chance to go faster.
        warnings.filterwarnings('ignore', 'Grad strides do not match bucket view strides')
        self.network = DistributedDataParallel(model) if launch.world() > 1 else model
        self.optimizer = OPTIMIZERS[self.config.optimizer](
            model.parameters(), lr=self.config.learning_rate, weight_decay=self.config.weight_decay,
            betas=(self.config.beta1, 0.999), foreach=self.config.fast_adamax)
        averages = self.config.ema_decay or self.config.ema_halflife_kimg
        self.average = average_of(model, self.config, schedule.joint_batch) if averages else None
        self.buffers = [b for b in model.buffers() if b.is_floating_point()]
        self.good_buffers = [b.clone() for b in self.buffers]       # as they were after the last good step
        self.step = self.skipped = self.skipped_in_a_row = 0
        self.returns = 0                    # to a checkpoint: each halves the learning rate (recovery.py)

    @property
    def evaluated(self) -> Any:
        """The model with the weights that count: the average if one is kept."""
        return self.average.module if self.average else self.model

    @property
    def diverged(self) -> bool:
        """Whether too many steps in a row were not finite."""
        return self.skipped_in_a_row >= MOST_SKIPPED

    def weights_changed(self) -> None:
        """The weights were set, not updated: the average starts from them."""
        copy_all(self.good_buffers, self.buffers)
        if self.average:
            self.average.module.load_state_dict(self.model.state_dict())

    @torch.no_grad()
    def update(self) -> dict[str, Any]:
        """Moves the weights by their gradients; returns what there is to log."""
        rate = self.schedule.learning_rate(self.step) / 2 ** self.returns
        for group in self.optimizer.param_groups:
            group['lr'] = rate
        weights = list(self.model.parameters())
        norm = nn.utils.get_total_norm([p.grad for p in weights if p.grad is not None])
        finite = bool(torch.isfinite(norm))
        self.step += 1
        if finite:
            if self.config.grad_clip:
                nn.utils.clip_grads_with_norm_(weights, self.config.grad_clip, norm)
            self.optimizer.step()
            copy_all(self.good_buffers, self.buffers)
            self._update_average()
        else:
            copy_all(self.buffers, self.good_buffers)
        self.skipped += not finite
        self.skipped_in_a_row = 0 if finite else self.skipped_in_a_row + 1
        return {'train/lr': rate, 'train/grad_norm': norm, 'train/skipped': self.skipped}

    def _update_average(self) -> None:
        every = self.config.reptile_steps
        if self.average and self.step % (every or 1) == 0:
            self.average.update_parameters(self.model)
            if every:                   # the weights continue from the average (Reptile, Nichol et al. 2018)
                self.model.load_state_dict(self.average.module.state_dict())

    def weights(self) -> dict[str, Any]:
        """The part of the state that an evaluation needs."""
        return {'step': self.step, 'weights': self.model.state_dict(),
                'ema': self.average.module.state_dict() if self.average else None}

    def state_dict(self) -> dict[str, Any]:
        return {**self.weights(), 'optimizer': self.optimizer.state_dict(), 'skipped': self.skipped,
                'returns': self.returns,
                'ema_count': int(self.average.n_averaged) if self.average else 0,
                'joint_batch': self.schedule.joint_batch}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state['weights'])
        self.weights_changed()
        self.optimizer.load_state_dict(state['optimizer'])
        for group in self.optimizer.param_groups:               # how to compute is this command's choice
            group['foreach'] = self.config.fast_adamax
        if self.average:
            self.average.module.load_state_dict(state['ema'] or state['weights'])
            self.average.n_averaged.fill_(state['ema_count'])
        self.step, self.skipped, self.skipped_in_a_row = state['step'], state['skipped'], 0
        self.returns = state.get('returns', 0)


def copy_all(to: list[Tensor], values: list[Tensor]) -> None:
    """Copies tensors in one operation, not one each."""
    if values:
        torch._foreach_copy_(to, values)


def average_of(model: nn.Module, config: TrainConfig, images: int = 1) -> AveragedModel:
    """An exponential average of the model's weights, starting from them as they are. Integers are copied."""
    def update(averages: list[Tensor], values: list[Tensor], n: Tensor) -> None:
        decay = average_decay(int(n), config, images) if averages[0].is_floating_point() else 0.0
        get_ema_multi_avg_fn(decay)(averages, values, n)

    average = AveragedModel(model, multi_avg_fn=update, use_buffers=not config.ema_bn_batches)
    average.n_averaged.fill_(1)                 # of 0 updates torch takes the first one whole
    return average


def average_decay(n: int, config: TrainConfig, images: int = 1) -> float:
    """Weight of the old average in its n-th update, n from 1, with this many images a step."""
    if config.ema_halflife_kimg:                # Karras et al. 2022, appendix F.1
        half_life, images = 1000 * config.ema_halflife_kimg, images * (config.reptile_steps or 1)
        return 0.5 ** (images / min(half_life, config.ema_rampup_ratio * images * n or half_life))
    if config.ema_ramp:
        return min(config.ema_decay, (1 + n) / (10 + n))
    return config.ema_decay if n > 1 else 0.0


def check_graph(model: nn.Module, accumulate: int, recomputes: bool) -> None:
    """Raises UserError if the passes of this training cannot be captured."""
    for stands, words in (
            (launch.device().type != 'cuda', 'is for a GPU: this run is on the CPU'),
            (launch.world() > 1, 'is for one process'),
            (accumulate > 1, 'and --accumulate exclude each other: the graph overwrites gradients'),
            (recomputes, 'and --checkpoint_activations exclude each other: lower --batch_size'),
            (not getattr(model, 'capturable', True),
             f'is not for {type(model).__name__}: which voxels it takes depends on the images')):
        if stands:
            raise UserError(f"--cuda_graph {words}. Leave it out.")


def capture_passes(model: nn.Module, x: Tensor, amp: bool) -> None:
    """From here on `model(x)` of a batch of this shape, in training, replays its forward and backward pass.

    Weights may change in place, other passes are as before. Noise follows the seed of each step: a replay
    draws what the pass would have drawn. Running statistics stay as they are.
    """
    # Gradients are written by the stream that captured them, and their sums wait for it.
    warnings.filterwarnings('ignore', "The AccumulateGrad node's stream does not match")
    buffers = [buffer.clone() for buffer in model.buffers()]
    # The weights are cast inside the graph, not kept from the passes that warm it up.
    with torch.autocast(x.device.type, dtype=torch.bfloat16, enabled=amp, cache_enabled=False):
        torch.cuda.make_graphed_callables(model, (x.clone(),))
    with torch.no_grad():
        for buffer, before in zip(model.buffers(), buffers):
            buffer.copy_(before)


# -------------------------------------------------------------------------------------------------- precision

def multiplies_bf16() -> bool:
    """Whether all processors of the run have instructions for bfloat16; without, it is many times slower."""
    capabilities = torch.cpu.get_capabilities().items()
    return not launch.any_rank(not any(has for name, has in capabilities if name.endswith('bf16')))


def choose_bf16(model: Any, x: Tensor) -> tuple[bool, str]:
    """Whether forward and backward passes of a training batch x (B, C, *S) on a CPU are faster in bfloat16,
    and a line that says so. Gradients are left behind, buffers stay as they are. All processes decide alike.
    """
    seconds: dict[bool, list[float]] = {False: [], True: []}
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    for number in range(ROUNDS + 1):
        for bf16, times in seconds.items():
            start = time.perf_counter()
            with torch.autocast('cpu', dtype=torch.bfloat16, enabled=bf16):
                loss, _ = model.objective(model(x), 0.0)
            loss.backward()
            times += [time.perf_counter() - start] if number else []
    for buffer, before in buffers:
        buffer.copy_(before)
    exact, half = (statistics.median(times) for times in seconds.values())
    faster = not launch.any_rank(half >= exact)
    return faster, (f'--amp auto: {"bfloat16" if faster else "float32"}, as a step takes {exact:.2f} s in '
                    f'float32 and {half:.2f} s in bfloat16')
