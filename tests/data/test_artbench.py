"""ArtBench-10 from its tar or folder: decoded as Pillow does, lazily, and refused where broken."""

import dataclasses
import io
import logging
import tarfile

import numpy as np
import pytest
from PIL import Image

from jaxinf.core import arrays
from jaxinf.data import DataConfig, load
from jaxinf.data.dataset import stratified_positions
from jaxinf.data.resizing import resized
from tests.data.artbench_tar import ARTBENCH, ROOT, STYLES, decoded, picture, write_artbench


@pytest.fixture(scope="module")
def published(tmp_path_factory):
  """(path of a tar, its training files by id)."""
  path = tmp_path_factory.mktemp("artbench") / "split.tar"
  return path, write_artbench(path, np.random.default_rng(0).permutation(30).tolist())


def config(path, name="artbench", **options):
  return DataConfig(name, path=str(path), **options)


def rewritten(path, target, **changes):
  """The tar with members replaced, by their training ids; None leaves one out."""
  with tarfile.open(path) as old, tarfile.open(target, "w") as new:
    for member in old:
      content = old.extractfile(member).read()
      content = changes.get(member.name.removeprefix(f"{ROOT}/train/"), content)
      if content is not None:
        member.size = len(content)
        new.addfile(member, io.BytesIO(content))
  return target


def test_ids_labels_and_pixels_are_those_of_the_training_files(published):
  path, files = published
  dataset = load(config(path))
  assert dataset.ids.tolist() == sorted(files) and dataset.random_flip
  assert dataset.label_names == STYLES
  assert [STYLES[n] for n in dataset.labels] == [i.split("/")[0] for i in dataset.ids]
  for name, image in zip(dataset.ids, dataset.images, strict=True):
    np.testing.assert_array_equal(image, decoded(files[name]))


def test_the_extracted_folder_is_the_same_data_set(published, tmp_path):
  path, _ = published
  with tarfile.open(path) as tar:
    tar.extractall(tmp_path, filter="data")
  whole = load(config(path)).fingerprint()
  for folder in (tmp_path, tmp_path / ROOT):
    assert load(config(folder)).fingerprint() == whole
  # Ids are those of `folder`, so that scores of one can be read with the other.
  assert load(config(tmp_path / ROOT / "train", "folder")).fingerprint() == whole


def test_images_beyond_what_memory_is_given_are_decoded_when_asked_for(published, monkeypatch):
  path, _ = published
  whole = load(config(path))
  monkeypatch.setattr(arrays, "_MOST_HELD_BYTES", whole.images.nbytes - 1)
  lazy = load(config(path))
  assert isinstance(lazy.images, arrays.Rows) and lazy.images.nbytes == whole.images.nbytes
  assert lazy.fingerprint() == whole.fingerprint()
  rows = np.array([7, 2, 2, 29])
  for found in (lazy.images[rows], arrays.read_rows(lazy.images, rows)):
    np.testing.assert_array_equal(found, whole.images[rows])
  np.testing.assert_array_equal(lazy.images[-1], whole.images[-1])
  np.testing.assert_array_equal(np.asarray(lazy.images), whole.images)
  assert isinstance(lazy.take(rows[:2]).images, np.ndarray)
  monkeypatch.setattr(arrays, "_MOST_HELD_BYTES", 200)
  some = lazy.take(rows[[0, 1, 3]])
  assert isinstance(some.images, arrays.Rows)
  assert some.fingerprint() == whole.take(rows[[0, 1, 3]]).fingerprint()


def test_a_lazy_image_that_is_damaged_is_named_when_it_is_read(published, tmp_path, monkeypatch):
  path, files = published
  bad = sorted(files)[11]
  broken = rewritten(path, tmp_path / "broken.tar", **{bad: files[bad][:200]})
  with pytest.raises(ValueError, match=f"train/{bad}: expected a readable image"):
    load(config(broken))
  monkeypatch.setattr(arrays, "_MOST_HELD_BYTES", 0)
  images = load(config(broken)).images
  assert len(images[:11]) == 11
  with pytest.raises(ValueError, match=f"train/{bad}: expected a readable image.*skip_damaged"):
    images[9:13]


