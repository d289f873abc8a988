"""Cuts the K-FAC reference fixture from the output of an independent float64 referee.

The referee (PyTorch autograd, a diffusers UNet2DModel of 12.6k parameters, every output's
Jacobian, no Monte Carlo) writes one .npz with weights, data, draws, factors, gradients and scores;
its arrays are channels-first and its losses are sums over pixels. This keeps what
test_kfac_reference.py reads.

  python tests/curvature/make_kfac_reference.py REFEREE.npz fixtures/kfac-reference.npz
"""

import sys

import numpy as np

LAYERS = ("conv", "strided", "dense", "attention")
KEPT = ("name", "A", "B", "grad_train", "grad_query", "damping", "scores_kfac")


def main() -> None:
  source, target = sys.argv[1:]
  with np.load(source) as file:
    names = [name for name in file.files if name.startswith("param/")]
    names += ["train", "train_t", "train_eps", "query", "query_t", "query_eps", "output", "loss"]
    names += [f"{layer}.{key}" for layer in LAYERS for key in KEPT]
    np.savez_compressed(target, **{name: file[name] for name in names})


if __name__ == "__main__":
  main()
