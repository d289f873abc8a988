"""In a real browser links, sliders, ticks and keys lead where the numbers say; texts stay texts."""

import contextlib
import json
import socket
import threading
import time

import numpy as np
import pytest

pytest.importorskip("uvicorn", reason="the extra explore is not installed")

from jaxinf.explorer import serve
from tests.explorer.browser import PROGRAM, Browser
from tests.explorer.examples import SCRIPT, TOKEN, findings, png

LARGE = 50_000
NAMES = "[...document.querySelectorAll('ol.tiles .name')].map((name) => name.textContent)"
ROWS = "[...document.querySelectorAll('tbody tr')]"
CELLS = ROWS + ".map((row) => [row.querySelector('a').textContent, row.cells[2].textContent])"
LIGHT = """{
  const theme = document.getElementById("theme");
  theme.value = "light";
  theme.dispatchEvent(new Event("change"));
}"""
GRID = "document.querySelectorAll('.grid li').length"


@contextlib.contextmanager
def served(found):
  """The address at which findings are shown."""
  sock = serve.listening("127.0.0.1", 0)
  port = sock.getsockname()[1]
  server = serve.server_of(found, "127.0.0.1", port, TOKEN)
  thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]}, daemon=True)
  thread.start()
  while not server.started and thread.is_alive():
    time.sleep(0.01)
  try:
    yield serve.address_of("127.0.0.1", port)
  finally:
    server.should_exit = True
    thread.join()


@pytest.fixture
def browser(tmp_path):
  if PROGRAM is None:
    pytest.skip("chromium is not installed")
  with Browser(tmp_path) as browser:
    yield browser


def minus(text: str) -> float:
  return float(text.replace("−", "-"))


def test_a_run_is_explored_with_mouse_and_keys(browser, tmp_path):
  found = findings()
  scores = found.scores()
  with served(found) as home:
    browser.open(f"{home}/?token={TOKEN}")
    assert browser.until(f"location.search === '' && {GRID}") == 4
    assert browser.do("document.cookie") == ""  # scripts do not see the token
    # Samples → one sample: its supporters, in the order of the scores.
    browser.do("document.querySelector('.grid li:nth-child(3) a').click()")
    browser.until(f"{NAMES}.length === 24")
    shown = scores.top(12).ids[2].tolist() + scores.bottom(12).ids[2].tolist()
    assert browser.do(NAMES) == shown
    assert browser.do("location.pathname + location.search") == "/sample?id=sample_2"
    # The slider of dampings, by an arrow key: the address follows, and the slider keeps the focus.
    browser.do("document.querySelector('[name=damping]').focus()")
    browser.press("ArrowRight")
    browser.until("location.search.includes('damping=0.0001') && document.querySelector('main h1')")
    shown = found.scores("attribute", 1).top(12).ids[2].tolist()
    browser.until(f"{NAMES}.slice(0, 12).join('/') === {json.dumps('/'.join(shown))}")
    assert browser.do("document.activeElement.name") == "damping"
    # Ticks → what if: the predicted changes, by the scores that are shown first.
    for identity in shown[:2]:
      box = json.dumps(f"[aria-label='remove {identity}']")
      browser.do(f"document.querySelector({box}).click()")
    browser.do("document.querySelector('#ticked a').click()")
    rows = dict(browser.until(f"{CELLS}.length === 4 && {CELLS}"))
    changes = scores.predicted_change(shown[:2])
    exponent = 3 * np.floor(np.log10(np.abs(changes.changes).max()) / 3)
    for q, change in enumerate(changes.changes):
      assert minus(rows[f"sample_{q}"].split(" ")[0]) == pytest.approx(
        change / 10**exponent, abs=0.06
      )
    # The address alone brings it back.
    browser.open(browser.do("location.href"))
    assert dict(browser.until(f"{CELLS}.length === 4 && {CELLS}")) == rows
    # An id that is a script is a text.
    browser.open(f"{home}/training?text=script")
    browser.until("document.querySelector('.grid .name')")
    assert browser.do("document.querySelector('.grid .name').textContent") == SCRIPT
    assert browser.do("document.scripts.length") == 2
    # An upload, watched until it is done.
    (tmp_path / "mine.png").write_bytes(png(found.dataset.images[4, ..., 0]))
    browser.open(f"{home}/upload")
    browser.until("document.querySelector('[name=file]')")
    browser.attach("[name=file]", tmp_path / "mine.png")
    browser.do("document.querySelector('form button').click()")
    browser.until("document.querySelector('progress')?.value === 3")
    found.scorer.ready.set()
    assert browser.until(f"{NAMES}[0]") == "elsewhere.png"
    # The system's colours, and the switch.
    ground = "getComputedStyle(document.body).backgroundColor"
    assert browser.do(ground) == "rgb(255, 255, 255)"
    browser.prefer(dark=True)
    assert browser.until(f"{ground} !== 'rgb(255, 255, 255)'")
    browser.do(LIGHT)
    assert browser.do(ground) == "rgb(255, 255, 255)"
    assert browser.errors == []


def test_fifty_thousand_images_are_a_few_tiles_at_a_time(browser):
  found = findings(LARGE, sources={}, scorer=None, self_influence=None)
  with served(found) as home:
    browser.open(f"{home}/training?token={TOKEN}")
    browser.until(GRID)
    browser.do("document.querySelector('.grid a').focus()")
    browser.press("End")
    last = "document.activeElement.closest('li')?.getAttribute('aria-posinset')"
    browser.until(f"{last} === '{LARGE}'")
    browser.press("ArrowUp")
    assert 0 < LARGE - int(browser.until(f"{last} !== '{LARGE}' && {last}")) < 20
    assert 0 < browser.do(GRID) < 150
    assert browser.errors == []


def test_a_taken_port_says_what_to_do():
  with socket.create_server(("127.0.0.1", 0)) as taken:
    port = taken.getsockname()[1]
    with pytest.raises(
      ValueError, match=f"Cannot listen on 127.0.0.1:{port} .*: choose another --port"
    ):
      serve.listening("127.0.0.1", port)


@pytest.mark.parametrize(
  ("host", "address"),
  [
    ("127.0.0.1", "http://127.0.0.1:9"),
    ("0.0.0.0", "http://127.0.0.1:9"),
    ("::1", "http://[::1]:9"),
  ],
)
def test_the_printed_address_opens_in_a_browser(host, address):
  assert serve.address_of(host, 9) == address
