// Tile kernels with a hand-written and with the generated policy of a loss: what
// `python -m bench.generated_policies` compiles for one instruction set, with the two structs in
// handwritten.h and generated.h and with UF_KERNELS, the function of policy_kernels.h.
//
//   policy_tiles count KERNEL CONSTANTS CONSTANTS    instructions per pair of both
//   policy_tiles time KERNEL CONSTANTS CONSTANTS     nanoseconds per pair of both, round by round
//
// CONSTANTS: numbers with commas between them, those of the hand-written policy first.
#include <sys/ptrace.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
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

#include "cpu/policy_kernels.h"
#include "generated.h"
#include "handwritten.h"

namespace unitsface::cpu {

namespace {

constexpr int64_t kMostRows = 64, kMostColumns = 1024, kIdentities = 16;
// Columns of a counted tile: small workspaces, for which malloc takes the same way every time.
constexpr int64_t kCounted = 192;
constexpr int kRounds = 31, kRepeats = 20;

template <class T, int64_t kCount>
struct alignas(64) Array : std::array<T, kCount> {
  explicit Array(T value) { this->fill(value); }
};

// One for all runs, since the compiler's loops depend on alignment; aligned as Torch's memory.
struct Tile {
  int64_t n, m;
  Array<float, kMostRows * kMostColumns> cosines{0.0f}, gradient{0.0f};
  Array<float, kMostColumns> rows{0.5f}, columns{0.5f}, sums{0.5f}, other{0.5f};
  Array<double, kMostColumns> losses{0.0}, more{0.0}, slopes{0.0};
  Array<int32_t, kMostColumns> labels{0};
  Array<int64_t, kMostRows> targets{0};

  void resize(int64_t new_n, int64_t new_m) {
    n = new_n, m = new_m;
    for (size_t i = 0; i < cosines.size(); ++i) cosines[i] = 0.9f * std::sin(0.37f * float(i));
    for (int64_t j = 0; j < m; ++j) labels[j] = int32_t(j % kIdentities);
    for (int64_t i = 0; i < n; ++i) targets[i] = 3 * i;
  }

