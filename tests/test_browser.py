"""The explorers under a real hand: JupyterLab in Chromium, sliders moved by keyboard and mouse while models train."""

import contextlib
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
# What training changes by itself; everything else in the status line changes by hand only.
MOVING = "state generation drawn step loss diverged largest-difference verdict ms-a-model-and-step".split()
KERNEL = "() => window.jupyterapp?.shell.currentWidget?.sessionContext?.session?.kernel?.status === 'idle'"


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """A JupyterLab of its own, with settings of its own; yields its folder and its address."""
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
    assert not errors, errors


def open_and_run(page, address, name):
    page.goto(f"{address}/doc/tree/{name}?reset&token=test")
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


def test_lesson_1_answers_to_keyboard_and_mouse(lab, page):
    root, address = lab
    shutil.copy(ROOT / "notebooks" / "02_stale_gradients.ipynb", root)
    open_and_run(page, address, "02_stale_gradients.ipynb")
    explorer = Explorer(page)
    first = explorer.settled()
    assert explorer["verdict"] == "DIVERGENT"
    assert explorer["largest-difference"] == "9.3%"

    before = int(explorer["generation"])
    explorer.handle("seed").focus()
    page.keyboard.press("PageUp")
    second = explorer.settled(before)
    assert second != first

    before = int(explorer["generation"])
    explorer.drag(explorer.handle("seed"), 60)
    third = explorer.settled(before)
    assert third not in (first, second)

    for name, value in {"gradients": "cleared", "weights": "same", "order": "same"}.items():
        before = int(explorer["generation"])
        page.locator(f'.widget-dropdown:has(label:text-is("{name}")) select').select_option(value)
        explorer.settled(before)
    assert explorer["faults"] == "none"
    assert explorer["verdict"] == "CONSISTENT"


def open_explorer(lab, page, name):
    """Open one that trains for long, in a notebook of its own; it is paused."""
    root, address = lab
    source = "import torch\ntorch.set_num_threads(1)\nfrom mbkit import widgets\n"
    source += f"explorer = widgets.{name}({LONG.get(name, '')})\n"
    source += "explorer.pause.value = True  # or showing it would wait for the end\nexplorer"
    python = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)], metadata=python)
    nbformat.write(notebook, root / f"{name}.ipynb")
    open_and_run(page, address, f"{name}.ipynb")
    return Explorer(page)


@pytest.mark.parametrize("name", EXPLORERS)
def test_every_slider_answers_to_keyboard_and_mouse_while_it_trains(lab, page, name):
    explorer = open_explorer(lab, page, name)
    handles = page.locator(".noUi-handle")
    assert handles.count() >= 2
    explorer.page.wait_for_function("() => +document.querySelector('.mbkit-status')?.dataset.drawn > 0")
    for index in range(handles.count()):
        handle = handles.nth(index)
        for hand in ("keyboard", "mouse"):
            low, now, high = (float(handle.get_attribute(f"aria-value{end}")) for end in ("min", "now", "max"))
            assert low < high
            asked, picture = explorer.asked(), explorer.image.get_attribute("src")
            up = now < (low + high) / 2
            if hand == "keyboard":
                handle.focus()
                page.keyboard.press("ArrowRight" if up else "ArrowLeft")
            else:
                explorer.drag(handle, 20 if up else -20)
            page.wait_for_function(f"([moving, before]) => ({ASKED})(moving) !== before", arg=[MOVING, asked])
            page.wait_for_function(
                """before => { const image = document.querySelector('img.widget-image');
                return image.src !== before && !image.classList.contains('mbkit-outdated'); }""",
                arg=picture,
            )
            assert explorer["state"] in ("running", "idle", "paused")
    page.locator("button", has_text="Reset").click()
    page.locator("button", has_text="Stop").click()
    page.wait_for_function("() => ['stopped', 'idle'].includes(document.querySelector('.mbkit-status').dataset.state)")


def test_a_grid_is_trained_anew_while_it_trains(lab, page):
    explorer = open_explorer(lab, page, "explore_learning_rates")
    explorer.settled(state="paused")
    page.locator("button", has_text="Pause").click()
    explorer.settled(state="running")

    before = int(explorer["generation"])
    explorer.handle("seeds").focus()
    for _ in range(3):
        page.keyboard.press("ArrowRight")  # while it trains
    picture = explorer.settled(before, state="running")
    assert explorer["models"] == "20"

    before = explorer["rate"]
    explorer.drag(explorer.handle("show rate"), 40)
    page.wait_for_function("rate => document.querySelector('.mbkit-status').dataset.rate !== rate", arg=before)
    assert explorer.image.get_attribute("src") != picture

    page.locator("button", has_text="Stop").click()
    explorer.settled(state="stopped")
    assert 0 < int(explorer["step"]) < 100_000
