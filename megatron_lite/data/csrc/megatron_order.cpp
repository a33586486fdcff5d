// Megatron-Core's sample order, rebuilt: numpy's RandomState(seed).shuffle, the walk that finds where samples start, and
// the greedy blend. data/megatron_order.py says the same in numpy, bit for bit. Stateless: Python owns every buffer.

#include <cstdint>
#include <cstring>

#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__) && !defined(ML_NO_CLONES)
#define ML_CLONES __attribute__((target_clones("avx2", "default")))
#else
#define ML_CLONES
#endif

namespace {

constexpr int64_t WORDS = 624, SHIFT = 397;  // MT19937
constexpr int64_t AHEAD = 64;               // swaps whose cache lines are asked for before the first is done

struct Twister {
  uint32_t state[WORDS];
  uint32_t out[WORDS];  // the state, tempered
  int64_t at;           // next of `out`
};

inline uint32_t twist(uint32_t high, uint32_t low) {
  const uint32_t y = (high & 0x80000000u) | (low & 0x7FFFFFFFu);
  return (y >> 1) ^ ((0u - (low & 1u)) & 0x9908B0DFu);
}

ML_CLONES void refill(Twister* twister) {
  uint32_t* s = twister->state;
  for (int64_t i = 0; i < WORDS - SHIFT; ++i) s[i] = s[i + SHIFT] ^ twist(s[i], s[i + 1]);
  for (int64_t i = WORDS - SHIFT; i < WORDS - 1; ++i) s[i] = s[i + SHIFT - WORDS] ^ twist(s[i], s[i + 1]);
  s[WORDS - 1] = s[SHIFT - 1] ^ twist(s[WORDS - 1], s[0]);
  for (int64_t i = 0; i < WORDS; ++i) {
    uint32_t y = s[i];
    y ^= y >> 11;
    y ^= (y << 7) & 0x9D2C5680u;
    y ^= (y << 15) & 0xEFC60000u;
    twister->out[i] = y ^ (y >> 18);
  }
  twister->at = 0;
}

// Partners of positions top, top - 1, ... (at most AHEAD of them): numpy's random_interval draws 32 bits, masks them to
// the bound's width and draws again while they are above it. Positions of one batch share that width. Returns how many.
template <typename T>
inline int64_t partners(Twister* twister, int64_t top, T* data, uint32_t* js) {
  const uint32_t mask = 0xFFFFFFFFu >> __builtin_clz(static_cast<uint32_t>(top));
  const int64_t same = top - (mask >> 1);
  const int64_t count = same < AHEAD ? same : AHEAD;
  int64_t found = 0;
  while (found < count) {
    if (twister->at == WORDS) refill(twister);
    const uint32_t value = twister->out[twister->at++] & mask;
    js[found] = value;
    __builtin_prefetch(data + value, 1);  // a rejected one is asked for in vain, which costs less than to branch
    found += value <= static_cast<uint32_t>(top - found);
  }
  return count;
}

// RandomState.shuffle: Fisher-Yates from the end. While one batch is swapped the next one's cache lines are on their way.
template <typename T>
void shuffle(Twister* twister, T* data, int64_t size) {
  uint32_t js[2][AHEAD];
  int64_t top = size - 1, side = 0;
  int64_t count = top > 0 ? partners(twister, top, data, js[0]) : 0;
  while (count > 0) {
    const int64_t next = top - count;
    const int64_t coming = next > 0 ? partners(twister, next, data, js[1 - side]) : 0;
    for (int64_t i = 0; i < count; ++i) {
      const T held = data[top - i];
      data[top - i] = data[js[side][i]];
      data[js[side][i]] = held;
    }
    top = next, count = coming, side = 1 - side;
  }
}

// Pairs hold (document, length). Writes where each sample starts, [num_samples + 1] times (place in the order, offset in
// tokens); Megatron's build_sample_idx, which starts a sample at the last token of the one before.
template <typename T>
void walk(const uint64_t* pairs, int64_t size, int64_t seq_length, int64_t num_samples, T* out) {
  int64_t place = 0, before = 0, length = size ? static_cast<int64_t>(pairs[0] >> 32) : 0;
  out[0] = out[1] = 0;  // also where the first documents are empty
  for (int64_t sample = 1; sample <= num_samples; ++sample) {
    const int64_t token = sample * seq_length;
    while (before + length <= token && place + 1 < size) {
      before += length;
      length = static_cast<int64_t>(pairs[++place] >> 32);
    }
    const bool past = before + length <= token;  // a last, partial sample ends with the last document
    out[2 * sample] = static_cast<T>(place);
    out[2 * sample + 1] = static_cast<T>(past ? length - 1 : token - before);
  }
}

}  // namespace

