# %% [markdown]
# # Anomalies in medical images: from pixels to likelihood ratios
#
# A model that has only ever seen normal images should be surprised by an abnormal one. This lesson builds
# that idea step by step, and shows at each step how it can fool you. The images are synthetic chest
# radiographs that a program draws: nothing is downloaded, and no patient is in them. What you measure here
# says nothing about patients either.
#
# Run it as a notebook, or as `python docs/tutorial.py` from the folder of the repository. It needs no GPU.

# %%
import json
import os
import sys
import tempfile
from pathlib import Path

sys.path[:0] = ['.', '..']                       # the notebook lies in docs/, the library above it

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F

from datasets import DataConfig, load_data
from model import build_model, family_config
from readers.batches import eval_batches, train_batches
from utils import seed_noise

FAST = bool(os.environ.get('TUTORIAL_FAST'))     # a shorter lesson: fewer images, less training
PHANTOMS, STEPS = (200, 120) if FAST else (400, 800)
SIZE, BATCH = 32, 16                             # pixels of a side; images a training step
FOLDER = Path(tempfile.gettempdir(), 'anomaly-tutorial')

# %% [markdown]
# ## 1. Normal and abnormal
#
# `load_data` draws the phantoms at its first call and splits them: models train on the normal images of
# `train`, thresholds come from the normal images of `val`, and `test`, normal and abnormal, judges. An
# abnormal phantom has hazy opacities, low and at the outside of both lungs: faint, moderate or marked ones.
# Its mask holds the pixels that an opacity brightens by more than half of its maximum. No model sees a mask.

# %%
data = load_data(DataConfig(dataset='phantom', data=str(FOLDER), num_phantoms=PHANTOMS, image_size=SIZE,
                            cache_dir=str(FOLDER / 'cache')))
print('\n'.join(data.report))

batches = [batch for _, batch in eval_batches(data.test, 50)]
x = torch.cat([batch.x for batch in batches])                        # (N, 1, 32, 32) in [0, 1]
mask = torch.cat([batch.mask for batch in batches])                  # (N, 1, 32, 32) bool
ill = torch.cat([batch.y for batch in batches]).numpy() == 1         # (N,)


def show(rows, titles, first=0):
    """Rows of (N, 1, H, W) images, five columns from image `first` on."""
    axes = plt.subplots(len(rows), 5, figsize=(7, 1.5 * len(rows)), squeeze=False)[1]
    for line, images, title in zip(axes, rows, titles):
        high = max(1e-6, float(images[first:first + 5].float().max()))
        for axis, image in zip(line, images[first:first + 5]):
            axis.imshow(image[0].float(), cmap='gray', vmin=0, vmax=high)
            axis.set(xticks=[], yticks=[])
        line[0].set_ylabel(title)
    plt.show()


first_ill = [entry.class_name for entry in data.test.entries].index('Marked')
first_normal = int(np.flatnonzero(~ill)[0])
show([x], ['normal'], first_normal)
show([x, mask], ['marked', 'mask'], first_ill)

# %% [markdown]
# ## 2. Reconstruction error
#
# An autoencoder squeezes an image through a few numbers and draws it again. Trained on normal chests, it
# should fail where a chest is not normal. Every model family trains the same way: `objective` makes a loss
# of what `forward` says.


# %%
def train(model, steps, learning_rate=1e-3):
    """Trains on the normal images of `train`; returns the model, ready to score."""
    seed_noise(1, 'training')
    model.train()
    if hasattr(model, 'initialize'):             # some families set their scales by a first look at images
        model.initialize(next(train_batches(data.train, 64, seed=0)).x)
    optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate)
    for step, batch in zip(range(steps), train_batches(data.train, BATCH, seed=1)):
        loss, _ = model.objective(model(batch.x), progress=step / steps)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 200.0)
        optimizer.step()
    return model.eval()


seed_noise(1, 'initialization')
config = family_config('ae')(latent_dim=32, width=16)
autoencoder = train(build_model('ae', data.shape, config, data.pixels), STEPS)
with torch.no_grad():
    reconstruction = autoencoder.reconstruct(x)
residual = (x - reconstruction).abs()
show([x, reconstruction, residual, mask], ['image', 'drawn again', 'residual', 'mask'], first_ill)

# %% [markdown]
# One number an image: the mean residual. The AUROC is the chance that an abnormal image has a larger one
# than a normal image: 0.5 is a coin, 1 is perfect.

# %%
from sklearn.metrics import roc_auc_score

auroc = {'reconstruction': roc_auc_score(ill, residual.mean((1, 2, 3)))}


