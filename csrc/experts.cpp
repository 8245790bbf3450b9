// See experts.h. All threads run the same function: they take pieces of work from shared counters, the large ones of a
// phase first come first served, so that a thread that is slow or late costs little. Every row is computed as it would
// be alone, and sums over experts go in the order of experts: results do not depend on the number of threads.
#include "experts.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <memory>
#include <new>
#include <stdexcept>
#include <vector>

#include "tasks.h"

namespace moeq {
namespace {

// Matrices that meet the same vectors: these are prepared once, and pieces of all matrices are taken in one go.
struct LinearTask {
  const LinearJob& job;
  const Run& run;
  Kernels kernels;
  Vectors x;
  std::vector<const Activations*> in;
  std::unique_ptr<Scratch> floats;     // answers, where they are wanted in another dtype
  std::vector<std::vector<float*>> out;  // by matrix and token
  std::vector<int64_t> stop;             // one past each matrix's last piece
  int64_t each;                          // rows of a piece
  Phase loading;
  Counter multiplying;

  LinearTask(const LinearJob& job, const Run& run)
      : job(job), run(run), kernels(kernels_of(run.isa)), x(job.tokens, job.matrices[0].columns) {
    for (int64_t t = 0; t < job.tokens; t++) in.push_back(&x[t]);
    int64_t rows = 0, pieces = 0;
    for (const Matrix& matrix : job.matrices) rows += matrix.rows;
    if (job.dtype != Dtype::float32) floats = std::make_unique<Scratch>((size_t)(job.tokens * rows) * sizeof(float));
    float* next = floats ? floats->floats() : nullptr;
    each = piece_rows(rows, run.threads * kGatePieces);
    for (size_t m = 0; m < job.matrices.size(); m++) {
      const int64_t here = job.matrices[m].rows;
      float* to = floats ? next : (float*)job.y[m];
      out.emplace_back();
      for (int64_t t = 0; t < job.tokens; t++) out.back().push_back(to + t * here);
      if (floats) next += job.tokens * here;
      stop.push_back(pieces += num_pieces(here, each));
    }
  }

  void multiply(size_t m, int64_t piece) {
    const Matrix& matrix = job.matrices[m];
    const int64_t first = piece * each, last = std::min(first + each, matrix.rows);
    product(kernels, run.exact, matrix, first, last, in.data(), out[m].data(), job.tokens);
    if (!floats) return;
    for (int64_t t = 0; t < job.tokens; t++)
      kernels.from_float(out[m][(size_t)t] + first, job.dtype, (char*)job.y[m] + (size_t)(t * matrix.rows + first) * 2, last - first);
  }

  void operator()() {
    loading.run(job.tokens, [this](int64_t t) { load(kernels, job.x, job.dtype, x, t); });
    for (int64_t piece; (piece = multiplying.take()) < stop.back();) {
      const size_t m = (size_t)(std::upper_bound(stop.begin(), stop.end(), piece) - stop.begin());
      multiply(m, piece - (m ? stop[m - 1] : 0));
    }
  }
};

// The matrices of an expert that somebody chose.
struct Gated {
  Matrix gate, up, down;
};

struct ExpertsTask {
  const ExpertsJob& job;
  const Run& run;
  Kernels kernels;
  Routing routing;
  std::vector<Gated> matrices;  // by chosen expert
  Vectors x;                    // by token
  std::unique_ptr<Vectors> inner;  // by choice
  std::unique_ptr<Scratch> up, down, sum;
  std::vector<const Activations*> in, between;
  std::vector<float*> gate_out, up_out, down_out;
  std::unique_ptr<Counter[]> left;  // pieces of each expert that are done
  int64_t gate_rows, down_rows;
  Phase loading;
  Counter gating, gated, adding;

