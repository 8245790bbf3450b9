// See layouts.h. Factors are multiplied with few vectors (one for each token and grid row), what comes out is combined
// with the rows of the other factor: for gate and up by choice, beside the residual; for down once for each token and grid
// column, after the routing weights. Pieces and threads as in experts.cpp.
#include "layouts.h"

#include "tasks.h"

namespace moeq {
namespace {

enum Owner { nobody, layer, tile, expert_own };

// One projection's sides.
struct Side {
  int64_t rank, rows, columns, block, plain, inputs;
  int64_t scale_owner, order_owner, experts;
  const uint16_t *cells, *scales, *orders;
  Matrix in, out;

  Side(const TiledJob& job, int at) {
    const ExpertsJob& all = job.routed;
    const int64_t* row = job.tiles + at * 8;
    const int64_t outputs = at == 2 ? all.hidden : all.inner;
    inputs = at == 2 ? all.inner : all.hidden;
    experts = all.num_experts;
    int64_t offset = row[0];
    rank = row[1];
    rows = row[2];
    columns = row[3];
    scale_owner = row[4];
    order_owner = row[5];
    block = row[6];
    plain = row[7];
    require(rank >= 0 && rank < (1 << 16) && rows >= 1 && rows <= experts && columns >= 1 && columns <= experts,
            "no such factors");
    require((scale_owner == nobody || scale_owner == expert_own) && order_owner >= nobody && order_owner <= expert_own,
            "no such owner");
    require(order_owner == nobody || (inputs <= (1 << 16) && block >= 1 && (block & (block - 1)) == 0 && plain >= 0 &&
                                      plain <= inputs && (inputs - plain) % block == 0),
            "no such rotation");
    require(offset >= 0 && offset <= job.sides_size && (uintptr_t)(job.sides + offset) % 2 == 0,
            "the sides lie outside the blob");
    const auto numbers = [&](int64_t count) {
      require(2 * count <= job.sides_size - offset, "the sides lie outside the blob");
      const uint16_t* here = (const uint16_t*)(job.sides + offset);
      offset = std::min(offset + aligned(2 * count), job.sides_size);
      return here;
    };
    const auto factor = [&](int64_t count, int64_t width) {
      const Matrix m = matrix_at(job.sides, job.sides_size, offset, 8, -1, (int)Levels::sym, count, width);
      offset += aligned(plane_bytes(count, width, 8)) + aligned(2 * count);
      return m;
    };
    cells = numbers(rank || order_owner == tile ? 2 * experts : 0);
    if (rank) {
      in = factor(rows * rank, inputs);
      out = factor(columns * rank, outputs);
    }
    scales = numbers(scale_owner ? experts * inputs : 0);
    orders = numbers(inputs * owners());
  }

  int64_t owners() const {
    return order_owner == layer ? 1 : order_owner == tile ? rows : order_owner == expert_own ? experts : 0;
  }
  bool rotates() const { return order_owner != nobody; }
  int64_t row_of(int64_t expert) const { return inside(cells[2 * expert], rows); }
  int64_t column_of(int64_t expert) const { return inside(cells[2 * expert + 1], columns); }

  // Whose permutation an expert's inputs take.
  int64_t owner_of(int64_t expert) const {
    return order_owner == tile ? row_of(expert) : order_owner == expert_own ? expert : 0;
  }
  // A permutation whose numbers are proven.
  const uint16_t* order(int64_t owner) const {
    const uint16_t* found = orders + owner * inputs;
    int64_t most = 0;
    for (int64_t j = 0; j < inputs; j++) most = std::max<int64_t>(most, found[j]);
    require(most < inputs, "a permutation has numbers that are too large");
    return found;
  }

