"""The command `explore`: a run in the browser, until it is interrupted."""

import secrets
import socket
from typing import Any

from jaxinf.engine import processes
from jaxinf.explorer.findings import Findings, findings_of
from jaxinf.runs.run import Run

_MOST_HEAD = 2**18  # bytes of a request's line and headers: ids of ticked images are in the address
_PUBLIC = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}  # all addresses, and one that a browser opens


def explore(run: Run) -> None:
  """Serves what a run has found, and prints the address that opens it.

  Raises:
    ValueError: starlette and uvicorn are not installed, the address cannot be listened on, there is
      nothing to show, or there are several processes.
  """
  if processes.count() > 1:
    raise ValueError("explore takes one process: start it alone.")
  host, token = run.address[0], secrets.token_urlsafe(24)
  with listening(*run.address) as sock:
    port = sock.getsockname()[1]
    server = server_of(findings_of(run), host, port, token)
    print(f"open {address_of(host, port)}/?token={token}", flush=True)
    if host in _PUBLIC:
      print(f"Whoever reaches port {port} and has this token can read the run.", flush=True)
    server.run(sockets=[sock])


def server_of(findings: Findings, host: str, port: int, token: str) -> Any:
  """A uvicorn.Server that shows findings to who has the token.

  Raises:
    ValueError: starlette or uvicorn is not installed.
  """
  try:
    import uvicorn

    from jaxinf.explorer.app import application
    from jaxinf.explorer.guard import Door
  except ImportError as error:
    raise ValueError(
      f"explore needs starlette and uvicorn ({error}): install them with pip install "
      "'jaxinf[explore]'."
    ) from error
  config = uvicorn.Config(
    application(findings, Door(host, port, token)),
    log_level="warning",
    access_log=False,
    server_header=False,
    h11_max_incomplete_event_size=_MOST_HEAD,
    timeout_graceful_shutdown=1,
  )
  return uvicorn.Server(config)


def address_of(host: str, port: int) -> str:
  """The address that a browser opens."""
  name = _PUBLIC.get(host, f"[{host}]" if ":" in host else host)
  return f"http://{name}:{port}"


def listening(host: str, port: int) -> socket.socket:
  """A socket that listens there; port 0 is any that is free.

  Raises:
    ValueError: another program does, or the host is no address of this machine.
  """
  try:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host, port), family=family)
  except (OSError, OverflowError) as error:
    raise ValueError(
      f"Cannot listen on {host}:{port} ({error}): choose another --port, 0 for any that is free."
    ) from error
