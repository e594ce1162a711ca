# %% [markdown]
# # Hands against the rest: an autoencoder and a VAE on MedNIST
#
# The classic first lesson of anomaly detection: train on one class of a data set, call every other class
# anomalous. Two small networks learn what a radiograph of a hand looks like. One is judged by what it cannot
# draw again, the other by how unusual it finds an image's code. The exercises at the end change one thing at
# a time, and some of the answers are surprising.
#
# MedNIST holds images of 64 x 64 pixels in six classes: abdominal and chest CT, breast MRI, chest X-rays,
# hands and head CT. Download `MedNIST.tar.gz` from the
# [MONAI test data](https://github.com/Project-MONAI/MONAI-extra-test-data/releases/tag/0.8.1) and say where
# it is in the variable `MEDNIST`; it does not have to be unpacked:
#
#     MEDNIST=path/to/MedNIST.tar.gz jupyter lab docs/tutorial_mednist.ipynb
#
# `python docs/tutorial_mednist.py` runs the same lesson as a script. It needs no GPU: on two cores each of
# the two trainings takes 10 to 15 minutes. With `TUTORIAL_FAST=1` they are cut short, and teach next to
# nothing.

# %%
import os
import sys
import tempfile
from collections import Counter
from pathlib import Path

sys.path[:0] = ['.', '..']                       # the notebook lies in docs/, the library above it

import matplotlib.pyplot as plt
import numpy as np
import torch
from sklearn.metrics import roc_auc_score

from anomaly.scores import SCORES, Scoring
from anomaly.scoring import part_batches, score_images
from datasets import DataConfig, load_data
from distributed.launch import keep_freed_memory
from model import build_model, family_config
from readers.batches import eval_batches, train_batches
from utils import seed_noise

keep_freed_memory()                      # for the next step: on a CPU, a third of the time of a training
FAST = bool(os.environ.get('TUTORIAL_FAST'))
ITERATIONS, LOG_EVERY, VALIDATE_EVERY, BATCH = (30, 5, 15, 32) if FAST else (1000, 50, 100, 128)
LATENTS, LEARNING_RATE = 128, 1e-3
NORMAL = 'Hand'
CACHE = Path(tempfile.gettempdir(), 'anomaly-tutorial', 'mednist')

# %% [markdown]
# ## 1. The data
#
# Of the images of the normal class, 80 % are for training, 10 % for validation and 10 % for testing. The test
# set gets as many images of the other classes, all of them together, and no model has seen any of these.

# %%
def load(normal):
    """MedNIST with one class as the normal one."""
    return load_data(DataConfig(dataset='mednist', data=os.environ['MEDNIST'], normal_classes=(normal,),
                                cache_dir=str(CACHE)))


def images_of(part):
    """The images (N, 1, 64, 64) in [0, 1] of a part, and whether they are anomalous, (N,) bool."""
    batches = [batch for _, batch in eval_batches(part, BATCH)]
    return torch.cat([batch.x for batch in batches]), np.concatenate([batch.y for batch in batches]) == 1


def show(rows, titles, columns=6):
    """Rows of (N, 1, H, W) images on one gray scale from 0 to 1."""
    axes = plt.subplots(len(rows), columns, figsize=(1.3 * columns, 1.4 * len(rows)), squeeze=False)[1]
    for line, images, title in zip(axes, rows, titles):
        for axis in line:
            axis.set(xticks=[], yticks=[])
        for axis, image in zip(line, images):
            axis.imshow(image[0], cmap='gray', vmin=0, vmax=1)
        line[0].set_ylabel(title)
    plt.show()


data = load(NORMAL)
print('\n'.join(data.report))
x, anomalous = images_of(data.test)
print(Counter(entry.class_name for entry in data.test.entries))
show([x[~anomalous], x[anomalous]], ['normal', 'anomalous'])

# %% [markdown]
# ## 2. An autoencoder
#
# Three convolutions halve the image to 8 x 8 pixels of 128 channels, a linear layer squeezes these into 128
# numbers, and the mirror image of all that draws the picture again. The loss is the mean squared error of a
# pixel. `family_config('ae')` holds the published settings, and every family trains by the same few lines:
# `forward` gives terms an image, `objective` makes a loss of them.


# %%
def loss_of(model, images, progress=0.0):
    """The loss of a batch, and what it consists of."""
    return model.objective(model(images), progress)


