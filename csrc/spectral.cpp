// See layouts.h. Inputs are projected on the bases once; gate and up combine the rows of their components, whose
// coefficients are those projections; down's components are multiplied with what comes out of the gate, weighted, added up
// by direction, and the basis of the outputs is combined once. Pieces and threads as in experts.cpp.
#include "layouts.h"

#include "tasks.h"

namespace moeq {
namespace {

// The components of one width.
struct Slab {
  Matrix matrix;
  const int64_t* starts;
};

class Projection {
 public:
  Projection(const SpectralJob& job, int at) : order_(job.order + at * job.routed.num_experts * job.directions) {
    const ExpertsJob& all = job.routed;
    const int64_t* row = job.table + at * (1 + kSlabs) * 5;
    offset_ = row[0];
    rank_ = row[4];
    bits_ = row[1];
    require(rank_ >= 0 && rank_ <= job.directions && (bits_ == 8 || bits_ == 16), "no such basis");
    if (rank_ && bits_ == 8) {
      basis_ = matrix_at(all.data, all.size, offset_, 8, row[2], (int)row[3], rank_, all.hidden);
    } else if (rank_) {
      require(offset_ >= 0 && offset_ <= all.size && 2 * rank_ * all.hidden <= all.size - offset_ &&
                  (uintptr_t)(all.data + offset_) % 2 == 0,
              "the basis lies outside the blob");
      half_ = {(const uint16_t*)(all.data + offset_), rank_, all.hidden};
    }
    for (int slab = 0; slab < kSlabs; slab++) {
      row += 5;
      if (row[4] == 0) continue;
      require(row[3] != (int64_t)Levels::vector, "no such matrix: components have no codebooks");
      const int64_t* starts = job.starts + (at * kSlabs + slab) * (all.num_experts + 1);
      slabs_.push_back({matrix_at(all.data, all.size, row[0], (int)row[1], row[2], (int)row[3], row[4], all.inner), starts});
    }
    directions_ = job.directions;
  }

  // Components of an expert, whose rows and directions are proven.
  int64_t count(int64_t expert) const {
    int64_t total = 0;
    for (const Slab& slab : slabs_) {
      const int64_t from = slab.starts[expert], to = slab.starts[expert + 1];
      require(from >= 0 && from <= to && to <= slab.matrix.rows, "rows of an expert lie outside the blob");
      total += to - from;
    }
    require(total <= rank_, "an expert has too many components");
    const int16_t* of = order(expert);
    int16_t least = 0, most = -1;
    for (int64_t j = 0; j < total; j++) {
      least = std::min(least, of[j]);
      most = std::max(most, of[j]);
    }
    require(least >= 0 && most < rank_, "a direction lies outside the basis");
    return total;
  }

  const int16_t* order(int64_t expert) const { return order_ + expert * directions_; }
  int64_t rank() const { return rank_; }
  bool shares_basis(const Projection& other) const {
    return offset_ == other.offset_ && bits_ == other.bits_ && rank_ == other.rank_;
  }
  const std::vector<Slab>& slabs() const { return slabs_; }

  // Coordinates first .. last - 1 of vectors in the basis.
  void project(const Kernels& kernels, bool exact, int64_t first, int64_t last, const Activations* const* x,
               float* const* out, int64_t count) const {
    if (bits_ == 8) return product(kernels, exact, basis_, first, last, x, out, count);
    for (int64_t row = first; row < last; row += kTileRows)
      for (int64_t i = 0; i < count; i += kMaxTokens) {
        DotsJob job{half_.w, Dtype::float16, half_.columns, row, std::min(row + kTileRows, last), {},
                    (int)std::min<int64_t>(count - i, kMaxTokens), {}};
        for (int t = 0; t < job.num_x; t++) {
          job.x[t] = x[i + t]->x;
          job.out[t] = out[i + t];
        }
        kernels.dots(job);
      }
  }

  // Columns first .. last - 1 of vectors of coordinates; added to y.
  void map_back(const Kernels& kernels, bool exact, int64_t first, int64_t last, const float* const* a, float* const* y,
                int64_t count) const {
    if (bits_ == 8) return combination(kernels, exact, basis_, first, last, a, y, count);
    for (int64_t i = 0; i < count; i++) kernels.half_combine(half_, first, last, a[i], y[i]);
  }

