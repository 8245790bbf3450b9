// Tables of the level set "trellis", made by scripts/trellis_tables.py; see src/moeq/trellis/tables.py.
#pragma once

#include <cstdint>

namespace moeq {

constexpr int64_t kRestart = 64;  // rows after which the history is zero again
// By code width: codes above that matter, parities, and the bits that each of them is of.
constexpr int kHistory[5] = {0, 5, 6, 5, 5};
constexpr int kParities[5] = {0, 4, 3, 3, 2};
constexpr int kTaps[5][4] = {{}, {10, 4, 6, 41}, {36, 10, 81}, {4, 18, 35}, {18, 37}};
constexpr int kLargest[5] = {0, 31, 31, 63, 127};  // of its entries
constexpr int8_t kTrellis[5][32] = {
    {},
    {-18, -31, -18, -17, -8, -9, -8, -4, 10, 4, 7, 8, 19, 16, 18, 31},
    {-30, -20, -17, -12, -10, -6, -4, -1, 1, 4, 7, 10, 14, 16, 21, 31},
    {-62, -47, -40, -33, -31, -25, -24, -19, -18, -14, -13, -9, -8, -5, -4, -1,
     1, 4, 5, 8, 10, 13, 14, 17, 20, 23, 26, 30, 35, 39, 48, 63},
    {-126, -98, -80, -67, -56, -48, -42, -36, -31, -26, -22, -18, -14, -10, -6, -2,
     1, 6, 9, 13, 17, 22, 26, 31, 36, 42, 49, 57, 68, 82, 100, 127},
};

}  // namespace moeq
