// Tokens of a piece to 64 bits, and what the ends of documents mean for positions, loss and attention.
#pragma once

#include "permutation.h"

// `count` tokens to `tokens`. False when one of them is negative or not below vocab_size.
bool widen(int64_t dtype_code, const uint8_t* source, int64_t count, int64_t* tokens, uint64_t vocab_size);

struct Marks {  // what a row's documents give; null is not wanted
  float* loss_mask;       // [seq_length]: 0 where the input is EOD
  int64_t* position_ids;  // [seq_length]: place in the document
  int32_t* cu_seqlens;    // where to append `first` and the place after each EOD inside the row
};

// Returns how many numbers were appended to cu_seqlens. `first` is the row's place in the flattened micro-batch.
int64_t mark(const int64_t* tokens, int64_t seq_length, int64_t eod, int64_t first, const Marks& marks);
