"""``python train/compare_losses.py``: see train/tools/comparison.py."""

if __name__ == "__main__":
    from script import start

    start("train.tools.comparison")
