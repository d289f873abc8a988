"""The matrix-free GGN against the dense one: all layers jointly, cross-layer blocks included."""

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinf import Checkpointing, Compute, DiffusionModel, Draws, Examples, fit_curvature
from jaxinf.curvature.ggn import GGN
from jaxinf.curvature.solver import PRECONDITIONERS, Solver
from jaxinf.layers.specs import from_matrices
from tests import nets, twins
from tests.twins import vector

NUM, DRAWS, SEED = 5, 2, 3
IDS = np.array([5, 3, 6, 0, 1], np.uint32)
LABELS = np.linspace(-1, 1, NUM).astype(np.float32)
GRADS = nets.random_params(nets.CONV_SHAPES, seed=7)


def conditional_net(params, x_t, t, labels):
  return nets.conv_net(params, x_t * (1 + labels[:, None, None, None]), t)


def bytes_examples(conditioning=None) -> Examples:
  images = np.random.default_rng(0).integers(0, 256, (NUM, 4, 4, 1)).astype(np.uint8)
  return Examples(images, IDS, conditioning)


def ggn(
  model, layers, *, train=None, num=DRAWS, batch_size=10, devices=None, precision="float32"
) -> GGN:
  return GGN(
    model,
    layers,
    bytes_examples() if train is None else train,
    draws=Draws(num, seed=SEED),
    solver=Solver(precision=precision),
    compute=Compute(batch_size=batch_size, devices=devices),
  )


def flat(matrices) -> np.ndarray:
  """[Q, P] of layer name → [Q, d_out, d_in]."""
  return np.concatenate([m.reshape(len(m), -1) for m in matrices.values()], axis=1)


def dense_ggn(model, layers, conditioning=None) -> np.ndarray:
  """[P, P] in float64, on the draws of the curvature."""
  pairs = twins.fit_pairs(model, bytes_examples(conditioning), DRAWS, SEED)
  return twins.dense_ggn(model, layers, pairs)


@pytest.fixture(scope="module")
def model():
  return nets.conv_model()


@pytest.fixture(scope="module")
def kfac(model):
  return fit_curvature(model, bytes_examples(), draws=Draws(50, seed=SEED))


@pytest.fixture(scope="module")
def layers(kfac):
  return kfac.layers


@pytest.fixture(scope="module")
def dense(model, layers):
  return dense_ggn(model, layers)


@pytest.fixture(scope="module")
def exact(model, layers):
  """In float64, on one device."""
  return ggn(model, layers, devices=jax.local_devices()[:1], precision="float64")


@pytest.fixture(scope="module")
def matrix(exact, model, layers, dense):
  """H [P, P] as the products of `exact` have it, to the rounding of float64."""
  _, unravel = jax.flatten_util.ravel_pytree(model.params)
  units = [unravel(unit) for unit in np.eye(len(dense), dtype=np.float32)]
  products = [vector(layers, exact.multiply(unit, 1.0)) for unit in units]
  order = np.stack([vector(layers, unit) for unit in units])
  return order.T @ np.stack(products) - np.eye(len(dense))


@pytest.fixture(scope="module")
def rhs(layers):
  """Two right-hand sides."""
  rng = np.random.default_rng(2)
  return {layer.name: rng.normal(size=(2, *layer.matrix_shape)) for layer in layers}


# Products in float32 round in sums of some hundred terms. In float64 the draws, which stay float32,
# still round by the program they are compiled in: x_t by one unit in the last place here and there.
ERRORS = {"float32": 1e-5, "float64": 1e-7}


@pytest.mark.parametrize("precision", ERRORS)
@pytest.mark.parametrize("batch_size", [4, 100])
def test_products_are_those_of_the_dense_ggn(model, layers, dense, devices, batch_size, precision):
  """Over batches with and without padding, on one device and two."""
  exact = ggn(model, layers, batch_size=batch_size, devices=devices, precision=precision)
  product = exact.multiply(GRADS, damping=0.1)
  assert all(leaf.dtype == np.float64 for leaf in jax.tree.leaves(product))
  expected = dense @ vector(layers, GRADS) + 0.1 * vector(layers, GRADS)
  twins.assert_close(vector(layers, product), expected, ERRORS[precision])


