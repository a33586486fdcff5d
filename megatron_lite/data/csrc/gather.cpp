// One call for a rank's whole batch: the draw of the blend, the tokens, and what documents mean for the model.
// No state, no allocation that outlives a call, no Python: Python owns every buffer, ctypes drops the GIL.

#include "blend.h"
#include "readahead.h"
#include "rows.h"
#include "sources.h"

extern "C" {

struct Batch {  // one call: what is asked, where it goes, and how it went; native.py mirrors it
  const Domain* domains;
  const Blend* blend;   // null: `domain` and `ordinal` are given
  const int64_t* mine;  // [count]: this rank's places among the samples of the step, ascending
  int64_t start;        // place in the blend of the step's first sample
  int64_t step_size;    // samples of the step over all ranks
  int64_t begin;        // rows that are done
  int64_t count;        // rows in all, a multiple of micro_batch_size
  int64_t micro_batch_size;
  int64_t seq_length;
  uint64_t vocab_size;
  int64_t eod;
  int64_t* domain;        // [count]
  int64_t* ordinal;       // [count]
  int64_t* tokens;        // [count, seq_length]
  int64_t* labels;        // [count, seq_length]
  float* loss_mask;       // [count, seq_length]; this and the rest may be null
  int64_t* position_ids;  // [count, seq_length]
  int32_t* cu_seqlens;    // [micro-batches, micro_batch_size * seq_length + 1]
  int64_t* num_cu;        // [micro-batches]: how many of them count
  int64_t* max_seqlen;    // [micro-batches]
  ReadAhead ahead;
  Fault fault;
};

static_assert(sizeof(Shard) == 72 && sizeof(Domain) == 136 && sizeof(Blend) == 80 && sizeof(Batch) == 200,
              "native.py mirrors these");

int64_t ml_version() { return 4; }  // native.VERSION: raise both when a signature or a result changes

// Tell the kernel how a mapped range is read: in no order (what = 0), or soon (1).
void ml_advise(const uint8_t* base, int64_t bytes, int64_t what) { advise(base, bytes, what); }

static void draw_rows(const Blend& blend, int64_t start, const Batch& batch, int64_t* domain, int64_t* ordinal) {
  int64_t row = 0;
  draw(blend, start, batch.step_size, [&](int64_t i, int32_t leaf, int64_t nth) {
    if (row == batch.count || batch.mine[row] != i) return;
    domain[row] = blend.domain[leaf];
    ordinal[row++] = blend.first[leaf] + nth;
  });
}

// Ask for the pages of the next step's rows, so that reading them does not wait for the disk one page at a time.
static void ask_ahead(const Batch& batch) {
  std::vector<int64_t> domain(batch.count), ordinal(batch.count);
  draw_rows(*batch.blend, batch.start + batch.step_size, batch, domain.data(), ordinal.data());
  for (int64_t i = 0; i < batch.count; ++i) {
    const Domain& source = batch.domains[domain[i]];
    walk_sample(source, ordinal[i], batch.seq_length + 1, [&](int64_t s, int64_t, int64_t at, int64_t count) {
      const Shard& shard = source.shards[s];
      const int64_t shift = ITEM_SHIFT[shard.dtype_code];
      advise(shard.tokens + (at << shift), count << shift, WILL_NEED);
      return true;
    });
  }
}

static Fault fill_row(const Batch& batch, int64_t i) {
  const Domain& domain = batch.domains[batch.domain[i]];
  const int64_t seq_length = batch.seq_length;
  int64_t *tokens = batch.tokens + i * seq_length, *labels = batch.labels + i * seq_length, filled = 0;
  return walk_sample(domain, batch.ordinal[i], seq_length + 1, [&](int64_t s, int64_t, int64_t at, int64_t count) {
    const Shard& shard = domain.shards[s];
    const int64_t from = filled, skip = from == 0;  // the first token is no label, the last no input
    filled += count;
    return widen(shard.dtype_code, shard.tokens + (at << ITEM_SHIFT[shard.dtype_code]), count, filled > seq_length,
                 skip, tokens + from, labels + from - 1 + skip, batch.vocab_size);
  });
}

static void mark_row(const Batch& batch, int64_t i) {
  const int64_t seq_length = batch.seq_length, row = i % batch.micro_batch_size, micro = i / batch.micro_batch_size;
  int32_t* cu = batch.cu_seqlens ? batch.cu_seqlens + micro * (batch.micro_batch_size * seq_length + 1) : nullptr;
  int64_t used = cu && row ? batch.num_cu[micro] : 0;
  const Marks marks{batch.loss_mask ? batch.loss_mask + i * seq_length : nullptr,
                    batch.position_ids ? batch.position_ids + i * seq_length : nullptr, cu ? cu + used : nullptr};
  used += mark(batch.tokens + i * seq_length, seq_length, batch.eod, row * seq_length, marks);
  if (!cu) return;
  batch.num_cu[micro] = used;
  if (row + 1 < batch.micro_batch_size) return;
  cu[used] = static_cast<int32_t>(batch.micro_batch_size * seq_length);
  batch.num_cu[micro] = used + 1;
  int32_t longest = 0;
  for (int64_t k = 0; k < used; ++k) longest = cu[k + 1] - cu[k] > longest ? cu[k + 1] - cu[k] : longest;
  batch.max_seqlen[micro] = longest;
}

// Returns the number of rows done; batch->fault says why it stopped there.
int64_t ml_batch(Batch* batch) {
  const int64_t faults = major_faults();
  batch->fault = {DONE, 0, -1};
  if (batch->blend) {
    draw_rows(*batch->blend, batch->start, *batch, batch->domain, batch->ordinal);
    if (batch->ahead.calls > 0) ask_ahead(*batch);
  }
  const bool marked = batch->loss_mask || batch->position_ids || batch->cu_seqlens;
  int64_t i = batch->begin;
  for (; i < batch->count; ++i) {
    batch->fault = fill_row(*batch, i);
    if (batch->fault.status != DONE) break;
    if (marked) mark_row(*batch, i);
  }
  batch->ahead.update(major_faults() > faults);
  return i;
}

}  // extern "C"
