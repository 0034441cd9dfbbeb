"""``python train/demo.py``: see train/tools/demo.py."""

if __name__ == "__main__":
    from script import start

    start("train.tools.demo")