 private:
  static int64_t inside(int64_t at, int64_t count) {
    require(at < count, "a cell lies outside the grid");
    return at;
  }
};

// An input in the form that a residual (rotated) or a factor (divided by scales) wants.
struct Form {
  const float* from;
  const uint16_t *order, *scales;  // one of them
  const Side* side;
};

// Vectors that one grid row's input factor, or one grid column's output factor, is multiplied with.
struct Group {
  const Side* side;
  int64_t at;  // row or column
  std::vector<int64_t> owners;           // token or choice, as the list wants
  std::vector<const Activations*> in;
  std::vector<float*> out;
};

// The group of a factor, made if there is none.
Group& group_of(std::vector<Group>& groups, const Side& side, int64_t at) {
  for (Group& group : groups)
    if (group.side == &side && group.at == at) return group;
  groups.push_back({&side, at, {}, {}, {}});
  return groups.back();
}

int64_t position(const std::vector<int64_t>& of, int64_t value) {
  return std::find(of.begin(), of.end(), value) - of.begin();
}

constexpr int64_t kFactorRows = 32;  // of a piece

struct TiledTask {
  const ExpertsJob& job;
  const Run& run;
  Kernels kernels;
  Routing routing;
  Side sides[kProjections];
  int64_t count, rank;  // choices; largest of a projection
  Vectors x, inner;     // by token, by choice
  std::vector<Matrix> matrices;  // gate, up, down of chosen experts
  // What is made of the inputs: of x for gate and up, of `inner` for down.
  Vectors made, made_inner;
  std::vector<Form> forms, inner_forms;  // made[i] is forms[i]; a form of nothing is not used
  std::vector<const Activations*> residual_in[kProjections];
  std::vector<Group> factors, inner_factors, columns;
  Scratch low_memory, sums, up_memory, down_memory, y;
  std::vector<const float*> low[kProjections];  // what the input factors answer, by choice
  std::vector<float*> gate_out, up_out, down_out, low_down;
  int64_t gate_rows, down_rows;
  Phase loading, forming, entering, gating, rounding, reforming, leaving, adding_up, adding;

  TiledTask(const TiledJob& all, const Run& run)
      : job(all.routed),
        run(run),
        kernels(kernels_of(run.isa)),
        routing(route(kernels, job)),
        sides{Side(all, 0), Side(all, 1), Side(all, 2)},
        count((int64_t)routing.choices.size()),
        rank(std::max({sides[0].rank, sides[1].rank, sides[2].rank})),
        x(job.tokens, job.hidden),
        inner(count, job.inner),
        made(num_made(), job.hidden),
        made_inner((sides[2].rotates() ? count : 0) + (sides[2].scale_owner ? count : 0), job.inner),
        low_memory((size_t)(3 * count * rank) * sizeof(float)),
        sums((size_t)(sides[2].rank ? count * sides[2].rank : 0) * sizeof(float)),
        up_memory((size_t)(count * job.inner) * sizeof(float)),
        down_memory((size_t)(count * job.hidden) * sizeof(float)),
        y((size_t)(job.tokens * job.hidden) * sizeof(float)) {
    for (int64_t i = 0; i < count; i++) {
      gate_out.push_back(inner.x(i));
      up_out.push_back(up_memory.floats() + i * job.inner);
      down_out.push_back(down_memory.floats() + i * job.hidden);
      low_down.push_back(low_memory.floats() + (2 * count + i) * rank);
    }
    for (const Chosen& each : routing.chosen) {
      for (int at = 0; at < kProjections; at++) matrices.push_back(expert_matrix(job, each.expert, at));
      for (int64_t i = each.first; i < each.first + each.count; i++) {
        for (int at = 0; at < 2; at++) enter(at, each.expert, i);
        enter_down(each.expert, i);
      }
    }
    const int64_t experts = std::max<int64_t>((int64_t)routing.chosen.size(), 1);
    const int64_t gate_pieces = (run.threads * kGatePieces + experts - 1) / experts;
    const bool factored = sides[0].rank || sides[1].rank;
    gate_rows = factored ? whole_blocks(job.inner, gate_pieces) : piece_rows(job.inner, gate_pieces);
    const int64_t down_pieces = run.threads * kDownPieces;
    down_rows = sides[2].rank ? whole_blocks(job.hidden, down_pieces) : piece_rows(job.hidden, down_pieces);
  }

  // At most as many forms of x are made.
  int64_t num_made() const {
    int64_t total = 0;
    for (int at = 0; at < 2; at++) total += (sides[at].rotates() ? count : 0) + (sides[at].scale_owner ? count : 0);
    return total;
  }

