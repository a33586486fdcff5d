// Which domain each sample of the blend belongs to: quotas from a tree, shuffled inside windows.
#pragma once

#include <vector>

#include "permutation.h"

struct Blend {  // native.py mirrors it
  int64_t num_leaves;
  const int32_t* nodes;  // [num_leaves - 1] each: quota.QuotaTree
  const int32_t* light;
  const int32_t* heavy;
  const double* share;
  const double* round_up;
  uint64_t key;
  int64_t window;         // samples between two exact quotas
  const int32_t* domain;  // [num_leaves]: which domain a leaf is
  const int64_t* first;   // [num_leaves]: the ordinal of its first sample
};

// Split `total` samples down the tree: the light child gets its rounded share, the heavy one the rest.
ML_INLINE void split(const Blend& blend, int64_t total, int64_t* counts) {
  counts[2 * blend.num_leaves - 2] = total;
  for (int64_t i = 0; i < blend.num_leaves - 1; ++i) {
    const int64_t n = counts[blend.nodes[i]];
    const int64_t part = static_cast<int64_t>(blend.share[i] * static_cast<double>(n) + blend.round_up[i]);
    counts[blend.light[i]] = part;
    counts[blend.heavy[i]] = n - part;
  }
}

// emit(i, leaf, ordinal) for samples start + i, i from 0 to count - 1.
template <typename Emit>
void draw(const Blend& blend, int64_t start, int64_t count, const Emit& emit) {
  std::vector<int64_t> now(2 * blend.num_leaves - 1), next(2 * blend.num_leaves - 1);
  std::vector<int32_t> slots(blend.window);
  const uint64_t size = static_cast<uint64_t>(blend.window);
  const int64_t end = start + count;
  int64_t window = start / blend.window;
  split(blend, window * blend.window, now.data());
  for (; window * blend.window < end; ++window) {
    split(blend, (window + 1) * blend.window, next.data());
    int64_t slot = 0;
    for (int64_t leaf = 0; leaf < blend.num_leaves; ++leaf)
      for (int64_t quota = next[leaf] - now[leaf]; quota > 0; --quota) slots[slot++] = static_cast<int32_t>(leaf);
    const uint64_t key = mix64(blend.key, static_cast<uint64_t>(window));
    const int64_t first = window * blend.window;
    const int64_t stop = end - first < blend.window ? end - first : blend.window;
    const auto walk = [&](auto&& position) {  // from the window's start, so that a leaf's samples come in order
      for (int64_t i = 0; i < stop; ++i) {
        const int32_t leaf = slots[position(i)];
        const int64_t ordinal = now[leaf]++;
        if (first + i >= start) emit(first + i - start, leaf, ordinal);
      }
    };
    if (size <= TABLE_LIMIT) {
      Sequence order(size, key);
      walk([&](int64_t) { return order.next(); });
    } else {
      const Permutation order(size, key);
      walk([&](int64_t i) { return order(static_cast<uint64_t>(i)); });
    }
    now.swap(next);
  }
}
