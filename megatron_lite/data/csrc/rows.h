// Tokens of a piece to 32 bits, and what the ends of documents mean for positions, loss and attention.
#pragma once

#include "permutation.h"

// `count` tokens to `tokens`. False when one of them is negative or not below vocab_size, at most 2^31.
bool convert(int64_t dtype_code, const uint8_t* source, int64_t count, int32_t* tokens, uint64_t vocab_size);

struct Marks {  // what a row's documents give; null is not wanted
  bool* loss_mask;        // [seq_length]: false where the input is EOD
  int32_t* position_ids;  // [seq_length]: place in the document
  int32_t* cu_seqlens;    // where to append `first` and the place after each EOD inside the row
};

// Returns how many numbers were appended to cu_seqlens. `first` is the row's place in the flattened micro-batch.
int64_t mark(const int32_t* tokens, int64_t seq_length, int32_t eod, int64_t first, const Marks& marks);