def test_blocks_between_layers_are_there(layers, dense, matrix):
  """What a block-diagonal curvature drops is a good part of this GGN."""
  np.testing.assert_allclose(matrix, dense, rtol=0, atol=1e-7 * np.abs(dense).max())
  ends = np.cumsum([np.prod(layer.matrix_shape) for layer in layers])
  owner = np.searchsorted(ends, np.arange(len(dense)), side="right")
  between = np.where(owner[:, None] != owner, dense, 0)
  assert np.linalg.norm(between) > 0.3 * np.linalg.norm(dense)


def test_float64_products_are_symmetric_to_float64(matrix):
  np.testing.assert_allclose(matrix, matrix.T, rtol=0, atol=1e-14 * np.abs(matrix).max())


def test_a_conditional_model_is_given_its_conditioning(model, layers):
  conditional = DiffusionModel(conditional_net, model.params, nets.PROCESS)
  product = ggn(conditional, layers, train=bytes_examples(LABELS)).multiply(GRADS, damping=0.1)
  expected = dense_ggn(conditional, layers, LABELS) @ vector(layers, GRADS)
  actual = vector(layers, product) - 0.1 * vector(layers, GRADS)
  twins.assert_close(actual, expected)


def test_parameters_outside_the_layers_neither_count_nor_change(model, layers):
  """The GGN of some layers is the block of the whole; zeros come out for the others."""
  some = tuple(layer for layer in layers if layer.name in ("conv_in", "mix"))
  product = ggn(model, some).multiply(GRADS, damping=0.1)
  expected = dense_ggn(model, some) @ vector(some, GRADS) + 0.1 * vector(some, GRADS)
  twins.assert_close(vector(some, product), expected)
  for name in ("time", "conv_out"):
    assert not any(leaf.any() for leaf in jax.tree.leaves(product[name]))


def true_residuals(matrix, damping, rhs, solutions):
  b, x = flat(rhs), flat(solutions)
  return np.linalg.norm(x @ matrix + damping * x - b, axis=1) / np.linalg.norm(b, axis=1)


# EK-FAC is another fit of the same eigenbases.
@pytest.mark.parametrize("name", [name for name in PRECONDITIONERS if "ekfac" not in name])
@pytest.mark.parametrize("ratio", [1e-1, 1e-3, 1e-5])
def test_solutions_are_those_of_a_dense_solve(exact, matrix, kfac, rhs, name, ratio):
  damping = ratio * np.linalg.eigvalsh(matrix)[-1]
  solver = Solver(1e-7, max_iterations=1000, sketch_rank=20, preconditioner=name)
  solutions, residuals = exact.solve(rhs, damping, preconditioner=kfac, solver=solver)
  assert residuals.converged.all()
  expected = np.linalg.solve(matrix + damping * np.eye(len(matrix)), flat(rhs).T).T
  # ‖x − x*‖ ≤ ‖(H + λI)⁻¹‖ ‖(H + λI) x − b‖ ≤ (1/λ) · tolerance · ‖b‖
  bound = 1e-7 / damping * np.linalg.norm(flat(rhs), axis=1)
  assert (np.linalg.norm(flat(solutions) - expected, axis=1) <= bound).all()
  for name, matrices in rhs.items():
    assert solutions[name].shape == matrices.shape


def test_dampings_are_solved_from_the_largest_down_each_from_the_one_before(exact, matrix, rhs):
  """To the same solutions, in fewer iterations together than from nothing."""
  dampings = np.array([1e-3, 1e-1, 3e-2, 1e-2]) * np.linalg.eigvalsh(matrix)[-1]
  solver = Solver(tolerance=1e-6, max_iterations=1000, preconditioner="none")
  found = list(exact.solutions(rhs, dampings, solver=solver))
  assert [damping for damping, *_ in found] == sorted(dampings, reverse=True)
  alone = [exact.solve(rhs, damping, solver=solver) for damping, *_ in found]
  for (damping, solutions, residuals), (expected, _) in zip(found, alone, strict=True):
    assert residuals.converged.all()
    bound = 2e-6 / damping * np.linalg.norm(flat(rhs), axis=1)
    assert (np.linalg.norm(flat(solutions) - flat(expected), axis=1) <= bound).all()
  total = lambda residuals: sum(r.iterations.sum() for r in residuals)
  assert total(r for *_, r in found) <= total(r for _, r in alone)


