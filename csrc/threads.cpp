// See threads.h.
#include "threads.h"

#include <atomic>
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

void run_on(int threads, Work* work, void* context) {
  if (threads <= 1)
    work(context);
  else if (openmp() != nullptr)
    openmp()(work, context, (unsigned)threads, 0);
  else
    pool().run(threads, work, context);
}

}  // namespace moeq
