"""The explorers under a real hand: JupyterLab in Chromium, sliders moved by keyboard and mouse while models train."""

import contextlib
import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import nbformat
import pytest

from mbkit import widgets

pytestmark = pytest.mark.browser

ROOT = Path(__file__).parent.parent
CHROMIUM = "/usr/bin/chromium"
FLAGS = "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync"
FLAGS += " --disable-background-networking --disable-component-update"
EXPLORERS = [name for name in widgets.__all__ if name.startswith("explore_")]
LONG = {  # so that they still train when the next slider is moved
    "explore_consistency": "epochs=60",
    "explore_learning_rates": "num_rates=4, num_seeds=2, steps=100_000",
    "explore_trainability": "size=16, steps=5_000",
}
PAGES = {
    "jupyterlab": "doc/tree/{}?reset&token=test",
    "notebook": "notebooks/{}?token=test",
    "voila": "voila/render/{}?token=test",
}
# What training changes by itself; everything else in the status line changes by hand only.
MOVING = "state generation drawn step loss diverged largest-difference verdict ms-a-model-and-step".split()
KERNEL = "() => window.jupyterapp?.shell.currentWidget?.sessionContext?.session?.kernel?.status === 'idle'"
STATE = "state => document.querySelector('.mbkit-status')?.dataset.state === state"
PYTHON = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """A Jupyter server of its own, with settings of its own; yields its folder and its address."""
    base = tmp_path_factory.mktemp("lab")
    root = base / "notebooks"
    root.mkdir()
    names = ["JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR"]
    names += ["JUPYTERLAB_SETTINGS_DIR", "JUPYTERLAB_WORKSPACES_DIR"]
    env = {**os.environ, **{name: str(base / name.lower()) for name in names}}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [env.get("PYTHONPATH"), str(ROOT)]))
    config = base / "jupyter_config_dir" / "labconfig"
    config.mkdir(parents=True)
    quiet = {"@jupyterlab/apputils-extension:notification": {"fetchNews": "false", "checkForUpdates": False}}
    (config / "default_setting_overrides.json").write_text(json.dumps(quiet))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = f"-m jupyterlab --no-browser --allow-root --ServerApp.ip=127.0.0.1 --ServerApp.port={port}"
    command += f" --ServerApp.port_retries=0 --IdentityProvider.token=test --ServerApp.root_dir={root}"
    command += " --LabApp.expose_app_in_browser=True --LabApp.extension_manager=readonly"
    command += " --JupyterNotebookApp.expose_app_in_browser=True"
    log = (base / "log").open("w")
    server = subprocess.Popen(
        [sys.executable, *command.split()], env=env, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
    )
    try:
        address = f"http://127.0.0.1:{port}"
        for _ in range(300):
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{address}/api?token=test", timeout=5):
                break
            assert server.poll() is None, (base / "log").read_text()
            time.sleep(0.2)
        else:
            pytest.fail(f"JupyterLab did not start:\n{(base / 'log').read_text()}")
        yield root, address
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(20)
        log.close()


@pytest.fixture
def page(request):
    """A page whose console must stay free of errors; a screenshot is kept in .ci/out where a test fails."""
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        pytest.fail("Expected playwright: pip install -e '.[dev]'.")
    if not Path(CHROMIUM).exists():
        pytest.fail(f"Expected Chromium as {CHROMIUM}: apt-get install chromium.")
    before, errors = request.session.testsfailed, []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS.split())
        page = browser.new_page(viewport={"width": 1300, "height": 1000})
        page.set_default_timeout(60_000)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        yield page
        if errors or request.session.testsfailed > before:
            out = ROOT / ".ci" / "out"
            out.mkdir(parents=True, exist_ok=True)
            page.screenshot(path=out / f"{request.node.name}.png")
        browser.close()
    assert not errors or any(other in request.node.name for other in ("notebook", "voila")), (
        errors
    )  # they have own ones


def open_and_run(lab, page, cells, frontend="jupyterlab"):
    """Open a notebook, or one of these code cells, and run it."""
    if importlib.util.find_spec(frontend) is None:
        pytest.skip(f"{frontend} is not installed")
    root, address = lab
    name = f"{frontend}-{time.time_ns()}.ipynb"
    if isinstance(cells, Path):
        shutil.copy(cells, root / name)
    else:
        cells = [nbformat.v4.new_code_cell(source) for source in cells]
        nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=PYTHON), root / name)
    page.goto(f"{address}/{PAGES[frontend].format(name)}")
    if frontend != "voila":
        run_all(page)