  ExpertsTask(const ExpertsJob& job, const Run& run)
      : job(job), run(run), kernels(kernels_of(run.isa)), routing(route(kernels, job)), x(job.tokens, job.hidden) {
    const auto& [chosen, choices] = routing;
    for (const Chosen& each : chosen)
      matrices.push_back({expert_matrix(job, each.expert, 0), expert_matrix(job, each.expert, 1),
                          expert_matrix(job, each.expert, 2)});
    const size_t count = choices.size();
    inner = std::make_unique<Vectors>((int64_t)count, job.inner);
    up = std::make_unique<Scratch>(count * (size_t)job.inner * sizeof(float));
    down = std::make_unique<Scratch>(count * (size_t)job.hidden * sizeof(float));
    sum = std::make_unique<Scratch>((size_t)(job.tokens * job.hidden) * sizeof(float));
    for (size_t i = 0; i < count; i++) {
      in.push_back(&x[choices[i].token]);
      between.push_back(&(*inner)[(int64_t)i]);
      gate_out.push_back(inner->x((int64_t)i));
      up_out.push_back(up->floats() + i * (size_t)job.inner);
      down_out.push_back(down->floats() + i * (size_t)job.hidden);
    }
    left = std::make_unique<Counter[]>(chosen.size());
    const int64_t experts = std::max<int64_t>((int64_t)chosen.size(), 1);
    gate_rows = piece_rows(job.inner, (run.threads * kGatePieces + experts - 1) / experts);
    down_rows = piece_rows(job.hidden, run.threads * kDownPieces);
  }

  void gate(int64_t piece) {
    const int64_t pieces = num_pieces(job.inner, gate_rows), at = piece / pieces;
    const int64_t first = piece % pieces * gate_rows, last = std::min(first + gate_rows, job.inner);
    const Chosen& expert = routing.chosen[(size_t)at];
    const size_t start = (size_t)expert.first;
    product(kernels, run.exact, matrices[(size_t)at].gate, first, last, &in[start], &gate_out[start], expert.count);
    product(kernels, run.exact, matrices[(size_t)at].up, first, last, &in[start], &up_out[start], expert.count);
    for (size_t i = start; i < start + (size_t)expert.count; i++)
      kernels.silu_gate(gate_out[i] + first, up_out[i] + first, last - first);
    // Whoever ends an expert's last piece prepares the input of its down projection.
    if (left[(size_t)at].value.fetch_add(1, std::memory_order_acq_rel) + 1 < pieces) return;
    for (size_t i = start; i < start + (size_t)expert.count; i++) kernels.quantize(*between[i], job.inner);
    gated.done();
  }

  void add(int64_t piece) {
    const int64_t first = piece * down_rows, last = std::min(first + down_rows, job.hidden);
    for (int64_t t = 0; t < job.tokens; t++) std::fill_n(sum->floats() + t * job.hidden + first, last - first, 0.0f);
    for (size_t at = 0; at < matrices.size(); at++) {
      const Chosen& expert = routing.chosen[at];
      const size_t start = (size_t)expert.first;
      product(kernels, run.exact, matrices[at].down, first, last, &between[start], &down_out[start], expert.count);
      for (size_t i = start; i < start + (size_t)expert.count; i++)
        kernels.add_scaled(down_out[i] + first, routing.choices[i].weight, sum->floats() + routing.choices[i].token * job.hidden + first,
                           last - first);
    }
    write_answers(kernels, job, sum->floats(), first, last);
  }

  void operator()() {
    loading.run(job.tokens, [this](int64_t t) { load(kernels, job.x, job.dtype, x, t); });
    const int64_t pieces = (int64_t)matrices.size() * num_pieces(job.inner, gate_rows);
    for (int64_t piece; (piece = gating.take()) < pieces;) gate(piece);
    gated.wait_for((int64_t)matrices.size());
    for (int64_t piece; (piece = adding.take()) < num_pieces(job.hidden, down_rows);) add(piece);
  }
};

struct DecodeTask {
  const DecodeJob& job;
  DecodeMatrix* decode;
  int64_t each;
  Counter decoding;

  void operator()() {
    const int64_t groups = (job.columns + job.group_size - 1) / job.group_size;
    for (int64_t first; (first = decoding.take() * each) < job.rows;) {
      DecodeJob part = job;
      part.rows = std::min(each, job.rows - first);
      for (int plane = 0; plane < job.num_planes; plane++)
        part.planes[plane].data += plane_bytes(first, job.columns, job.planes[plane].width);
      part.scale += first * groups;
      part.zero = (const char*)job.zero + first * groups * (job.levels == Levels::asym ? 1 : 2);
      part.w = (char*)job.w + (size_t)(first * job.columns) * size_of(job.dtype);
      decode(part);
    }
  }
};

struct LookUpTask {
  const LookUpJob& job;
  LookUp* look_up;
  int64_t each;
  Counter looking;

