"""Who may ask: this machine's user, who has the token, under a name of this machine.

Pages of other sites can make a browser ask us, and a name that is first theirs can come to mean
127.0.0.1 (DNS rebinding). So every request must name a host that is ours and have the token, which
the first address carries and a cookie of this site keeps, and those that send something must come
from our own pages. Answers may run no script but ours.
"""

import dataclasses
import http.cookies
import ipaddress
import secrets
import urllib.parse

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse, PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

_HEADERS = {
  "Content-Security-Policy": (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
  ),
  "Cross-Origin-Opener-Policy": "same-origin",
  "Cross-Origin-Resource-Policy": "same-origin",
  "Referrer-Policy": "no-referrer",
  "X-Content-Type-Options": "nosniff",
}
_LOOPBACK = ("localhost", "127.0.0.1", "::1")
_NO_TOKEN = (
  "This address needs the token: open the address that jaxinf explore printed in its terminal, "
  "which ends in ?token=…"
)


@dataclasses.dataclass(frozen=True)
class Door:
  """What is asked of a request.

  Attributes:
    host: that is listened on; where it is not a name of this machine alone, other addresses of it,
      as numbers, are ours too.
    port: likewise. Cookies of one host are of all its ports, so that theirs has it in its name.
    token: a secret.
  """

  host: str
  port: int
  token: str

  @property
  def cookie(self) -> str:
    return f"jaxinf_{self.port}"

  @property
  def is_local(self) -> bool:
    """Whether only this machine can ask."""
    return self.host in _LOOPBACK

  def knows(self, host: str) -> bool:
    """Whether a Host header, with or without a port, names this machine.

    Any port, because a tunnel may end at another; it is names that can be made to mean us.
    """
    try:
      name = urllib.parse.urlsplit(f"//{host}").hostname
    except ValueError:
      return False
    if name is None:
      return False
    return name in (*_LOOPBACK, self.host) or (not self.is_local and _is_number(name))

  def admits(self, given: str | None) -> bool:
    """Whether that is the token."""
    return given is not None and secrets.compare_digest(given.encode(), self.token.encode())


class Guard:
  """An application that is asked only what passes the door.

  Args:
    app: the application.
    door: what is asked of requests.
  """

  def __init__(self, app: ASGIApp, door: Door):
    self._app, self._door = app, door

  async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
    if scope["type"] != "http":
      if scope["type"] == "lifespan":
        await self._app(scope, receive, send)
      return

    async def send_guarded(message: Message) -> None:
      if message["type"] == "http.response.start":
        headers = MutableHeaders(scope=message)
        for name, value in _HEADERS.items():
          headers[name] = value
      await send(message)

    answer = self._refusal(scope)
    await (self._app if answer is None else answer)(scope, receive, send_guarded)

  def _refusal(self, scope: Scope) -> Response | None:
    """What is answered instead, where a request does not pass; None where it does."""
    door, headers = self._door, Headers(scope=scope)
    host = headers.get("host", "")
    if not door.knows(host):
      return _refused(
        scope, 421, f"This is not the host {host!r}: use http://127.0.0.1:{door.port}"
      )
    query = urllib.parse.parse_qsl(scope["query_string"].decode("latin-1"), keep_blank_values=True)
    if scope["method"] == "GET" and door.admits(dict(query).get("token")):
      return self._entered(scope["path"], [pair for pair in query if pair[0] != "token"])
    bearer = headers.get("authorization", "")
    given = bearer[7:] if bearer.startswith("Bearer ") else _cookie(headers, door.cookie)
    if not door.admits(given):
      return _refused(scope, 401, _NO_TOKEN)
    if scope["method"] not in ("GET", "HEAD"):
      origin = headers.get("origin")
      if origin is not None and origin.partition("://")[2] != host:
        return _refused(scope, 403, f"Pages of {origin} may not ask this.")
    return None

  def _entered(self, path: str, query: list[tuple[str, str]]) -> Response:
    """To the same address without the token, which a cookie keeps from here on."""
    place = "/" + urllib.parse.quote(path.lstrip("/\\"))  # never to another host
    answer = RedirectResponse(f"{place}?{urllib.parse.urlencode(query)}" if query else place, 303)
    answer.set_cookie(self._door.cookie, self._door.token, httponly=True, samesite="lax")
    return answer


def _cookie(headers: Headers, name: str) -> str | None:
  try:
    found = http.cookies.SimpleCookie(headers.get("cookie", "")).get(name)
  except http.cookies.CookieError:
    return None
  return None if found is None else found.value


def _is_number(name: str) -> bool:
  try:
    ipaddress.ip_address(name)
  except ValueError:
    return False
  return True


def _refused(scope: Scope, status: int, why: str) -> Response:
  if scope["path"].startswith("/api/"):
    return JSONResponse({"error": why}, status)
  return PlainTextResponse(why, status)
