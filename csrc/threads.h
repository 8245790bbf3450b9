// One function on several threads at once.
#pragma once

namespace moeq {

using Work = void(void* context);

// Calls work(context) on up to `threads` threads, this one among them, and returns when all calls have returned. The
// function must do everything that is left to do: fewer threads may come, and some may come late.
//
// Where the process has an OpenMP runtime with GNU's entry point (torch brings one), its threads do the work: they are
// there, they are as many as torch.set_num_threads says, and two pools would fight for the same cores. Otherwise a pool
// of our own is started, whose threads sleep between calls. On a busy machine a thread works alone for a while after it
// had to wait for others (docs/decisions/0042).
void run_on(int threads, Work* work, void* context);

// Whether run_on uses the OpenMP runtime of the process.
bool borrows_threads();

// One turn of a waiting loop: a moment of spinning, later the core is given up.
void relax(int round);

// Counts how long a thread waits for others.
class Patience {
 public:
  Patience();
  ~Patience();

 private:
  long long since_;
};

template <class Done>
void wait_until(const Done& done) {
  int round = 0;
  for (; round < 200; round++) {
    if (done()) return;
    relax(round);
  }
  const Patience patience;
  for (; !done(); round++) relax(round);
}

}  // namespace moeq
