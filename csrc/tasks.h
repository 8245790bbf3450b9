// What the calls for whole layers share: memory for vectors, counters from which threads take work, products of tiles.
#pragma once

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdint>
#include <memory>
#include <new>
#include <stdexcept>
#include <vector>

#include "combine.h"
#include "dense.h"
#include "experts.h"
#include "threads.h"
#include "trellis.h"

namespace moeq {

struct Kernels {
  Quantize* quantize;
  Matvec* matvec;
  SiluGate* silu_gate;
  ToFloat* to_float;
  FromFloat* from_float;
  AddScaled* add_scaled;
  ReadAll* read_all;
  Combine* combine;
  Dots* dots;
  MatvecMany* many_trellis;
  HalfCombine* half_combine;
  Rotate* rotate;
};

inline Kernels kernels_of(Isa isa) {
  isa = product_isa(isa);
  return {MOEQ_PICK(isa, quantize),         MOEQ_PICK(isa, matvec),     MOEQ_PICK(isa, silu_gate),
          MOEQ_PICK(isa, to_float_array),   MOEQ_PICK(isa, from_float_array), MOEQ_PICK(isa, add_scaled),
          MOEQ_PICK(isa, read_all),         MOEQ_PICK(isa, combine),    MOEQ_PICK(isa, dense_dots),
          MOEQ_PICK(isa, many_trellis),
          MOEQ_PICK(isa, half_combine),     MOEQ_PICK(isa, rotate)};
}

constexpr int64_t kTileRows = 16;  // pieces are multiples of it
constexpr int64_t kGatePieces = 16, kDownPieces = 8;  // pieces of work for each thread: balance against long runs

// Rows of a piece if there are to be `pieces` of them.
inline int64_t piece_rows(int64_t rows, int64_t pieces) {
  const int64_t each = (rows + std::max<int64_t>(pieces, 1) - 1) / std::max<int64_t>(pieces, 1);
  return std::max<int64_t>((each + kTileRows - 1) / kTileRows * kTileRows, kTileRows);
}
inline int64_t num_pieces(int64_t rows, int64_t each) { return (rows + each - 1) / each; }

// Columns of a piece, in whole blocks, if there are to be about `pieces` of them.
inline int64_t whole_blocks(int64_t columns, int64_t pieces) {
  return (piece_rows(columns, pieces) + kBlock - 1) / kBlock * kBlock;
}

// Memory that is aligned as vectors want it.
class Scratch {
 public:
  explicit Scratch(size_t bytes) : memory_(::operator new(std::max<size_t>(bytes, 64), std::align_val_t{64})) {}
  ~Scratch() { ::operator delete(memory_, std::align_val_t{64}); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  char* get() const { return (char*)memory_; }
  float* floats() const { return (float*)memory_; }

 private:
  void* memory_;
};

// Vectors of one length, laid out for the kernels.
class Vectors {
 public:
  Vectors(int64_t count, int64_t columns)
      : columns_(columns), each_((activation_bytes(columns) + 63) / 64 * 64), memory_((size_t)count * each_), all_((size_t)count) {
    for (int64_t i = 0; i < count; i++) all_[(size_t)i] = place(memory_.get() + (size_t)i * each_, columns);
  }
  const Activations& operator[](int64_t i) const { return all_[(size_t)i]; }
  float* x(int64_t i) const { return (float*)all_[(size_t)i].x; }
  int64_t columns() const { return columns_; }

 private:
  int64_t columns_;
  size_t each_;
  Scratch memory_;
  std::vector<Activations> all_;
};

// out[i][row] for a tile of rows after the other, so that its codes are in the cache for all vectors but the first.
inline void product(const Kernels& kernels, bool exact, const Matrix& matrix, int64_t first, int64_t last,
             const Activations* const* x, float* const* out, int64_t count) {
  if (count > kMaxTokens && !exact && matrix.levels == Levels::trellis) return kernels.many_trellis({&matrix, first, last, x, out, count});
  const int64_t tile = count > kMaxTokens ? kTileRows : last - first;
  for (int64_t row = first; row < last; row += tile)
    for (int64_t i = 0; i < count; i += kMaxTokens) {
      MatvecJob job{&matrix, row, std::min(row + tile, last), {}, (int)std::min<int64_t>(count - i, kMaxTokens), {}, exact};
      for (int t = 0; t < job.num_x; t++) {
        job.x[t] = x[i + t];
        job.out[t] = out[i + t];
      }
      kernels.matvec(job);
    }
}

// A counter of its own cache line.
struct alignas(64) Counter {
  std::atomic<int64_t> value{0};
  int64_t take() { return value.fetch_add(1, std::memory_order_relaxed); }
  void done() { value.fetch_add(1, std::memory_order_release); }
  void wait_for(int64_t count) const {
    wait_until([&] { return value.load(std::memory_order_acquire) >= count; });
  }
};

// A part of a task of which every piece must be done before the next part starts.
struct Phase {
  Counter taken, done;

