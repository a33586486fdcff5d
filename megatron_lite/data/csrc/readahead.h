// Reading mapped files well from a cold page cache, at no cost when it is warm.
#pragma once

#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#include <sys/resource.h>
#include <unistd.h>
#endif

constexpr int64_t RANDOM_ORDER = 0, WILL_NEED = 1;
constexpr int64_t FIRST_CALLS = 32, MOST_CALLS = 1024;

// Asking for pages costs a system call a piece, so it is done only while pages are missing: for FIRST_CALLS calls after
// one that waited for the disk, and twice as long each time that is found again, since then the cold part is large.
struct ReadAhead {
  int64_t calls;  // that still ask
  int64_t next;   // how many after the next wait

  void update(bool waited) {
    if (calls > 0) {
      --calls;
    } else if (waited) {
      calls = next < FIRST_CALLS ? FIRST_CALLS : next;
      next = calls * 2 < MOST_CALLS ? calls * 2 : MOST_CALLS;
    } else {
      next = FIRST_CALLS;
    }
  }
};

#if defined(__linux__)
inline void advise(const uint8_t* base, int64_t bytes, int64_t what) {
  static const uintptr_t page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  const uintptr_t start = reinterpret_cast<uintptr_t>(base) / page * page;
  const uintptr_t end = reinterpret_cast<uintptr_t>(base) + static_cast<uintptr_t>(bytes);
  madvise(reinterpret_cast<void*>(start), end - start, what == WILL_NEED ? MADV_WILLNEED : MADV_RANDOM);
}

inline int64_t major_faults() {  // of this thread: reads that waited for a disk
  rusage usage;
  return getrusage(RUSAGE_THREAD, &usage) == 0 ? usage.ru_majflt : 0;
}
#else  // readahead is left to the system
inline void advise(const uint8_t*, int64_t, int64_t) {}
inline int64_t major_faults() { return 0; }
#endif
