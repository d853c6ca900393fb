"""How fluid the graph page is: `python benchmarks/graph_page.py [--nodes N]`, one JSON line.

A graph of 5,000 features, 26 layers and two million edges in Chromium without a GPU at 1280 x 800. Each time is from an
input event until the frame that shows its effect is done; median and slowest of 20. `edges` times the server's answer
for one node's links; `ratio` is the limit of 100 ms over the slowest scroll, filter or selection.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import shutil
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import uvicorn

sys.path.insert(0, str(Path(__file__).parents[1]))
from clt.serve.graph_library import GraphLibrary
from clt.serve.graph_server import create_app
from tests.synthetic_graphs import write_graph_folder

FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-background-networking"]
REPETITIONS = 20
LIMIT_MS = 100

# Resolves after the frame that follows the change has been drawn.
_TIMED = """async ([what, value]) => {
  const act = {
    scroll: () => document.querySelector('[data-testid=graph]').scrollBy(value, 0),
    filter: () => {
      const slider = document.querySelector('[data-testid=influence]')
      slider.value = value
      slider.dispatchEvent(new Event('input', { bubbles: true }))
    },
    hover: () => {
      const graph = document.querySelector('[data-testid=graph]')
      const box = graph.getBoundingClientRect()
      const at = { clientX: box.left + 80 + value, clientY: box.top + 200, bubbles: true }
      graph.dispatchEvent(new PointerEvent('pointermove', at))
    },
    search: () => {
      const field = document.querySelector('[data-testid=search]')
      field.value = value
      field.dispatchEvent(new Event('input', { bubbles: true }))
    },
  }[what]
  const frame = () => new Promise((done) => requestAnimationFrame(() => setTimeout(done)))
  await frame()
  const begin = performance.now()
  act()
  await frame()
  await frame()
  return performance.now() - begin
}"""


def measured(page: Any) -> dict[str, list[float]]:
    """Milliseconds of every interaction."""
    page.get_by_test_id("influence").fill("1")
    for _ in range(2):
        page.get_by_role("button", name="Zoom in").click()
    page.wait_for_timeout(500)
    values: dict[str, list[Any]] = {
        "scroll": [-60] * REPETITIONS,
        "filter": [0.5 + 0.5 * (n % 10) / 10 for n in range(REPETITIONS)],
        "hover": [n * 35 for n in range(REPETITIONS)],
        "search": ["dallas", "l7 capital", "feature 3", "state"] * (REPETITIONS // 4),
    }
    return {what: [page.evaluate(_TIMED, [what, value]) for value in each] for what, each in values.items()}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nodes", type=int, default=5000, help="features of the graph")
    parser.add_argument("--inputs", type=int, default=400, help="edges into each of them, at most")
    options = parser.parse_args()
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None or importlib.util.find_spec("playwright") is None:
        print(json.dumps({"benchmark": "graph_page", "skipped": "needs Chromium and playwright"}))
        return
    playwright = importlib.import_module("playwright.sync_api")
    with tempfile.TemporaryDirectory() as folder, playwright.sync_playwright() as driver:
        root = Path(folder)
        write_graph_folder(root / "large", n_features=options.nodes, n_layers=26, inputs_per_row=options.inputs)
        library = GraphLibrary(root)
        server = uvicorn.Server(uvicorn.Config(create_app(library), port=0, log_level="error", ws="none"))
        threading.Thread(target=server.run, daemon=True).start()
        while not server.started:
            time.sleep(0.02)
        address = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
        browser = driver.chromium.launch(executable_path=chromium, args=FLAGS)
        page = browser.new_page(viewport={"width": 1280, "height": 800})
        begin = time.perf_counter()
        page.goto(address)
        page.get_by_test_id("count").wait_for()
        open_seconds = time.perf_counter() - begin
        times = measured(page)
        view = library.view("large")
        begin = time.perf_counter()
        for node in range(100):
            view.links(node * 37)
        link_ms = (time.perf_counter() - begin) * 10
        browser.close()
        server.should_exit = True
    slowest = max(max(times[what]) for what in ("scroll", "filter"))
    result: dict[str, Any] = {"benchmark": "graph_page", "nodes": view.n_nodes, "edges": len(view.edges)}
    result |= {"open_s": round(open_seconds, 2), "links_ms": round(link_ms, 3)}
    for what, each in times.items():
        result[what] = {"median_ms": round(statistics.median(each), 1), "slowest_ms": round(max(each), 1)}
    print(json.dumps({**result, "ratio": round(LIMIT_MS / slowest, 2)}))


if __name__ == "__main__":
    main()
