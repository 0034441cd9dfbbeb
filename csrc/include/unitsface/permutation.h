// A permutation of [0, size) that is computed element by element, in both directions, to draw
// classes without a list of them. permutation.py in unitsface_kernels/distributed/partial_fc is the
// same in Torch; both must give the same bits.
#pragma once

#include <cstdint>

#include "unitsface/macros.h"

namespace unitsface {

struct PermutedArgs {
  uint64_t key, size;
  const int64_t* classes;    // [n] in [0, size), anything else is outside; null: places of a draw
  const int64_t* positives;  // [m] places that it must have, ascending, behind them size for none
  int64_t m, n;
  int64_t* out;  // [n] the class at each place; with classes, the place of each or size if outside
};

inline namespace UF_ISA {

// Both mixes are bijections whose every output bit depends on every input bit; multipliers and
// shifts are those of SplitMix64 and of MurmurHash3's finalizer.
UF_HOST_DEVICE uint64_t mix_bits(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

UF_HOST_DEVICE uint32_t mix_bits(uint32_t x) {
  x = (x ^ (x >> 16)) * 0x85ebca6bu;
  x = (x ^ (x >> 13)) * 0xc2b2ae35u;
  return x ^ (x >> 16);
}

// A draw of n places: all positives, and the first others. They are the first places, as long as
// these leave room for the positives behind them, which follow in their order.
class Draw {
 public:
  UF_HOST_DEVICE explicit Draw(const PermutedArgs& t) : positives_(t.positives) {
    const int64_t real = first_from(static_cast<int64_t>(t.size), 0, t.m);
    others_ = t.n - real;
    // j positives and p - j others precede the j-th positive p.
    within_ = others_ + first_from(others_, 1, real);
  }

  UF_HOST_DEVICE int64_t place(int64_t i) const {
    return i < within_ ? i : positives_[i - others_];
  }

 private:
  // The first j < count with positives[j] - step * j >= bound, which do not decrease; else count.
  UF_HOST_DEVICE int64_t first_from(int64_t bound, int64_t step, int64_t count) const {
    int64_t first = 0;
    while (first < count) {
      const int64_t middle = first + (count - first) / 2;
      if (positives_[middle] - step * middle < bound) {
        first = middle + 1;
      } else {
        count = middle;
      }
    }
    return first;
  }

  const int64_t* positives_;
  int64_t others_, within_;
};

// A Feistel network on the next power of two: rounds change either part by a keyed function of the
// other. Results outside [0, size) are permuted again until they are inside (cycle walking);
// half of the values need no further step. Small domains mix slowly, one-bit parts hardly at
// all: the domain has at least 2^6 values, and few classes take more steps.
class Permutation {
 public:
  static constexpr int kRounds = 12;
  static constexpr int kFewestBits = 6;

  // 1 <= size <= 2^62.
  UF_HOST_DEVICE Permutation(uint64_t size, uint64_t key) : size_(size) {
    int bits = kFewestBits;
    while (bits < 62 && (size - 1) >> bits != 0) ++bits;
    low_bits_ = bits - bits / 2;
    high_mask_ = (1u << (bits / 2)) - 1;
    low_mask_ = (1u << low_bits_) - 1;
    for (int round = 0; round < kRounds; ++round) {
      key += 0x9e3779b97f4a7c15u;
      keys_[round] = static_cast<uint32_t>(mix_bits(key) >> 32);
    }
  }

  // The class at a place in [0, size); the cycle of a place outside might never enter the range.
  UF_HOST_DEVICE uint64_t at(uint64_t place) const {
    do {
      uint32_t high = static_cast<uint32_t>(place >> low_bits_), low = low_part(place);
      for (int round = 0; round < kRounds; round += 2) {
        high ^= mix_bits(low ^ keys_[round]) & high_mask_;
        low ^= mix_bits(high ^ keys_[round + 1]) & low_mask_;
      }
      place = static_cast<uint64_t>(high) << low_bits_ | low;
    } while (place >= size_);
    return place;
  }

  // The place of a class: the inverse of at().
  UF_HOST_DEVICE uint64_t place_of(uint64_t c) const {
    do {
      uint32_t high = static_cast<uint32_t>(c >> low_bits_), low = low_part(c);
      for (int round = kRounds - 2; round >= 0; round -= 2) {
        low ^= mix_bits(high ^ keys_[round + 1]) & low_mask_;
        high ^= mix_bits(low ^ keys_[round]) & high_mask_;
      }
      c = static_cast<uint64_t>(high) << low_bits_ | low;
    } while (c >= size_);
    return c;
  }

  // out[i] of PermutedArgs.
  UF_HOST_DEVICE int64_t permuted(const PermutedArgs& t, const Draw& draw, int64_t i) const {
    if (t.classes == nullptr) return static_cast<int64_t>(at(static_cast<uint64_t>(draw.place(i))));
    // As unsigned numbers negative classes are beyond size, too.
    const uint64_t c = static_cast<uint64_t>(t.classes[i]);
    return static_cast<int64_t>(c < size_ ? place_of(c) : size_);
  }

 private:
  UF_HOST_DEVICE uint32_t low_part(uint64_t x) const {
    return static_cast<uint32_t>(x) & low_mask_;
  }

  uint64_t size_;
  int low_bits_;
  uint32_t high_mask_, low_mask_;
  uint32_t keys_[kRounds];
};

}  // namespace UF_ISA
}  // namespace unitsface
