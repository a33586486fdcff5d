// The arithmetic behind samples and blend. data/reference.py says the same in numpy, bit for bit.
// No state, no allocation that outlives a call, no Python: Python owns every buffer, ctypes drops the GIL.

#include "blend.h"

extern "C" {

void ml_permute(const int64_t* index, int64_t count, int64_t size, uint64_t key, int64_t* out) {
  const Permutation order(static_cast<uint64_t>(size), key);
  for (int64_t i = 0; i < count; ++i) out[i] = static_cast<int64_t>(order(static_cast<uint64_t>(index[i])));
}

void ml_counts(const Blend* blend, int64_t total, int64_t* counts) { split(*blend, total, counts); }

// Samples [start, start + count): which leaf each belongs to, and its ordinal within that leaf.
void ml_draw(const Blend* blend, int64_t start, int64_t count, int32_t* leaf_out, int64_t* ordinal_out) {
  draw(*blend, start, count, [=](int64_t i, int32_t leaf, int64_t ordinal) {
    leaf_out[i] = leaf;
    ordinal_out[i] = ordinal;
  });
}

// Tokens before each block when the blocks are taken in the order that `key` gives.
void ml_block_prefix(const int64_t* block_tokens, int64_t num_blocks, uint64_t key, int64_t* prefix) {
  const Permutation order(static_cast<uint64_t>(num_blocks), key);
  int64_t total = 0;
  for (int64_t i = 0; i < num_blocks; ++i) {
    prefix[i] = total;
    total += block_tokens[order(static_cast<uint64_t>(i))];
  }
  prefix[num_blocks] = total;
}

}  // extern "C"
