"""Pages: one HTML file each, everything escaped but our own SVG and scripts, and nothing from a network."""

import base64
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from anomaly.judge import group_title
from anomaly.report import tables
from anomaly.report.gallery import short_number
from utils import write_atomically

TEMPLATES = Path(__file__).parent / 'templates'


def write_page(path: Path, template: str, scripts: Sequence[str] = ('gallery.js',), **variables: Any) -> None:
    """Fills a template with `variables`; a policy for the browser allows the `scripts` and forbids whatever
    comes from a network.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup
    script = ''.join((TEMPLATES / name).read_text(encoding='utf-8') for name in scripts)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    environment = Environment(loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined,
                              trim_blocks=True, lstrip_blocks=True)
    environment.globals |= {name: getattr(tables, name)
                            for name in ('number', 'bracket', 'show', 'shade', 'percent')}
    page = environment.get_template(template).render(
        script=Markup(script), script_hash=f'sha256-{digest}', group_title=group_title,
        short_number=short_number, **variables)
    write_atomically(path, lambda path: path.write_text(page, encoding='utf-8'))
