"""Flags of a training run, and its schedule. PyTorch is not imported: --help is answered without it."""

import math
from dataclasses import dataclass
from pathlib import Path

from model import MODELS
from utils import UserError, flag, flags


def cosine(done: float, total: float) -> float:
    """From 1 to 0 along a cosine, as `done` rises to `total`; 1 where there is no way to go."""
    return (1 + math.cos(math.pi * min(done / total, 1.0))) / 2 if total > 0 else 1.0


# Where the learning rate is after the warm-up: from 1, the highest, to 0, the lowest.
DECAYS = {
    'cosine': lambda schedule, step: cosine(                                    # constant within an epoch
        step // schedule.steps - schedule.config.warmup_epochs,
        schedule.config.epochs - schedule.config.warmup_epochs - 1),
    'cosine_by_step': lambda schedule, step: cosine(step - schedule.warmup, schedule.total - schedule.warmup),
    'step': lambda schedule, step: 0.3 ** int(step / (0.4 * schedule.steps * schedule.config.epochs)),  # SADE
    'constant': lambda schedule, step: 1.0}
AVERAGE = 'ema_decay or ema_halflife_kimg'          # flags that keep an average of the weights


@flags
class RunConfig:
    """The run"""
    model: str = flag('nvae', 'model family', choices=MODELS, basic=True)
    root: str = flag('runs', 'folder of all runs', basic=True)
    save: str = flag('exp', 'name of this run, which is kept in <root>/eval-<save>', basic=True)
    cont_training: bool = flag(False, 'resume this run; start it if there is no checkpoint yet', basic=True)
    seed: int = flag(1, 'seed of everything random', basic=True)
    wandb_project: str = flag('', "also log to this project of Weights & Biases; '' = do not")
    mlflow_experiment: str = flag('', "also log to this experiment of MLflow; '' = do not")
    dry_run: bool = flag(False, 'take a few steps, report the memory and time that the run needs, and keep '
                                'nothing', basic=True)

    @property
    def folder(self) -> Path:
        return Path(self.root) / f'eval-{self.save}'


