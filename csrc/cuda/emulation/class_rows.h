// Rows of a tile of classes, for the tests of log-sum-exps over these.
#pragma once

#include "checks.h"

namespace unitsface::checks {

struct ClassRows {
  int64_t n, m, start;  // rows, and the tile's classes and the first of them
  Buffer<int64_t> targets;
  Buffer<float> log_negatives, weights, target_gradients;

  // Targets inside, just outside on both sides, and of ignored rows.
  ClassRows(int64_t rows, int64_t classes, int64_t first)
      : n(rows),
        m(classes),
        start(first),
        targets(rows, 0),
        log_negatives(rows, 0.0f),
        weights(rows, 0.0f),
        target_gradients(rows, 0.0f) {
    for (int64_t i = 0; i < n; ++i) {
      const int64_t choice = integer(0, 5);
      targets[i] = choice == 0   ? -1 - integer(0, 1)
                   : choice == 1 ? start - 1
                   : choice == 2 ? start + m
                                 : start + integer(0, m - 1);
    }
  }

  // What the gradient of row i depends on, some of them without weight.
  void set(int64_t i, float log) {
    log_negatives[i] = log;
    weights[i] = i % 4 == 1 ? 0.0f : uniform(0.1f, 1.0f);
    target_gradients[i] = uniform(-16.0f, 0.0f);
  }

  LogsumexpGradientArgs gradient(const float* cosines, void* out, DType dtype,
                                 int64_t stride) const {
    return {cosines,
            out,
            dtype,
            32.0f,
            n,
            m,
            stride,
            targets.data,
            start,
            log_negatives.data,
            weights.data,
            target_gradients.data};
  }
};

}  // namespace unitsface::checks