def train(model, data, iterations=None):
    """Trains on the normal images of `train`. Returns the losses as rows (iteration, training, validation),
    NaN where there was no validation.
    """
    iterations = iterations or ITERATIONS
    seed_noise(0, 'training')
    validation, _ = images_of(data.val)
    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)
    history, recent = [], []
    for step, batch in zip(range(1, iterations + 1), train_batches(data.train, BATCH, seed=0)):
        model.train()
        loss, _ = loss_of(model, batch.x, step / iterations)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        recent.append(float(loss.detach()))
        if step % LOG_EVERY == 0:
            history.append([step, np.mean(recent), np.nan])
            recent = []
        if step % VALIDATE_EVERY == 0:
            model.eval()
            with torch.no_grad():
                history[-1][2] = float(loss_of(model, validation, 1.0)[0])
            print('iteration {}: loss {:.5f} in training, {:.5f} in validation'.format(*history[-1]))
    model.eval()
    return np.array(history)


def plot_losses(history):
    """Both curves, on a logarithmic axis: the first losses are far larger than the last."""
    axis = plt.subplots(figsize=(6, 2.4))[1]
    axis.semilogy(history[:, 0], history[:, 1], label='training')
    checked = history[np.isfinite(history[:, 2])]
    axis.semilogy(checked[:, 0], checked[:, 2], 'o', label='validation')
    axis.set(xlabel='iteration', ylabel='loss')
    axis.legend()
    plt.show()


@torch.no_grad()
def reconstruct(model, images):
    """The images drawn again, and the residuals |x - y|: both (N, 1, 64, 64)."""
    y = torch.cat([model.reconstruct(some) for some in images.split(BATCH)])
    return y, (images - y).abs()


def build(family, **settings):
    """A model with fresh weights, the same at every call."""
    seed_noise(0, 'initialization')
    settings = {'latent_dim': LATENTS} | settings
    return build_model(family, data.shape, family_config(family)(**settings), data.pixels)


autoencoder = build('ae')
print(f'{sum(p.numel() for p in autoencoder.parameters()):,} parameters')
ae_losses = train(autoencoder, data)
plot_losses(ae_losses)

# %% [markdown]
# What it draws: first hands of the validation set, which it has never seen but knows the like of, then test
# images, normal and anomalous. A residual is bright where the network could not follow.

# %%
hands, _ = images_of(data.val)
show([hands[:6], *reconstruct(autoencoder, hands[:6])], ['image', 'drawn again', 'residual'])
for name, some in (('normal', x[~anomalous][:6]), ('anomalous', x[anomalous][:6])):
    show([some, *reconstruct(autoencoder, some)], [name, 'drawn again', 'residual'])

# %% [markdown]
# ## 3. From a residual to a score
#
# The anomaly score of an image is the mean of its residual: of |x - y|, although the network was trained on
# (x - y)². The AUROC is the chance that an anomalous image has a higher score than a normal one.


# %%
def score_part(name, model, part):
    """The score `name` of every image of a part: (N,)."""
    score = next(score for score in SCORES[name](getattr(model, 'num_groups', 0)) if score.name == name)
    table = score_images(model, part_batches(part, BATCH, 'scores'), [score], Scoring(num_draws=1))
    return table.select([entry.id for entry in part.entries]).values[name]


def histogram(values, title):
    """How the scores of normal and anomalous test images are spread; none is left out."""
    plt.figure(figsize=(6, 2.2))
    bins = np.linspace(values.min(), values.max(), 100)
    plt.hist(values[~anomalous], bins, label='normal', color='tab:blue', alpha=0.7)
    plt.hist(values[anomalous], bins, label='anomalous', color='tab:red', alpha=0.7)
    plt.xlabel(title)
    plt.legend()
    plt.show()


auroc = {}
residual_score = score_part('reconstruction', autoencoder, data.test)
auroc['AE, residual'] = roc_auc_score(anomalous, residual_score)
histogram(residual_score, 'mean residual')
print(f"AUROC of the AE's residual: {auroc['AE, residual']:.4f}")

# %% [markdown]
# Which classes does it miss? A mean over all anomalous images hides the answer.


# %%
def by_class(values, part):
    """AUROC of each anomalous class against the normal test images."""
    names = np.array([entry.class_name for entry in part.entries])
    return {str(name): roc_auc_score(names[(names == name) | ~anomalous] == name,
                                     values[(names == name) | ~anomalous])
            for name in np.unique(names[anomalous])}


ae_classes = by_class(residual_score, data.test)
for name, value in sorted(ae_classes.items(), key=lambda item: item[1]):
    print(f'{name:12} {value:.3f}')

# %% [markdown]
# A residual is small where an image is dark or smooth, whatever it shows. Compare the order of the classes
# with their mean brightness and contrast:

# %%
names = np.array([entry.class_name for entry in data.test.entries])
for name in np.unique(names):
    some = x[torch.from_numpy(names == name)]
    print(f'{name:12} mean {some.mean():.3f}, standard deviation within an image '
          f'{some.flatten(1).std(1).mean():.3f}')

