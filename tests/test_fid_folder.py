"""Published commands name no network of FID: it is found in --fid_dir."""

import pytest
import torch

from evaluation.config import NetworkConfig
from evaluation.fid import INCEPTION_URL, load_features
from utils import UserError


def test_the_network_is_taken_from_the_folder_of_statistics_or_asked_for(tmp_path):
    def load(**flags):
        return load_features(NetworkConfig(**flags), (1, 8, 8), torch.device('cpu'), str(tmp_path))

    with pytest.raises(UserError, match=f'{INCEPTION_URL}, or put that into {tmp_path}, or --fid_features'):
        load()
    file = tmp_path / INCEPTION_URL.rpartition('/')[2]
    file.write_bytes(b'no weights')
    with pytest.raises(UserError, match=f'{file} is damaged'):
        load()
    with pytest.raises(UserError, match='--inception_weights here cannot be read'):
        load(inception_weights='here')
    with pytest.raises(UserError, match='--fid_features there cannot be read'):
        load(fid_features='there')
