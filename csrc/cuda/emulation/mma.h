// Instructions of a whole warp: ldmatrix and mma.sync, by the fragments of the PTX ISA.
#pragma once

#include <cmath>

#include "shared_memory.h"

namespace emulation {

// What the lanes of a warp give to one instruction. All of them have to execute the same one.
class WarpInstruction {
 public:
  static constexpr size_t kMost = 64;

  struct Slot {
    alignas(16) char bytes[kMost];
    const char* name;
  };

  // The values of all lanes, which stay until the lane's next instruction but one.
  const Slot* exchange(const char* name, const void* values, size_t bytes) {
    const int lane = block.current % kLanes;
    const int64_t mine = generation_;
    Slot* slots = slots_[mine % 2];
    std::memcpy(slots[lane].bytes, values, bytes);
    slots[lane].name = name;
    if (++arrived_ == kLanes) {
      arrived_ = 0;
      ++generation_;
      ++block.progress;
    }
    while (generation_ == mine) block.yield();
    for (int k = 0; k < kLanes; ++k) {
      if (slots[k].name != name)
        broken("all lanes of a warp execute the same .aligned instruction");
    }
    return slots;
  }

 private:
  Slot slots_[2][kLanes];
  int arrived_ = 0;
  int64_t generation_ = 0;
};

inline std::vector<WarpInstruction> warp_instructions;
inline WarpInstruction& own_warp() {
  const size_t warps = block.fibers.size() / kLanes;
  if (warp_instructions.size() < warps) warp_instructions.resize(warps);
  return warp_instructions[block.current / kLanes];
}

inline void load_matrices(uint32_t (&words)[4], const void* row) {
  if (reinterpret_cast<uintptr_t>(row) % 16 != 0)
    broken("rows of ldmatrix are aligned to 16 bytes");
  shared_memory.read(row, 16);
  // As numbers in the memory: all lanes have to have read what they name before it changes.
  uint32_t own[4];
  std::memcpy(own, row, 16);
  static const char kName[] = "ldmatrix.x4";
  const auto* slots = own_warp().exchange(kName, own, sizeof(own));
  const int lane = block.current % kLanes;
  for (int matrix = 0; matrix < 4; ++matrix) {
    std::memcpy(&words[matrix], slots[8 * matrix + lane / 4].bytes + 4 * (lane % 4), 4);
  }
}

// Fragments of a lane, in words: a holds rows lane / 4 and + 8 (odd words), and the second half of
// the depth (words 2 and 3); b holds column lane / 4, its words the halves of the depth; c as
// accumulator.cuh says.
struct Fragments {
  uint32_t a[4], b[2];
};

// kPerWord numbers in a word, which `number` takes apart.
template <int kPerWord, class Number>
void multiply_fragments(const char* name, float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                        uint32_t b1, const Number& number) {
  const Fragments own{{a[0], a[1], a[2], a[3]}, {b0, b1}};
  const auto* slots = own_warp().exchange(name, &own, sizeof(own));
  const int lane = block.current % kLanes;
  for (int half = 0; half < 2; ++half) {
    for (int which = 0; which < 2; ++which) {
      float& sum = c[2 * half + which];
      for (int part = 0; part < 2; ++part) {
        for (int word = 0; word < 4; ++word) {
          Fragments left, right;
          std::memcpy(&left, slots[lane / 4 * 4 + word].bytes, sizeof(left));
          std::memcpy(&right, slots[(lane % 4 * 2 + which) * 4 + word].bytes, sizeof(right));
          for (int k = 0; k < kPerWord; ++k) {
            sum = std::fmaf(number(left.a[2 * part + half], k), number(right.b[part], k), sum);
          }
        }
      }
    }
  }
}

inline float bfloat16_of(uint32_t word, int k) {
  const uint32_t bits = k == 0 ? word << 16 : word & 0xffff0000u;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline float float16_of(uint32_t word, int k) {
  const uint16_t bits = static_cast<uint16_t>(word >> (16 * k));
  __half value;
  std::memcpy(static_cast<void*>(&value), &bits, 2);
  return __half2float(value);
}

// The low 13 bits of a word of TF32 are undefined: their use would be a mistake.
inline float tf32_of(uint32_t word, int) {
  if ((word & 0x1fffu) != 0 && (word & 0x7f800000u) != 0x7f800000u) {
    broken("operands of mma.sync in tf32 were rounded by cvt.rna.tf32");
  }
  float value;
  std::memcpy(&value, &word, 4);
  return value;
}

}  // namespace emulation
