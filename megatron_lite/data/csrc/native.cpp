// The arithmetic behind samples, blend and the batch gather. data/reference.py says the same in numpy, bit for bit.
// No state, no allocation that outlives a call, no Python: Python owns every buffer, ctypes drops the GIL.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__) && !defined(ML_NO_CLONES)
#define ML_CLONES __attribute__((target_clones("avx2", "default")))  // widening tokens is what AVX2 is for
#else
#define ML_CLONES
#endif
#define ML_INLINE static inline __attribute__((always_inline))

namespace {

constexpr int64_t BLOCK = 256;     // documents that stay neighbours; samples.BLOCK
constexpr int HALF_ROUNDS = 6;     // reference.HALF_ROUNDS

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

  static inline uint64_t reduce(uint64_t sum, uint64_t modulus) { return sum >= modulus ? sum - modulus : sum; }

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

// Split `total` samples down the tree: the light child gets its rounded share, the heavy one the rest.
void split(int64_t num_leaves, const int32_t* nodes, const int32_t* light, const int32_t* heavy, const double* share,
           int64_t total, int64_t* counts) {
  counts[2 * num_leaves - 2] = total;
  for (int64_t i = 0; i < num_leaves - 1; ++i) {
    const int64_t n = counts[nodes[i]];
    const int64_t part = static_cast<int64_t>(share[i] * static_cast<double>(n) + 0.5);
    counts[light[i]] = part;
    counts[heavy[i]] = n - part;
  }
}

template <typename T>
ML_INLINE T load(const uint8_t* base, int64_t i) {  // the arrays of an .idx are unaligned
  T value;
  std::memcpy(&value, base + i * static_cast<int64_t>(sizeof(T)), sizeof(T));
  return value;
}

}  // namespace

