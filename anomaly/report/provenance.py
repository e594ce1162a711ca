"""What a report says of the model, the data and the code that it was made with."""

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from anomaly.report.figures import read_history
from model import family_name
from storage.provenance import commit
from utils import read_json

SHORT = 10                      # digits of a commit
NOT_OF_THE_MODEL = ('data', 'cache_dir', 'root', 'save', 'cont_training', 'dry_run', 'wandb_project',
                    'mlflow_experiment')


def about_run(model: Any, path: str | Path) -> dict[str, Any]:
    """Name of the run, family and parameters of the model, epochs and steps that it was trained for, and its
    flags, from its folder or a checkpoint in it; what the folder does not tell is left out.
    """
    run_folder = Path(path) if Path(path).is_dir() else Path(path).parent
    file, history = run_folder / 'args.json', read_history(run_folder)
    flags = read_json(file) if file.exists() else {}
    parameters = getattr(model, 'parameters', list)()
    facts = {'run': run_folder.name.removeprefix('eval-'), 'family': family_name(model),
             'parameters': sum(p.numel() for p in parameters),
             'shape': list(getattr(model, 'shape', ())), 'epochs': flags.get('epochs'),
             'steps': max((points[-1][0] for points in history.values()), default=None),
             'flags': {name: value for name, value in flags.items() if name not in NOT_OF_THE_MODEL}}
    return {name: value for name, value in facts.items() if value}


def code_and_date() -> dict[str, str]:
    """The day, in UTC, and the commit of the code, shortened, with a + if files differ; '' = unknown."""
    known = commit()
    return {'date': datetime.now(UTC).strftime('%Y-%m-%d'),
            'commit': known[:SHORT] + '+' * known.endswith('+')}
