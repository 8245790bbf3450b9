// See threads.h.
#include "threads.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#if defined(__unix__) || defined(__APPLE__)
#include <dlfcn.h>
#include <pthread.h>
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace moeq {
namespace {

using GompParallel = void(Work* work, void* context, unsigned threads, unsigned flags);

GompParallel* find_openmp() {
#if (defined(__unix__) || defined(__APPLE__)) && !defined(MOEQ_OWN_THREADS)
  return (GompParallel*)dlsym(RTLD_DEFAULT, "GOMP_parallel");
#else
  return nullptr;
#endif
}

GompParallel* openmp() {
  static GompParallel* const found = find_openmp();
  return found;
}

using Clock = std::chrono::steady_clock;

// A wait for other threads that says that the machine is busy: longer than this, and a third of the call.
constexpr auto kPatience = std::chrono::milliseconds(1);
constexpr int kShare = 3;
constexpr auto kFirstPause = std::chrono::milliseconds(50), kLongestPause = std::chrono::milliseconds(1000);

thread_local Clock::duration waited{};  // by this thread, for others, since its call began

// Whether to ask other threads at all. A thread that the system has taken its processor from holds up the others for
// milliseconds, call after call; so after a long wait a thread works alone for a while, longer each time.
struct Company {
  Clock::time_point comes{};
  Clock::duration pause = kFirstPause;

  void learn(Clock::time_point now, Clock::duration took) {
    if (waited > kPatience && kShare * waited > took) {
      comes = now + pause;
      pause = std::min<Clock::duration>(2 * pause, kLongestPause);
    } else if (now > comes + 4 * pause) {
      pause = kFirstPause;
    }
  }
};

thread_local Company company;

// A call, and when the thread that makes it has done its own part.
struct Call {
  Work* work;
  void* context;
  std::thread::id caller;
  Clock::time_point done{};

  static void run(void* context) {
    Call& call = *(Call*)context;
    call.work(call.context);
    if (std::this_thread::get_id() == call.caller) call.done = Clock::now();
  }
};

// Threads that sleep until there is work. One call at a time: a second one waits.
class Pool {
 public:
  void run(int threads, Work* work, void* context) {
    const std::lock_guard<std::mutex> alone(calls_);
    {
      const std::lock_guard<std::mutex> lock(state_);
      while ((int)workers_.size() < threads - 1) {
        const int index = (int)workers_.size();
        workers_.emplace_back([this, index, seen = generation_.load()] { serve(index, seen); });
        workers_.back().detach();
      }
      work_ = work;
      context_ = context;
      wanted_ = threads - 1;
      generation_.fetch_add(1, std::memory_order_release);
    }
    wake_.notify_all();
    work(context);
    // Everything is done or being done: who has not come by now is not waited for.
    std::unique_lock<std::mutex> lock(state_);
    wanted_ = 0;
    idle_.wait(lock, [this] { return running_ == 0; });
  }

 private:
  void serve(int index, unsigned long seen) {
    for (;;) {
      // Calls follow each other closely while a model runs.
      for (int round = 0; round < kSpins && generation_.load(std::memory_order_acquire) == seen; round++) relax(0);
      std::unique_lock<std::mutex> lock(state_);
      wake_.wait(lock, [&] { return generation_.load() != seen; });
      seen = generation_.load();
      if (index >= wanted_) continue;
      running_++;
      Work* const work = work_;
      void* const context = context_;
      lock.unlock();
      work(context);
      lock.lock();
      if (--running_ == 0) idle_.notify_one();
    }
  }

  static constexpr int kSpins = 3000;  // some 30 microseconds
  std::mutex calls_, state_;
  std::condition_variable wake_, idle_;
  std::vector<std::thread> workers_;
  std::atomic<unsigned long> generation_{0};
  Work* work_ = nullptr;
  void* context_ = nullptr;
  int wanted_ = 0, running_ = 0;
};

Pool* current = nullptr;

// A child process has none of its parent's threads.
void forget_threads() { current = nullptr; }

Pool& pool() {
  static std::mutex making;
  const std::lock_guard<std::mutex> lock(making);
  if (current == nullptr) {
    // Never deleted: threads that still run at exit must not find it gone.
    current = new Pool;
#if defined(__unix__) || defined(__APPLE__)
    static const int registered = pthread_atfork(nullptr, nullptr, forget_threads);
    (void)registered;
#endif
  }
  return *current;
}

}  // namespace

bool borrows_threads() { return openmp() != nullptr; }

void relax(int round) {
  if (round >= 2000) {
    std::this_thread::yield();
    return;
  }
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

Patience::Patience() : since_(Clock::now().time_since_epoch().count()) {}

Patience::~Patience() { waited += Clock::duration(Clock::now().time_since_epoch().count() - since_); }

void run_on(int threads, Work* work, void* context) {
  const auto begun = Clock::now();
  if (threads <= 1 || begun < company.comes) return work(context);
  waited = {};
  Call call{work, context, std::this_thread::get_id()};
  if (openmp() != nullptr)
    openmp()(Call::run, &call, (unsigned)threads, 0);
  else
    pool().run(threads, Call::run, &call);
  const auto now = Clock::now();
  waited += now - call.done;
  company.learn(now, now - begun);
}

}  // namespace moeq
