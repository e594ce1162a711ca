"""The shapes of an HVAE, LVAE or BIVA that follow from its configuration and the size of the images.

L stages, stage 1 nearest the image; shapes are (C, H, W). In stage i, h_i are the features that inference
leads to, u_i what it hands to stage i + 1, z_i the latents, d_i the features that generation leads to.
"""

from collections import deque
from dataclasses import dataclass

from families.hvae.config import Block, DenseLatent, Latent
from utils import UserError

Shape = tuple[int, int, int]


@dataclass(frozen=True)
class StageSpec:
    """A stage in numbers: its blocks and latent, and every shape that it meets."""
    blocks: list[Block]                 # in the order of inference
    generative: list[Block]             # in the order of generation
    latent: Latent
    first: bool
    top: bool
    below: Shape                        # h_{i-1}; the image, for stage 1
    handed_up: Shape                    # u_{i-1}, which inference starts from
    shape: Shape                        # h_i
    projected: Shape                    # of z_i as features, which generation starts from
    above: Shape | None                 # d_{i+1}; none at the top
    skips: list[Shape | None]           # what a generative block is handed past the latents; None at the top


def stage_specs(image: Shape, blocks: list[list[Block]], latents: list[Latent], *, ladder: bool,
                bidirectional: bool, reverses: bool) -> list[StageSpec]:
    """The stages of a network for images of this shape, stage 1 first.

    A `ladder` hands features to the next stage, not latents; in a `bidirectional` network stages below the
    top have two latents; a stage that `reverses` generates with its list of blocks in the reverse order.
    Raises UserError for a size that a stride does not divide.
    """
    shapes = [image]
    for i, stage in enumerate(blocks):
        shapes.append(_encoded(shapes[-1], stage, i + 1))
    number, specs, above, queue = len(blocks), [], None, deque()
    for i in reversed(range(number)):
        top, latent, shape = i == number - 1, latents[i], shapes[i + 1]
        count = 2 if bidirectional and not top else 1
        projected = _projected(latent, shape, count)
        generative = blocks[i][::-1] if reverses else blocks[i]
        skips, (_, height, width) = [], projected
        for block in generative:
            # A queue: each block takes the oldest entry and leaves its own output; the top only leaves.
            skips.append(None if top else queue.popleft())
            height, width = height * block.stride, width * block.stride
            queue.append((block.out_channels, height, width))
        handed_up = shapes[i] if ladder or i == 0 else _projected(latents[i - 1], shapes[i], 1)
        specs.append(StageSpec(blocks[i], generative, latent, i == 0, top, shapes[i], handed_up, shape,
                               projected, above, skips))
        above = queue[-1]
    return specs[::-1]


def _encoded(shape: Shape, blocks: list[Block], stage: int) -> Shape:
    """The shape that a stage's inference leads to."""
    for j, block in enumerate(blocks):
        _, height, width = shape
        place = f"--config_deterministic, stage {stage}, block {j + 1}"
        if height % block.stride or width % block.stride:
            raise UserError(f"{place}: its stride {block.stride} does not divide features of {height} x "
                            f"{width}. Change the stride or the size of the images, or pad them with "
                            f"--padded_shape.")
        if block.kernel_size < block.stride:
            raise UserError(f"{place}: its stride {block.stride} is larger than its kernel_size "
                            f"{block.kernel_size}, so pixels would be left out. Raise the kernel_size.")
        shape = (block.out_channels, height // block.stride, width // block.stride)
    return shape


def _projected(latent: Latent, shape: Shape, count: int) -> Shape:
    """Latents as features: dense ones fill the stage's own shape."""
    return shape if isinstance(latent, DenseLatent) else (count * latent.latent_features, *shape[1:])
