// One tile kernel of one loss, counted or timed: `python -m bench.generated_policies` compiles it
// with each variant of the policies, for one instruction set (UF_ISA).
//
//   policy_tiles count KERNEL LOSS CONSTANT ...          instructions per pair
//   policy_tiles time KERNEL LOSS CONSTANT ...           nanoseconds per pair, best of a few
#include <sys/ptrace.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <cmath>
#include <csignal>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <string>
#include <vector>

#include "cpu/kernels.h"

#define UF_JOIN2(a, b) a##b
#define UF_JOIN(a, b) UF_JOIN2(a, b)

namespace unitsface::cpu {

extern const Kernels UF_JOIN(kernels_, UF_ISA);

namespace {

const Kernels& kernels = UF_JOIN(kernels_, UF_ISA);
constexpr int64_t kMostRows = 64, kColumns = 1024, kIdentities = 16;

struct Tile {
  int64_t n;
  std::vector<float> cosines = std::vector<float>(kMostRows * kColumns);
  std::vector<float> gradient = cosines, columns = std::vector<float>(kColumns, 0.5f);
  std::vector<float> rows = columns, sums = columns, other = columns;
  std::vector<double> losses = std::vector<double>(kColumns), more = losses, slopes = losses;
  std::vector<int32_t> labels = std::vector<int32_t>(kColumns);
  std::vector<int64_t> targets = std::vector<int64_t>(kMostRows);

  explicit Tile(int64_t n) : n(n) {
    for (size_t i = 0; i < cosines.size(); ++i) cosines[i] = 0.9f * std::sin(0.37f * float(i));
    for (int64_t j = 0; j < kColumns; ++j) labels[j] = int32_t(j % kIdentities);
    for (int64_t i = 0; i < n; ++i) targets[i] = 3 * i;
  }

  // Gradients go to a place of their own: the cosines are the same in every run.
  SumTile sum(bool per_column, bool both) {
    SumTile t{};
    t.cosines = cosines.data(), t.gradient = gradient.data(), t.gradient_scale = 1.0f;
    t.n = n, t.m = t.stride = kColumns;
    t.a_labels = t.b_labels = labels.data();
    t.a_threshold = t.b_threshold = columns.data(), t.per_column = per_column;
    t.a_loss = losses.data(), t.b_loss = both ? more.data() : nullptr;
    t.a_dthreshold = t.b_dthreshold = slopes.data();
    t.diagonal = INT64_MIN, t.mirrored = both;
    return t;
  }

