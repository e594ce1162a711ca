"""The passes of a network as one CUDA graph: a GPU no longer waits for Python to start each operation."""

import warnings

import torch
from torch import Tensor, nn

from utils import UserError


def check_graph(model: nn.Module, device: torch.device, world: int, accumulate: int,
                recomputes: bool) -> None:
    """Raises UserError where the passes of a training cannot be captured."""
    hindrance = next((words for hinders, words in (
        (device.type != 'cuda', 'is for a GPU: this run is on the CPU'),
        (world > 1, 'is for one process'),
        (accumulate > 1, 'and --accumulate exclude each other: gradients stay where the graph writes them'),
        (recomputes, 'and --checkpoint_activations exclude each other: lower --batch_size'),
        (not getattr(model, 'capturable', True), f'is not for {type(model).__name__}: which voxels it takes '
                                                 f'depends on the images')) if hinders), '')
    if hindrance:
        raise UserError(f"--cuda_graph {hindrance}. Leave it out.")


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
