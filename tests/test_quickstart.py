"""The notebook of docs/ runs from its first cell to its last, with the commands that an installation has."""

import os
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

from w2v2.__main__ import DATA_SCRIPTS, SCRIPTS

ROOT = Path(__file__).resolve().parents[1]


def write_commands(folder):
    """What pip makes of the entry points, on this checkout."""
    folder.mkdir()
    text = f'#!{sys.executable}\nfrom w2v2.__main__ import main\nif __name__ == "__main__":\n    main()\n'
    for name in SCRIPTS + DATA_SCRIPTS:
        command = folder / f"w2v2-{name.replace('_', '-')}"
        command.write_text(text)
        command.chmod(0o755)


FEWER = {"--max_steps 100": "--max_steps 20", "_steps 40": "_steps 10"}  # updates, for the test alone


def test_the_notebook_runs(tmp_path, monkeypatch):
    write_commands(tmp_path / "bin")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    for name in ("IPYTHONDIR", "JUPYTER_CONFIG_DIR", "TMPDIR"):
        monkeypatch.setenv(name, str(tmp_path))
    notebook = nbformat.read(ROOT / "docs" / "quickstart.ipynb", as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in code), "store it without outputs"
    for number, fewer in FEWER.items():
        assert any(number in cell.source for cell in code)
        for cell in code:
            cell.source = cell.source.replace(number, fewer)
    NotebookClient(notebook, timeout=900, resources={"metadata": {"path": str(tmp_path)}}).execute()
    (folder,) = tmp_path.glob("quickstart-*")
    assert code[0].outputs[0].text.strip() == str(folder)
    assert all((folder / "runs" / name).is_file() for name in ("pretrained/report.html", "ctc/model.safetensors"))
    assert code[-1].outputs[-1].data["text/plain"].startswith("torch.Size([1, ")
