"""The committed notebooks are complete: executed, without errors, with their pictures, and small.

That they run, within a limit a cell, is tested by nbmake, which plain `pytest` uses on notebooks/; conftest.py adds
that they print nothing to stderr and show their figures when they run.
"""

import base64
import io
import itertools
import re
from pathlib import Path

import nbformat
import pytest
from conftest import complaints
from PIL import Image

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("[0-9]*.ipynb"))
MOST_BYTES = 300_000

every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def read(path):
    return nbformat.read(path, as_version=4)


def code(path):
    return [cell for cell in read(path).cells if cell.cell_type == "code"]


def outputs(path):
    return [output for cell in code(path) for output in cell.outputs]


@every_notebook
def test_it_is_valid_and_small(path):
    nbformat.validate(read(path))
    assert path.stat().st_size < MOST_BYTES


@every_notebook
def test_it_is_executed_from_top_to_bottom(path):
    assert [cell.execution_count for cell in code(path)] == list(range(1, len(code(path)) + 1))


@every_notebook
def test_it_carries_nothing_of_the_machine_it_ran_on(path):
    notebook = read(path)
    assert "widgets" not in notebook.metadata
    assert "language_info" not in notebook.metadata
    assert not any("execution" in cell.metadata for cell in notebook.cells)
    assert not re.search(r"/(home|root|tmp|work)/", path.read_text())


@every_notebook
def test_nothing_went_wrong_in_it(path):
    kinds = {(output.output_type, output.get("name")) for output in outputs(path)}
    assert not any(kind == "error" or name == "stderr" for kind, name in kinds)


@every_notebook
def test_its_figures_are_there_without_a_kernel(path):
    pictures = [output.data["image/png"] for output in outputs(path) if "image/png" in output.get("data", {})]
    assert len(pictures) >= 3
    for picture in pictures:
        image = Image.open(io.BytesIO(base64.b64decode(picture)))
        assert image.width >= 600
        assert len(image.convert("L").getcolors()) > 10
    explorers = [cell for cell in code(path) if "widgets.explore" in cell.source]
    assert explorers
    assert all("image/png" in cell.outputs[-1].data for cell in explorers)


@every_notebook
def test_it_teaches_as_the_others_do(path):
    cells = read(path).cells
    text = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    assert cells[0].source.startswith("# ")
    assert "## Exercises" in text
    assert "Predict" in text
    solutions = re.findall("<details>.*?</details>", text, re.S)
    assert text.count("<details>") == len(solutions) >= 3
    assert all("```python" in solution and "assert" in solution for solution in solutions)  # conftest.py runs them
    assert sum("assert " in cell.source for cell in code(path)) >= 5
    assert max(len(cell.source.splitlines()) for cell in code(path)) <= 40
    first = next(cell for cell in code(path))
    assert "torch.__version__" in first.source
    assert "seed" in first.source


def test_the_index_shows_each_lesson_and_each_links_to_the_next():
    index, _, installs = read(NOTEBOOKS[0].parent / "index.ipynb").cells
    assert installs.execution_count == 1
    assert "is ready" in installs.outputs[0].text
    shown = re.findall(r"\[!\[[^]]+\]\(attachment:(\d\d)\.png\)\]\((\S+)\.ipynb\)", index.source)
    assert shown == [(path.stem[:2], path.stem) for path in NOTEBOOKS]
    for number, _ in shown:
        picture = base64.b64decode(index.attachments[f"{number}.png"]["image/png"])
        assert len(Image.open(io.BytesIO(picture)).convert("L").getcolors()) > 10
    for path, after in itertools.pairwise(NOTEBOOKS):
        assert f"]({after.name})" in read(path).cells[-1].source


def test_noise_and_missing_figures_are_complained_about():
    def cell(source, *outputs):
        return nbformat.v4.new_code_cell(source, outputs=list(outputs))

    noise = nbformat.v4.new_output("stream", name="stderr", text="a warning")
    said = nbformat.v4.new_output("stream", name="stdout", text="a number")
    figure = nbformat.v4.new_output("display_data", data={"image/png": "iVBORw0KGgo="})
    good = [cell("plots.accuracy(x)", figure), cell("print(1)", said), nbformat.v4.new_markdown_cell("plots.")]
    assert complaints(nbformat.v4.new_notebook(cells=good)) == []
    bad = [*good, cell("x = 1\nwidgets.explore_faults()"), cell("f()", noise)]
    assert complaints(nbformat.v4.new_notebook(cells=bad)) == [(4, "stderr: a warning"), (3, "no figure")]
