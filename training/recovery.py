"""What a run does whose numbers are no longer finite: back to its last checkpoint, at a lower rate."""

import torch
from torch import Tensor, nn

from distributed import launch
from storage.checkpoint import not_finite, read_checkpoint, save_checkpoint
from training.optimization import Optimization
from training.run_folder import RunFolder
from utils import UserError, seed_noise

MOST_RETURNS = 3                    # to a checkpoint, each at half the learning rate of the one before
EVIDENCE = 'diverged.pt'            # the batch of the last step, and what is first not finite in it
GRADIENT = 'the gradient of '


def go_back(optimization: Optimization, folder: RunFolder, images: list[Tensor], seed: int) -> None:
    """Sets the state of the last checkpoint, and keeps what has happened after it in `EVIDENCE`.

    Raises UserError, which ends the run with a status that is not 0, if there is no checkpoint, or if it was
    of no use before.
    """
    step, returns = optimization.step, optimization.returns
    skipped = optimization.skipped_in_a_row
    words = f'{skipped} steps in a row had a gradient' if optimization.diverged else 'there is a weight'
    causes = launch.gather([(first_not_finite(optimization, images, seed), [x.cpu() for x in images])])
    # Where one process has the cause, all have its gradient.
    cause, batch = min(causes, key=lambda row: (not row[0], row[0].startswith(GRADIENT)))
    what = f'step {step}: {words} that is not finite; the first such number is in {cause or "none now"}'
    if launch.is_main():
        save_checkpoint(folder.folder / EVIDENCE, {'step': step, 'first_not_finite': cause, 'images': batch})
    try:
        if returns == MOST_RETURNS:
            raise UserError(f"it was the same after {returns} returns to a checkpoint.")
        saved = read_checkpoint(folder.folder, folder.say)
    except UserError as error:
        raise UserError(f"{what} (see {folder.folder / EVIDENCE}). The run has diverged: {error} Lower "
                        f"--learning_rate or set --grad_clip; the last checkpoint is kept.") from None
    optimization.load_state_dict(saved)
    optimization.returns = returns + 1
    if launch.is_main():
        folder.forget_after(optimization.step)
    folder.say(f'{what} (see {EVIDENCE}): back to step {optimization.step}, at 1/{2 ** optimization.returns} '
               f'of the learning rate')


def first_not_finite(optimization: Optimization, images: list[Tensor], seed: int) -> str:
    """What is first not finite in the last step, in the order of its computation: images, a weight, the
    output of a layer, the gradient of a weight; '' if everything is finite. Where images or weights of any
    process are not, no process looks further: passes of some would wait for those of the others.
    """
    model, found = optimization.model, []
    name = not_finite(model.state_dict())
    cause = 'the images' if not_finite(images) else f'the weight {name}' if name else ''
    if launch.any_rank(bool(cause)):
        return cause

    def note(name: str) -> object:
        def look(_: nn.Module, inputs: object, output: object) -> None:
            if not found and not_finite(output, 'output'):
                found.append(name)
        return look
    hooks = [module.register_forward_hook(note(name)) for name, module in model.named_modules() if name]
    with torch.no_grad():
        for index, x in enumerate(images):
            seed_noise(seed, 'train', optimization.step - 1, launch.rank() * len(images) + index)
            model(x)
    for hook in hooks:
        hook.remove()
    if found:
        return f'the output of layer {found[0]}'
    gradients = {name: p.grad for name, p in reversed(list(model.named_parameters()))}
    return f'{GRADIENT}{name}' if (name := not_finite(gradients)) else ''
