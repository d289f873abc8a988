"""Scores of the `traker` package on the common workload, for several projections, as one .npz.

Runs where PyTorch and traker are installed, through traker's public interface alone; PEERS holds
the modules that load the workload:

  python tests/benchmarks/trak_peer.py --work=FOLDER --peers=PEERS --damping=0.03 --seeds=3

Writes FOLDER/traker-scores.npz: scores [seeds, Q, N], positive where an image supports a query, and
the damping in jaxinf's units. traker's is larger by N · D² · k / P: its H is a sum over the images,
its loss a sum over the D outputs, its gradients are divided by √P, and its projection has
entries of variance one in k rows.
"""

import argparse
import logging
import sys
import tempfile

import numpy as np


def main():
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--work", required=True)
  parser.add_argument("--peers", required=True)
  parser.add_argument("--damping", type=float, required=True)
  parser.add_argument("--seeds", type=int, default=3)
  parser.add_argument("--dim", type=int, default=2048)
  parser.add_argument("--examples_per_call", type=int, default=64)
  args = parser.parse_args()
  sys.path[0] = args.peers  # in place of the folder of this file, whose trak.py is another
  import torch
  from bench_trak import DrawAveragedLoss, per_example
  from trak import TRAKer
  from trak.projectors import BasicProjector, ProjectionType
  from workload import load

  model, data = load(args.work)
  splits = {split: per_example(data, split) for split in ("train", "query")}
  num, num_queries = len(data["train"]), len(data["query"])
  outputs = int(np.prod(data["train"].shape[1:]))
  num_params = sum(p.numel() for p in model.parameters())
  scale = num * outputs**2 * args.dim / num_params
  found = []
  for seed in range(args.seeds):
    with tempfile.TemporaryDirectory(prefix="trak-") as folder:
      projector = BasicProjector(
        grad_dim=num_params, proj_dim=args.dim, seed=seed,
        proj_type=ProjectionType.normal, device="cpu", dtype=torch.float32,
      )  # fmt: skip
      traker = TRAKer(
        model=model, task=DrawAveragedLoss(), train_set_size=num, save_dir=folder,
        load_from_save_dir=True, device="cpu", projector=projector, proj_dim=None,
        use_half_precision=False, lambda_reg=scale * args.damping,
        logging_level=logging.ERROR,
      )  # fmt: skip
      state = model.state_dict()
      traker.load_checkpoint(state, model_id=0)
      for i in range(0, num, args.examples_per_call):
        batch = [x[i : i + args.examples_per_call] for x in splits["train"]]
        traker.featurize(batch, num_samples=len(batch[0]))
      traker.finalize_features()
      traker.start_scoring_checkpoint("peer", state, model_id=0, num_targets=num_queries)
      traker.score(splits["query"], num_samples=num_queries)
      found.append(np.array(traker.finalize_scores("peer")).T)
    np.savez(f"{args.work}/traker-scores.npz", scores=np.stack(found), damping=args.damping)
    print(f"seed {seed}: scores {found[-1].shape}", flush=True)


if __name__ == "__main__":
  main()