def test_damaged_images_are_left_out_where_asked_and_named(published, tmp_path, caplog):
  path, files = published
  bad = [sorted(files)[n] for n in (3, 20)]
  broken = rewritten(path, tmp_path / "broken.tar", **{bad[0]: b"", bad[1]: files[bad[1]][:150]})
  caplog.set_level(logging.WARNING, "jaxinf")
  some = load(config(broken, skip_damaged=True))
  (line,) = [r.getMessage() for r in caplog.records if "cannot be read" in r.getMessage()]
  assert "2 of 30 images" in line and all(name in line for name in bad)
  kept = np.setdiff1d(sorted(files), bad)
  assert some.fingerprint() == load(config(path)).select(kept).fingerprint()


def test_a_size_divides_or_not_and_is_that_of_the_shared_resizing(published):
  path, _ = published
  whole = load(config(path)).images
  for size in (4, 3):
    np.testing.assert_array_equal(load(config(path, image_size=size)).images, resized(whole, size))


def test_artbench2_has_as_many_of_two_styles_drawn_by_seed(published, monkeypatch, tmp_path):
  path, _ = published
  monkeypatch.setattr(ARTBENCH, "_ARTBENCH2_STYLE_SIZE", 2)
  whole, dataset = load(config(path)), load(config(path, "artbench2"))
  assert dataset.label_names == ("post_impressionism", "ukiyo_e")
  assert dataset.labels.tolist() == [0, 0, 1, 1]
  both = whole.take(np.flatnonzero(np.isin(whole.labels, [4, 9])))
  # As CIFAR-2 is drawn: of two classes of one size, as many of each.
  here = stratified_positions(both.ids, both.labels, num_examples=4, seed=0)
  assert dataset.ids.tolist() == both.ids[here].tolist()
  assert dataset.fingerprint() == both.take(here).fingerprint()
  seeds = {tuple(load(config(path, "artbench2", seed=s)).ids) for s in range(8)}
  assert len(seeds) > 1
  # Where one is damaged and skipped, there are still as many.
  bad = dataset.ids[0]
  broken = rewritten(path, tmp_path / "broken.tar", **{bad: b"damaged"})
  others = load(config(broken, "artbench2", skip_damaged=True))
  assert others.labels.tolist() == [0, 0, 1, 1] and bad not in others.ids
  monkeypatch.setattr(ARTBENCH, "_ARTBENCH2_STYLE_SIZE", 4)
  with pytest.raises(ValueError, match="at least 4 images of post_impressionism, got 3"):
    load(config(path, "artbench2"))


def test_another_md5_is_said_in_one_line_and_the_published_is_not(published, monkeypatch, caplog):
  path, _ = published
  caplog.set_level(logging.WARNING, "jaxinf")
  load(config(path))
  (line,) = [r.getMessage() for r in caplog.records if "md5" in r.getMessage()]
  found = line.split("md5 is ")[1].split(",")[0]
  assert len(found) == 32 and "64f4d66dcf34b3c77e8c7d68fed2ec8c" in line
  monkeypatch.setattr(ARTBENCH, "_MD5", found)
  caplog.clear()
  load(config(path))
  assert not any("md5" in r.getMessage() for r in caplog.records)


@pytest.mark.parametrize("share", [0.05, 0.3, 0.5, 0.9])
def test_a_tar_that_is_cut_off_is_refused(published, tmp_path, share):
  content = published[0].read_bytes()
  (tmp_path / "cut.tar").write_bytes(content[: int(share * len(content))])
  with pytest.raises(ValueError, match=r"cut\.tar: expected .*(cut off|damaged)"):
    load(config(tmp_path / "cut.tar"))


