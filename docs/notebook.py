"""Makes a page of the tutorial: its text and its code, without what running it gives."""

import json
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

FENCE = '```'


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds NAME.md for each NAME.ipynb; mkdocs calls this."""
    for notebook in [file for file in files if file.src_uri.endswith('.ipynb')]:
        name = Path(notebook.src_uri).with_suffix('.md').as_posix()
        cells = json.loads(Path(notebook.abs_src_path).read_text(encoding='utf-8'))['cells']
        files.append(File.generated(config, name, content='\n\n'.join(map(_markdown, cells))))
    return files


def on_page_markdown(markdown: str, **_) -> str:
    """Leads links to a notebook to its page; the repository shows the notebook itself."""
    return markdown.replace('.ipynb)', '.md)')


def _markdown(cell: dict) -> str:
    text = ''.join(cell['source'])
    return text if cell['cell_type'] == 'markdown' else f'{FENCE}python\n{text}\n{FENCE}'
