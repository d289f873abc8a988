"""The explorer as a web application: addresses, and what each answers.

  /                  the pages: one file that shows whatever view the address names
  /static/NAME       their scripts and style
  /picture/KIND/N    PNG of a sample, a training image or an upload
  /api/…             the views as JSON, and as files to keep

Errors are JSON, {"error": "what came, what was expected, what to do"}.
"""

import functools
import hashlib
import importlib.resources
import json
import logging
import math
from collections.abc import Callable
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from jaxinf.explorer import exports, views
from jaxinf.explorer.alike import Alike
from jaxinf.explorer.findings import Findings, NotFound
from jaxinf.explorer.guard import Door, Guard
from jaxinf.explorer.thumbnails import THUMBNAIL, Thumbnails, png_of
from jaxinf.explorer.uploads import MOST_BYTES, Asked, Busy, Upload, Uploads
from jaxinf.explorer.views import Choice, Filter, View

PAGES = ("/", "/sample", "/training", "/image", "/what-if", "/self-influence", "/upload")
_KINDS = {"html": "text/html", "js": "text/javascript", "css": "text/css", "svg": "image/svg+xml"}
_TABLES = {"csv": "text/csv", "json": "application/json", "png": "image/png"}
_MOST_ASKED = 4 * 2**20  # bytes of a request that is no upload: the ids of 50,000 images
_FOREVER = "private, max-age=31536000, immutable"
_LOG = logging.getLogger("jaxinf")


class TooLarge(ValueError):
  """A request of more bytes than are taken."""


def application(findings: Findings, door: Door) -> Starlette:
  """The application that shows findings to who passes the door."""
  site = Site(findings)
  return Starlette(
    routes=site.routes(),
    middleware=[Middleware(Guard, door=door)],
    exception_handlers={
      NotFound: functools.partial(_failed, 404),
      Busy: functools.partial(_failed, 409),
      TooLarge: functools.partial(_failed, 413),
      ValueError: functools.partial(_failed, 400),
      HTTPException: _unknown,
      Exception: _broken,
    },
  )