def histogram(values, title):
    """Normal and abnormal test images side by side."""
    plt.figure(figsize=(6, 2.2))
    plt.hist([values[~ill], values[ill]], bins=25, label=['normal', 'abnormal'])
    plt.xlabel(title)
    plt.legend()
    plt.show()


histogram(residual.mean((1, 2, 3)).numpy(), 'mean residual')
print(f"AUROC of the mean residual: {auroc['reconstruction']:.2f}")

# %% [markdown]
# **Why blur misleads.** Few numbers cannot hold ribs and vessels, so the copy is blurred, and beside the
# lesions the residual shows the edges of any chest. A blur needs no training and knows no anatomy. As far
# as its residual ranks the images as that of the model does, the model measures how much fine structure an
# image has, not whether it is normal. The shorter the training, the more it does so.

# %%
padded = F.pad(x, (2, 2, 2, 2), mode='reflect')
blurred = F.avg_pool2d(padded, 5, 1)                                 # (N, 1, 32, 32)
blur_residual = (x - blurred).abs().mean((1, 2, 3))
auroc['blur'] = roc_auc_score(ill, blur_residual)
likeness = float(np.corrcoef(residual.mean((1, 2, 3)), blur_residual)[0, 1])
inside, outside = float(residual[mask].mean()), float(residual[ill][~mask[ill]].mean())
print(f"AUROC of a blur: {auroc['blur']:.2f}; correlation of both residuals over the images: {likeness:.2f}")
print(f'mean residual inside the lesions {inside:.3f}, elsewhere in the same images {outside:.3f}')

# %% [markdown]
# The residual is larger inside the lesions, so the map is worth a look, though the mean over all pixels
# drowns much of it in edges.
#
# ## 3. What needs no model
#
# So first ask what trivial scores reach: brightness, file size, a linear fit. They are rows of a table, and
# they stand beside every score that the framework reports. An AUROC below 0.5 tells as much as one above
# it: the score then only has to be turned round.

# %%
from anomaly.baselines import fit_baselines
from anomaly.scores import Scoring
from anomaly.scoring import part_batches, score_images


def score_part(score, model, part):
    """A score of every image of a part: (N,)."""
    table = score_images(model, part_batches(part, 50, 'scores'), [score], Scoring(num_draws=1))
    return table.select([entry.id for entry in part.entries]).values[score.name]


normal_images = torch.cat([batch.x for _, batch in eval_batches(data.train, 50)])
for baseline in fit_baselines(normal_images):
    auroc[baseline.name] = roc_auc_score(ill, score_part(baseline, autoencoder, data.test))
    print(f'{baseline.name:20} {auroc[baseline.name]:.2f}   {baseline.about}')

# %% [markdown]
# The residual of a linear fit (`pca`) does as well here as that of our autoencoder: so far nothing needed a
# deep model. To claim more, beat it.
#
# The phantom is made so that its classes do not differ in file or exposure. Real data sets are not: their
# classes come from different hospitals. `audit` looks for such confounds before anything is trained, and
# says it in words.

# %%
from audit.audit import audit, sentences

audited = audit(data, max_images=100, num_bootstrap=200)
for sentence in sentences(audited)[:4]:
    print('-', sentence)

# %% [markdown]
# ## 4. Likelihood
#
# A likelihood model answers another question: how probable is this image, pixel by pixel? A variational
# autoencoder bounds log p(x) from below: the ELBO is what the decoder explains minus what the latents cost
# (their KL). The negative ELBO, in nats, is the score: larger is less probable. This one is hierarchical,
# with three stages of latents, from the coarse top to the one nearest the image.

# %%
from anomaly.outputs import Outputs
from anomaly.scores import SCORES

block = {'block': 'ResBlockConv2d', 'out_channels': 16, 'kernel_size': 3, 'gated': False}
stages = [[block | {'stride': 1}, block | {'stride': 2}]] * 3
latents = [{'block': 'GaussianConv2d', 'latent_features': 4}] * 2
latents += [{'block': 'GaussianDense', 'latent_features': 16}]
config = family_config('hvae')(json.dumps(stages), json.dumps(latents), free_nats=0.0)
seed_noise(2, 'initialization')
hvae = train(build_model('hvae', data.shape, config, data.pixels), STEPS)

nelbo, = SCORES['nelbo'](hvae.num_groups)
values = score_part(nelbo, hvae, data.test)
auroc['nelbo'] = roc_auc_score(ill, values)
histogram(values, 'negative ELBO, nats')
print(f"AUROC of the negative ELBO: {auroc['nelbo']:.2f}")