  void operator()() {
    for (int64_t row; (row = job.first + looking.take() * each) < job.last;) {
      LookUpJob part{job.matrix, row, std::min(row + each, job.last), job.w, job.dtype};
      part.w = (char*)job.w + (size_t)((row - job.first) * job.matrix->columns) * size_of(job.dtype);
      look_up(part);
    }
  }
};

struct ReadTask {
  const char* data;
  size_t bytes, each;
  ReadAll* read_all;
  Counter reading;
  std::atomic<uint64_t> all{0};

  void operator()() {
    for (int64_t piece; (size_t)(piece = reading.take()) * each < bytes;) {
      const size_t first = (size_t)piece * each;
      all.fetch_xor(read_all(data + first, std::min(each, bytes - first)), std::memory_order_relaxed);
    }
  }
};

}  // namespace

Matrix matrix_at(const uint8_t* data, int64_t size, int64_t offset, int bits, int64_t group_size, int levels,
                 int64_t rows, int64_t columns) {
  const bool vector = levels == (int)Levels::vector;
  require(bits >= 1 && bits <= 8 && bits != 7 && levels >= 0 && levels <= 5, "no such matrix");
  require(levels != (int)Levels::trellis || bits <= 4, "no such trellis");
  require(!vector || ((bits == 2 || bits == 3) && group_size == -1), "no such codebooks");
  require(group_size == -1 || group_size == 32 || group_size == 64 || group_size == 128, "no such group size");
  require(rows > 0 && columns > 0 && rows < (1LL << 31) && columns < (1LL << 31), "no such shape");
  require(offset >= 0 && offset <= size && (uintptr_t)(data + offset) % 2 == 0, "the record lies outside the blob");
  Matrix out{};
  out.bits = bits;
  // One group may be wider than a row; the kernels go by the columns.
  out.group_size = group_size == -1 ? columns : group_size;
  out.levels = (Levels)levels;
  out.rows = rows;
  out.columns = columns;
  out.dim = !vector ? 1 : bits == 2 ? 4 : 2;
  require(columns % out.dim == 0, "no such shape: columns cannot be cut into vectors");
  const int code = !vector ? bits : bits == 2 ? 8 : 6;
  const int widths[2] = {code == 3 ? 2 : code == 5 || code == 6 ? 4 : code, code == 3 || code == 5 ? 1 : code == 6 ? 2 : 0};
  int64_t at = offset;
  for (int plane = 0; plane < 2; plane++) {
    out.planes[plane] = data + at;
    out.widths[plane] = widths[plane];
    if (widths[plane]) at += aligned(plane_bytes(rows, columns / out.dim, widths[plane]));
  }
  const int64_t groups = rows * ((columns + out.group_size - 1) / out.group_size);
  out.scale = (const uint16_t*)(data + at);
  at += aligned(2 * groups);
  out.zero = data + at;
  at += aligned(groups * (levels == 0 ? 1 : levels == 1 ? 2 : 0));
  if (vector) {
    out.books = data + at;
    const int64_t across = (columns + book_columns(out) - 1) / book_columns(out);
    at += aligned((rows + kBookRows - 1) / kBookRows * across * book_bytes(out));
  }
  require(at <= size, "the record lies outside the blob");
  return out;
}

void linear(const LinearJob& job, const Run& run) {
  require(!job.matrices.empty(), "there is no matrix");
  LinearTask task(job, run);
  on_threads(run.threads, task);
}

void experts(const ExpertsJob& job, const Run& run) {
  ExpertsTask task(job, run);
  on_threads(run.threads, task);
}

void decode(const DecodeJob& job, const Run& run) {
  DecodeTask task{job, MOEQ_PICK(run.isa, decode_matrix), piece_rows(job.rows, run.threads * kDownPieces), {}};
  on_threads(run.threads, task);
}

void look_up(const LookUpJob& job, const Run& run) {
  LookUpTask task{job, MOEQ_PICK(run.isa, look_up), piece_rows(job.last - job.first, run.threads * kDownPieces), {}};
  on_threads(run.threads, task);
}

double read_bandwidth(const void* data, size_t bytes, const Run& run) {
  ReadTask task{(const char*)data, bytes, (size_t)1 << 22, kernels_of(run.isa).read_all, {}, {}};
  const auto started = std::chrono::steady_clock::now();
  on_threads(run.threads, task);
  return (double)bytes / std::chrono::duration<double>(std::chrono::steady_clock::now() - started).count();
}

}  // namespace moeq
