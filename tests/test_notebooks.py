"""Every notebook runs from top to bottom: in `make test` with fewer steps and choices, in `make test-all` as it stands.

Cells, models and plots are the same in both; a short run leaves out repetition.
"""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
SHORTER = {  # notebook: what a short run replaces
    "01_finetune_smollm2": {"STEPS, EVAL_EVERY = 24, 8": "STEPS, EVAL_EVERY = 4, 2", "count=40": "count=8"},
    "02_adapters_and_formats": {
        "in formats.items()": 'in [(name, formats[name]) for name in ("nf4", "int4", "int2")]',
        "LAYERS, STEPS = 4, 12": "LAYERS, STEPS = 4, 2",
        "in adapters.items()": 'in [(name, adapters[name]) for name in ("lora", "lamda", "ia3")]',
    },
    "03_activation_memory": {
        '["none", "full", "8bit", "4bit", "full-4bit"]': '["none", "full", "4bit"]',
        "depths = [6, 12, 18]": "depths = [6, 18]",
        '("8bit", "full-8bit", "4bit", "full-4bit", "2bit")': '("8bit", "4bit")',
    },
    "04_optimizers": {
        "STEPS, BATCH, LENGTH = 150, 16, 64": "STEPS, BATCH, LENGTH = 20, 4, 64",
        "in contest.items()": 'in [(name, contest[name]) for name in ("AdamW", "GaLore", "FRUGAL")]',
        "(2, 6, 10)": "(2, 6)",
    },
    "05_sparse_attention": {
        "S, BLOCKS = 2048, (128, 128)": "S, BLOCKS = 1024, (128, 128)",
        "counts = [2, 4, 8, 16, 32]": "counts = [4, 32]",
        "room = 1024": "room = 512",
        "in compared.items()": "in list(compared.items())[1:3]",
    },
}


def shorten(notebook, changes):
    """Makes the replacements in the code of a notebook; each must be possible in one place."""
    for old, new in changes.items():
        (cell,) = (cell for cell in notebook.cells if cell.cell_type == "code" and cell.source.count(old) == 1)
        cell.source = cell.source.replace(old, new)


def run(notebook, folder, monkeypatch):
    """Runs a notebook on the devices of the tests, but compiled as usual: a notebook trains for a while."""
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
    where = {"metadata": {"path": folder}}
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources=where).execute()


def test_there_are_notebooks():
    assert NOTEBOOKS
    assert set(SHORTER) <= {path.stem for path in NOTEBOOKS}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path, tmp_path, monkeypatch):
    notebook = nbformat.read(path, as_version=4)
    shorten(notebook, SHORTER.get(path.stem, {}))
    run(notebook, tmp_path, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("path", [path for path in NOTEBOOKS if path.stem in SHORTER], ids=lambda path: path.stem)
def test_notebook_runs_as_it_stands(path, tmp_path, monkeypatch):
    run(nbformat.read(path, as_version=4), tmp_path, monkeypatch)
