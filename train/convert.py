"""``python train/convert.py``: see train/tools/convert.py."""

if __name__ == "__main__":
    from script import start

    start("train.tools.convert")
