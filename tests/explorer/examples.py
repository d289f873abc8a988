"""A run as arrays: nothing is trained, and nothing of JAX is compiled."""

import dataclasses
import io
import threading
from collections.abc import Callable

import numpy as np
from PIL import Image

from jaxinf.data.dataset import Dataset
from jaxinf.explorer.findings import Findings, Samples, Source
from jaxinf.explorer.uploads import Asked, Tell, fitted, picture_in
from jaxinf.scores.models import mean_scores
from jaxinf.scores.scores import Scores
from jaxinf.scores.self_influence import SelfInfluence

NUM_TRAIN, NUM_SAMPLES = 30, 4
DAMPINGS = (1e-6, 1e-4)
SCRIPT = "<script>alert(1)</script>.png"  # an id, as a file may have it
TOKEN = "a-token"


def dataset_of(num: int = NUM_TRAIN) -> Dataset:
  """Grey 8 × 8 images of three labels with names and captions; the last two are the same."""
  images = np.random.default_rng(0).integers(0, 256, (num, 8, 8, 1)).astype(np.uint8)
  images[-1] = images[-2]
  ids = [f"cats/tabby {n:02d}.png" for n in range(num)]
  ids[1] = SCRIPT
  captions = np.array([f"number {n} & <b>more</b>" for n in range(num)])
  labels = np.arange(num) % 3
  return Dataset("toys", images, np.array(ids), labels, ("cat", "dog", "<i>owl"), captions=captions)


def scores_of(dataset: Dataset, damping: float, seed: int = 0, **settings) -> Scores:
  """Of two models, with three replicates of training draws and two of query draws."""
  ids = np.array([f"sample_{q}" for q in range(NUM_SAMPLES)])

  def of_model(seed: int) -> Scores:
    rng = np.random.default_rng(seed)
    of = lambda num: (1e-5 * rng.normal(size=(num, NUM_SAMPLES, len(dataset)))).astype(np.float32)
    said = {"measurement": "loss", "damping": damping, "draws": 8, **settings}
    return Scores(of(3), ids, dataset.ids, said, of(2), dataset.labels)

  return mean_scores([of_model(2 * seed), of_model(2 * seed + 1)])


@dataclasses.dataclass
class Scorer:
  """Stands for a store: scores are the images' overlap with the upload, once `ready` is set."""

  dataset: Dataset
  needs_label: bool = False
  damping: float = 1e-4
  ready: threading.Event = dataclasses.field(default_factory=threading.Event)

  def image_of(self, content: bytes) -> np.ndarray:
    return fitted(picture_in(content), self.dataset.image_shape)

  def scores(self, image: np.ndarray, asked: Asked, tell: Tell) -> Scores:
    tell("gradients of the image", 3, 10)
    assert self.ready.wait(60)
    if asked.damping == 1:
      raise ValueError("The damping is too large.")
    values = (self.dataset.images.astype(np.float32) * image).mean(axis=(1, 2, 3))[None, None]
    # The store has another order, and an image that is not in the data set.
    ids = np.append(self.dataset.ids[::-1], "elsewhere.png")
    values = np.append(values[..., ::-1], values.max(keepdims=True) + 1, axis=2)
    return Scores(values, np.array([asked.name]), ids, {"measurement": "loss", "damping": 1e-4})


def findings(
  num: int = NUM_TRAIN, read: Callable[[], list[Scores]] | None = None, **fields
) -> Findings:
  """What a run has found: scores at two dampings, those of another method, self-influence."""
  dataset = dataset_of(num)
  rng = np.random.default_rng(5)
  ids = np.array([f"sample_{q}" for q in range(NUM_SAMPLES)])
  data = rng.uniform(-1, 1, (NUM_SAMPLES, 8, 8, 1)).astype(np.float32)
  own = SelfInfluence(
    rng.uniform(0, 1, num).astype(np.float32),
    np.full(num, 0.01, np.float32),
    dataset.ids,
    {"damping": 1e-4, "biased": False},
  )
  read = read or (lambda: [scores_of(dataset, x, seed) for seed, x in enumerate(DAMPINGS)])
  other = lambda: [scores_of(dataset, 1e-2, 7, measurement=None)]
  sources = [
    Source("attribute", "attribute (loss)", DAMPINGS, "λ", 0, read),
    Source("score/pixel", "pixel", (), "", 0, other),
  ]
  given = {
    "samples": Samples(ids, data, [f"label {q}" for q in range(NUM_SAMPLES)]),
    "sources": {source.name: source for source in sources},
    "self_influence": own,
    "scorer": Scorer(dataset),
  }
  return Findings(dataset, "v1", **(given | fields))


def png(pixels: np.ndarray, kind: str = "PNG") -> bytes:
  """A file of grey [H, W] or coloured [H, W, 3] pixels."""
  buffer = io.BytesIO()
  Image.fromarray(pixels).save(buffer, kind)
  return buffer.getvalue()
