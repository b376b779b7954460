"""The notebook runs from its first cell to its last, for a few steps."""

from pathlib import Path

import nbformat
import quick_compiler
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parent.parent / "examples" / "tiny_mixtral.ipynb"


def _outputs(cell):
    texts = (each.get("text", "") or each.get("data", {}).get("text/plain", "") for each in cell.outputs)
    return "".join(texts)


def test_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PYTHONPATH", str(NOTEBOOK.parent.parent))
    monkeypatch.setenv("XLA_FLAGS", quick_compiler.FLAGS)
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    assert all(not cell.get("outputs") for cell in notebook.cells)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert code[0].source.startswith("STEPS = 100")
    code[0].source = code[0].source.replace("100", "6")
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    said = [_outputs(cell) for cell in code]
    assert "step 6/6" in said[1]
    assert "loss " in said[2]
    assert len(said[3].splitlines()) > 10
    assert said[4].startswith("def decode(")
    assert "config.json" in said[5]
    assert float(said[5].split("logit:")[1]) < 1e-3