  // Which inputs a choice's residual and factor of gate or up take.
  void enter(int at, int64_t expert, int64_t choice) {
    const Side& side = sides[at];
    const int64_t token = routing.choices[(size_t)choice].token;
    const Activations* plain = &x[token];
    const Activations* rotated = plain;
    if (side.rotates()) {
      const uint16_t* order = side.orders + side.owner_of(expert) * side.inputs;
      size_t found = 0;
      while (found < forms.size() && !(forms[found].from == plain->x && forms[found].order == order)) found++;
      if (found == forms.size()) forms.push_back({plain->x, side.order(side.owner_of(expert)), nullptr, &side});
      rotated = &made[(int64_t)found];
    }
    residual_in[at].push_back(rotated);
    if (!side.rank) return;
    Group& group = group_of(factors, side, side.row_of(expert));
    int64_t key = token;
    if (side.scale_owner) {
      forms.push_back({plain->x, nullptr, side.scales + expert * side.inputs, &side});
      plain = &made[(int64_t)forms.size() - 1];
      key = job.tokens + choice;
    }
    const size_t known = (size_t)position(group.owners, key);
    if (known == group.owners.size()) {
      group.owners.push_back(key);
      group.in.push_back(plain);
      group.out.push_back(low_memory.floats() + (at * count + choice) * rank);
    }
    low[at].push_back(group.out[known]);
    side.column_of(expert);
  }

  void enter_down(int64_t expert, int64_t choice) {
    const Side& side = sides[2];
    const Activations* plain = &inner[choice];
    residual_in[2].push_back(plain);
    if (side.rotates()) {
      inner_forms.push_back({plain->x, side.order(side.owner_of(expert)), nullptr, &side});
      residual_in[2].back() = &made_inner[(int64_t)inner_forms.size() - 1];
    }
    if (!side.rank) return;
    if (side.scale_owner) {
      inner_forms.push_back({plain->x, nullptr, side.scales + expert * side.inputs, &side});
      plain = &made_inner[(int64_t)inner_forms.size() - 1];
    }
    Group& group = group_of(inner_factors, side, side.row_of(expert));
    group.in.push_back(plain);
    group.out.push_back(low_down[(size_t)choice]);
    // The sum of a token's answers in a column; of the choices that share it the first one's place is taken.
    Group& column = group_of(columns, side, side.column_of(expert));
    const int64_t token = routing.choices[(size_t)choice].token;
    if (position(column.owners, token) < (int64_t)column.owners.size()) return;
    column.owners.push_back(token);
    column.in.push_back(nullptr);
    column.out.push_back(sums.floats() + choice * side.rank);
  }

  void make(const Form& form, const Vectors& to, int64_t i) {
    const int64_t columns = to.columns();
    if (form.order) {
      kernels.rotate(form.from, form.order, columns, form.side->block, form.side->plain, to.x(i));
    } else {
      std::vector<float> scale((size_t)columns);
      kernels.to_float(form.scales, Dtype::float16, scale.data(), columns);
      for (int64_t j = 0; j < columns; j++) to.x(i)[j] = form.from[j] / scale[(size_t)j];
    }
    kernels.quantize(to[i], columns);
  }

  // Some rows of an input factor.
  void enter_factor(const std::vector<Group>& groups, int64_t piece) {
    const int64_t pieces = num_pieces(rank, kFactorRows);
    const Group& group = groups[(size_t)(piece / pieces)];
    const int64_t first = piece % pieces * kFactorRows, last = std::min(first + kFactorRows, group.side->rank);
    if (first >= last) return;
    const Matrix matrix = rows_of(group.side->in, group.at * group.side->rank, group.side->rank);
    product(kernels, run.exact, matrix, first, last, group.in.data(), group.out.data(), (int64_t)group.in.size());
  }

  // Rows of gate or up of a chosen expert.
  void project(const Chosen& each, size_t chosen, int at, float* const* out, int64_t first, int64_t last) {
    product(kernels, run.exact, matrices[3 * chosen + (size_t)at], first, last, &residual_in[at][(size_t)each.first],
            out + each.first, each.count);
    const Side& side = sides[at];
    if (!side.rank) return;
    const Matrix factor = rows_of(side.out, side.column_of(each.expert) * side.rank, side.rank);
    combination(kernels, run.exact, factor, first, last, &low[at][(size_t)each.first], out + each.first, each.count);
  }

