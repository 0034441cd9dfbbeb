// The threads of the CPU kernels.
//
// Kernels are short loops in quick succession. After such a loop the threads of an OpenMP runtime
// spin for milliseconds, and at its end each waits for all others, even for one that has had no
// processor yet: beside other work on the machine most of the time is then spent waiting. Here any
// thread, the calling one included, takes the next chunk of the loop. The calling thread waits for
// chunks that others have begun, never for one that has not started; it soon sleeps.
#pragma once

#include <cstdint>

namespace unitsface::cpu {

// `slot` is below the number of threads, and no two running chunks have the same.
using RunChunk = void (*)(const void* body, int64_t chunk, int slot);

// Runs the chunks [0, count), each once, on the calling thread and at most `threads` - 1 others; on
// the calling thread alone while another call has these. Which thread runs a chunk is left to
// chance: results must not depend on it. Chunks must not throw.
void run_chunks(int64_t count, int threads, RunChunk run, const void* body);

// body(chunk, slot)
template <class Body>
void parallel_chunks(int64_t count, int threads, const Body& body) {
  const RunChunk run = [](const void* context, int64_t chunk, int slot) {
    (*static_cast<const Body*>(context))(chunk, slot);
  };
  run_chunks(count, threads, run, &body);
}

// Elements of a chunk of rows: 5 to 30 microseconds, many times what it costs to take it.
constexpr int64_t kChunkElements = 16384;

// body(i) for each of n rows of `width` elements.
template <class Body>
void parallel_rows(int64_t n, int64_t width, int threads, const Body& body) {
  const int64_t rows = width < kChunkElements ? kChunkElements / (width < 1 ? 1 : width) : 1;
  parallel_chunks((n + rows - 1) / rows, threads, [&](int64_t chunk, int) {
    const int64_t end = n < (chunk + 1) * rows ? n : (chunk + 1) * rows;
    for (int64_t i = chunk * rows; i < end; ++i) body(i);
  });
}

}  // namespace unitsface::cpu