class Site:
  """What each address answers.

  Args:
    findings: what is shown.
  """

  def __init__(self, findings: Findings):
    self._findings = findings
    arrays = {"train": findings.dataset.images}
    if findings.samples is not None:
      arrays["sample"] = findings.samples.data
    self._thumbnails, self._alike = Thumbnails(arrays), Alike(findings.dataset.images)
    self._uploads = None if findings.scorer is None else Uploads(findings.scorer)
    folder = importlib.resources.files("jaxinf.explorer") / "static"
    self._files = {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}

  def routes(self) -> list[BaseRoute]:
    """All addresses."""
    api: dict[str, Callable[[Request], View]] = {
      "run": lambda request: views.run_view(self._findings),
      "samples": lambda request: views.samples_view(self._findings, *_part(request)),
      "sample": self._sample,
      "compare": self._compare,
      "training": lambda request: views.training_view(
        self._findings, _filter(request), *_part(request)
      ),
      "image": lambda request: views.image_view(
        self._findings, _word(request, "id"), self._choice(request)
      ),
      "nearest": self._nearest,
      "self-influence": lambda request: views.own_view(
        self._findings, _word(request, "order", "largest") == "largest", *_part(request)
      ),
      "duplicates": self._duplicates,
      "upload": self._upload,
    }
    return [
      *(Route(path, self._page) for path in PAGES),
      Route("/static/{name}", self._static),
      Route("/picture/{kind}/{position:int}", self._picture),
      Route("/picture/upload/{name}", self._upload_picture),
      *(Route(f"/api/{name}", _as_json(view)) for name, view in api.items()),
      Route("/api/what-if", self._what_if, methods=["POST"]),
      Route("/api/upload", self._begin_upload, methods=["POST"]),
      Route("/api/export/{view}.{kind}", self._export, methods=["GET", "POST"]),
    ]

  def _page(self, request: Request) -> Response:
    return self._file(request, "index.html")

  def _static(self, request: Request) -> Response:
    return self._file(request, request.path_params["name"])

  def _file(self, request: Request, name: str) -> Response:
    """One of the files that were read at the start: no path is opened that a request names."""
    content, kind = self._files.get(name), _KINDS.get(name.rpartition(".")[2])
    if content is None or kind is None:
      raise NotFound(f"There is no file {name!r}.")
    tag = hashlib.sha256(content).hexdigest()[:16]
    return _cached(request, tag, "no-cache", lambda: content, f"{kind}; charset=utf-8")

  def _picture(self, request: Request) -> Response:
    kind, position = request.path_params["kind"], request.path_params["position"]
    whole = _word(request, "size", "small") == "whole"
    make = self._thumbnails.whole if whole else self._thumbnails.small
    version = self._findings.version
    age = _FOREVER if request.query_params.get("v") == version else "no-cache"
    tag = f"{version}-{kind}-{position}-{'whole' if whole else THUMBNAIL}"
    return _cached(request, tag, age, lambda: make(kind, position), "image/png")

  def _upload_picture(self, request: Request) -> Response:
    name = request.path_params["name"]
    return _cached(
      request,
      f"upload-{name}",
      _FOREVER,
      lambda: png_of(self._asked(name).image, None),
      "image/png",
    )

  def _sample(self, request: Request) -> View:
    k = _whole(request, "k", 12)
    return views.sample_view(
      self._findings, _word(request, "id"), self._choice(request), k, _filter(request)
    )

  def _compare(self, request: Request) -> View:
    first, second = self._choice(request), self._choice(request, "versus")
    k = _whole(request, "k", 12)
    return views.compare_view(self._findings, _word(request, "id"), first, second, k)

  def _nearest(self, request: Request) -> View:
    position = self._findings.position(_word(request, "id"))
    k = views.checked_shown(_whole(request, "k", 8))
    return {
      "rows": [
        views.entry(self._findings, n) | {"distance": views.number(distance)}
        for n, distance in self._alike.nearest(position, k)
      ]
    }

  def _duplicates(self, request: Request) -> View:
    k = views.checked_shown(_whole(request, "k", 24))
    pairs = self._alike.pairs(k)
    of = functools.partial(views.entry, self._findings)
    return {"rows": [{"first": of(i), "second": of(j), "distance": d} for i, j, d in pairs]}

  async def _what_if(self, request: Request) -> Response:
    asked = await _asked_json(request)
    return JSONResponse(await run_in_threadpool(self._removed, asked))

  def _removed(self, asked: dict[str, Any]) -> View:
    choice = self._choice_of(asked.get("source"), asked.get("damping"))
    ids, labels = asked.get("ids", []), asked.get("labels", [])
    texts = isinstance(ids, list) and all(isinstance(identity, str) for identity in ids)
    if not texts or not isinstance(labels, list) or not all(type(x) is int for x in labels):
      raise ValueError('Send {"ids": [texts], "labels": [whole numbers]}, one of them or both.')
    return views.what_if_view(self._findings, ids, labels, choice)

  def _upload(self, request: Request) -> View:
    upload = self._asked(_word(request, "name"))
    return views.upload_view(self._findings, upload, _whole(request, "k", 12), _filter(request))

  async def _begin_upload(self, request: Request) -> Response:
    if self._uploads is None:
      raise NotFound("There is no store to score images from: run the stage index, start again.")
    content = await _body(request, MOST_BYTES)
    damping = request.query_params.get("damping")
    asked = Asked(
      _word(request, "name", "upload"),
      _whole(request, "label", None),
      None if damping is None else _number(damping, "damping"),
    )
    name = await run_in_threadpool(self._uploads.begin, content, asked)
    return JSONResponse({"name": name}, 202)

  def _asked(self, name: str) -> Upload:
    upload = None if self._uploads is None else self._uploads.get(name)
    if upload is None:
      raise NotFound("This upload is forgotten: send the image again.")
    return upload

  async def _export(self, request: Request) -> Response:
    view, kind = request.path_params["view"], request.path_params["kind"]
    if kind not in _TABLES:
      raise NotFound(f"Files are {', '.join(_TABLES)}; got {kind!r}.")
    if (view == "what-if") != (request.method == "POST"):
      raise NotFound("What-if is asked by POST, all other files by GET.")
    asked = await _asked_json(request) if view == "what-if" else {}
    content = await run_in_threadpool(self._exported, request, view, kind, asked)
    name = f'attachment; filename="jaxinf-{view}.{kind}"'
    return Response(content, media_type=_TABLES[kind], headers={"Content-Disposition": name})

  def _exported(self, request: Request, view: str, kind: str, asked: dict[str, Any]) -> bytes:
    """The content of a file."""
    if kind == "png":
      return self._figure(request, view)
    head, rows = self._table(request, view, asked)
    return exports.csv_bytes(rows) if kind == "csv" else exports.json_bytes(head, rows)

  def _table(self, request: Request, view: str, asked: dict[str, Any]) -> tuple[View, list[View]]:
    findings, only = self._findings, _filter(request)
    if view == "sample":
      return exports.sample_table(findings, _word(request, "id"), self._choice(request), only)
    if view == "upload":
      upload = self._asked(_word(request, "name"))
      return {"upload": upload.asked.name}, exports.table_of(findings, _scores(upload), only)
    if view == "image":
      found = views.image_view(findings, _word(request, "id"), self._choice(request))
      return {"image": found["image"], **found.get("scores", {})}, exports.plain(found["samples"])
    if view == "what-if":
      found = self._removed(asked)
      head = {name: value for name, value in found.items() if name != "changes"}
      return head | {"removed": asked}, exports.plain(found["changes"])
    if view == "self-influence":
      found = views.own_view(findings, True, 0, len(findings.dataset))
      return {"damping": found["damping"]}, exports.plain(found["rows"])
    raise NotFound(f"There is no table of {view!r}.")

  def _figure(self, request: Request, view: str) -> bytes:
    findings, k = self._findings, views.checked_shown(_whole(request, "k", 8))
    if view == "sample":
      identity = _word(request, "id")
      scores = views.of_sample(findings, identity, self._choice(request))
      assert findings.samples is not None
      picture = findings.samples.data[findings.sample_position(identity)]
      return exports.figure(findings, scores, picture, identity, k)
    if view == "upload":
      upload = self._asked(_word(request, "name"))
      return exports.figure(findings, _scores(upload), upload.image, upload.asked.name, k)
    raise NotFound("A sample or an upload is drawn as PNG; other views are CSV and JSON.")

  def _choice(self, request: Request, prefix: str = "") -> Choice:
    """Of the parameters `source` and `damping`, or of `versus` and `versus_damping`."""
    source = request.query_params.get(prefix or "source")
    damping = request.query_params.get(f"{prefix}_damping" if prefix else "damping")
    return self._choice_of(source, None if damping is None else _number(damping, "damping"))

  def _choice_of(self, source: Any, damping: Any) -> Choice:
    """The scores of a source, None for the first, at a damping, None for its default."""
    if damping is None:
      return Choice(source, None)
    found = self._findings.source(source)
    there = [math.isclose(damping, x, rel_tol=1e-6) for x in found.dampings]
    if not any(there):
      dampings = ", ".join(f"{x:g}" for x in found.dampings) or "none"
      raise NotFound(f"{found.title} was scored at the dampings {dampings}; got {damping!r}.")
    return Choice(source, there.index(True))


