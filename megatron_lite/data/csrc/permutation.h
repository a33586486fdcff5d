// Keys and keyed permutations. data/keys.py and data/reference.py say the same, bit for bit.
#pragma once

#include <cmath>
#include <cstdint>

#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__) && !defined(ML_NO_CLONES)
#define ML_CLONES __attribute__((target_clones("avx2", "default")))  // widening tokens is what AVX2 is for
#else
#define ML_CLONES
#endif
#define ML_INLINE static inline __attribute__((always_inline))

constexpr int HALF_ROUNDS = 6;                // reference.HALF_ROUNDS
constexpr uint64_t TABLE_LIMIT = 256 * 256;  // up to here a round function has at most 256 values: a table

// splitmix64's finaliser over a counter: a new key for every purpose.
ML_INLINE uint64_t mix64(uint64_t key, uint64_t value) {
  uint64_t z = key + 0x9E3779B97F4A7C15ull * (value + 1);
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
  return z ^ (z >> 31);
}

ML_INLINE uint64_t hash32(uint64_t value, uint64_t key) {
  uint64_t z = (value + key) * 0xFF51AFD7ED558CCDull;  // murmur3's finaliser constants
  z = (z ^ (z >> 32)) * 0xC4CEB9FE1A85EC53ull;
  return z >> 32;
}

template <typename T>
ML_INLINE T reduce(T sum, T modulus) {
  return sum >= modulus ? sum - modulus : sum;
}

// A keyed permutation of [0, size): Feistel on a grid of a x b cells, a*b - size < a, so cells outside are rare.
struct Permutation {
  uint64_t size, a, b, keys[HALF_ROUNDS];

  Permutation(uint64_t n, uint64_t key) : size(n) {
    a = static_cast<uint64_t>(std::sqrt(static_cast<double>(n)));
    while (a * a < n) ++a;
    while (a > 1 && (a - 1) * (a - 1) >= n) --a;
    b = a ? (n + a - 1) / a : 0;
    for (int r = 0; r < HALF_ROUNDS; ++r) keys[r] = mix64(key, static_cast<uint64_t>(r));
  }

  static inline uint64_t divide(uint64_t x, uint64_t y) {  // 64-bit division costs several times the 32-bit one
    return (x | y) >> 32 ? x / y : static_cast<uint32_t>(x) / static_cast<uint32_t>(y);
  }

  uint64_t operator()(uint64_t i) const {
    do {
      uint64_t x = divide(i, b), y = i - x * b;
      for (int r = 0; r < HALF_ROUNDS; r += 2) {
        x = reduce(x + ((hash32(y, keys[r]) * a) >> 32), a);
        y = reduce(y + ((hash32(x, keys[r + 1]) * b) >> 32), b);
      }
      i = x * b + y;
    } while (i >= size);
    return i;
  }
};

// The same permutation at 0, 1, 2, ...: next() gives one value after the other. Its rounds are table look-ups, so it is
// several times faster where most of a small range is wanted, and size is at most TABLE_LIMIT.
class Sequence {
 public:
  Sequence(uint64_t size, uint64_t key) : order_(size, key), a_(static_cast<uint32_t>(order_.a)),
                                          b_(static_cast<uint32_t>(order_.b)) {
    for (int r = 0; r < HALF_ROUNDS; ++r) {
      const uint32_t inputs = r % 2 ? a_ : b_;
      const uint64_t outputs = r % 2 ? b_ : a_;
      for (uint32_t i = 0; i < inputs; ++i)
        table_[r][i] = static_cast<uint8_t>((hash32(i, order_.keys[r]) * outputs) >> 32);
    }
  }

  uint32_t next() {
    uint32_t x = x_, y = y_, i;
    if (++y_ == b_) {
      y_ = 0;
      ++x_;
    }
    while (true) {
      for (int r = 0; r < HALF_ROUNDS; r += 2) {
        x = reduce(x + table_[r][y], a_);
        y = reduce(y + table_[r + 1][x], b_);
      }
      i = x * b_ + y;
      if (i < order_.size) return i;  // else walk on: a cell outside, whose x and y are where the next walk starts
    }
  }

 private:
  Permutation order_;
  uint32_t a_, b_, x_ = 0, y_ = 0;
  uint8_t table_[HALF_ROUNDS][256];
};