extern "C" {

struct Shard {
  const uint8_t* tokens;
  const uint8_t* lengths;   // int32 [num_documents], unaligned
  const uint8_t* pointers;  // int64 [num_documents], bytes into tokens, unaligned
  int64_t num_documents;
  int64_t first_block;
  int64_t dtype_code;  // Megatron's
};

struct Domain {
  const Shard* shards;
  int64_t num_shards;
  int64_t num_blocks;
  int64_t samples_per_epoch;
  uint64_t key;
  int64_t epochs[2];         // which epoch each of `prefixes` belongs to; -1 is none
  const int64_t* prefixes[2];  // int64 [num_blocks + 1]: tokens before each block in that epoch's order
};

enum Status : int64_t { DONE = 0, NEEDS_EPOCH = 1, BAD_TOKEN = 2 };

static_assert(sizeof(Shard) == 48 && sizeof(Domain) == 72, "native.py mirrors these");

int64_t ml_version() { return 2; }  // native.VERSION: raise both when a signature or a result changes

void ml_permute(const int64_t* index, int64_t count, int64_t size, uint64_t key, int64_t* out) {
  const Permutation order(static_cast<uint64_t>(size), key);
  for (int64_t i = 0; i < count; ++i) out[i] = static_cast<int64_t>(order(static_cast<uint64_t>(index[i])));
}

void ml_counts(int64_t num_leaves, const int32_t* nodes, const int32_t* light, const int32_t* heavy,
               const double* share, int64_t total, int64_t* counts) {
  split(num_leaves, nodes, light, heavy, share, total, counts);
}

// Samples [start, start + count): which leaf each belongs to, and its ordinal within that leaf.
void ml_draw(int64_t num_leaves, const int32_t* nodes, const int32_t* light, const int32_t* heavy, const double* share,
             uint64_t key, int64_t start, int64_t count, int64_t window_size, int32_t* leaf_out, int64_t* ordinal_out) {
  std::vector<int64_t> now(2 * num_leaves - 1), next(2 * num_leaves - 1);
  std::vector<int32_t> slots(window_size);
  const int64_t end = start + count;
  int64_t window = start / window_size;
  split(num_leaves, nodes, light, heavy, share, window * window_size, now.data());
  for (; window * window_size < end; ++window) {
    split(num_leaves, nodes, light, heavy, share, (window + 1) * window_size, next.data());
    int64_t slot = 0;
    for (int64_t leaf = 0; leaf < num_leaves; ++leaf)
      for (int64_t quota = next[leaf] - now[leaf]; quota > 0; --quota) slots[slot++] = static_cast<int32_t>(leaf);
    const Permutation order(static_cast<uint64_t>(window_size), mix64(key, static_cast<uint64_t>(window)));
    const int64_t first = window * window_size;
    const int64_t stop = end - first < window_size ? end - first : window_size;
    for (int64_t i = 0; i < stop; ++i) {  // from the window's start, so that a leaf's samples come in order
      const int32_t leaf = slots[order(static_cast<uint64_t>(i))];
      const int64_t ordinal = now[leaf]++;
      if (first + i < start) continue;
      leaf_out[first + i - start] = leaf;
      ordinal_out[first + i - start] = ordinal;
    }
    now.swap(next);
  }
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

namespace {

template <typename T>
ML_INLINE bool widen(const uint8_t* source, int64_t count, int64_t* out, uint64_t vocab_size) {
  const T* tokens = reinterpret_cast<const T*>(source);  // a .bin is mapped, and pointers are multiples of sizeof(T)
  T low = 0, high = 0;
  for (int64_t i = 0; i < count; ++i) {
    low = tokens[i] < low ? tokens[i] : low;
    high = tokens[i] > high ? tokens[i] : high;
  }
  for (int64_t i = 0; i < count; ++i) out[i] = static_cast<int64_t>(tokens[i]);
  return low >= 0 && static_cast<uint64_t>(high) < vocab_size;
}

ML_INLINE bool widen_any(int64_t code, const uint8_t* source, int64_t count, int64_t* out, uint64_t vocab_size) {
  switch (code) {
    case 1: return widen<uint8_t>(source, count, out, vocab_size);
    case 2: return widen<int8_t>(source, count, out, vocab_size);
    case 3: return widen<int16_t>(source, count, out, vocab_size);
    case 4: return widen<int32_t>(source, count, out, vocab_size);
    case 5: return widen<int64_t>(source, count, out, vocab_size);
    default: return widen<uint16_t>(source, count, out, vocab_size);
  }
}

constexpr int64_t ITEMSIZE[9] = {0, 1, 1, 2, 4, 8, 8, 4, 2};

// Copy `length` tokens from position `start` of the epoch's stream: blocks in keyed order, documents in keyed order
// inside each block, end to end. False when a token is outside the vocabulary.
ML_INLINE bool read_stream(const Domain& domain, uint64_t epoch_key, const int64_t* prefix, int64_t start,
                           int64_t length, int64_t* out, uint64_t vocab_size) {
  const Permutation blocks(static_cast<uint64_t>(domain.num_blocks), mix64(epoch_key, 0));
  const uint64_t inside_key = mix64(epoch_key, 1);
  int64_t low = 0, high = domain.num_blocks;  // the last block that starts at or before `start`
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    (prefix[middle] <= start ? low : high) = middle;
  }
  int64_t skip = start - prefix[low], filled = 0;
  bool clean = true;
  for (int64_t position = low; filled < length; ++position) {
    if (position >= domain.num_blocks) return false;  // the file shrank under us
    const int64_t block = static_cast<int64_t>(blocks(static_cast<uint64_t>(position)));
    const Shard* shard = domain.shards + domain.num_shards - 1;
    while (shard->first_block > block) --shard;
    const int64_t first = (block - shard->first_block) * BLOCK;
    const int64_t left = shard->num_documents - first;
    const int64_t documents = left < BLOCK ? left : BLOCK;
    const Permutation inside(static_cast<uint64_t>(documents), mix64(inside_key, static_cast<uint64_t>(block)));
    for (int64_t i = 0; i < documents && filled < length; ++i) {
      const int64_t document = first + static_cast<int64_t>(inside(static_cast<uint64_t>(i)));
      const int64_t tokens = load<int32_t>(shard->lengths, document);
      if (tokens <= skip) {
        skip -= tokens;
        continue;
      }
      const int64_t take = tokens - skip < length - filled ? tokens - skip : length - filled;
      const uint8_t* source =
          shard->tokens + load<int64_t>(shard->pointers, document) + skip * ITEMSIZE[shard->dtype_code];
      clean &= widen_any(shard->dtype_code, source, take, out + filled, vocab_size);
      filled += take;
      skip = 0;
    }
  }
  return clean;
}

}  // namespace

extern "C" {

// Rows [begin, count): row i is sample `ordinal[i]` of domains[which[i]], seq_length + 1 tokens.
// tokens [count, width] gets the first `width` of them; labels [count, seq_length], when given, all but the first.
// Returns the number of rows done; *status says why it stopped there. `row` is scratch of seq_length + 1.
ML_CLONES int64_t ml_gather(const Domain* domains, const int32_t* which, const int64_t* ordinal, int64_t begin,
                            int64_t count, int64_t seq_length, uint64_t vocab_size, int64_t width, int64_t* tokens,
                            int64_t* labels, int64_t* row, int64_t* status) {
  *status = DONE;
  for (int64_t i = begin; i < count; ++i) {
    const Domain& domain = domains[which[i]];
    const int64_t epoch = ordinal[i] / domain.samples_per_epoch;
    const int slot = static_cast<int>(epoch & 1);
    if (domain.epochs[slot] != epoch) {
      *status = NEEDS_EPOCH;
      return i;
    }
    const uint64_t epoch_key = mix64(domain.key, static_cast<uint64_t>(epoch));
    const Permutation windows(static_cast<uint64_t>(domain.samples_per_epoch), mix64(epoch_key, 2));
    const uint64_t rank = static_cast<uint64_t>(ordinal[i] - epoch * domain.samples_per_epoch);
    const int64_t start = static_cast<int64_t>(windows(rank)) * seq_length;
    int64_t* out = width == seq_length + 1 ? tokens + i * width : row;
    if (!read_stream(domain, epoch_key, domain.prefixes[slot], start, seq_length + 1, out, vocab_size)) {
      *status = BAD_TOKEN;
      return i;
    }
    if (out == row) std::memcpy(tokens + i * width, row, static_cast<size_t>(width) * sizeof(int64_t));
    if (labels) std::memcpy(labels + i * seq_length, out + 1, static_cast<size_t>(seq_length) * sizeof(int64_t));
  }
  return count;
}

}  // extern "C"