  template <class Args>
  Args pairs() {
    Args t{};
    t.cosines = cosines.data(), t.n = n, t.m = t.stride = kColumns;
    t.a_labels = t.b_labels = labels.data(), t.diagonal = INT64_MIN;
    return t;
  }
};

using Run = std::function<bool(const char* loss, const float* constants)>;

std::map<std::string, Run> runs(Tile& tile) {
  std::map<std::string, Run> found;
  const auto sum = [&](bool per_column, bool both) {
    return [&tile, per_column, both](const char* loss, const float* constants) {
      return kernels.sum_tile(loss, constants, tile.sum(per_column, both), 1);
    };
  };
  found["sum"] = sum(false, false);
  found["sum both"] = sum(false, true);
  found["sum per column"] = sum(true, true);
  found["statistics"] = [&](const char* loss, const float* constants) {
    const LogsumexpTileArgs t{tile.cosines.data(), tile.n, kColumns,         kColumns,
                              tile.targets.data(), 0,      tile.rows.data(), tile.sums.data(),
                              tile.other.data()};
    return kernels.logsumexp_tile(loss, constants, t, 1);
  };
  found["gradient"] = [&](const char* loss, const float* constants) {
    const LogsumexpGradientArgs t{tile.cosines.data(),
                                  tile.gradient.data(),
                                  DType::kFloat32,
                                  1.0f,
                                  tile.n,
                                  kColumns,
                                  kColumns,
                                  tile.targets.data(),
                                  0,
                                  tile.rows.data(),
                                  tile.columns.data(),
                                  tile.other.data()};
    return kernels.logsumexp_gradient_tile(loss, constants, t, 1);
  };
  found["pair negatives"] = [&](const char* loss, const float* constants) {
    auto t = tile.pairs<PairNegatives>();
    // The kernel leaves logits in place of the cosines.
    std::memcpy(tile.gradient.data(), tile.cosines.data(), sizeof(float) * tile.n * kColumns);
    t.cosines = tile.gradient.data();
    t.a_maximum = tile.rows.data(), t.a_total = tile.sums.data();
    return kernels.pair_negatives_tile(loss, constants, t, 1);
  };
  found["pair positives"] = [&](const char* loss, const float* constants) {
    auto t = tile.pairs<PairPositives>();
    t.a_log_negatives = tile.columns.data();
    t.a_loss = tile.sums.data(), t.a_negative_prob = tile.other.data();
    return kernels.pair_positives_tile(loss, constants, t, 1);
  };
  found["pair gradient"] = [&](const char* loss, const float* constants) {
    auto t = tile.pairs<PairGradient>();
    t.gradient = tile.gradient.data(), t.gradient_scale = 1.0f;
    t.a_log_negatives = t.b_log_negatives = tile.columns.data();
    t.a_negative_weight = t.b_negative_weight = tile.columns.data();
    t.a_positive_weight = t.b_positive_weight = tile.columns.data();
    return kernels.pair_gradient_tile(loss, constants, t, 1);
  };
  return found;
}

// Instructions of `run` in a child, which stops before and after it; steps of this process count.
double instructions(const std::function<void()>& run) {
  const pid_t child = fork();
  if (child == 0) {
    ptrace(PTRACE_TRACEME, 0, nullptr, nullptr);
    raise(SIGSTOP);
    run();
    raise(SIGSTOP);
    _exit(0);
  }
  int status = 0;
  int64_t count = 0;
  waitpid(child, &status, 0);
  for (bool stopped = false; !stopped; ++count) {
    if (ptrace(PTRACE_SINGLESTEP, child, nullptr, nullptr) != 0) return -1;
    waitpid(child, &status, 0);
    if (!WIFSTOPPED(status)) return -1;
    stopped = WSTOPSIG(status) == SIGSTOP;
  }
  kill(child, SIGKILL);
  waitpid(child, &status, 0);
  return double(count);
}

double best_seconds(const std::function<void()>& run) {
  double best = INFINITY;
  for (int round = 0; round < 20; ++round) {
    const auto start = std::chrono::steady_clock::now();
    for (int i = 0; i < 10; ++i) run();
    const std::chrono::duration<double> took = std::chrono::steady_clock::now() - start;
    best = std::fmin(best, took.count() / 10);
  }
  return best;
}

}  // namespace
}  // namespace unitsface::cpu

int main(int count, char** arguments) {
  using namespace unitsface::cpu;
  if (count < 4) return 2;
  float constants[16] = {};
  for (int i = 4; i < count && i < 20; ++i) constants[i - 4] = std::strtof(arguments[i], nullptr);
  const std::string kernel = arguments[2];
  const auto run_of = [&](int64_t rows,
                          const std::function<double(const std::function<void()>&)>& measure) {
    Tile tile(rows);
    const auto known = runs(tile);
    const auto found = known.find(kernel);
    // A first run: lazy binding, and whether there is such a loss.
    if (found == known.end() || !found->second(arguments[3], constants)) std::exit(2);
    return measure([&] { found->second(arguments[3], constants); });
  };
  if (std::strcmp(arguments[1], "count") == 0) {
    // The difference of two tiles: without what a call costs.
    const double few = run_of(2, instructions), more = run_of(4, instructions);
    if (few < 0 || more < 0) return 3;
    std::printf("%.4f\n", (more - few) / double(2 * kColumns));
  } else {
    std::printf("%.5f\n", 1e9 * run_of(kMostRows, best_seconds) / double(kMostRows * kColumns));
  }
}
