// What differs between operating systems: memory, files, threads, the stream that llama.cpp takes for
// a file, the clock. One file per system implements all of it; nothing else includes its headers.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <memory>
#include <string>

namespace moe {

class stream;

namespace os {

// Address space without memory behind it: touching it is a fault. nullptr when refused.
void * reserve(size_t bytes);
// Zeroed memory for one long-lived block that is walked linearly: in huge pages where the system has
// them, each taken at its first touch. nullptr when refused.
void * allocate(size_t bytes);
// Asks for the same of memory of somebody's, of which nothing was touched yet.
void in_huge_pages(void * memory, size_t bytes);
// Gives back what one of these two gave.
void release(void * memory, size_t bytes);

// Bytes at a multiple of `align`, of 4096 at most; nullptr when there are none. Freed with aligned_free.
void * aligned_alloc(size_t align, size_t bytes);
void   aligned_free(void * memory);

using file             = intptr_t;
constexpr file NO_FILE = -1;

enum class access {
    SEQUENTIAL,
    SCATTERED,  // nothing is read ahead
    DIRECT,     // past the page cache: offsets, sizes and memory are aligned as the file asks for it
};

// NO_FILE on failure, and the reason in *error, a number for describe().
file open_file(const char * path, access how, int * error);
void close_file(file f);
// How many bytes came: 0 at the end of the file, fewer than asked for where the system likes it. On
// failure -error. Any thread may read at any time.
int64_t read_at(file f, void * to, int64_t bytes, int64_t offset);
// Forgets what the page cache holds of these bytes, so that the next read is the disk's.
void        drop_cache(file f, int64_t offset, int64_t bytes);
std::string describe(int error);

// Threads that are started while one lives never run the host's signal handlers.
class signals_blocked {
  public:
    signals_blocked();
    ~signals_blocked();
    signals_blocked(const signals_blocked &)             = delete;
    signals_blocked & operator=(const signals_blocked &) = delete;

  private:
    struct mask;
    std::unique_ptr<mask> before_;
};

// A FILE * that reads what the stream reads, and whose descriptor maps as that many bytes, of which
// none may be touched. nullptr when the system has no descriptor left. fclose ends the stream.
FILE * open_stream(std::unique_ptr<stream> s);

// The clock that Python reads as time.perf_counter_ns.
int64_t now_ns();

}  // namespace os

using os::now_ns;

}  // namespace moe
