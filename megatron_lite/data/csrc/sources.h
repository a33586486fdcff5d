// Where the tokens of a sample lie: pieces of documents in mapped .bin files, in each of the three orders.
// Nothing that an .idx says is believed: every piece is checked against its .bin before it is handed on.
#pragma once

#include <cstring>

#include "permutation.h"

constexpr int64_t BLOCK = 256;                                       // samples.BLOCK
constexpr int64_t ITEM_SHIFT[9] = {0, 0, 0, 1, 2, 3, 3, 2, 1};       // log2 of the bytes of Megatron's dtype codes

enum Mode : int64_t { DOCUMENTS = 0, CONTIGUOUS = 1, MEGATRON = 2 };  // samples.MODES
enum Status : int64_t { DONE, NEEDS_EPOCH, BAD_TOKEN, BAD_PIECE, BAD_STREAM };  // native.py names them too

struct Shard {  // native.py mirrors it, and Domain
  const uint8_t* tokens;
  const uint8_t* lengths;   // int32 [num_documents], unaligned
  const uint8_t* pointers;  // int64 [num_documents], bytes into tokens, unaligned
  int64_t num_documents;
  int64_t num_tokens;  // that the .bin has room for
  int64_t first_block;
  int64_t first_document;  // documents in the shards before it
  int64_t first_token;     // tokens in the shards before it
  int64_t dtype_code;   // Megatron's
};

struct Domain {
  int64_t mode;
  const Shard* shards;
  int64_t num_shards;
  int64_t num_tokens;
  int64_t num_blocks;
  int64_t samples_per_epoch;
  uint64_t key;
  int64_t epochs[2];           // DOCUMENTS: which epoch each of `prefixes` belongs to; -1 is none
  const int64_t* prefixes[2];  // int64 [num_blocks + 1]: tokens before each block in that epoch's order
  const uint8_t* document_index;  // MEGATRON: int32 [num_indexed]
  const uint8_t* sample_index;    // int32 or int64 [samples_per_epoch + 1, 2]
  const uint8_t* shuffle_index;   // uint32 or int64 [samples_per_epoch]
  int64_t num_indexed;
  int64_t sample_index_size;  // bytes of one number
  int64_t shuffle_index_size;
};

struct Fault {
  int64_t status, shard, document;  // document is -1 where it is not known
};

template <typename T>
ML_INLINE T load(const uint8_t* base, int64_t i) {  // the arrays of an .idx are unaligned
  T value;
  std::memcpy(&value, base + i * static_cast<int64_t>(sizeof(T)), sizeof(T));
  return value;
}

// The document's first token in the .bin, or -1 when it does not lie inside it.
ML_INLINE int64_t locate(const Shard& shard, int64_t document, int64_t length) {
  const int64_t pointer = load<int64_t>(shard.pointers, document), shift = ITEM_SHIFT[shard.dtype_code];
  const int64_t at = pointer >> shift, rest = pointer & ((int64_t{1} << shift) - 1);
  return rest == 0 && pointer >= 0 && length <= shard.num_tokens && at <= shard.num_tokens - length ? at : -1;
}

// take(shard, document, at, count) for each piece of `length` tokens from position `start` of the epoch's stream:
// blocks in keyed order, documents in keyed order inside each block, end to end.
template <typename Take>
Fault walk_documents(const Domain& domain, uint64_t epoch_key, const int64_t* prefix, int64_t start, int64_t length,
                     const Take& take) {
  const Permutation blocks(static_cast<uint64_t>(domain.num_blocks), mix64(epoch_key, 0));
  const uint64_t inside_key = mix64(epoch_key, 1);
  int64_t low = 0, high = domain.num_blocks;  // the last block that starts at or before `start`
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    (prefix[middle] <= start ? low : high) = middle;
  }
  int64_t skip = start - prefix[low];
  for (int64_t position = low; length > 0; ++position) {
    if (position >= domain.num_blocks) return {BAD_STREAM, domain.num_shards - 1, -1};
    const int64_t block = static_cast<int64_t>(blocks(static_cast<uint64_t>(position)));
    int64_t s = domain.num_shards - 1;
    while (domain.shards[s].first_block > block) --s;
    const Shard& shard = domain.shards[s];
    const int64_t first = (block - shard.first_block) * BLOCK;
    const int64_t left = shard.num_documents - first;
    if (left <= 0) return {BAD_STREAM, s, -1};
    const int64_t documents = left < BLOCK ? left : BLOCK;
    Sequence inside(static_cast<uint64_t>(documents), mix64(inside_key, static_cast<uint64_t>(block)));
    for (int64_t i = 0; i < documents && length > 0; ++i) {
      const int64_t document = first + static_cast<int64_t>(inside.next());
      const int64_t tokens = load<int32_t>(shard.lengths, document);
      if (tokens < 0) return {BAD_PIECE, s, document};
      if (tokens <= skip) {
        skip -= tokens;
        continue;
      }
      const int64_t at = locate(shard, document, tokens);
      if (at < 0) return {BAD_PIECE, s, document};
      const int64_t count = tokens - skip < length ? tokens - skip : length;
      take(s, document, at + skip, count);
      length -= count;
      skip = 0;
    }
    if (skip > 0) return {BAD_STREAM, s, -1};  // the block has fewer tokens than its sum says
  }
  return {DONE, 0, -1};
}