def test_many_right_hand_sides_are_solved_as_each_alone(exact, matrix, layers):
  """More than products are made of at once, one of them zero; each stops when it has converged."""
  rng = np.random.default_rng(5)
  nonzero = (np.arange(10) != 4).reshape(-1, 1, 1)
  some = {x.name: nonzero * rng.normal(size=(10, *x.matrix_shape)) for x in layers}
  damping = 1e-2 * np.linalg.eigvalsh(matrix)[-1]
  solutions, residuals = exact.solve(some, damping)
  two = {name: matrices[[7, 2]] for name, matrices in some.items()}
  expected, alone = exact.solve(two, damping)
  np.testing.assert_array_equal(residuals.iterations[[7, 2]], alone.iterations)
  # Draws round to 1e-7 by the program that they are compiled in, and a condition number of 100.
  twins.assert_close(flat(solutions)[[7, 2]], flat(expected), 1e-5)
  assert residuals.converged.all() and residuals.iterations[4] == 0
  assert not flat(solutions)[4].any()


def test_stochastic_steps_over_all_pairs_end_at_the_dense_solution(exact, matrix, kfac, rhs):
  damping = 1e-1 * np.linalg.eigvalsh(matrix)[-1]
  solver = Solver(1e-6, 400, method="stochastic", step_pairs=NUM * DRAWS, momentum=0.8, decay=1.0)
  solutions, residuals = exact.solve(rhs, damping, preconditioner=kfac, solver=solver)
  expected = np.linalg.solve(matrix + damping * np.eye(len(matrix)), flat(rhs).T).T
  assert residuals.converged.all() and (residuals.iterations == 400).all()
  bound = 1e-6 / damping * np.linalg.norm(flat(rhs), axis=1)
  assert (np.linalg.norm(flat(solutions) - expected, axis=1) <= bound).all()


def test_stochastic_steps_sample_pairs_without_repeats_and_with_draws_of_their_own(exact):
  few, many = exact.sample(3, 4), exact.sample(4, 7)
  assert len(few) == 4 and set(few.ids) < set(IDS) and few.first_draw == DRAWS + 3
  assert len(many) == 6 and (many.draws, many.first_draw) == (2, DRAWS + 8)
  assert len(exact.sample(0, NUM * DRAWS)) == NUM * DRAWS


def test_stochastic_steps_with_samples_come_near(model, layers, matrix, kfac, rhs):
  """Nearer than the preconditioner alone."""
  many = ggn(model, layers, num=200, precision="float64", batch_size=500)
  damping = 1e-2 * np.linalg.eigvalsh(matrix)[-1]
  solver = Solver(method="stochastic", max_iterations=200, step_pairs=5)
  solutions, residuals = many.solve(rhs, damping, preconditioner=kfac, solver=solver)
  x, b = flat(solutions), flat(rhs)
  each = [
    from_matrices(kfac.layers, dict(zip(rhs, m, strict=True)), GRADS)
    for m in zip(*rhs.values(), strict=True)
  ]
  guess = np.stack([vector(kfac.layers, kfac.precondition(tree, damping)) for tree in each])
  distance = lambda x: np.linalg.norm(many.products(x) + damping * x - b) / np.linalg.norm(b)
  assert distance(x) < 0.7 * distance(guess)  # which is left by the noise of five pairs a step
  # Estimated from two samples of 80 pairs.
  assert 0.8 < np.sqrt(np.mean(residuals.relative**2)) / distance(x) < 1.25