  // Gradients go to a place of their own: the cosines are the same in every run.
  SumTile sum(bool per_column, bool both) {
    SumTile t{};
    t.cosines = cosines.data(), t.gradient = gradient.data(), t.gradient_scale = 1.0f;
    t.n = n, t.m = t.stride = m;
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
    t.cosines = cosines.data(), t.n = n, t.m = t.stride = m;
    t.a_labels = t.b_labels = labels.data(), t.diagonal = INT64_MIN;
    return t;
  }
};

using Run = std::function<void(const LossKernels& kernels, const float* constants)>;

// The tile that a kernel takes: earlier trees have no variables in it.
template <typename Tile>
Tile argument_of(void (*)(const float*, const Tile&, int));
using Statistics = decltype(argument_of(std::declval<LossKernels>().logsumexp_tile));
using Gradient = decltype(argument_of(std::declval<LossKernels>().logsumexp_gradient_tile));

std::map<std::string, Run> runs(Tile& tile) {
  std::map<std::string, Run> found;
  const auto sum = [&](bool per_column, bool both) {
    return [&tile, per_column, both](const LossKernels& kernels, const float* constants) {
      kernels.sum_tile(constants, tile.sum(per_column, both), 1);
    };
  };
  found["sum"] = sum(false, false);
  found["sum both"] = sum(false, true);
  found["sum per column"] = sum(true, true);
  found["sum of rows per column"] = sum(true, false);  // of classes
  found["statistics"] = [&](const LossKernels& kernels, const float* constants) {
    Statistics t{};
    static_cast<LogsumexpTileArgs&>(t) = {
        tile.cosines.data(), tile.n,           tile.m,           tile.m, tile.targets.data(), 0,
        tile.rows.data(),    tile.sums.data(), tile.other.data()};
    kernels.logsumexp_tile(constants, t, 1);
  };
  found["gradient"] = [&](const LossKernels& kernels, const float* constants) {
    Gradient t{};
    static_cast<LogsumexpGradientArgs&>(t) = {tile.cosines.data(),
                                              tile.gradient.data(),
                                              DType::kFloat32,
                                              1.0f,
                                              tile.n,
                                              tile.m,
                                              tile.m,
                                              tile.targets.data(),
                                              0,
                                              tile.rows.data(),
                                              tile.columns.data(),
                                              tile.other.data()};
    kernels.logsumexp_gradient_tile(constants, t, 1);
  };
  found["pair negatives"] = [&](const LossKernels& kernels, const float* constants) {
    auto t = tile.pairs<PairNegatives>();
    // The kernel leaves logits in place of the cosines.
    std::memcpy(tile.gradient.data(), tile.cosines.data(), sizeof(float) * tile.n * tile.m);
    t.cosines = tile.gradient.data();
    t.a_maximum = tile.rows.data(), t.a_total = tile.sums.data();
    kernels.pair_negatives_tile(constants, t, 1);
  };
  found["pair positives"] = [&](const LossKernels& kernels, const float* constants) {
    auto t = tile.pairs<PairPositives>();
    t.a_log_negatives = tile.columns.data();
    t.a_loss = tile.sums.data(), t.a_negative_prob = tile.other.data();
    kernels.pair_positives_tile(constants, t, 1);
  };
  found["pair gradient"] = [&](const LossKernels& kernels, const float* constants) {
    auto t = tile.pairs<PairGradient>();
    t.gradient = tile.gradient.data(), t.gradient_scale = 1.0f;
    t.a_log_negatives = t.b_log_negatives = tile.columns.data();
    t.a_negative_weight = t.b_negative_weight = tile.columns.data();
    t.a_positive_weight = t.b_positive_weight = tile.columns.data();
    kernels.pair_gradient_tile(constants, t, 1);
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

double seconds(const std::function<void()>& run) {
  const auto start = std::chrono::steady_clock::now();
  for (int i = 0; i < kRepeats; ++i) run();
  const std::chrono::duration<double> took = std::chrono::steady_clock::now() - start;
  return took.count() / kRepeats;
}

std::vector<float> parsed(const char* text) {
  std::vector<float> found;
  for (char* end = nullptr; *text != '\0'; text = *end == ',' ? end + 1 : end) {
    found.push_back(std::strtof(text, &end));
  }
  return found;
}

}  // namespace
}  // namespace unitsface::cpu

int main(int count, char** arguments) {
  using namespace unitsface::cpu;
  if (count != 5) return 2;
  static Tile tile;
  const bool counts = std::strcmp(arguments[1], "count") == 0;
  const LossKernels kernels[] = {UF_KERNELS<unitsface::Handwritten>(),
                                 UF_KERNELS<unitsface::Generated>()};
  const std::vector<float> constants[] = {parsed(arguments[3]), parsed(arguments[4])};
  const auto measured = [&](int variant, auto measure, int64_t n, int64_t m) {
    tile.resize(n, m);
    const Run run = runs(tile).at(arguments[2]);
    const auto once = [&] { run(kernels[variant], constants[variant].data()); };
    once();  // lazy binding
    return measure(once);
  };
  for (int round = 0; round < (counts ? 2 : kRounds); ++round) {
    for (int variant = 0; variant < 2; ++variant) {
      double found;
      if (counts) {
        // The difference of two tiles: without what a call costs.
        const double one = measured(variant, instructions, 1, kCounted);
        const double two = measured(variant, instructions, 2, kCounted);
        if (one < 0 || two < 0) return 3;
        found = (two - one) / kCounted;
      } else {
        found = 1e9 * measured(variant, seconds, kMostRows, kMostColumns);
        found /= double(kMostRows * kMostColumns);
      }
      // Malloc works on its lists in the first runs of a process.
      if (counts && round == 0) continue;
      std::printf(variant == 0 ? "%.5f " : "%.5f\n", found);
    }
  }
}
