// See decoding.h. A block of 128 codes is unpacked into bytes, then turned into weights group by group; all loops are
// over plain arrays, which compilers turn into vector code for each instruction set.
#include "decoding.h"

#include "planes.h"

namespace moeq::MOEQ_ISA {
namespace {

inline void write(const uint8_t* codes, int count, float scale, float zero, float* w) {
  for (int j = 0; j < count; j++) w[j] = ((float)codes[j] - zero) * scale;
}

struct Reader {
  const DecodeJob& job;
  float shared;  // the zero of all groups
  float step;    // of zeros in bytes

  float zero(int64_t group) const {
    if (job.levels == Levels::asym) return (float)((const uint8_t*)job.zero)[group] * step;
    if (job.levels == Levels::asym16) return half_to_float(((const uint16_t*)job.zero)[group]);
    return shared;
  }
};

}  // namespace

void decode_matrix(const DecodeJob& job) {
  const int top = (1 << job.bits) - 1;
  const float shared = job.levels == Levels::sym ? (float)(1 << (job.bits - 1)) : (float)top / 2;
  const Reader reader{job, shared, (float)(top / 255.0)};
  const int64_t groups = (job.columns + job.group_size - 1) / job.group_size;
  for (int64_t row = 0; row < job.rows; row++) {
    for (int64_t column = 0; column < job.columns; column += kBlock) {
      const int here = (int)(job.columns - column < kBlock ? job.columns - column : kBlock);
      alignas(64) uint8_t codes[kBlock];
      alignas(64) float w[kBlock];
      for (int plane = 0; plane < job.num_planes; plane++) {
        const int width = job.planes[plane].width;
        const uint8_t* in = job.planes[plane].data + row * row_bytes(job.columns, width) + column / 8 * width;
        unpack_plane(in, width, here, plane == 0, codes);
      }
      for (int64_t start = column; start < column + here;) {
        const int64_t group = start / job.group_size;
        const int64_t end = (group + 1) * job.group_size, stop = end < column + here ? end : column + here;
        const int64_t at = row * groups + group;
        const int64_t first = start - column;
        write(codes + first, (int)(stop - start), half_to_float(job.scale[at]), reader.zero(at), w + first);
        start = stop;
      }
      store_as(w, here, job.dtype, job.w, row * job.columns + column);
    }
  }
}

}  // namespace moeq::MOEQ_ISA
