"""Only who has the token is answered; what cannot be is refused in words; files hold all scores."""

import csv
import io
import json
import struct
import time
import zlib

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("starlette", reason="the extra explore is not installed")
from starlette.testclient import TestClient

from jaxinf.explorer import views
from jaxinf.explorer.app import PAGES, application
from jaxinf.explorer.guard import Door
from jaxinf.explorer.uploads import MOST_BYTES, MOST_PIXELS
from jaxinf.explorer.views import Choice, Filter
from tests.explorer.examples import NUM_TRAIN, SCRIPT, TOKEN, findings, png

HOME = "http://127.0.0.1:8765"
GREY = png(np.arange(64, dtype=np.uint8).reshape(8, 8))


@pytest.fixture
def found():
  return findings()


@pytest.fixture
def client(found):
  with client_of(found) as client:
    yield client


def client_of(found, host="127.0.0.1", token=TOKEN, **given):
  app = application(found, Door(host, 8765, TOKEN))
  headers = {"Authorization": f"Bearer {token}"} if token else {}
  return TestClient(app, base_url=HOME, headers=headers, follow_redirects=False, **given)


def refusal(answer, status):
  assert answer.status_code == status, answer.text
  return answer.json()["error"]


@pytest.mark.parametrize(
  "host", ["evil.example", "evil.example:8765", "10.0.0.5", "", "[::1", "a@b"]
)
def test_other_hosts_are_refused_even_with_the_token(client, host):
  assert "This is not the host" in refusal(client.get("/api/run", headers={"Host": host}), 421)


@pytest.mark.parametrize("host", ["127.0.0.1:9", "localhost:8765", "[::1]:8765", "LOCALHOST"])
def test_names_of_this_machine_are_its_own_at_any_port(client, host):
  assert client.get("/api/run", headers={"Host": host}).status_code == 200


def test_a_public_address_answers_to_numbers_and_its_name_only(found):
  client = client_of(found, host="0.0.0.0")
  assert client.get("/api/run", headers={"Host": "10.0.0.5:8765"}).status_code == 200
  refusal(client.get("/api/run", headers={"Host": "evil.example"}), 421)


@pytest.mark.parametrize("path", [*PAGES, "/static/main.js", "/picture/train/0", "/api/run", "/no"])
def test_without_the_token_there_is_nothing(found, path):
  for token in (None, "another", ""):
    answer = client_of(found, token=token).get(path)
    assert answer.status_code == 401 and "needs the token" in answer.text


def test_the_first_address_gives_a_cookie_and_leaves_the_token_out(found):
  client = client_of(found, token=None)
  answer = client.get(f"/sample?id=a%26b&token={TOKEN}&k=3")
  assert (answer.status_code, answer.headers["location"]) == (303, "/sample?id=a%26b&k=3")
  assert (
    "HttpOnly" in answer.headers["set-cookie"] and "jaxinf_8765=" in answer.headers["set-cookie"]
  )
  assert client.get("/api/run").status_code == 200  # by the cookie
  away = client.get(f"http://127.0.0.1:8765//evil.example/?token={TOKEN}")
  assert away.headers["location"] == "/evil.example/"
  asked = client.post("/api/what-if", json={}, headers={"Origin": "http://evil.example"})
  assert "may not ask this" in refusal(asked, 403)


def test_every_answer_forbids_foreign_scripts(client):
  for path in ("/", "/api/run", "/static/main.js", "/nowhere"):
    headers = client.get(path).headers
    assert "script-src 'self'" in headers["content-security-policy"]
    assert headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize(
  "path",
  [
    "/static/../app.py", "/static/%2e%2e/app.py", "/static/..%2fapp.py", "/static/app.py",
    "/static//etc/passwd", "/static/%2fetc%2fpasswd", "/picture/train/-1", "/picture/train/1e9",
    "/picture/../train", "/picture/none/0", "/api/../setup.cfg", "/api/export/sample.exe",
    f"/picture/train/{NUM_TRAIN}", "/picture/upload/..%2f..%2fx", "/api/nothing",
  ],
)  # fmt: skip
def test_paths_lead_nowhere_else(client, path):
  refusal(client.get(path), 404)


