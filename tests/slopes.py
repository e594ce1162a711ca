"""Whether a long run needs more and more: memory and open files of a training and of an anomaly evaluation.

    python tests/slopes.py --steps 10000 --images 20000        a few minutes on one core

Prints, for each, the slope of a straight line through what the program held while it trained or scored, after
the first fifth, in MB and open files for 1,000 steps or images.
"""

import argparse
import contextlib
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).parents[1]
PAGE = os.sysconf('SC_PAGE_SIZE')
EVERY = 0.2                  # seconds between looks
WARM_UP = 0.2                # share that is left out: caches fill, threads start


def draw(folder, normal, anomalous, seed=0):
    """Class folders of tiny images."""
    rng = np.random.default_rng(seed)
    for name, number in (('normal', normal), ('odd', anomalous)):
        (folder / name).mkdir(parents=True)
        for i in range(number):
            Image.fromarray(rng.integers(0, 256, (16, 16), np.uint8)).save(folder / name / f'{i:05d}.png')


def watch(phase, *command):
    """Runs a program to its end; returns what it held during a phase, rows (seconds, MB, open files).

    `phase` matches the line that says how many seconds the phase took, and what came after it.
    """
    program = subprocess.Popen([sys.executable, '-u', *map(str, command)], cwd=ROOT, stdout=subprocess.PIPE,
                               env={**os.environ, 'OMP_NUM_THREADS': '1'}, text=True)
    place, rows, said = Path('/proc', str(program.pid)), [], []

    def listen():
        for line in program.stdout:
            if found := re.search(phase, line):
                said.append((time.monotonic(), *map(int, found.groups(default=0))))

    listener = threading.Thread(target=listen)
    listener.start()
    while program.poll() is None:
        with contextlib.suppress(OSError):                                               # it has just ended
            memory = int((place / 'statm').read_text().split()[1]) * PAGE / 1e6
            rows.append((time.monotonic(), memory, len(os.listdir(place / 'fd'))))
        time.sleep(EVERY)
    listener.join()
    if program.returncode or not said:
        sys.exit(f'{command[0]} ended with status {program.returncode}')
    (now, lasted, *after), = said
    end = now - sum(after)
    return np.array([row for row in rows if end - lasted < row[0] < end])


def slopes(rows, number):
    """MB and open files for 1,000 of `number` things, without the first of them."""
    things = (rows[:, 0] - rows[0, 0]) / np.ptp(rows[:, 0]) * number / 1000
    late = things > WARM_UP * number / 1000
    return [float(np.polyfit(things[late], rows[late, column], 1)[0]) for column in (1, 2)]


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--steps', type=int, default=10_000)
    parser.add_argument('--images', type=int, default=20_000)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        draw(folder / 'images', 200, args.images)
        epochs = -(-args.steps // (130 // 8))
        tiny = '--model vae --width 8 --latent_dim 8 --num_layers 2 --image_size 16 --batch_size 8'
        trained = watch(r'training (\d+) s', 'train.py', '--root', folder / 'runs', '--save', 'a',
                        '--dataset', 'folder', '--data', folder / 'images', '--cache_dir', folder / 'cache',
                        *tiny.split(), '--max_steps', args.steps, '--epochs', epochs, '--val_every', 20)
        scored = watch(r'scoring took (\d+) s, the report (\d+) s', 'evaluate.py', '--checkpoint',
                       folder / 'runs' / 'eval-a', '--eval_mode', 'anomaly', '--scores', 'nelbo',
                       '--batch_size', 64, '--num_draws', 1, '--num_bootstrap', 2)
    for name, rows, number in (('steps of training', trained, args.steps),
                               ('images of an evaluation', scored, args.images)):
        memory, files = slopes(rows, number)
        print(f'{number:,} {name}: {memory:+.3f} MB and {files:+.4f} open files for 1,000, at most '
              f'{rows[:, 1].max():.0f} MB and {rows[:, 2].max():.0f} open files')


if __name__ == '__main__':
    main()