// The tokens of all shards are a ring; a window may begin anywhere on it and run over its end.
template <typename Take>
Fault walk_ring(const Domain& domain, int64_t start, int64_t length, const Take& take) {
  int64_t s = domain.num_shards - 1;
  while (domain.shards[s].first_token > start) --s;
  while (length > 0) {
    const Shard& shard = domain.shards[s];
    const int64_t end = s + 1 < domain.num_shards ? domain.shards[s + 1].first_token : domain.num_tokens;
    const int64_t at = start - shard.first_token, count = end - start < length ? end - start : length;
    if (at + count > shard.num_tokens) return {BAD_PIECE, s, -1};
    if (count > 0) take(s, -1, at, count);
    length -= count;
    start += count;
    if (start == end && ++s == domain.num_shards) s = start = 0;
  }
  return {DONE, 0, -1};
}

// Megatron-Core's GPTDataset._query_document_sample_shuffle_indices. Documents are counted through all shards.
template <typename Take>
Fault walk_indices(const Domain& domain, int64_t ordinal, int64_t length, const Take& take) {
  const int64_t n = domain.samples_per_epoch;
  const auto sample = [&](int64_t i) -> int64_t {
    return domain.sample_index_size == 4 ? load<int32_t>(domain.sample_index, i)
                                         : load<int64_t>(domain.sample_index, i);
  };
  if (ordinal >= n) return {BAD_STREAM, 0, -1};
  const int64_t j = domain.shuffle_index_size == 4 ? load<uint32_t>(domain.shuffle_index, ordinal)
                                                   : load<int64_t>(domain.shuffle_index, ordinal);
  if (j < 0 || j >= n) return {BAD_STREAM, 0, -1};
  const int64_t last = sample(2 * j + 2);
  int64_t offset = sample(2 * j + 1);
  for (int64_t i = sample(2 * j); length > 0; ++i, offset = 0) {
    if (i < 0 || i > last || i >= domain.num_indexed) return {BAD_STREAM, 0, -1};
    int64_t document = load<int32_t>(domain.document_index, i), s = domain.num_shards - 1;
    if (document < 0) return {BAD_STREAM, 0, -1};
    while (domain.shards[s].first_document > document) --s;
    const Shard& shard = domain.shards[s];
    document -= shard.first_document;
    if (document >= shard.num_documents) return {BAD_STREAM, s, -1};
    const int64_t tokens = load<int32_t>(shard.lengths, document);
    const int64_t at = tokens < 0 ? -1 : locate(shard, document, tokens);
    if (at < 0 || offset < 0 || offset > tokens) return {BAD_PIECE, s, document};
    const int64_t count = tokens - offset < length ? tokens - offset : length;
    if (count > 0) take(s, document, at + offset, count);
    length -= count;
  }
  return {DONE, 0, -1};
}

// The pieces of sample `ordinal`: `length` = seq_length + 1 tokens.
template <typename Take>
Fault walk_sample(const Domain& domain, int64_t ordinal, int64_t length, const Take& take) {
  if (domain.mode == MEGATRON) return walk_indices(domain, ordinal, length, take);
  const int64_t epoch = ordinal / domain.samples_per_epoch, rank = ordinal - epoch * domain.samples_per_epoch;
  const uint64_t epoch_key = mix64(domain.key, static_cast<uint64_t>(epoch));
  const Permutation windows(static_cast<uint64_t>(domain.samples_per_epoch), mix64(epoch_key, 2));
  const int64_t start = static_cast<int64_t>(windows(static_cast<uint64_t>(rank))) * (length - 1);
  if (domain.mode == CONTIGUOUS) {
    const uint64_t ring = static_cast<uint64_t>(domain.num_tokens);
    const int64_t phase = static_cast<int64_t>(mix64(epoch_key, 3) % ring);
    return walk_ring(domain, reduce(phase + start, domain.num_tokens), length, take);
  }
  const int64_t slot = epoch & 1;
  if (domain.epochs[slot] != epoch) return {NEEDS_EPOCH, 0, -1};
  return walk_documents(domain, epoch_key, domain.prefixes[slot], start, length, take);
}