@flags
class TrainConfig:
    """Optimization"""
    batch_size: int = flag(200, 'images per batch and process', least=1, basic=True)
    accumulate: int = flag(1, 'batches per step and process; their gradients are averaged', least=1)
    epochs: int = flag(200, 'passes over the training images', least=1, basic=True)
    max_steps: int = flag(0, 'end the run after this many steps, whatever the epochs; 0 = no limit', least=0)
    warmup_epochs: int = flag(5, 'epochs over which the learning rate rises from 0', least=0)
    warmup_steps: int = flag(0, 'steps of that rise, if these are more', least=0)
    learning_rate: float = flag(1e-2, 'highest learning rate', least=0, basic=True)
    learning_rate_min: float = flag(1e-4, 'lowest learning rate, at the end of the schedule', least=0)
    lr_schedule: str = flag('cosine', 'cosine = falls epoch by epoch, as published; cosine_by_step = step by '
                                      'step; step = times 0.3 every 40 % of the run',
                            choices=tuple(DECAYS))
    optimizer: str = flag('adamax', 'optimizer', choices=('adamax', 'adam', 'adamw', 'radam'))
    beta1: float = flag(0.9, 'decay of the running mean of gradients', least=0, below=1)
    weight_decay: float = flag(3e-4, 'L2 penalty on all weights; decoupled in adamw', least=0)
    fast_adamax: bool = flag(False, 'update all weights in one fused operation; the numbers are the same')
    grad_clip: float = flag(0.0, 'largest gradient norm; 0 = do not clip', least=0)
    ema_decay: float = flag(0.0, 'keep an average of the weights with this decay and evaluate it; 0 = do not',
                            least=0, below=1, basic=True)
    ema_ramp: bool = flag(False, 'lower decay at first: (1 + n) / (10 + n) at step n, up to --ema_decay',
                          needs='ema_decay')
    ema_halflife_kimg: float = flag(0.0, 'in place of --ema_decay: half-life of the average in thousands of '
                                         'images; 0 = --ema_decay', least=0)
    ema_rampup_ratio: float = flag(0.0, 'limits --ema_halflife_kimg to this times the images seen so far; '
                                        '0 = no limit', least=0, needs='ema_halflife_kimg')
    init_from: str = flag('', "start from the weights of this run folder or checkpoint; '' = from scratch")
    reptile_steps: int = flag(0, 'Reptile finetuning: steps between updates of the average, from which '
                                 'training then continues; 0 = no Reptile', least=0, needs=AVERAGE)
    ema_bn_batches: int = flag(0, 'training batches to measure batch-norm statistics of the averaged weights '
                                  'on, before these are used; 0 = average these too', least=0, needs=AVERAGE)
    amp: str = flag('auto', 'network in bfloat16; auto = where that is faster',
                    choices=('auto', 'bf16', 'off'), basic=True)
    checkpoint_activations: str = flag('auto', 'recompute activations in the backward pass: slower, less '
                                       'memory; auto = if needed', choices=('auto', 'on', 'off'))
    cuda_graph: bool = flag(False, 'one GPU: replay passes as one CUDA graph, faster with small batches')
    save_every: int = flag(0, 'steps between checkpoints; 0 = 1 % of the run, at least an epoch', least=0)
    keep: int = flag(2, 'number of versions of checkpoint.pt and of best.pt to keep; an older one replaces a '
                        'damaged one', least=1)
    log_every: int = flag(100, 'steps between lines of metrics', least=1)
    image_every: int = flag(1000, 'steps between pictures in TensorBoard; 0 = none', least=0)
    val_every: int = flag(0, 'epochs between validations; 0 = 1, or 20 in a run of over 50 epochs', least=0)
    val_steps: int = flag(0, 'steps between validations; 0 = as --val_every says', least=0)
    monitor_anomalies: int = flag(0, 'test images, half of them normal, whose AUROC each validation logs; '
                                     'nothing is ever chosen by it; 0 = none', least=0)
    val_iw_samples: int = flag(10, 'importance samples of a validation', least=1)
    keep_best: bool = flag(False, 'also keep best.pt, the model of the lowest validation NELBO (or loss)')

    def __post_init__(self) -> None:
        if self.ema_decay and self.ema_halflife_kimg:
            raise UserError(f"--ema_decay {self.ema_decay} --ema_halflife_kimg {self.ema_halflife_kimg}: set "
                            f"one of them to 0.")


@dataclass(frozen=True)
class Schedule:
    """A run of epochs of `steps` steps, of `joint_batch` images over all processes: what is due when."""
    config: TrainConfig
    steps: int
    batch_size: int = 1              # images a batch, per process
    joint_batch: int = 1

    @property
    def total(self) -> int:
        """Steps of all epochs, which schedules go by."""
        return self.steps * self.config.epochs

    @property
    def end(self) -> int:
        """The last step: --max_steps may end the run early."""
        return min(self.total, self.config.max_steps or self.total)

    @property
    def warmup(self) -> int:
        """Steps over which the learning rate rises."""
        return max(self.config.warmup_epochs * self.steps, self.config.warmup_steps)

    def learning_rate(self, step: int) -> float:
        """Linear warm-up by step, then from the highest rate towards the lowest."""
        highest, lowest = self.config.learning_rate, self.config.learning_rate_min
        if step < self.warmup:
            return highest * step / self.warmup
        return lowest + (highest - lowest) * DECAYS[self.config.lr_schedule](self, step)

    def due(self, step: int) -> set[str]:
        """What is to be done after this many steps; the end has a validation and pictures of its own."""
        config = self.config
        every = {'log': config.log_every, 'show': config.image_every, 'epoch': self.steps,
                 'save': config.save_every or self.steps * math.ceil(config.epochs / 100),
                 'validate': config.val_steps or self.steps * (config.val_every or (
                     1 if config.epochs <= 50 else 20))}
        due = {name for name, steps in every.items() if steps and step % steps == 0}
        return due - {'show', 'validate'} | {'log', 'save'} if step == self.end else due
