"""Verification sets (.bin files of insightface): ten-fold accuracy with flip test."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

HELP = "verification sets such as lfw.bin: 10-fold accuracy"


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("sets", nargs="+", metavar="SET", help="e.g. lfw.bin cfp_fp.bin")


def run(arguments: Namespace) -> int:
    from train.evaluation.bins import open_bin_set
    from train.evaluation.commands.pairs import make_folder, plot_scores
    from train.evaluation.embed import embed
    from train.evaluation.folds import FAR
    from train.evaluation.model import load_model
    from train.evaluation.rates import resolved
    from train.evaluation.test_sets import distinct
    from train.run_folder import write_json

    model = load_model(arguments)
    size = model.config.model.input_size
    sets = distinct(
        open_bin_set(
            path,
            size,
            on_error=arguments.on_error,
            workers=arguments.workers,
            max_pixels=model.config.data.max_pixels,
        )
        for path in arguments.sets
    )
    make_folder(arguments.out)
    figures = {}
    print(f"{'set':<16}{'accuracy':>18}{'AUC':>9}{'val@FAR=1e-3':>14}{'at b/s':>9}{'best':>8}")
    for test_set in sets:
        features, _ = embed(
            model.backbone, test_set.source, model.device, batch_size=arguments.batch_size
        )
        row = test_set.score(features, threshold=model.threshold, device=model.device)
        if arguments.out is not None:
            scores = test_set.pair_scores(features)
            plot_scores(test_set.name, *scores, (model.threshold, row["best_threshold"]), arguments)
        figures[test_set.name] = row
        negatives = int((~test_set.same).sum())
        validation = f"{row['val@far=0.001']:.4f}" if resolved(FAR, negatives) else "not resolved"
        learned = row.get("accuracy_at_threshold")
        print(
            f"{test_set.name:<16}{row['accuracy']:>9.4f} ± {row['accuracy_std']:.4f}"
            f"{row['auc']:>9.4f}{validation:>14}"
            f"{'-' if learned is None else f'{learned:.4f}':>9}{row['best_threshold']:>8.3f}"
            + (f"  ({row['skipped_pairs']} pairs skipped)" if "skipped_pairs" in row else "")
        )
    if arguments.out is not None:
        write_json(arguments.out / "verification.json", figures)
    return 0
