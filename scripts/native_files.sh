# What scripts/sanitize.sh and scripts/aarch64.sh compile, beside the extension itself: for every instruction set, and once.
kernels="matvec codebook trellis trellis_search combine dense floats vectors decoding"
checks="tests/native/check_kernels.cpp tests/native/check_layouts.cpp tests/native/check_dense.cpp
  csrc/dense_tasks.cpp csrc/experts.cpp csrc/spectral.cpp csrc/tiled.cpp csrc/threads.cpp"
