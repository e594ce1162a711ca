"""Flags of the autoencoder and the variational autoencoder."""

import math

from utils import flag, flags

LOSSES = ('l2', 'l1', 'ssim')
LIKELIHOODS = ('l2', 'l1')           # losses that are, but for a constant, a negative log-likelihood


@flags
class AEConfig:
    """Flags of --model ae and vae"""
    # As published: Adam at a constant rate.
    defaults = {'optimizer': 'adam', 'learning_rate': 1e-3, 'learning_rate_min': 1e-3, 'warmup_epochs': 0,
                'weight_decay': 0.0, 'batch_size': 128}
    primary_score = 'reconstruction'

    latent_dim: int = flag(128, 'number of latents', least=1, basic=True)
    num_layers: int = flag(3, 'convolutions that halve the image, and as many that double it again', least=1,
                           basic=True)
    width: int = flag(32, 'channels after the first convolution; each further one doubles them', least=1,
                      basic=True)
    loss: str = flag('l2', 'squared error, absolute error, or 1 - structural similarity', choices=LOSSES,
                     basic=True)
    input_noise: float = flag(0.0, 'denoising: standard deviation of the normal noise added to the input of '
                                   'the encoder in training, for images in [0, 1]; 0 = none',
                              least=0, below=math.inf, basic=True)
    coarse_noise: float = flag(0.0, 'denoising: standard deviation of the coarse noise added to the input of '
                                    'the encoder in training, for images in [0, 1]; 0 = none',
                               least=0, below=math.inf)


@flags
class VAEConfig(AEConfig):
    """Flags of --model vae"""
    primary_score = 'kl'

    loss: str = flag('l2', 'squared error or absolute error: a normal or a Laplace p(x|z)',
                     choices=LIKELIHOODS, basic=True)
    kl_weight: float = flag(2.0, 'weight of the mean KL of a latent relative to the mean error of a pixel',
                            above=0, below=math.inf, basic=True)
