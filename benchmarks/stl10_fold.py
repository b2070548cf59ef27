"""One of STL-10's ten official folds of 1,000 labels as a data set of its own, for recipes with few labels.

    python benchmarks/stl10_fold.py --data STL10 --fold 0 --out stl10-fold0.npz

STL10 is a folder of shards of the labelled images, in the official order, with ``fold_indices.txt``. The file has the
splits train (the fold's 1,000 labelled images), unlabeled (the other training images, without labels, except for 500)
and test. The 500 omitted images are the first ones in a seeded order that are not in the fold. No run reads them.
"""

import argparse
from pathlib import Path

import numpy as np

import rush
from rush.runtime.files import write_arrays

LEFT_OUT = 500


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--fold", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    train, test = (rush.load_images(arguments.data, split=split) for split in ("train", "test"))
    lines = (arguments.data / "fold_indices.txt").read_text().strip().split("\n")
    fold = np.array(sorted(map(int, lines[arguments.fold].split())))
    others = np.setdiff1d(np.arange(len(train)), fold)
    left_out = np.random.default_rng(0).permutation(others)[:LEFT_OUT]
    unlabeled = np.setdiff1d(others, left_out)
    assert train.labels is not None
    assert test.labels is not None
    write_arrays(
        arguments.out,
        x_train=train.images[fold].numpy(),
        y_train=train.labels[fold].numpy(),
        x_unlabeled=train.images[unlabeled].numpy(),
        x_test=test.images.numpy(),
        y_test=test.labels.numpy(),
        classes=np.array(train.classes),
    )
    print(f"{len(fold):,} labelled, {len(unlabeled):,} without labels, {len(test):,} test images in {arguments.out}")


if __name__ == "__main__":
    main()
