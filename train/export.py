"""``python train/export.py``: see train/tools/export.py."""

if __name__ == "__main__":
    from script import start

    start("train.tools.export")
