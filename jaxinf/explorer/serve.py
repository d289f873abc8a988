"""The command `explore`: a run in the browser, until it is interrupted."""

import secrets
import socket

from jaxinf.engine import processes
from jaxinf.explorer.findings import findings_of
from jaxinf.runs.run import Run

_MOST_HEAD = 2**18  # bytes of a request's line and headers: ids of ticked images are in the address


def explore(run: Run) -> None:
  """Serves what a run has found, and prints the address that opens it.

  Raises:
    ValueError: starlette and uvicorn are not installed, the address cannot be listened on, or there
      is nothing to show.
  """
  if processes.count() > 1:
    raise ValueError("explore takes one process: start it alone.")
  try:
    import uvicorn

    from jaxinf.explorer.app import application
    from jaxinf.explorer.guard import Door
  except ImportError as error:
    raise ValueError(
      f"explore needs starlette and uvicorn ({error}): install them with pip install "
      "'jaxinf[explore]'."
    ) from error
  with _listening(*run.address) as sock:
    findings = findings_of(run)
    host, port = run.address[0], sock.getsockname()[1]
    door = Door(host, port, secrets.token_urlsafe(24))
    config = uvicorn.Config(
      application(findings, door),
      log_level="warning",
      access_log=False,
      server_header=False,
      h11_max_incomplete_event_size=_MOST_HEAD,
      timeout_graceful_shutdown=1,
    )
    print(f"open {address_of(host, port)}/?token={door.token}", flush=True)
    if not door.is_local:
      print(f"Whoever reaches {host}:{port} and has this token can read the run.", flush=True)
    uvicorn.Server(config).run(sockets=[sock])


def address_of(host: str, port: int) -> str:
  """The address that a browser opens."""
  name = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
  return f"http://{name}:{port}"


def _listening(host: str, port: int) -> socket.socket:
  """A socket there; port 0 is any that is free."""
  try:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host, port), family=family)
  except (OSError, OverflowError) as error:
    raise ValueError(
      f"Cannot listen on {host}:{port} ({error}): choose another --port, 0 for any that is free."
    ) from error
