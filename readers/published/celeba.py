"""CelebA as torchvision keeps it: <folder>/celeba/img_align_celeba/*.jpg and list_eval_partition.txt."""

from pathlib import Path

from readers.published.records import FileStore
from utils import UserError

IMAGES, PARTITION = 'img_align_celeba', 'list_eval_partition.txt'
PARTS = {'train': '0', 'valid': '1', 'test': '2'}              # in list_eval_partition.txt
LAYOUT = f'celeba/{PARTITION} and celeba/{IMAGES}/*.jpg, as torchvision.datasets.CelebA leaves them'


def find_celeba(folder: str | Path) -> Path | None:
    """`folder` or `folder`/celeba, whichever holds CelebA; None if neither does."""
    places = (Path(folder), Path(folder, 'celeba'))
    return next((p for p in places if (p / PARTITION).is_file() and (p / IMAGES).is_dir()), None)


def celeba_names(folder: Path, split: str) -> list[str]:
    """The files of the published part 'train', 'valid' or 'test', in the order of the list."""
    path = folder / PARTITION
    try:
        lines = [line.split() for line in path.read_text().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read ({error}): fetch it again.") from None
    if bad := next((line for line in lines if len(line) != 2 or line[1] not in PARTS.values()), None):
        raise UserError(f"{path} has the line {' '.join(bad)!r}: expected a file name and 0, 1 or 2. "
                        f"Fetch it again.")
    names = [name for name, part in lines if part == PARTS[split]]
    if not names:
        raise UserError(f"{path} lists no image of the part {split}: fetch it again.")
    return names


def celeba_store(part: str, folder: Path, split: str) -> FileStore:
    return FileStore(part, folder / IMAGES, celeba_names(folder, split))