@pytest.mark.parametrize(
  ("path", "complaint"),
  [
    ("/api/sample", "The parameter id is missing"),
    ("/api/sample?id=sample_0&k=no", "k must be a whole number from 0; got 'no'"),
    ("/api/sample?id=sample_0&k=0", "k and count must lie in 1…500; got 0"),
    ("/api/sample?id=sample_0&k=99999999999999", "k must be a whole number"),
    ("/api/sample?id=sample_0&label=9", "label is a number in 0…2; got 9"),
    ("/api/sample?id=sample_0&damping=x", "damping must be a number; got 'x'"),
    ("/api/training?count=501", "k and count must lie in 1…500"),
  ],
)
def test_questions_without_sense_say_what_to_do(client, path, complaint):
  assert complaint in refusal(client.get(path), 400)


def test_an_unknown_damping_is_answered_with_those_that_there_are(client):
  answer = client.get("/api/sample?id=sample_0&damping=1e-5")
  assert "at the dampings 1e-06, 0.0001; got 1e-05" in refusal(answer, 404)


@pytest.mark.parametrize("body", ["", "[]", "{", '{"ids": "x"}', '{"labels": [true]}', "[" * 10**5])
def test_what_if_takes_an_object_of_lists(client, body):
  assert refusal(client.post("/api/what-if", content=body), 400).startswith("Send ")


def test_views_are_as_json_what_they_are(client, found):
  asked = {"id": "sample_1", "k": 4, "damping": 1e-4, "label": 1}
  shown = views.sample_view(found, "sample_1", Choice("attribute", 1), 4, Filter(1))
  assert client.get("/api/sample", params=asked).json() == json.loads(json.dumps(shown))
  removed = {"ids": [SCRIPT], "labels": [2], "source": "score/pixel", "damping": None}
  shown = views.what_if_view(found, [SCRIPT], [2], Choice("score/pixel"))
  assert client.post("/api/what-if", json=removed).json() == json.loads(json.dumps(shown))


def test_ids_are_data_and_never_markup(client):
  """Pages are one file for all views, and JSON says what it is."""
  page = client.get("/image", params={"id": SCRIPT})
  assert page.content == client.get("/").content
  assert page.headers["content-type"] == "text/html; charset=utf-8"
  answer = client.get("/api/image", params={"id": SCRIPT})
  assert answer.headers["content-type"] == "application/json"
  assert answer.json()["image"]["id"] == SCRIPT


def test_pictures_are_the_pixels_and_are_sent_once(client, found):
  answer = client.get("/picture/train/3?v=v1")
  pixels = np.asarray(Image.open(io.BytesIO(answer.content)))
  np.testing.assert_array_equal(pixels, found.dataset.images[3, ..., 0])
  assert "immutable" in answer.headers["cache-control"]
  tag = answer.headers["etag"]
  again = client.get("/picture/train/3", headers={"If-None-Match": tag})
  assert (again.status_code, again.content, again.headers["cache-control"]) == (
    304,
    b"",
    "no-cache",
  )
  assert client.get("/picture/sample/3").headers["etag"] != tag


def test_files_hold_all_scores(client, found):
  """One row a training image; the sums of a what-if are those of the view."""
  scores = found.scores("attribute", 0)
  text = client.get("/api/export/sample.csv?id=sample_2").content.decode()
  rows = list(csv.DictReader(io.StringIO(text, newline="")))
  assert [row["id"] for row in rows] == found.dataset.ids.tolist()
  for name, values in (("score", scores.values), ("std_error", scores.std_errors)):
    assert [float(row[name]) for row in rows] == values[2].tolist()
  answer = client.get("/api/export/sample.json?id=sample_2&label=1")
  assert answer.headers["content-disposition"] == 'attachment; filename="jaxinf-sample.json"'
  assert answer.json()["damping"] == 1e-6 and len(answer.json()["rows"]) == NUM_TRAIN // 3
  asked = {"ids": [SCRIPT], "labels": []}
  removed = client.post("/api/export/what-if.json", json=asked).json()
  changes = scores.predicted_change([SCRIPT]).changes
  np.testing.assert_allclose([row["change"] for row in removed["rows"]], changes, rtol=1e-12)
  for view in ("image.csv?id=" + found.dataset.ids[0], "self-influence.csv"):
    assert client.get(f"/api/export/{view}").status_code == 200
  picture = client.get("/api/export/sample.png?id=sample_2&k=2").content
  assert Image.open(io.BytesIO(picture)).size[0] > 500