  void open(int64_t piece) {
    const int64_t pieces = num_pieces(job.inner, gate_rows);
    const size_t chosen = (size_t)(piece / pieces);
    const Chosen& each = routing.chosen[chosen];
    const int64_t first = piece % pieces * gate_rows, last = std::min(first + gate_rows, job.inner);
    project(each, chosen, 0, gate_out.data(), first, last);
    project(each, chosen, 1, up_out.data(), first, last);
    for (int64_t i = each.first; i < each.first + each.count; i++)
      kernels.silu_gate(gate_out[(size_t)i] + first, up_out[(size_t)i] + first, last - first);
  }

  // A token's answers of down's input factors, added up by grid column.
  void add_up(int64_t token) {
    for (const Group& column : columns) {
      const int64_t at = position(column.owners, token);
      if (at == (int64_t)column.owners.size()) continue;
      std::fill_n(column.out[(size_t)at], column.side->rank, 0.0f);
      for (const Chosen& each : routing.chosen) {
        if (column.side->column_of(each.expert) != column.at) continue;
        for (int64_t i = each.first; i < each.first + each.count; i++)
          if (routing.choices[(size_t)i].token == token)
            kernels.add_scaled(low_down[(size_t)i], routing.choices[(size_t)i].weight, column.out[(size_t)at],
                               column.side->rank);
      }
    }
  }

  void add(int64_t piece) {
    const int64_t first = piece * down_rows, last = std::min(first + down_rows, job.hidden);
    for (int64_t t = 0; t < job.tokens; t++) std::fill_n(y.floats() + t * job.hidden + first, last - first, 0.0f);
    for (size_t chosen = 0; chosen < routing.chosen.size(); chosen++) {
      const size_t start = (size_t)routing.chosen[chosen].first, here = (size_t)routing.chosen[chosen].count;
      product(kernels, run.exact, matrices[3 * chosen + 2], first, last, &residual_in[2][start], &down_out[start],
              (int64_t)here);
      for (size_t i = start; i < start + here; i++)
        kernels.add_scaled(down_out[i] + first, routing.choices[i].weight,
                           y.floats() + routing.choices[i].token * job.hidden + first, last - first);
    }
    for (const Group& column : columns) {
      std::vector<float*> to;
      for (const int64_t token : column.owners) to.push_back(y.floats() + token * job.hidden);
      const std::vector<const float*> a(column.out.begin(), column.out.end());
      const Matrix factor = rows_of(column.side->out, column.at * column.side->rank, column.side->rank);
      combination(kernels, run.exact, factor, first, last, a.data(), to.data(), (int64_t)to.size());
    }
    write_answers(kernels, job, y.floats(), first, last);
  }

  void operator()() {
    const int64_t pieces = num_pieces(rank, kFactorRows);
    const auto size = [](const auto& list) { return (int64_t)list.size(); };
    loading.run(job.tokens, [this](int64_t t) { load(kernels, job.x, job.dtype, x, t); });
    forming.run(size(forms), [this](int64_t i) { make(forms[(size_t)i], made, i); });
    entering.run(size(factors) * pieces, [this](int64_t piece) { enter_factor(factors, piece); });
    gating.run(size(routing.chosen) * num_pieces(job.inner, gate_rows), [this](int64_t piece) { open(piece); });
    rounding.run(count, [this](int64_t i) { kernels.quantize(inner[i], job.inner); });
    reforming.run(size(inner_forms), [this](int64_t i) { make(inner_forms[(size_t)i], made_inner, i); });
    leaving.run(size(inner_factors) * pieces, [this](int64_t piece) { enter_factor(inner_factors, piece); });
    if (sides[2].rank) adding_up.run(job.tokens, [this](int64_t token) { add_up(token); });
    adding.run(num_pieces(job.hidden, down_rows), [this](int64_t piece) { add(piece); });
  }
};

}  // namespace

void tiled_experts(const TiledJob& job, const Run& run) {
  TiledTask task(job, run);
  on_threads(run.threads, task);
}

}  // namespace moeq
