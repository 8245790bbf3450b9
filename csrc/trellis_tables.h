// Tables of the level set "trellis", made by scripts/trellis_tables.py; see src/moeq/trellis/tables.py.
#pragma once

#include <cstdint>

namespace moeq {

// By code width: codes above that matter, parities, and the bits that each of them is of.
constexpr int kHistory[5] = {0, 5, 6, 5, 5};
constexpr int kParities[5] = {0, 4, 3, 3, 2};
constexpr int kTaps[5][4] = {{}, {10, 4, 6, 41}, {36, 10, 81}, {4, 18, 35}, {18, 37}};
constexpr int kLargest[5] = {0, 31, 31, 63, 127};  // of its entries
constexpr int8_t kTrellis[5][32] = {
    {},
    {-25, -29, -19, -13, -8, -8, -7, -5, 6, 5, 8, 10, 18, 17, 21, 31},
    {-31, -20, -17, -11, -10, -6, -4, -1, 1, 4, 6, 10, 12, 17, 20, 31},
    {-63, -48, -39, -33, -29, -25, -23, -19, -17, -14, -12, -9, -8, -5, -3, -1,
     1, 4, 5, 8, 10, 12, 14, 17, 20, 23, 26, 29, 33, 39, 48, 63},
    {-127, -98, -80, -67, -56, -48, -42, -35, -31, -26, -22, -17, -14, -9, -7, -2,
     1, 6, 9, 13, 17, 21, 25, 31, 36, 41, 48, 56, 67, 81, 99, 127},
};

}  // namespace moeq