@pytest.mark.parametrize("method", ["cg", "stochastic"])
def test_a_stopped_solve_goes_on_to_the_same_numbers(
  model, layers, matrix, kfac, rhs, method, tmp_path
):
  """Stopped in the fifth iteration, with the state of an earlier one saved."""
  damping = 1e-2 * np.linalg.eigvalsh(matrix)[-1]
  solver = Solver(
    max_iterations=9, method=method, step_pairs=5, preconditioner="kfac-nystrom", sketch_rank=6
  )
  fresh = lambda: ggn(model, layers, precision="float64")
  expected, whole = fresh().solve(rhs, damping, preconditioner=kfac, solver=solver)
  stopped, kept = fresh(), Checkpointing(tmp_path, every=2)
  products, calls = stopped.products, []

  def stopping(*args, **options):
    calls.append(args)
    if len(calls) == 1 + 5 + 20 * (method == "stochastic"):  # a sketch, and a power iteration
      raise KeyboardInterrupt
    return products(*args, **options)

  stopped.products = stopping
  with pytest.raises(KeyboardInterrupt):
    stopped.solve(rhs, damping, preconditioner=kfac, solver=solver, checkpoint=kept)
  with np.load(tmp_path / f"solves-{damping:e}-000.npz") as file:
    assert 0 < file["iterations"].max() < 5
  resumed = fresh()
  found, residuals = resumed.solve(
    rhs, damping, preconditioner=kfac, solver=solver, checkpoint=kept
  )
  np.testing.assert_array_equal(flat(found), flat(expected))
  np.testing.assert_array_equal(residuals.iterations, whole.iterations)
  other = {name: 2 * matrices for name, matrices in rhs.items()}
  with pytest.raises(ValueError, match="other right-hand sides"):
    resumed.solve(other, damping, preconditioner=kfac, solver=solver, checkpoint=kept)


def test_float32_solves_at_an_ordinary_damping(model, layers, dense, rhs, devices):
  damping = 1e-3 * np.linalg.eigvalsh(dense)[-1]
  solutions, residuals = ggn(model, layers, batch_size=4, devices=devices).solve(rhs, damping)
  assert residuals.converged.all()
  # Against the dense GGN, residuals have the float32 error of a product, some 1e-6 · ‖H‖ ‖x‖ / ‖b‖.
  bound = 1e-4 + 1e-5 / 1e-3
  assert (true_residuals(dense, damping, rhs, solutions) < bound).all()


def test_a_fitted_curvature_saves_iterations_where_kfac_is_nearly_exact():
  """One layer: K-FAC-expand is the GGN but for the sampling of targets, whatever the damping."""
  scales = np.array([1, 10], np.float32)
  net = lambda params, x_t, t: nets.conv(params["only"], x_t * scales)
  params = nets.random_params({"only": {"kernel": (3, 3, 2, 2), "bias": (2,)}})
  model, train = DiffusionModel(net, params, nets.PROCESS), nets.examples(20, (4, 4, 2))
  kfac = fit_curvature(model, train, draws=Draws(50))
  exact = ggn(model, kfac.layers, train=train, num=10, batch_size=200)
  rng = np.random.default_rng(0)
  rhs = {layer.name: rng.normal(size=(2, *layer.matrix_shape)) for layer in kfac.layers}
  damping = 1e-3 * exact.largest_eigenvalue()
  _, plain = exact.solve(rhs, damping)
  _, preconditioned = exact.solve(rhs, damping, preconditioner=kfac)
  assert plain.converged.all() and preconditioned.converged.all()
  assert (preconditioned.iterations <= plain.iterations / 2).all()


def test_what_did_not_converge_is_reported_with_its_true_residual(exact, matrix, rhs, caplog):
  damping = 1e-4 * np.linalg.eigvalsh(matrix)[-1]
  solutions, residuals = exact.solve(rhs, damping, solver=Solver(max_iterations=1))
  assert not residuals.converged.any()
  assert (residuals.iterations == 1).all()
  expected = true_residuals(matrix, damping, rhs, solutions)
  np.testing.assert_allclose(residuals.relative, expected, rtol=1e-9)
  (record,) = (r for r in caplog.records if r.levelname == "WARNING")
  for part in ("2 of 2 solves", f"residuals up to {max(expected):.1e}", "more iterations"):
    assert part in record.getMessage()


def test_a_right_hand_side_of_zeros_is_solved_by_zeros(exact, rhs):
  zeros = {name: np.zeros_like(matrices) for name, matrices in rhs.items()}
  solutions, residuals = exact.solve(zeros, 1e-3)
  assert not flat(solutions).any() and not residuals.relative.any() and residuals.converged.all()