# %% [markdown]
# **Simple is not normal.** Take the normal test images and blur them. No radiograph looks like that, and
# the model has never seen one. Yet it finds them *more* probable: smooth pixels are easy to foretell,
# whatever they show. A score of likelihood alone would call them the most normal images of all. Subtracting
# the size of the image as a compressed file (`complexity`) asks instead: probable, for an image this
# simple?


# %%
def of_images(score, images):
    """A score of images that are in no part: (N,)."""
    return score.image(Outputs(hvae, images, Scoring(num_draws=1))).double().numpy()


normal = x[~ill][:50]
simple = (255 * blurred[~ill][:50]).round() / 255                    # on the grey levels of the data
complexity, = SCORES['complexity'](hvae.num_groups)
more_probable = float((of_images(nelbo, simple) < of_images(nelbo, normal)).mean())
caught = {score.name: roc_auc_score([0] * len(normal) + [1] * len(simple), np.r_[
    of_images(score, normal), of_images(score, simple)]) for score in (nelbo, complexity)}
auroc['complexity'] = roc_auc_score(ill, score_part(complexity, hvae, data.test))
print(f'{100 * more_probable:.0f} % of the blurred images are more probable than their originals')
print(f"blurred against normal: AUROC of nelbo {caught['nelbo']:.2f}, "
      f"of complexity {caught['complexity']:.2f}")
print(f"abnormal against normal: AUROC of complexity {auroc['complexity']:.2f}")

# %% [markdown]
# ## 5. Likelihood ratios: LLR>k
#
# Most of a likelihood is about fine texture, which the latents nearest the image explain for any image,
# normal or not. So compare two bounds of the same image: L, and L>k, where the k groups nearest the image
# are drawn from the prior instead of being read from the image. LLR>k = L - L>k is what these k groups know
# of the image that the coarse ones did not lead one to expect (Havtorn et al. 2021). Each k asks at another
# scale, and the AUROC of each says where these anomalies are strange.

# %%
ratios = SCORES['llr'](hvae.num_groups)                              # k = 1 (the finest group), 2
costs = SCORES['kl'](hvae.num_groups)                                # their KL: all, then the top group down
for score in [*ratios, *costs]:
    auroc[score.name] = roc_auc_score(ill, score_part(score, hvae, data.test))
    print(f'{score.name:8} {auroc[score.name]:.2f}   {score.about}')

axis = plt.subplots(figsize=(6, 2.6))[1]
names = list(auroc)
axis.bar(names, [auroc[name] - 0.5 for name in names], bottom=0.5)
axis.axhline(0.5, color='black', linewidth=1)
axis.set(ylabel='AUROC', ylim=(0.2, 1))
axis.tick_params(axis='x', rotation=90)
plt.show()

# %% [markdown]
# A small network, trained for a minute on small images, stays near chance here; larger ones and other data
# are in the [README](../README.md). Do not pick the tallest bar: with this many scores one is always lucky.
# Choose the score before you look, or on other data, and say which.
#
# ## 6. A threshold, and how sure we are
#
# To call an image abnormal takes a threshold. It comes from normal validation images alone, so that at most
# 5 % of new normal images are flagged, if they are like these. How many abnormal ones are then found is the
# sensitivity. Few images make every figure uncertain: the intervals say how much.

# %%
from anomaly.metrics import Resamples, evaluate_score, threshold, wilson_interval

chosen = ratios[0]                                                   # named here, before looking: LLR>1
validation, values = (score_part(chosen, hvae, part) for part in (data.val, data.test))
limit = threshold(validation, target_fpr=0.05)
flagged = values > limit
for group, of in (('normal', ~ill), ('abnormal', ill)):
    low, high = wilson_interval(int(flagged[of].sum()), int(of.sum()))
    print(f'{group}: {flagged[of].sum()} of {of.sum()} flagged, '
          f'95 % interval {100 * low:.0f} to {100 * high:.0f} %')

resamples = Resamples.draw(int((~ill).sum()), int(ill.sum()), 1000, seed=1)
interval = evaluate_score(values[~ill], values[ill], resamples)['auroc']
print(f'AUROC of {chosen.name}: {interval.value:.2f}, '
      f'95 % interval {interval.low:.2f} to {interval.high:.2f}')

# %% [markdown]
# **What to take home.** A residual shows edges before it shows disease. Simple images are probable images.
# A score means something beside the trivial ones, with its interval, when it was chosen beforehand.
# `train.py` and `evaluate.py --eval_mode anomaly` do all of this at full size, for your images, and write
# it into one report: [README](../README.md), [all scores](anomaly_scores.md), [the library](python.md),
# [the audit](data.md#audit).
