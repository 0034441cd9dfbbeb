// Which threads have written and read each word of shared memory since the last barrier: an access
// that no barrier separates from a conflicting one of another thread ends the process, whatever
// the order in which the emulation runs the threads.
#pragma once

#include "cuda_emulation.h"

namespace emulation {

class SharedMemory {
 public:
  static constexpr int kNobody = -1, kSeveral = -2;

  struct Word {
    int writer = kNobody, reader = kNobody;
    int64_t written = -1, read = -1;  // generations of the block's barrier
    int in_flight = 0;                // asynchronous copies to it that no thread has waited for
  };

  // Looks at an access (pointer, bytes, whether it writes) to memory with rules of its own, of
  // which barriers of parts of a block are some; false: it is not such memory.
  bool (*elsewhere)(const void*, size_t, bool) = nullptr;

  // Every thread of a block calls; the first one finds memory that nothing was written to.
  void declare(void* memory, int bytes) {
    if (fresh_) {
      fresh_ = false;
      start_ = static_cast<char*>(memory);
      words_.assign(static_cast<size_t>(bytes) / 4, Word());
      std::memset(memory, 0xff, static_cast<size_t>(bytes));
    }
  }

  // Memory that was not declared belongs to kernels whose accesses are not checked.
  void read(const void* source, size_t bytes) {
    if (elsewhere != nullptr && elsewhere(source, bytes, false)) return;
    for_words(source, bytes, [&](Word& word) {
      if (word.in_flight > 0) broken("cp.async.wait_group before reading what cp.async writes");
      if (word.written == block.generation && word.writer != block.current) {
        broken("a barrier between writing shared memory and reading it by another thread");
      }
      const bool alone = word.read != block.generation || word.reader == block.current;
      word.reader = alone ? block.current : kSeveral;
      word.read = block.generation;
    });
  }

  void write(const void* target, size_t bytes) {
    if (elsewhere != nullptr && elsewhere(target, bytes, true)) return;
    for_words(target, bytes, [&](Word& word) {
      may_be_written(word);
      set_written(word);
    });
  }

  void start_copy(const void* target, size_t bytes) {
    require_inside(target, bytes);
    for_words(target, bytes, [&](Word& word) {
      may_be_written(word);
      ++word.in_flight;
    });
  }

  void finish_copy(const void* target, size_t bytes) {
    for_words(target, bytes, [&](Word& word) {
      --word.in_flight;
      set_written(word);
    });
  }

  void require_inside(const void* memory, size_t bytes) const {
    const char* place = static_cast<const char*>(memory);
    if (place < start_ || place + bytes > start_ + 4 * words_.size()) {
      broken("shared addresses lie in the shared memory of the block");
    }
  }

  void forget() { fresh_ = true; }

 private:
  static void may_be_written(const Word& word) {
    if (word.in_flight > 0) broken("nothing else writes where a copy is in flight");
    if (word.read == block.generation && word.reader != block.current) {
      broken("a barrier between reading shared memory and overwriting it by another thread");
    }
    if (word.written == block.generation && word.writer != block.current) {
      broken("a barrier between two threads that write the same shared memory");
    }
  }

  static void set_written(Word& word) {
    word.writer = block.current;
    word.written = block.generation;
  }

  template <class Run>
  void for_words(const void* memory, size_t bytes, const Run& run) {
    const char* place = static_cast<const char*>(memory);
    require_inside(memory, bytes);
    const size_t first = static_cast<size_t>(place - start_) / 4;
    const size_t last = static_cast<size_t>(place + bytes - 1 - start_) / 4;
    for (size_t k = first; k <= last; ++k) run(words_[k]);
  }

  bool fresh_ = true;
  char* start_ = nullptr;
  std::vector<Word> words_;
};

inline SharedMemory shared_memory;
inline const bool shared_memory_is_reset = [] {
  block_starts.push_back([] { shared_memory.forget(); });
  return true;
}();

}  // namespace emulation