def test_the_largest_eigenvalue_is_approached_from_below(exact, matrix):
  expected = np.linalg.eigvalsh(matrix)[-1]
  one, few, many = (exact.largest_eigenvalue(n) for n in (1, 20, 100))
  assert one < few <= many <= expected * (1 + 1e-12)
  np.testing.assert_allclose(few, expected, rtol=1e-2)
  np.testing.assert_allclose(many, expected, rtol=1e-12)  # more products than parameters


@pytest.mark.parametrize("precision", ["float32", "float64"])
def test_the_network_is_traced_once_for_products_of_as_many_vectors(model, layers, rhs, precision):
  traces = []

  def counted(params, x_t, t):
    traces.append(x_t.shape)
    return nets.conv_net(params, x_t, t)

  exact = ggn(DiffusionModel(counted, model.params, nets.PROCESS), layers, precision=precision)
  exact.multiply(GRADS, 0.1)
  after_the_first = len(traces)
  exact.largest_eigenvalue(3)
  exact.multiply(model.params, 0.2)
  assert len(traces) == after_the_first
  exact.solve(rhs, 1e-2)  # products of two, and of the one that takes longer
  assert len(traces) == 2 * after_the_first


def test_a_network_that_casts_to_float32_inside_has_no_float64_products(model, layers):
  single = lambda p, x_t, t: nets.conv_net(p, x_t, t).astype(jnp.float32)
  exact = ggn(DiffusionModel(single, model.params, nets.PROCESS), layers, precision="float64")
  with pytest.raises(ValueError, match="apply_fn returns float32 for float64 parameters"):
    exact.multiply(GRADS, 0.1)


@pytest.mark.parametrize("damping", [0.0, -1.0, np.nan])
def test_a_damping_that_is_not_positive_is_refused(exact, rhs, damping):
  with pytest.raises(ValueError, match="damping must be positive"):
    exact.solve(rhs, damping)
  with pytest.raises(ValueError, match="damping must be positive"):
    exact.multiply(GRADS, damping)


def test_vectors_of_another_structure_are_refused(exact, rhs):
  with pytest.raises(ValueError, match="structure and shapes of the parameters"):
    exact.multiply({"mix": GRADS["mix"]}, 0.1)
  wrong = (
    {},
    {"mix": rhs["mix"]},
    {name: matrices[0] for name, matrices in rhs.items()},
    {name: matrices[:0] for name, matrices in rhs.items()},
    rhs | {"mix": rhs["mix"][:1]},
    rhs | {"more": rhs["mix"]},
  )
  for value in wrong:
    with pytest.raises(ValueError, match=r"rhs must hold a matrix \[Q, d_out, d_in\] for each"):
      exact.solve(value, 0.1)
  with pytest.raises(ValueError, match="rhs is not finite"):
    exact.solve(rhs | {"mix": np.full_like(rhs["mix"], np.nan)}, 0.1)


def test_bad_options_are_refused(model, exact, layers, rhs):
  with pytest.raises(ValueError, match="tolerance must lie between 0 and 1; got 0"):
    exact.solve(rhs, 0.1, solver=Solver(tolerance=0))
  with pytest.raises(ValueError, match="max_iterations must be at least 1; got 0"):
    exact.solve(rhs, 0.1, solver=Solver(max_iterations=0))
  with pytest.raises(ValueError, match="Unknown preconditioner 'lu'; there are: none, kfac"):
    Solver(preconditioner="lu")
  with pytest.raises(ValueError, match="'kfac-nystrom' is made of a sketch: give a sketch_rank"):
    Solver(preconditioner="kfac-nystrom")
  with pytest.raises(ValueError, match="Unknown method of solving 'gmres'"):
    Solver(method="gmres")
  for name, value in (("momentum", 1.0), ("decay", 0.0), ("learning_rate", 0.0)):
    with pytest.raises(ValueError, match=f"{name} must be .*; got {value}"):
      Solver(**{name: value})
  with pytest.raises(ValueError, match="'kfac' takes a fitted curvature: give one"):
    exact.solve(rhs, 0.1, solver=Solver(preconditioner="kfac"))
  with pytest.raises(ValueError, match="iterations must be at least 1; got 0"):
    exact.largest_eigenvalue(0)
  with pytest.raises(ValueError, match="there are: float32, float64"):
    ggn(model, layers, precision="half")
  with pytest.raises(ValueError, match="layers is empty"):
    ggn(model, ())
