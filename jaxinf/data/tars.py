"""Files of a plain tar, indexed once and read where they lie: nothing is extracted."""

import pathlib
import tarfile

_BLOCK = 512  # bytes; a tar ends with at least one of zeros
_PADDING = 2**20  # bytes after it that are looked at: more than tar's records of 10 KiB


class TarFiles:
  """The files under a folder of a tar; their names are paths within that folder, with slashes.

  Args:
    path: the tar.
    under: the folder.

  Raises:
    ValueError: no tar, or a compressed one; one that is cut off or damaged; a name in it that leads
      out of the tar's own folder; or a link under the folder.
  """

  def __init__(self, path: pathlib.Path, under: str):
    self._path, self._under = path, under
    self._places: dict[str, tuple[int, int]] = {}  # of a content: its first byte, and how many
    try:
      with tarfile.open(path, "r:") as tar:
        for member in tar:
          self._add(member)
        end = tar.offset
    except (tarfile.TarError, OSError, EOFError) as error:
      raise ValueError(
        f"{path}: expected an uncompressed tar, got: {error}. It may be cut off: get it again."
      ) from error
    with path.open("rb") as file:  # tarfile takes a cut between two files for the end
      file.seek(end)
      rest = file.read(_PADDING)
    if len(rest) < _BLOCK or any(rest):
      raise ValueError(
        f"{path}: expected a tar with its end mark, got one that is cut off or damaged at byte "
        f"{end}, after {len(self._places)} files in {under}. Get it again."
      )

  def _add(self, member: tarfile.TarInfo) -> None:
    name = pathlib.PurePosixPath(member.name)
    if name.is_absolute() or ".." in name.parts:
      raise ValueError(
        f"{self._path}: expected files within its folder, got one that leads out of it: "
        f"{member.name!r}. Get the tar again, from where it is published."
      )
    if member.isdir() or not name.is_relative_to(self._under):
      return
    if not member.isreg() or member.issparse():
      raise ValueError(
        f"{self._path}: expected plain files in {self._under}, got a link or another kind: "
        f"{member.name!r}. Get the tar again, from where it is published."
      )
    place = member.offset_data, member.size
    self._places[name.relative_to(self._under).as_posix()] = place

  @property
  def names(self) -> list[str]:
    """Of all files, in the order in which they lie."""
    return list(self._places)

  def read(self, name: str) -> bytes:
    """The content of one file."""
    begin, size = self._places[name]
    with self._path.open("rb") as file:
      file.seek(begin)
      content = file.read(size)
    if len(content) < size:
      raise OSError(f"the tar ends within the file, after {len(content)} of {size} bytes")
    return content

  def where(self, name: str) -> str:
    """What messages call the file."""
    return f"{self._path}: {self._under}/{name}"