# %% [markdown]
# ## 4. A variational autoencoder
#
# The encoder of a VAE gives a distribution, a mean and a variance for each of the 128 latents, and the
# decoder draws from a sample of it. The loss has a second term: the KL divergence of that distribution from
# a standard normal one, which keeps codes short. Here it is the mean over latents with a weight of 2, while
# the error is a mean over pixels. Summed up, that is SSE + 64 KL: a very strong pull towards the prior.

# %%
vae = build('vae')
print(f'{sum(p.numel() for p in vae.parameters()):,} parameters')
vae_losses = train(vae, data)
plot_losses(vae_losses)
for name, some in (('normal', x[~anomalous][:6]), ('anomalous', x[anomalous][:6])):
    show([some, *reconstruct(vae, some)], [name, 'drawn again', 'residual'])

# %% [markdown]
# The copies are far more blurred than those of the autoencoder: with few nats to spend, the code holds little
# more than the pose of the hand. The lesson's score of a VAE is the KL alone, from the encoder, without a
# sample: how far the code of an image lies from the codes that are expected.

# %%
kl_score = score_part('kl', vae, data.test)
auroc['VAE, KL'] = roc_auc_score(anomalous, kl_score)
histogram(kl_score, 'KL divergence, nats')
print(f"AUROC of the VAE's KL: {auroc['VAE, KL']:.4f}")
for name, value in sorted(by_class(kl_score, data.test).items(), key=lambda item: item[1]):
    print(f'{name:12} {value:.3f}')

# %% [markdown]
# ## 5. Exercises
#
# Each changes one line of the above. Say what you expect before you run it.
#
# **a. The VAE's residual.** It blurs more, so is its residual a worse score than that of the autoencoder?

# %%
auroc['VAE, residual'] = roc_auc_score(anomalous, score_part('reconstruction', vae, data.test))
print(f"AUROC of the VAE's residual: {auroc['VAE, residual']:.4f}")

# %% [markdown]
# **b. Both terms.** A likelihood is neither the error nor the KL but their sum. `nelbo` is the bound on
# -log p(x) in nats that belongs to this loss: which of the two terms dominates it?

# %%
auroc['VAE, NELBO'] = roc_auc_score(anomalous, score_part('nelbo', vae, data.test))
print(f"AUROC of the VAE's NELBO: {auroc['VAE, NELBO']:.4f}")

# %% [markdown]
# **c. Square or modulus.** The network was trained on squares. Does the score get better with them?

# %%
_, residual = reconstruct(autoencoder, x)
auroc['AE, squares'] = roc_auc_score(anomalous, residual.square().mean((1, 2, 3)))
print(f"AUROC of the AE's mean squared residual: {auroc['AE, squares']:.4f}")

# %% [markdown]
# **d. No training at all.** How far does a score come that needs no network: the distance of an image from
# the mean hand?

# %%
mean_hand = images_of(data.train)[0].mean(0)
auroc['mean hand'] = roc_auc_score(anomalous, (x - mean_hand).abs().mean((1, 2, 3)))
print(f"AUROC of the distance from the mean hand: {auroc['mean hand']:.4f}")

# %% [markdown]
# **e. A weaker pull.** With `kl_weight=0.01` the code may hold more. Does the KL become a better score, and
# are the copies sharper? A fifth of the training is enough to see it.

# %%
weak = build('vae', kl_weight=0.01)
train(weak, data, max(20, ITERATIONS // 5))
show([x[anomalous][:6], *reconstruct(weak, x[anomalous][:6])], ['anomalous', 'drawn again', 'residual'])
auroc['VAE, weak pull, KL'] = roc_auc_score(anomalous, score_part('kl', weak, data.test))
print(f"AUROC of its KL: {auroc['VAE, weak pull, KL']:.4f}")

# %%
axis = plt.subplots(figsize=(6, 2.6))[1]
axis.barh(list(auroc), list(auroc.values()))
axis.axvline(0.5, color='black', linewidth=1)
axis.set(xlabel='AUROC', xlim=(0, 1))
plt.show()

# %% [markdown]
# **f. On your own.** `load('HeadCT')` and train again: which normal classes are easy, and is the reason that
# they are special or that they are dark? With `LATENTS = 8` the copies get worse; do the scores? And with
# `seed_noise(1, ...)`: how far apart are two trainings that differ in nothing but their seed?
#
# **What to take home.** An AUROC on such a task says that six kinds of pictures differ, which is true of
# their brightness already: put the score without a network beside it. Telling a sick hand from a healthy
# one is another task, and a far harder one: that is what the [other lesson](tutorial.py) is about. At full
# length, with checkpoints, intervals and a report, the two models here are `scripts/recipes/ae_mednist.sh`
# and `vae_mednist.sh`: [measured](autoencoder.md#measured).
