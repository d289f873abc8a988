"""What a layer's tag carries: where inputs, outputs and matrix lie in the layer's arrays."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class DenseForm:
  """y = contraction of x with W.

  Attributes:
    kernel_out, kernel_in: axes of W that become rows and columns of its matrix.
    x_in: axes of x that are contracted, in the order of kernel_in.
    y_out: axes of y that come from W, in the order of kernel_out.
  """

  kernel_out: tuple[int, ...]
  kernel_in: tuple[int, ...]
  x_in: tuple[int, ...]
  y_out: tuple[int, ...]
  kind = "dense"

  def batch_first(self, x: int, y: int) -> "DenseForm":
    """The form when the axes x and y of input and output, those of the batch, are moved first."""
    return dataclasses.replace(self, x_in=_moved(self.x_in, x), y_out=_moved(self.y_out, y))


@dataclasses.dataclass(frozen=True)
class ConvForm:
  """y = x ∗ W, as of jax.lax.conv_general_dilated; the specs are those of its dimension numbers."""

  strides: tuple[int, ...]
  padding: tuple[tuple[int, int], ...]
  lhs_dilation: tuple[int, ...]
  rhs_dilation: tuple[int, ...]
  groups: int
  x_spec: tuple[int, ...]
  kernel_spec: tuple[int, ...]
  y_spec: tuple[int, ...]

  @property
  def kind(self) -> str:
    name = "conv_transpose" if any(d != 1 for d in self.lhs_dilation) else "conv"
    return f"{name}{len(self.strides)}d"

  @property
  def y_out(self) -> tuple[int, ...]:
    return (self.y_spec[1],)

  def batch_first(self, x: int, y: int) -> "ConvForm":
    return dataclasses.replace(self, x_spec=_moved(self.x_spec, x), y_spec=_moved(self.y_spec, y))


@dataclasses.dataclass(frozen=True)
class EmbedForm:
  """y = W[x], rows of a table [V, C] by indices x [..., 1], or [..., 2] with a column, always 0."""

  kind = "embed"
  y_out = ()  # takes no bias

  def batch_first(self, x: int, y: int) -> "EmbedForm":
    del x, y
    return self


@dataclasses.dataclass(frozen=True)
class ElementForm:
  """y = x · p ("scale") or x + p ("shift"), p broadcast with its axes at `axes` of y."""

  kind: str
  axes: tuple[int | None, ...]
  y_out = ()  # takes no bias

  def batch_first(self, x: int, y: int) -> "ElementForm":
    del x
    moved = tuple(None if axis is None else _moved((axis,), y)[0] for axis in self.axes)
    return dataclasses.replace(self, axes=moved)


Form = DenseForm | ConvForm | EmbedForm | ElementForm


def _moved(axes: tuple[int, ...], batch: int) -> tuple[int, ...]:
  """Where axes stand after the axis `batch` has been moved first."""
  return tuple(0 if axis == batch else axis + (axis < batch) for axis in axes)