def bomb(side: int = 60_000) -> bytes:
  """A PNG of a few bytes that says to be side × side pixels."""
  header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
  chunk = lambda kind, data: (
    struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
  )
  return (
    b"\x89PNG\r\n\x1a\n"
    + chunk(b"IHDR", header)
    + chunk(b"IDAT", zlib.compress(b"\0"))
    + chunk(b"IEND", b"")
  )


@pytest.mark.parametrize(
  ("content", "status", "complaint"),
  [
    (b"", 400, "is no image that can be read"),
    (b"GIF89a" + GREY, 400, "send a PNG, JPEG, WebP or BMP file"),
    (b"<svg xmlns='http://www.w3.org/2000/svg'/>", 400, "is no image that can be read"),
    (GREY[:44], 400, "is damaged"),
    (bomb(), 400, f"has at most {MOST_PIXELS:,} pixels: shrink it first"),
    (bomb(5_000), 400, f"has at most {MOST_PIXELS:,} pixels; this one has 5,000 × 5,000"),
    (png(np.zeros((8, 8, 4), np.uint8)), 400, "transparent"),
    (GREY + bytes(MOST_BYTES), 413, "At most 16 MiB are taken"),
  ],
  ids=["empty", "gif", "svg", "cut off", "bomb", "large", "transparent", "bytes"],
)
def test_uploads_that_are_no_sound_images_are_refused(client, content, status, complaint):
  assert complaint in refusal(client.post("/api/upload", content=content), status)


def scored(client, name):
  deadline = time.monotonic() + 60
  while (shown := client.get(f"/api/upload?name={name}&k=3").json())["state"] == "running":
    assert time.monotonic() < deadline
    time.sleep(0.01)
  return shown


def test_an_upload_is_scored_while_others_wait(client, found):
  """A coloured image of another size becomes grey and small; scores go by the store's ids."""
  pixels = np.random.default_rng(1).integers(0, 256, (40, 32, 3)).astype(np.uint8)
  name = client.post("/api/upload?name=<b>mine.png", content=png(pixels)).json()["name"]
  shown = client.get(f"/api/upload?name={name}").json()
  assert (shown["state"], shown["done"], shown["total"]) == ("running", 3, 10) or shown["done"] == 0
  assert "wait until it is done" in refusal(client.post("/api/upload", content=GREY), 409)
  found.scorer.ready.set()
  shown = scored(client, name)
  assert (shown["state"], shown["name"]) == ("done", "<b>mine.png")
  grey = np.asarray(Image.fromarray(pixels).convert("L"))[4:36]
  picture = client.get(f"/picture/upload/{name}").content
  small = np.asarray(Image.open(io.BytesIO(picture)))
  np.testing.assert_array_equal(small, np.rint(grey.reshape(8, 4, 8, 4).mean(axis=(1, 3))))
  # One of the store's images is not in the data set: it has no position, and no filter keeps it.
  assert shown["supporting"][0] | {"score": None} == {
    "position": None, "id": "elsewhere.png", "label": None, "caption": None,
    "score": None, "error": None, "modelError": None,
  }  # fmt: skip
  overlap = (found.dataset.images[..., 0] * small.astype(np.float64)).mean(axis=(1, 2))
  assert shown["supporting"][1]["position"] == int(np.argmax(overlap))
  rows = client.get(f"/api/export/upload.json?name={name}&label=0").json()["rows"]
  assert len(rows) == NUM_TRAIN // 3


def test_an_upload_that_fails_says_why(client, found):
  found.scorer.ready.set()
  name = client.post("/api/upload?damping=1", content=GREY).json()["name"]
  shown = scored(client, name)
  assert (shown["state"], shown["step"]) == ("failed", "The damping is too large.")
  assert "positive" in refusal(client.post("/api/upload?damping=-1", content=GREY), 400)
  assert "send the image again" in refusal(client.get("/api/upload?name=other"), 404)


def test_a_run_without_store_or_scores_says_which_stage_is_missing():
  client = client_of(findings(scorer=None, sources={}))
  assert "run the stage index" in refusal(client.post("/api/upload", content=GREY), 404)
  assert "run the stage attribute" in refusal(client.get("/api/sample?id=sample_0"), 404)
  assert client.get("/api/run").json()["store"] is None


def test_a_fault_of_ours_is_told_without_its_inside(found, caplog):
  broken = findings(read=lambda: 1 / 0)
  answer = client_of(broken, raise_server_exceptions=False).get("/api/sample?id=sample_0")
  assert refusal(answer, 500) == "This failed: see the terminal of jaxinf explore."
  assert "ZeroDivisionError" in caplog.text
