"""Score and anomaly map of one image: python example.py IMAGE. Needs PyTorch and Pillow, nothing else."""

import json
import sys
from pathlib import Path

import torch
from PIL import Image, ImageOps


def load(path: str, size: int, border: int, channels: int, fit: str, depth: int, bits: int,
         invert: bool) -> torch.Tensor:
    """An opaque gray or color image file as the model sees it: (1, C, H, W) float32 in [0, 1]."""
    image = ImageOps.exif_transpose(Image.open(path))
    white = 65535 if image.mode.startswith('I') else 255
    bands = [image] if white > 255 else image.convert('L' if image.mode in ('1', 'L') else 'RGB').split()
    longest, shortest = max(image.size), min(image.size)
    shape = [max(1, round(size * n / longest)) if fit == 'pad' else size for n in image.size]     # w, h
    left, top = [(n - shortest) / 2 for n in image.size]
    box = (left, top, left + shortest, top + shortest) if fit == 'crop' else None
    planes = []
    for band in bands:
        band = band.convert('F').point(lambda value: value / white)
        canvas = Image.new('F', (size, size))
        canvas.paste(band.resize(shape, Image.Resampling.BILINEAR, box, 3.0),
                     [(size - n) // 2 for n in shape])
        planes.append(torch.frombuffer(bytearray(canvas.tobytes()), dtype=torch.float32).view(size, size))
    x, full = torch.stack(planes), 2 ** depth - 1
    if channels < len(x):
        x = (x * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(0, keepdim=True)    # luma
    levels = (full * x).round().int()
    levels = (full - levels if invert else levels) >> (depth - bits)
    x = torch.nn.functional.pad(levels / (2 ** bits - 1), [border] * 4)
    return x.expand(1, channels, -1, -1).contiguous()


if __name__ == '__main__':
    here = Path(__file__).parent
    about = json.loads((here / 'export.json').read_text())
    model = torch.export.load(here / 'model.pt2').module()
    with torch.no_grad():
        score, *maps = model(load(sys.argv[1], **about['input']))          # (1,), and the map (1, 1, H, W)
    limit, pixel_limit = (float('inf') if about[name] is None else about[name]
                          for name in ('threshold', 'pixel_threshold'))
    call = 'anomalous' if score.item() > limit else 'normal'
    print(f"{about['score']} {score.item():.7g}, threshold {limit:.7g}: {call}")
    for values in maps:
        share = (values > pixel_limit).float().mean()
        print(f"map of {about['map']}: {share:.2%} of the pixels are anomalous")