def _as_json(view: Callable[[Request], View]) -> Callable[[Request], Response]:
  def endpoint(request: Request) -> Response:
    return JSONResponse(view(request), headers={"Cache-Control": "no-store"})

  return endpoint


def _cached(request: Request, tag: str, age: str, make: Callable[[], bytes], kind: str) -> Response:
  """What `make` gives, or that the browser has it already."""
  headers = {"ETag": f'"{tag}"', "Cache-Control": age}
  if f'"{tag}"' in request.headers.get("if-none-match", ""):
    return Response(status_code=304, headers=headers)
  return Response(make(), media_type=kind, headers=headers)


def _scores(upload: Upload) -> Any:
  if upload.scores is None:
    raise NotFound("This upload has no scores yet: wait until it is done.")
  return upload.scores


async def _asked_json(request: Request) -> dict[str, Any]:
  """The object that a request holds; ValueError where it is none."""
  try:
    asked = json.loads(await _body(request, _MOST_ASKED))
  except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
    raise ValueError("Send a JSON object.") from error
  if not isinstance(asked, dict):
    raise ValueError(f"Send a JSON object; got {type(asked).__name__}.")
  return asked


async def _body(request: Request, most: int) -> bytes:
  """The content of a request, of which no more than `most` bytes are ever read."""
  found = bytearray()
  async for part in request.stream():
    found += part
    if len(found) > most:
      raise TooLarge(f"At most {most / 2**20:g} MiB are taken: send a smaller file.")
  return bytes(found)


def _word(request: Request, name: str, default: str | None = None) -> str:
  """A parameter; ValueError where it is missing and there is no default."""
  value = request.query_params.get(name, default)
  if value is None:
    raise ValueError(f"The parameter {name} is missing.")
  return value


def _whole(request: Request, name: str, default: Any) -> Any:
  """A whole number of at most nine digits, or the default where it is not given."""
  value = request.query_params.get(name)
  if value is None or value == "":
    return default
  if not (value.isascii() and value.isdigit() and len(value) < 10):
    raise ValueError(f"{name} must be a whole number from 0; got {value[:20]!r}.")
  return int(value)


def _number(text: str, name: str) -> float:
  try:
    return float(text)
  except ValueError as error:
    raise ValueError(f"{name} must be a number; got {text[:20]!r}.") from error


def _part(request: Request) -> tuple[int, int]:
  """Which part of a long list: its start, and how many."""
  return _whole(request, "start", 0), views.checked_shown(_whole(request, "count", 100))


def _filter(request: Request) -> Filter:
  return Filter(_whole(request, "label", None), request.query_params.get("text", "")[:200])


def _failed(status: int, request: Request, error: Exception) -> Response:
  return JSONResponse({"error": str(error)}, status)


def _unknown(request: Request, error: Exception) -> Response:
  assert isinstance(error, HTTPException)
  text = f"There is no {request.method} {request.url.path}."
  return JSONResponse({"error": text}, error.status_code, headers=error.headers)


def _broken(request: Request, error: Exception) -> Response:
  _LOG.error("explore: %s failed", request.url.path, exc_info=error)
  return JSONResponse({"error": "This failed: see the terminal of jaxinf explore."}, 500)
