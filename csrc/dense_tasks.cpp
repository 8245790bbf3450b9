// See dense_tasks.h. Every row and every span of keys is computed as it would be alone, and spans are joined in order:
// results do not depend on the number of threads.
#include "dense_tasks.h"

#include <algorithm>

#include "dense.h"
#include "tasks.h"

namespace moeq {
namespace {

constexpr int64_t kWorth = 1 << 16;  // products that another thread is woken for

int threads_for(const Run& run, int64_t products) { return (int)std::min<int64_t>(run.threads, 1 + products / kWorth); }

struct DenseTask {
  const DenseJob& job;
  int64_t each;
  ToFloat* to_float;
  FromFloat* from_float;
  Dots* dots;
  Scratch in, out;
  Phase loading;
  Counter multiplying;

  DenseTask(const DenseJob& job, const Run& run, Isa isa)
      : job(job),
        each(piece_rows(job.rows, run.threads * kGatePieces)),
        to_float(MOEQ_PICK(isa, to_float_array)),
        from_float(MOEQ_PICK(isa, from_float_array)),
        dots(MOEQ_PICK(isa, dense_dots)),
        in((size_t)(job.tokens * job.columns) * sizeof(float)),
        out((size_t)(job.tokens * job.rows) * sizeof(float)) {}

  void multiply(int64_t first, int64_t last) {
    for (int64_t t = 0; t < job.tokens; t += kMaxTokens) {
      DotsJob some{job.w, job.dtype, job.columns, first, last, {}, (int)std::min<int64_t>(job.tokens - t, kMaxTokens), {}};
      for (int i = 0; i < some.num_x; i++) {
        some.x[i] = in.floats() + (t + i) * job.columns;
        some.out[i] = out.floats() + (t + i) * job.rows;
      }
      dots(some);
    }
    for (int64_t t = 0; t < job.tokens; t++) {
      const int64_t at = t * job.rows + first;
      from_float(out.floats() + at, job.x_dtype, (char*)job.y + (size_t)at * size_of(job.x_dtype), last - first);
    }
  }

  void operator()() {
    loading.run(job.tokens, [this](int64_t t) {
      const int64_t at = t * job.columns;
      to_float((const char*)job.x + (size_t)at * size_of(job.x_dtype), job.x_dtype, in.floats() + at, job.columns);
    });
    // Tile by tile, so that weights are in the cache for all vectors but the first four.
    for (int64_t piece; (piece = multiplying.take()) < num_pieces(job.rows, each);)
      for (int64_t row = piece * each; row < std::min((piece + 1) * each, job.rows); row += kTileRows)
        multiply(row, std::min({row + kTileRows, (piece + 1) * each, job.rows}));
  }
};

struct AttentionTask {
  const AttentionJob& job;
  int64_t groups, spans;
  Attend* attend;
  Merge* merge;
  ToFloat* to_float;
  FromFloat* from_float;
  Scratch query, largest, total, sum, answer;
  Phase loading, attending;
  Counter merging;

  AttentionTask(const AttentionJob& job, Isa isa)
      : job(job),
        groups(job.heads / job.shared),
        spans((job.count + kSpan - 1) / kSpan),
        attend(MOEQ_PICK(isa, attend)),
        merge(MOEQ_PICK(isa, merge)),
        to_float(MOEQ_PICK(isa, to_float_array)),
        from_float(MOEQ_PICK(isa, from_float_array)),
        query((size_t)(job.batch * job.heads * job.size) * sizeof(float)),
        largest((size_t)(job.batch * job.heads * spans) * sizeof(float)),
        total((size_t)(job.batch * job.heads * spans) * sizeof(float)),
        sum((size_t)(job.batch * job.heads * spans * job.value_size) * sizeof(float)),
        answer((size_t)(job.batch * job.heads * job.value_size) * sizeof(float)) {}

  void load_query(int64_t at) {
    float* to = query.floats() + at * job.size;
    to_float((const char*)job.q + (size_t)(at * job.size) * size_of(job.q_dtype), job.q_dtype, to, job.size);
    for (int64_t j = 0; j < job.size; j++) to[j] *= job.scale;
  }

  // A span of keys that some heads share.
  void look(int64_t piece) {
    const int64_t span = piece % spans, sharing = piece / spans, sequence = sharing / job.shared, head = sharing % job.shared;
    const int64_t first = span * kSpan, statistic = piece * groups;
    const auto at = [&](const void* from, const int64_t* steps) {
      return (const char*)from + (sequence * steps[0] + head * steps[1] + first * steps[2]) * (int64_t)size_of(job.dtype);
    };
    attend({query.floats() + sharing * groups * job.size, at(job.k, job.k_steps), at(job.v, job.v_steps), job.k_steps[2],
            job.v_steps[2], job.dtype, (int)groups, job.size, job.value_size, std::min(kSpan, job.count - first),
            job.mask ? job.mask + sequence * job.mask_step + first : nullptr, largest.floats() + statistic,
            total.floats() + statistic, sum.floats() + statistic * job.value_size});
  }

  void join(int64_t at) {
    const int64_t statistic = at / groups * spans * groups + at % groups;
    float* to = answer.floats() + at * job.value_size;
    merge({spans, job.value_size, largest.floats() + statistic, total.floats() + statistic,
           sum.floats() + statistic * job.value_size, groups, groups * job.value_size, to});
    from_float(to, job.q_dtype, (char*)job.out + (size_t)(at * job.value_size) * size_of(job.q_dtype), job.value_size);
  }

  void operator()() {
    loading.run(job.batch * job.heads, [this](int64_t at) { load_query(at); });
    attending.run(job.batch * job.shared * spans, [this](int64_t piece) { look(piece); });
    for (int64_t at; (at = merging.take()) < job.batch * job.heads;) join(at);
  }
};

}  // namespace

void dense_linear(const DenseJob& job, const Run& run) {
  DenseTask task(job, run, product_isa(run.isa));
  on_threads(threads_for(run, job.rows * job.columns * job.tokens), task);
}

void attention(const AttentionJob& job, const Run& run) {
  AttentionTask task(job, product_isa(run.isa));
  on_threads(threads_for(run, 2 * job.batch * job.heads * job.count * job.size), task);
}

}  // namespace moeq
