"""Train a ResNet V2: ``python train.py RECIPE``; ``--help`` lists the recipes."""

from flax_resnetv2.cli.train import main as train

if __name__ == "__main__":
    raise SystemExit(train())
