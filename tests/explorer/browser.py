"""A real browser without a window: Chromium, spoken to in its DevTools protocol over two pipes."""

import base64
import fcntl
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

PROGRAM = shutil.which("chromium") or shutil.which("chromium-browser")
DEADLINE = 60  # seconds for what takes one on an idle machine

# Puts the pipes where Chromium expects them, 3 to read and 4 to write, and becomes it.
_BECOME = "import os, sys; r, w = map(int, sys.argv[1:3]); os.dup2(r, 3); os.dup2(w, 4); \
os.execv(sys.argv[3], sys.argv[3:])"
_FLAGS = (
  "--headless",
  "--no-sandbox",
  "--disable-gpu",
  "--disable-dev-shm-usage",
  "--no-first-run",
)


class Browser:
  """One page of a browser that ends with the `with` block.

  Args:
    profile: an empty folder.
    width, height: of the page in pixels.
    dark: whether the system is said to prefer dark colours.
  """

  def __init__(self, profile: Path, *, width: int = 1200, height: int = 900, dark: bool = False):
    self._number, self._waiting = 0, b""
    theirs_in, self._out = os.pipe()
    self._in, theirs_out = os.pipe()
    ends = [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 20) for end in (theirs_in, theirs_out)]
    command = [sys.executable, "-I", "-c", _BECOME, *map(str, ends), str(PROGRAM), *_FLAGS]
    command += ["--remote-debugging-pipe", f"--user-data-dir={profile}", "about:blank"]
    self._process = subprocess.Popen(
      command, pass_fds=ends, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
    )
    for end in (theirs_in, theirs_out, *ends):
      os.close(end)
    os.set_blocking(self._in, False)
    self._session = None
    (target,) = [t for t in self.call("Target.getTargets")["targetInfos"] if t["type"] == "page"]
    attached = self.call("Target.attachToTarget", targetId=target["targetId"], flatten=True)
    self._session = attached["sessionId"]
    self.errors: list[str] = []
    self.call("Runtime.enable")
    self.call("Log.enable")
    self.resize(width, height)
    self.prefer(dark)

  def __enter__(self) -> "Browser":
    return self

  def __exit__(self, *exc_info) -> None:
    self._session = None
    self.call("Browser.close")  # its children too, which write to its folder to the last
    try:
      self._process.wait(timeout=DEADLINE)
    finally:
      self._process.kill()
    os.close(self._in)
    os.close(self._out)

  def resize(self, width: int, height: int) -> None:
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
    self.call("Emulation.setDeviceMetricsOverride", **size)

  def prefer(self, dark: bool) -> None:
    scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    self.call("Emulation.setEmulatedMedia", features=[scheme])

  def open(self, address: str) -> None:
    self.call("Page.navigate", url=address)

  def do(self, script: str) -> Any:
    """The value of an expression, awaited where it is a promise."""
    found = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
    if "exceptionDetails" in found:
      raise AssertionError(f"{script}: {found['exceptionDetails']}")
    return found["result"].get("value")

  def until(self, script: str) -> Any:
    """The value of an expression, once it is true; True where it is an element."""
    script = f"((found) => found instanceof Element || found)({script})"
    deadline = time.monotonic() + DEADLINE
    while time.monotonic() < deadline:
      if found := self.do(script):
        return found
      time.sleep(0.05)
    raise AssertionError(f"not in time: {script}; the page: {self.do('document.body.innerText')}")

  def press(self, key: str) -> None:
    """A key, by the name that JavaScript has for it."""
    code = {"Tab": 9, "Enter": 13, "ArrowRight": 39, "ArrowUp": 38, "End": 35}[key]
    text = {"Enter": "\r"}.get(key)
    for kind in ("keyDown", "keyUp"):
      fields = {"text": text} if text and kind == "keyDown" else {}
      self.call("Input.dispatchKeyEvent", type=kind, key=key, windowsVirtualKeyCode=code, **fields)

  def attach(self, selector: str, file: Path) -> None:
    """Chooses a file in a file input."""
    root = self.call("DOM.getDocument")["root"]["nodeId"]
    node = self.call("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
    self.call("DOM.setFileInputFiles", nodeId=node, files=[str(file)])

  def picture(self) -> bytes:
    """PNG of what is seen."""
    return base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"])

  def call(self, method: str, **parameters: Any) -> dict:
    """The answer to a command of the protocol."""
    self._number += 1
    message = {"id": self._number, "method": method, "params": parameters}
    if self._session is not None:
      message["sessionId"] = self._session
    os.write(self._out, json.dumps(message).encode() + b"\0")
    while True:
      answer = self._received()
      if answer.get("id") == self._number:
        if "error" in answer:
          raise AssertionError(f"{method}: {answer['error']}")
        return answer["result"]
      self._heard(answer)

  def _heard(self, event: dict) -> None:
    """Keeps what went wrong on the page."""
    name, given = event.get("method"), event.get("params", {})
    if name == "Runtime.exceptionThrown":
      self.errors.append(str(given["exceptionDetails"]))
    elif name == "Log.entryAdded" and given["entry"]["level"] == "error":
      self.errors.append(f"{given['entry']['text']} {given['entry'].get('url', '')}")

  def _received(self) -> dict:
    deadline = time.monotonic() + DEADLINE
    while b"\0" not in self._waiting:
      try:
        part = os.read(self._in, 2**16)
        if not part:
          raise AssertionError("the browser ended")
        self._waiting += part
      except BlockingIOError:
        if time.monotonic() > deadline:
          raise AssertionError("the browser does not answer") from None
        time.sleep(0.01)
    message, _, self._waiting = self._waiting.partition(b"\0")
    return json.loads(message)