def run_all(page):
    page.wait_for_function(KERNEL)
    page.locator(".jp-CodeCell").first.wait_for()
    page.evaluate("() => void window.jupyterapp.commands.execute('notebook:run-all-cells')")


ASKED = """moving => { const status = document.querySelector('.mbkit-status');
    const marked = Object.values(status.attributes).filter(each => !moving.includes(each.name.replace('data-', '')));
    return marked.map(each => each.name + '=' + each.value).join() + status.querySelector('code').textContent; }"""


class Explorer:
    """An explorer on the page, as its reader sees it."""

    def __init__(self, page):
        self.page, self.status = page, page.locator(".mbkit-status")
        self.image = page.locator("img.widget-image")
        self.status.wait_for()
        self.image.scroll_into_view_if_needed()

    def __getitem__(self, name):
        return self.status.get_attribute(f"data-{name}")

    def handle(self, name):
        return self.page.locator(f'.widget-inline-hbox:has(label:text-is("{name}")) .noUi-handle').first

    def settled(self, after=0, state="idle"):
        """Wait for a picture of a later request than `after`; return it."""
        self.page.wait_for_function(
            """([state, after]) => { const data = document.querySelector('.mbkit-status')?.dataset;
            return data && data.state === state && +data.drawn > after && data.drawn === data.generation
                && !document.querySelector('img.widget-image.mbkit-outdated'); }""",
            arg=[state, after],
        )
        self.page.wait_for_function("() => document.querySelector('img.widget-image').naturalWidth > 0")
        return self.image.get_attribute("src")

    def asked(self):
        """What the status line says has been asked for: the line of code, and what is marked."""
        return self.page.evaluate(ASKED, MOVING)

    def drag(self, handle, pixels):
        handle.scroll_into_view_if_needed()
        box = handle.bounding_box()
        x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
        self.page.mouse.move(x, y)
        self.page.mouse.down()
        for part in range(1, 6):
            self.page.mouse.move(x + pixels * part / 5, y)
        self.page.mouse.up()


SOURCE = """import torch
from mbkit import widgets

torch.set_num_threads(1)
explorer = widgets.{}({})
explorer.{}
explorer"""


PAUSED = SOURCE.format("explore_learning_rates", LONG["explore_learning_rates"], "request(paused=True)")


@pytest.mark.parametrize(("frontend", "width"), [("jupyterlab", 1280), ("notebook", 800), ("voila", 800)])
@pytest.mark.parametrize("name", EXPLORERS)
def test_every_control_answers_to_keyboard_and_mouse_while_it_trains(lab, page, name, frontend, width):
    page.set_viewport_size({"width": width, "height": 900})
    open_and_run(lab, page, [SOURCE.format(name, LONG.get(name, ""), "request(paused=True)")], frontend)
    explorer = Explorer(page)
    page.wait_for_function("() => +document.querySelector('.mbkit-status')?.dataset.drawn > 0")
    page.wait_for_function("() => document.querySelector('img.widget-image').naturalWidth === 860")

    box, natural = explorer.image.bounding_box(), explorer.image.evaluate("image => image.naturalHeight")
    assert box["height"] / box["width"] == pytest.approx(natural / 860, abs=0.01)  # smaller, but not squeezed
    assert box["width"] <= width
    assert "step" in explorer.image.get_attribute("alt")
    cut = "nodes => nodes.filter(node => node.scrollWidth > node.clientWidth + 1).map(node => node.textContent)"
    assert page.locator(".mbkit-explorer .widget-label, .mbkit-explorer .widget-readout").evaluate_all(cut) == []

    def moves(act):
        asked, picture = explorer.asked(), explorer.image.get_attribute("src")
        act()
        page.wait_for_function(f"([moving, before]) => ({ASKED})(moving) !== before", arg=[MOVING, asked])
        page.wait_for_function(
            """before => { const image = document.querySelector('img.widget-image');
            return image.src !== before && !image.classList.contains('mbkit-outdated'); }""",
            arg=picture,
        )

    handles = page.locator(".noUi-handle")
    for handle in map(handles.nth, range(handles.count())):
        for hand in ("keyboard", "mouse"):
            low, now, high = (float(handle.get_attribute(f"aria-value{end}")) for end in ("min", "now", "max"))
            assert low < high
            up = now < (low + high) / 2
            handle.focus()
            key = "ArrowRight" if up else "ArrowLeft"
            moves(lambda: page.keyboard.press(key) if hand == "keyboard" else explorer.drag(handle, 20 if up else -20))  # noqa: B023
    for select in page.locator(".mbkit-explorer select:enabled").all():
        values = select.evaluate("node => [...node.options].map(option => option.value)")
        other = next(value for value in values if value != select.input_value())
        moves(lambda: select.select_option(other))  # noqa: B023
    assert explorer["state"] in ("running", "idle", "paused")
    page.get_by_role("button", name="Reset").click()
    if name in LONG:
        page.get_by_role("button", name="Stop").click()
        page.wait_for_function(STATE, arg="stopped")
        assert page.get_by_role("button", name="Pause").is_disabled()
        page.get_by_role("button", name="Step").click()
        page.wait_for_function(STATE, arg="paused")
        page.wait_for_function("() => document.querySelector('.mbkit-status').dataset.step === '1'")


