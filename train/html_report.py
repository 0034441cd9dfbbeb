"""``python train/html_report.py``: see train/tools/run_report.py."""

if __name__ == "__main__":
    from script import start

    start("train.tools.run_report")