def test_a_tar_is_refused_wherever_it_is_cut(published, tmp_path):
  """In a header, in a file, and between two of them, where tarfile sees no error."""
  content, cut = published[0].read_bytes(), tmp_path / "cut.tar"
  with tarfile.open(published[0]) as tar:
    member = tar.getmembers()[12]
    end = tar.getmembers()[-1].offset_data + 512 * -(-tar.getmembers()[-1].size // 512)
  for place in (member.offset, member.offset + 100, member.offset + 512, member.offset + 700, end):
    cut.write_bytes(content[:place])
    with pytest.raises(ValueError, match=r"cut\.tar: expected"):
      load(config(cut))
  zeros = bytes(member.size + 1024)  # a download with a hole
  cut.write_bytes(content[: member.offset] + zeros + content[member.offset + len(zeros) :])
  with pytest.raises(ValueError, match=r"cut\.tar: expected a tar with its end mark.*12 files"):
    load(config(cut))


@pytest.mark.parametrize(
  ("name", "message"),
  [
    ("../../etc/evil.jpg", r"leads out of it: '\.\./\.\./etc/evil\.jpg'"),
    ("/etc/evil.jpg", "leads out of it: '/etc/evil.jpg'"),
    (f"{ROOT}/train/../../../evil.jpg", "leads out of it"),
    (f"{ROOT}/train/cubism/a.jpg", "also 'cubism/a.jpg'"),
    (f"{ROOT}/train/baroque/deep/a.jpg", "also 'baroque/deep/a.jpg'"),
  ],
)
def test_a_member_that_does_not_belong_is_refused_by_name(name, message, tmp_path):
  write_artbench(tmp_path / "odd.tar", range(10), {name: picture(0)})
  with pytest.raises(ValueError, match=rf"odd\.tar: expected .*{message}"):
    load(config(tmp_path / "odd.tar"))


def test_a_link_is_refused(tmp_path):
  write_artbench(tmp_path / "odd.tar", range(10))
  with tarfile.open(tmp_path / "odd.tar", "a") as tar:
    link = tarfile.TarInfo(f"{ROOT}/train/baroque/a.jpg")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    tar.addfile(link)
  with pytest.raises(ValueError, match=r"odd\.tar: expected plain files .*baroque/a\.jpg"):
    load(config(tmp_path / "odd.tar"))


def test_what_is_no_such_tar_says_what_it_lacks(tmp_path):
  path = tmp_path / "file.tar"
  with pytest.raises(ValueError, match=r"'artbench' needs data\.path, artbench-10"):
    load(DataConfig("artbench"))
  with pytest.raises(ValueError, match=r"file\.tar.*expected a folder of images, got none"):
    load(config(path))
  for content in (b"", b"no tar" * 1000):
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"file\.tar: expected an uncompressed tar"):
      load(config(path))
  write_artbench(path, [])
  with pytest.raises(ValueError, match=r"got 0 images, and none of art_nouveau.*64f4d66d"):
    load(config(path))
  write_artbench(path, [0, 1, 2])
  with pytest.raises(ValueError, match="got 3 images, and none of impressionism"):
    load(config(path))
  with tarfile.open(path, "w:gz"):
    pass
  with pytest.raises(ValueError, match="expected an uncompressed tar"):
    load(config(path))


def test_images_of_another_size_or_none_are_named(published, tmp_path):
  path, files = published
  bad = sorted(files)[4]
  odd = rewritten(path, tmp_path / "odd.tar", **{bad: picture(0, (8, 9))})
  with pytest.raises(ValueError, match=f"{bad}: expected 8 × 8 pixels as in art.*got 9 × 8.*size"):
    load(config(odd))
  grey = rewritten(path, tmp_path / "odd.tar", **{bad: picture(0, mode="L")})
  image = load(config(grey)).select([bad]).images[0]
  np.testing.assert_array_equal(image, decoded(picture(0, mode="L")))  # three equal channels


def test_a_decompression_bomb_is_refused_by_name_and_skipped_on_request(tmp_path, monkeypatch):
  write_artbench(tmp_path / "a.tar", range(20))
  large = picture(0, (20, 20))
  odd = rewritten(tmp_path / "a.tar", tmp_path / "b.tar", **{"baroque/011.jpg": large})
  for limit in (300, 100):  # 400 pixels are more, where Pillow warns, and more than twice as many
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    with pytest.raises(ValueError, match=rf"baroque/011\.jpg: expected at most {limit} pixels"):
      load(config(odd, image_size=4))
  assert len(load(config(odd, image_size=4, skip_damaged=True))) == 19


def test_files_that_are_not_read_are_counted(tmp_path, caplog):
  others = {f"{ROOT}/train/baroque/{n}": b"" for n in ("a.gif", "b.gif", "c.tiff", "notes")}
  write_artbench(tmp_path / "a.tar", range(10), others)
  caplog.set_level(logging.WARNING, "jaxinf")
  assert len(load(config(tmp_path / "a.tar"))) == 10
  (line,) = [r.getMessage() for r in caplog.records if "not read" in r.getMessage()]
  assert "4 files are not read (2 .gif, 1 .tiff, 1 without suffix)" in line


def test_options_go_together(published):
  path, _ = published
  both = dataclasses.replace(config(path), num_examples=20, image_size=4)
  assert load(both).images.shape == (20, 4, 4, 3)