def test_the_lesson_of_the_published_table_runs_and_its_causes_can_be_taken_away(lab, page):
    open_and_run(lab, page, ROOT / "notebooks" / "02_stale_gradients.ipynb")
    explorer = Explorer(page)
    explorer.settled()
    assert (explorer["verdict"], explorer["largest-difference"]) == ("DIVERGENT", "9.3%")
    for name, value in {"gradients": "cleared", "weights": "same", "order": "same"}.items():
        before = int(explorer["generation"])
        page.locator(f'.widget-dropdown:has(label:text-is("{name}")) select').select_option(value)
        explorer.settled(before)
    assert (explorer["verdict"], explorer["faults"]) == ("CONSISTENT", "none")


def test_a_click_on_the_map_moves_the_mark_and_the_zoom_follows_the_edge(lab, page):
    open_and_run(lab, page, [SOURCE.format("explore_trainability", "size=32, steps=30", "wait()")])
    explorer = Explorer(page)
    explorer.settled()
    box, rate = explorer.image.bounding_box(), explorer["first-rate"]
    page.mouse.click(box["x"] + 0.12 * box["width"], box["y"] + 0.8 * box["height"])
    page.wait_for_function("rate => document.querySelector('.mbkit-status').dataset.firstRate !== rate", arg=rate)
    assert float(explorer["first-rate"]) < 0.05
    page.get_by_role("button", name="Reset").click()
    explorer.settled()


def test_a_cell_run_again_and_a_kernel_that_ended_are_told(lab, page):
    open_and_run(
        lab, page, [SOURCE.format("explore_learning_rates", LONG["explore_learning_rates"], "request(paused=True)")]
    )
    explorer = Explorer(page)
    explorer.settled(state="paused")
    page.evaluate("() => { document.querySelector('.mbkit-explorer').dataset.old = '1'; }")
    run_all(page)
    page.locator(".mbkit-explorer:not([data-old])").wait_for()
    explorer.settled(state="paused")
    assert page.locator(".mbkit-explorer").count() == 1
    page.get_by_role("button", name="Go on").click()
    page.wait_for_function(STATE, arg="running")
    assert not page.locator(".mbkit-dead").is_visible()
    page.evaluate("() => void window.jupyterapp.shell.currentWidget.sessionContext.session.kernel.restart()")
    page.locator(".mbkit-dead").wait_for()
    assert not page.locator(".mbkit-state").is_visible()


def test_a_grid_is_trained_anew_while_it_trains(lab, page):
    open_and_run(
        lab, page, [SOURCE.format("explore_learning_rates", LONG["explore_learning_rates"], "request(paused=True)")]
    )
    explorer = Explorer(page)
    explorer.settled(state="paused")
    page.get_by_role("button", name="Go on").click()
    explorer.settled(state="running")

    before = int(explorer["generation"])
    explorer.handle("seeds").focus()
    for _ in range(3):
        page.keyboard.press("ArrowRight")  # while it trains
    explorer.settled(before, state="running")
    assert explorer["models"] == "20"

    before, picture = explorer["rate"], explorer.image.get_attribute("src")
    explorer.drag(explorer.handle("show rate"), 40)
    page.wait_for_function("rate => document.querySelector('.mbkit-status').dataset.rate !== rate", arg=before)
    page.wait_for_function("before => document.querySelector('img.widget-image').src !== before", arg=picture)

    page.get_by_role("button", name="Stop").click()
    explorer.settled(state="stopped")
    assert 0 < int(explorer["step"]) < 100_000
