// One call for a rank's whole batch: the draw of the blend, the tokens, and what documents mean for the model.
// No state, no allocation that outlives a call, no Python: Python owns every buffer, ctypes drops the GIL.

#include "blend.h"
#include "readahead.h"
#include "rows.h"
#include "sources.h"

namespace {

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
  int32_t* tokens;        // [count, seq_length + 1]: inputs, and labels one place on
  bool* loss_mask;        // [count, seq_length]; this and the rest may be null
  int32_t* position_ids;  // [count, seq_length]
  int32_t* cu_seqlens;    // [micro-batches, micro_batch_size * seq_length + 1]
  int64_t* num_cu;        // [micro-batches]: how many of them count
  int64_t* max_seqlen;    // [micro-batches]
  ReadAhead ahead;
  Fault fault;
};

static_assert(sizeof(Shard) == 72 && sizeof(Domain) == 136 && sizeof(Blend) == 80 && sizeof(Batch) == 192,
              "native.py mirrors these");

void draw_rows(const Blend& blend, int64_t start, const Batch& batch, int64_t* domain, int64_t* ordinal) {
  int64_t row = 0;
  draw(blend, start, batch.step_size, [&](int64_t i, int32_t leaf, int64_t nth) {
    if (row == batch.count || batch.mine[row] != i) return;
    domain[row] = blend.domain[leaf];
    ordinal[row++] = blend.first[leaf] + nth;
  });
}

struct Piece {
  const Shard* shard;
  int64_t number, document, at, count;  // number: of the shard in its domain
};

struct Plan {  // where a row's tokens are
  std::vector<Piece> pieces;
  Fault fault;
};

// Look a row up; near(address, bytes) hears of every piece.
template <typename Near>
void look_up(const Batch& batch, int64_t which, int64_t ordinal, Plan* plan, const Near& near) {
  const Domain& domain = batch.domains[which];
  plan->pieces.clear();
  plan->fault = walk_sample(domain, ordinal, batch.seq_length + 1, [&](int64_t s, int64_t d, int64_t at, int64_t n) {
    const Shard& shard = domain.shards[s];
    plan->pieces.push_back({&shard, s, d, at, n});
    near(shard.tokens + (at << ITEM_SHIFT[shard.dtype_code]), n << ITEM_SHIFT[shard.dtype_code]);
  });
}

// Ask for the pages of the next step's rows, so that reading them does not wait for the disk one page at a time.
void ask_ahead(const Batch& batch) {
  std::vector<int64_t> domain(batch.count), ordinal(batch.count);
  draw_rows(*batch.blend, batch.start + batch.step_size, batch, domain.data(), ordinal.data());
  Plan plan;
  for (int64_t i = 0; i < batch.count; ++i)
    look_up(batch, domain[i], ordinal[i], &plan, [](const uint8_t* at, int64_t n) { advise(at, n, WILL_NEED); });
}

// Brings what `plan` needs to the cache, a few lines at a time: all at once would stall the copy that it runs beside.
class Fetch {
 public:
  explicit Fetch(const Plan& plan) : piece_(plan.pieces.data()), end_(piece_ + plan.pieces.size()) {}

  void bytes(int64_t count) {
    for (; count > 0 && piece_ != end_; count -= LINE) {
      const int64_t shift = ITEM_SHIFT[piece_->shard->dtype_code];
      __builtin_prefetch(piece_->shard->tokens + (piece_->at << shift) + done_, 0, 2);
      done_ += LINE;
      if (done_ >= piece_->count << shift) {
        done_ = 0;
        ++piece_;
      }
    }
  }

 private:
  static constexpr int64_t LINE = 64;  // bytes in a line of cache
  const Piece *piece_, *end_;
  int64_t done_ = 0;
};

Fault copy_row(const Batch& batch, int64_t i, const Plan& plan, Fetch fetch) {
  constexpr int64_t CHUNK = 256;  // tokens between two fetches
  int32_t* tokens = batch.tokens + i * (batch.seq_length + 1);
  for (const Piece& piece : plan.pieces) {
    const int64_t code = piece.shard->dtype_code, end = piece.at + piece.count;
    for (int64_t at = piece.at; at < end; at += CHUNK) {
      const int64_t count = end - at < CHUNK ? end - at : CHUNK;
      fetch.bytes(count << ITEM_SHIFT[code]);
      if (!convert(code, piece.shard->tokens + (at << ITEM_SHIFT[code]), count, tokens, batch.vocab_size))
        return {BAD_TOKEN, piece.number, piece.document};
      tokens += count;
    }
  }
  return plan.fault;
}

void mark_row(const Batch& batch, int64_t i) {
  const int64_t seq_length = batch.seq_length, row = i % batch.micro_batch_size, micro = i / batch.micro_batch_size;
  int32_t* cu = batch.cu_seqlens ? batch.cu_seqlens + micro * (batch.micro_batch_size * seq_length + 1) : nullptr;
  int64_t used = cu && row ? batch.num_cu[micro] : 0;
  const Marks marks{batch.loss_mask ? batch.loss_mask + i * seq_length : nullptr,
                    batch.position_ids ? batch.position_ids + i * seq_length : nullptr, cu ? cu + used : nullptr};
  used += mark(batch.tokens + i * (seq_length + 1), seq_length, static_cast<int32_t>(batch.eod), row * seq_length,
               marks);
  if (!cu) return;
  batch.num_cu[micro] = used;
  if (row + 1 < batch.micro_batch_size) return;
  cu[used] = static_cast<int32_t>(batch.micro_batch_size * seq_length);
  batch.num_cu[micro] = used + 1;
  int32_t longest = 0;
  for (int64_t k = 0; k < used; ++k) longest = cu[k + 1] - cu[k] > longest ? cu[k + 1] - cu[k] : longest;
  batch.max_seqlen[micro] = longest;
}

}  // namespace

extern "C" {

int64_t ml_version() { return 6; }  // native.VERSION: raise both when a signature or a result changes

// Tell the kernel how a mapped range is read: in no order (what = 0), or soon (1).
void ml_advise(const uint8_t* base, int64_t bytes, int64_t what) { advise(base, bytes, what); }

// Returns the number of rows done; batch->fault says why it stopped there.
int64_t ml_batch(Batch* batch) {
  const int64_t faults = major_faults();
  batch->fault = {DONE, 0, -1};
  if (batch->blend) {
    draw_rows(*batch->blend, batch->start, *batch, batch->domain, batch->ordinal);
    if (batch->ahead.calls > 0) ask_ahead(*batch);
  }
  const bool marked = batch->loss_mask || batch->position_ids || batch->cu_seqlens;
  Plan now, next;
  const auto look_at = [&](int64_t row) {
    look_up(*batch, batch->domain[row], batch->ordinal[row], &next, [](const uint8_t*, int64_t) {});
  };
  int64_t i = batch->begin;
  if (i < batch->count) look_at(i);
  for (; i < batch->count; ++i) {
    now.pieces.swap(next.pieces);
    now.fault = next.fault;
    next.pieces.clear();
    if (i + 1 < batch->count) look_at(i + 1);
    batch->fault = copy_row(*batch, i, now, Fetch(next));
    if (batch->fault.status != DONE) break;
    if (marked) mark_row(*batch, i);
  }
  batch->ahead.update(major_faults() > faults);
  return i;
}

}  // extern "C"