  template <class Body>
  void run(int64_t pieces, const Body& body) {
    for (int64_t piece; (piece = taken.take()) < pieces; done.done()) body(piece);
    done.wait_for(pieces);
  }
};

template <class Task>
void on_threads(int threads, Task& task) {
  run_on(threads, [](void* context) { (*(Task*)context)(); }, &task);
}

inline size_t size_of(Dtype dtype) { return dtype == Dtype::float32 ? 4 : 2; }

// Takes a vector in its dtype and prepares it for the kernels.
inline void load(const Kernels& kernels, const void* from, Dtype dtype, const Vectors& to, int64_t i) {
  kernels.to_float((const char*)from + (size_t)(i * to.columns()) * size_of(dtype), dtype, to.x(i), to.columns());
  kernels.quantize(to[i], to.columns());
}

// Writes columns first .. last - 1 of all tokens' answers, tokens x hidden, in the dtype that is wanted.
inline void write_answers(const Kernels& kernels, const ExpertsJob& job, const float* y, int64_t first, int64_t last) {
  for (int64_t t = 0; t < job.tokens; t++) {
    const int64_t at = t * job.hidden + first;
    kernels.from_float(y + at, job.dtype, (char*)job.y + (size_t)at * size_of(job.dtype), last - first);
  }
}

inline int64_t aligned(int64_t size) { return (size + 63) / 64 * 64; }

inline int64_t plane_bytes(int64_t rows, int64_t columns, int width) {
  return rows * (columns / kBlock * (kBlock / 8 * width) + (columns % kBlock + 7) / 8 * width);
}

inline void require(bool holds, const char* what) {
  if (!holds) throw std::invalid_argument(what);
}

// Some rows of a matrix of scalar levels, as a matrix.
inline Matrix rows_of(const Matrix& m, int64_t first, int64_t count) {
  Matrix out = m;
  const int64_t groups = (m.columns + m.group_size - 1) / m.group_size;
  for (int plane = 0; plane < 2; plane++)
    if (m.widths[plane]) out.planes[plane] += plane_bytes(first, m.columns, m.widths[plane]);
  out.scale += first * groups;
  if (m.levels == Levels::asym || m.levels == Levels::asym16)
    out.zero = (const char*)m.zero + first * groups * (m.levels == Levels::asym ? 1 : 2);
  out.rows = count;
  return out;
}

// y[i] += a[i] * matrix in columns first .. last - 1, for any number of vectors.
inline void combination(const Kernels& kernels, bool exact, const Matrix& matrix, int64_t first, int64_t last,
                        const float* const* a, float* const* y, int64_t count) {
  for (int64_t i = 0; i < count; i += kMaxTokens) {
    CombineJob job{&matrix, first, last, {}, (int)std::min<int64_t>(count - i, kMaxTokens), {}, exact};
    for (int t = 0; t < job.num_a; t++) {
      job.a[t] = a[i + t];
      job.y[t] = y[i + t];
    }
    kernels.combine(job);
  }
}

// One expert that somebody chose.
struct Chosen {
  int64_t expert;
  int64_t first, count;  // of its choices
};

// A token's choice of an expert.
struct Choice {
  int64_t token;
  float weight;
};

struct Routing {
  std::vector<Chosen> chosen;   // by expert
  std::vector<Choice> choices;  // by expert, then by token
};

inline Routing route(const Kernels& kernels, const ExpertsJob& job) {
  Routing out;
  std::vector<int64_t> counts((size_t)job.num_experts, 0), next((size_t)job.num_experts, 0);
  const int64_t total = job.tokens * job.top_k;
  for (int64_t i = 0; i < total; i++) {
    require(job.index[i] >= 0, "an expert's number is negative");
    if (job.index[i] < job.num_experts) counts[(size_t)job.index[i]]++;
  }
  int64_t first = 0;
  for (int64_t expert = 0; expert < job.num_experts; expert++) {
    next[(size_t)expert] = first;
    if (counts[(size_t)expert]) out.chosen.push_back({expert, first, counts[(size_t)expert]});
    first += counts[(size_t)expert];
  }
  std::vector<float> weights((size_t)total);
  kernels.to_float(job.weight, job.weight_dtype, weights.data(), total);
  out.choices.resize((size_t)first);
  for (int64_t i = 0; i < total; i++)
    if (job.index[i] < job.num_experts)
      out.choices[(size_t)next[(size_t)job.index[i]]++] = {i / job.top_k, weights[(size_t)i]};
  return out;
}

// Gate, up and down of an expert of a grouped layer.
inline Matrix expert_matrix(const ExpertsJob& job, int64_t expert, int at) {
  const int64_t* row = job.table + expert * 12 + 4 * at;
  const bool down = at == 2;
  return matrix_at(job.data, job.size, row[0], (int)row[1], row[2], (int)row[3], down ? job.hidden : job.inner,
                   down ? job.inner : job.hidden);
}

}  // namespace moeq
