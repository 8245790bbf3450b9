// One function on several threads at once.
#pragma once

namespace moeq {

using Work = void(void* context);

// Calls work(context) on up to `threads` threads, this one among them, and returns when all calls have returned. The
// function must do everything that is left to do: fewer threads may come, and some may come late.
//
// Where the process has an OpenMP runtime with GNU's entry point (torch brings one), its threads do the work: they are
// there, they are as many as torch.set_num_threads says, and two pools would fight for the same cores. Otherwise a pool
// of our own is started, whose threads sleep between calls.
void run_on(int threads, Work* work, void* context);

// Whether run_on uses the OpenMP runtime of the process.
bool borrows_threads();

// One turn of a waiting loop: a moment of spinning, later the core is given up.
void relax(int round);

template <class Done>
void wait_until(const Done& done) {
  for (int round = 0; !done(); round++) relax(round);
}

}  // namespace moeq
