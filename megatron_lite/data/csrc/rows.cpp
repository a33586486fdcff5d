#include "rows.h"

#include <cstring>

namespace {

template <typename T>
ML_INLINE bool convert(const uint8_t* source, int64_t count, int32_t* tokens, uint64_t vocab_size) {
  const T* from = reinterpret_cast<const T*>(source);  // aligned: a .bin is mapped, pieces start at whole tokens
  T low = 0, high = 0;
  for (int64_t i = 0; i < count; ++i) {
    low = from[i] < low ? from[i] : low;
    high = from[i] > high ? from[i] : high;
  }
  for (int64_t i = 0; i < count; ++i) tokens[i] = static_cast<int32_t>(from[i]);
  return low >= 0 && static_cast<uint64_t>(high) < vocab_size;
}

// Both loops count from 0 to a plain number: only so do compilers make them wide.
ML_INLINE void find(const int32_t* __restrict tokens, int64_t count, int32_t eod, bool* __restrict other) {
  for (int64_t i = 0; i < count; ++i) other[i] = tokens[i] != eod;
}

ML_INLINE void number(int32_t from, int32_t count, int32_t* __restrict places) {
  for (int32_t i = 0; i < count; ++i) places[i] = from + i;
}

}  // namespace

ML_CLONES bool convert(int64_t dtype_code, const uint8_t* source, int64_t count, int32_t* tokens, uint64_t vocab_size) {
  switch (dtype_code) {
    case 1: return convert<uint8_t>(source, count, tokens, vocab_size);
    case 2: return convert<int8_t>(source, count, tokens, vocab_size);
    case 3: return convert<int16_t>(source, count, tokens, vocab_size);
    case 4: return convert<int32_t>(source, count, tokens, vocab_size);
    case 5: return convert<int64_t>(source, count, tokens, vocab_size);
    default: return convert<uint16_t>(source, count, tokens, vocab_size);
  }
}

ML_CLONES int64_t mark(const int32_t* tokens, int64_t seq_length, int32_t eod, int64_t first, const Marks& marks) {
  constexpr int64_t STRIDE = 256;  // tokens looked at together, while they are in the first-level cache
  bool own[STRIDE];
  int64_t begin = 0, appended = 0;  // begin: where the document that holds the next token starts
  if (marks.cu_seqlens) marks.cu_seqlens[appended++] = static_cast<int32_t>(first);
  for (int64_t at = 0, end; at < seq_length; at = end) {
    end = seq_length - at < STRIDE ? seq_length : at + STRIDE;
    bool* const other = marks.loss_mask ? marks.loss_mask + at : own;  // than EOD
    find(tokens + at, end - at, eod, other);
    for (int64_t next = at; next < end;) {  // the rest of a document, as far as this stride goes
      const void* const found = std::memchr(other + (next - at), 0, static_cast<size_t>(end - next));
      const int64_t stop = found ? at + (static_cast<const bool*>(found) - other) + 1 : end;
      const auto place = static_cast<int32_t>(next - begin), count = static_cast<int32_t>(stop - next);
      if (marks.position_ids) number(place, count, marks.position_ids + next);
      next = stop;
      if (!found) continue;
      begin = next;
      if (marks.cu_seqlens && begin < seq_length) marks.cu_seqlens[appended++] = static_cast<int32_t>(first + begin);
    }
  }
  return appended;
}
