#include "rows.h"

namespace {

template <typename T>
ML_INLINE bool widen_as(const uint8_t* source, int64_t count, int64_t* tokens, uint64_t vocab_size) {
  const T* from = reinterpret_cast<const T*>(source);  // aligned: a .bin is mapped, pieces start at whole tokens
  T low = 0, high = 0;
  for (int64_t i = 0; i < count; ++i) {
    low = from[i] < low ? from[i] : low;
    high = from[i] > high ? from[i] : high;
  }
  for (int64_t i = 0; i < count; ++i) tokens[i] = static_cast<int64_t>(from[i]);
  return low >= 0 && static_cast<uint64_t>(high) < vocab_size;
}

}  // namespace

ML_CLONES bool widen(int64_t dtype_code, const uint8_t* source, int64_t count, int64_t* tokens, uint64_t vocab_size) {
  switch (dtype_code) {
    case 1: return widen_as<uint8_t>(source, count, tokens, vocab_size);
    case 2: return widen_as<int8_t>(source, count, tokens, vocab_size);
    case 3: return widen_as<int16_t>(source, count, tokens, vocab_size);
    case 4: return widen_as<int32_t>(source, count, tokens, vocab_size);
    case 5: return widen_as<int64_t>(source, count, tokens, vocab_size);
    default: return widen_as<uint16_t>(source, count, tokens, vocab_size);
  }
}

ML_CLONES int64_t mark(const int64_t* tokens, int64_t seq_length, int64_t eod, int64_t first, const Marks& marks) {
  constexpr int64_t STRIDE = 32;  // tokens looked at together: documents are mostly longer
  int64_t begin = 0, appended = 0;  // begin: where the document that holds token i starts
  if (marks.cu_seqlens) marks.cu_seqlens[appended++] = static_cast<int32_t>(first);
  if (marks.loss_mask)
    for (int64_t i = 0; i < seq_length; ++i) marks.loss_mask[i] = 1.0f;
  const auto close = [&](int64_t end) {
    if (marks.position_ids)
      for (int64_t i = begin; i < end; ++i) marks.position_ids[i] = i - begin;
    begin = end;
  };
  for (int64_t at = 0; at < seq_length; at += STRIDE) {
    const int64_t end = at + STRIDE < seq_length ? at + STRIDE : seq_length;
    int64_t found = 0;
    for (int64_t i = at; i < end; ++i) found |= tokens[i] == eod;
    if (!found) continue;
    for (int64_t i = at; i < end; ++i) {
      if (tokens[i] != eod) continue;
      if (marks.loss_mask) marks.loss_mask[i] = 0.0f;
      close(i + 1);
      if (marks.cu_seqlens && i + 1 < seq_length) marks.cu_seqlens[appended++] = static_cast<int32_t>(first + i + 1);
    }
  }
  close(seq_length);
  return appended;
}
