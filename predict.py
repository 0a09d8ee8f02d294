"""Name what is on images: ``python predict.py RUN_DIRECTORY IMAGE ...``."""

from flax_resnetv2.cli.predict import main as predict

if __name__ == "__main__":
    raise SystemExit(predict())