extern "C" {

int64_t ml_twister_size() { return sizeof(Twister); }

void ml_twister_seed(Twister* twister, uint32_t seed) {
  for (int64_t i = 0; i < WORDS; ++i) {
    twister->state[i] = seed;
    seed = 1812433253u * (seed ^ (seed >> 30)) + static_cast<uint32_t>(i + 1);
  }
  twister->at = WORDS;
}

void ml_shuffle32(Twister* twister, uint32_t* data, int64_t size) { shuffle(twister, data, size); }

void ml_shuffle64(Twister* twister, uint64_t* data, int64_t size) { shuffle(twister, data, size); }

// pairs[i] = document first + i and its length; `lengths` is int32, unaligned as an .idx is. Returns the tokens.
int64_t ml_pair(const uint8_t* lengths, int64_t first, int64_t count, uint64_t* pairs) {
  int64_t tokens = 0;
  for (int64_t i = 0; i < count; ++i) {
    int32_t length;
    std::memcpy(&length, lengths + 4 * i, 4);
    pairs[i] = static_cast<uint64_t>(static_cast<uint32_t>(length)) << 32 | static_cast<uint32_t>(first + i);
    tokens += length;
  }
  return tokens;
}

// The sample index into `out` (int32, or int64 when `wide`), and the documents of `pairs` to its own front as int32.
void ml_walk(uint64_t* pairs, int64_t size, int64_t seq_length, int64_t num_samples, int64_t wide, void* out) {
  if (wide) walk(pairs, size, seq_length, num_samples, static_cast<int64_t*>(out));
  else walk(pairs, size, seq_length, num_samples, static_cast<int32_t*>(out));
  auto* bytes = reinterpret_cast<uint8_t*>(pairs);
  for (int64_t i = 0; i < size; ++i) {
    const auto document = static_cast<uint32_t>(pairs[i]);
    std::memcpy(bytes + 4 * i, &document, 4);
  }
}

// Megatron's build_blending_indices for samples [start, start + count): the data set furthest behind its weight, the
// first of equals. `drawn` holds the samples of each before `start` and is moved on; which and ordinal may be null.
ML_CLONES void ml_greedy(const double* weights, int64_t k, int64_t start, int64_t count, double* drawn, int32_t* which,
                         int64_t* ordinal) {
  constexpr int64_t LANES = 8;
  for (int64_t t = start; t < start + count; ++t) {
    const double now = t > 1 ? static_cast<double>(t) : 1.0;
    double best[LANES], place[LANES];  // each lane keeps the first of its own equals
    for (int64_t lane = 0; lane < LANES; ++lane) best[lane] = -1e300, place[lane] = 0;
    int64_t i = 0;
    for (; i + LANES <= k; i += LANES) {
      for (int64_t lane = 0; lane < LANES; ++lane) {
        const double error = weights[i + lane] * now - drawn[i + lane];
        place[lane] = error > best[lane] ? static_cast<double>(i + lane) : place[lane];
        best[lane] = error > best[lane] ? error : best[lane];
      }
    }
    double most = -1e300, first = 0;
    for (int64_t lane = 0; lane < LANES; ++lane) {
      if (best[lane] > most || (best[lane] == most && place[lane] < first)) most = best[lane], first = place[lane];
    }
    for (; i < k; ++i) {
      const double error = weights[i] * now - drawn[i];
      if (error > most) most = error, first = static_cast<double>(i);
    }
    const auto winner = static_cast<int64_t>(first);
    if (which) which[t - start] = static_cast<int32_t>(winner);
    if (ordinal) ordinal[t - start] = static_cast<int64_t>(drawn[winner]);
    drawn[winner] += 1;
  }
}

}  // extern "C"