 private:
  const int16_t* order_;
  int64_t directions_, offset_, rank_, bits_;
  Matrix basis_{};
  HalfMatrix half_{};
  std::vector<Slab> slabs_;
};

// Some components of a chosen expert's down projection, and where their answers go.
struct Dots {
  Matrix matrix;
  size_t chosen;
  int64_t at;
};

struct SpectralTask {
  const ExpertsJob& job;
  const Run& run;
  Kernels kernels;
  Routing routing;
  Projection gate, up, down;
  bool joint;
  Vectors x, inner;  // by token, by choice
  int64_t width;     // most directions of a projection
  Scratch coordinates;  // of gate and up, by token
  Scratch picked;       // of gate and up, those of each choice; later the answers of down
  Scratch up_memory, sums, y;
  std::vector<std::array<int64_t, 3>> counts;  // components of chosen experts
  std::vector<const Activations*> in, between;
  std::vector<float*> gate_out, up_out;
  std::vector<Dots> dots;
  int64_t basis_rows, gate_columns, map_columns;
  Phase loading, projecting, picking, gating, rounding, answering, adding, mapping;

  SpectralTask(const SpectralJob& all, const Run& run)
      : job(all.routed),
        run(run),
        kernels(kernels_of(run.isa)),
        routing(route(kernels, job)),
        gate(all, 0),
        up(all, 1),
        down(all, 2),
        joint(gate.shares_basis(up)),
        x(job.tokens, job.hidden),
        inner((int64_t)routing.choices.size(), job.inner),
        width(std::max({gate.rank(), up.rank(), down.rank(), (int64_t)1})),
        coordinates((size_t)(2 * job.tokens * width) * sizeof(float)),
        picked(2 * routing.choices.size() * (size_t)width * sizeof(float)),
        up_memory(routing.choices.size() * (size_t)job.inner * sizeof(float)),
        sums((size_t)(job.tokens * width) * sizeof(float)),
        y((size_t)(job.tokens * job.hidden) * sizeof(float)) {
    for (int64_t t = 0; t < job.tokens; t++) in.push_back(&x[t]);
    for (size_t i = 0; i < routing.choices.size(); i++) {
      between.push_back(&inner[(int64_t)i]);
      gate_out.push_back(inner.x((int64_t)i));
      up_out.push_back(up_memory.floats() + i * (size_t)job.inner);
    }
    int64_t rows = 0;
    for (const Chosen& each : routing.chosen) {
      counts.push_back({gate.count(each.expert), up.count(each.expert), down.count(each.expert)});
      rows += counts.back()[2];
    }
    const int64_t each = piece_rows(rows, run.threads * kDownPieces);
    for (size_t at = 0; at < routing.chosen.size(); at++) {
      int64_t position = 0;
      for (const Slab& slab : down.slabs()) {
        const int64_t expert = routing.chosen[at].expert, last = slab.starts[expert + 1];
        for (int64_t row = slab.starts[expert]; row < last; row += each) {
          const int64_t here = std::min(each, last - row);
          dots.push_back({rows_of(slab.matrix, row, here), at, position});
          position += here;
        }
      }
    }
    const int64_t experts = std::max<int64_t>((int64_t)routing.chosen.size(), 1);
    basis_rows = piece_rows(width, run.threads * kDownPieces);
    gate_columns = whole_blocks(job.inner, (run.threads * 4 + experts - 1) / experts);
    map_columns = whole_blocks(job.hidden, run.threads * 2);
  }

  float* coordinate(int at, int64_t token) const { return coordinates.floats() + (at * job.tokens + token) * width; }
  float* pick(int at, int64_t choice) const {
    return picked.floats() + (at * (int64_t)routing.choices.size() + choice) * width;
  }

  void project(int64_t piece) {
    const int64_t pieces = num_pieces(width, basis_rows), first = piece % pieces * basis_rows;
    const int at = (int)(piece / pieces);
    const Projection& to = at ? up : gate;
    const int64_t last = std::min(first + basis_rows, to.rank());
    if (first >= last) return;
    std::vector<float*> out;
    for (int64_t t = 0; t < job.tokens; t++) out.push_back(coordinate(at, t));
    to.project(kernels, run.exact, first, last, in.data(), out.data(), job.tokens);
  }

  void choose(int64_t piece) {
    const size_t at = (size_t)(piece / 2);
    const int which = (int)(piece % 2);
    const Chosen& each = routing.chosen[at];
    const int16_t* order = (which ? up : gate).order(each.expert);
    for (int64_t i = each.first; i < each.first + each.count; i++) {
      const float* from = coordinate(joint ? 0 : which, routing.choices[(size_t)i].token);
      float* to = pick(which, i);
      for (int64_t j = 0; j < counts[at][(size_t)which]; j++) to[j] = from[order[j]];
    }
  }

  // Columns of gate or up of a chosen expert.
  void combine(const Chosen& each, int which, float* const* out, int64_t first, int64_t last) {
    std::vector<const float*> a;
    for (int64_t i = each.first; i < each.first + each.count; i++) {
      a.push_back(pick(which, i));
      std::fill(out[i] + first, out[i] + last, 0.0f);
    }
    for (const Slab& slab : (which ? up : gate).slabs()) {
      const int64_t row = slab.starts[each.expert], rows = slab.starts[each.expert + 1] - row;
      if (!rows) continue;
      combination(kernels, run.exact, rows_of(slab.matrix, row, rows), first, last, a.data(), out + each.first, each.count);
      for (const float*& here : a) here += rows;
    }
  }

  void open(int64_t piece) {
    const int64_t pieces = num_pieces(job.inner, gate_columns);
    const Chosen& each = routing.chosen[(size_t)(piece / pieces)];
    const int64_t first = piece % pieces * gate_columns, last = std::min(first + gate_columns, job.inner);
    combine(each, 0, gate_out.data(), first, last);
    combine(each, 1, up_out.data(), first, last);
    for (int64_t i = each.first; i < each.first + each.count; i++)
      kernels.silu_gate(gate_out[(size_t)i] + first, up_out[(size_t)i] + first, last - first);
  }

  void answer(int64_t piece) {
    const Dots& here = dots[(size_t)piece];
    const Chosen& each = routing.chosen[here.chosen];
    std::vector<float*> out;
    for (int64_t i = each.first; i < each.first + each.count; i++) out.push_back(pick(0, i) + here.at);
    product(kernels, run.exact, here.matrix, 0, here.matrix.rows, &between[(size_t)each.first], out.data(), each.count);
  }

  void add(int64_t token) {
    float* sum = sums.floats() + token * width;
    std::fill_n(sum, down.rank(), 0.0f);
    for (size_t at = 0; at < routing.chosen.size(); at++) {
      const Chosen& each = routing.chosen[at];
      const int16_t* order = down.order(each.expert);
      for (int64_t i = each.first; i < each.first + each.count; i++) {
        const Choice& choice = routing.choices[(size_t)i];
        if (choice.token != token) continue;
        const float* from = pick(0, i);
        for (int64_t j = 0; j < counts[at][2]; j++) sum[order[j]] += choice.weight * from[j];
      }
    }
  }

  void map(int64_t piece) {
    const int64_t first = piece * map_columns, last = std::min(first + map_columns, job.hidden);
    std::vector<const float*> a;
    std::vector<float*> out;
    for (int64_t t = 0; t < job.tokens; t++) {
      a.push_back(sums.floats() + t * width);
      out.push_back(y.floats() + t * job.hidden);
      std::fill(out.back() + first, out.back() + last, 0.0f);
    }
    if (down.rank()) down.map_back(kernels, run.exact, first, last, a.data(), out.data(), job.tokens);
    write_answers(kernels, job, y.floats(), first, last);
  }

  void operator()() {
    const int64_t experts = (int64_t)routing.chosen.size();
    loading.run(job.tokens, [this](int64_t t) { load(kernels, job.x, job.dtype, x, t); });
    projecting.run(num_pieces(width, basis_rows) * (joint ? 1 : 2), [this](int64_t piece) { project(piece); });
    picking.run(2 * experts, [this](int64_t piece) { choose(piece); });
    gating.run(experts * num_pieces(job.inner, gate_columns), [this](int64_t piece) { open(piece); });
    rounding.run((int64_t)between.size(), [this](int64_t i) { kernels.quantize(*between[(size_t)i], job.inner); });
    answering.run((int64_t)dots.size(), [this](int64_t piece) { answer(piece); });
    adding.run(job.tokens, [this](int64_t token) { add(token); });
    mapping.run(num_pieces(job.hidden, map_columns), [this](int64_t piece) { map(piece); });
  }
};

}  // namespace

void spectral_experts(const SpectralJob& job, const Run& run) {
  SpectralTask task(job, run);
  on_threads(run.threads, task);
}

}  // namespace moeq
