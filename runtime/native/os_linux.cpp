#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

#include "os.h"
#include "stream.h"

namespace moe::os {

static void * map(size_t bytes, int access) {
    void * p = mmap(nullptr, bytes, access, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    return p == MAP_FAILED ? nullptr : p;
}

void * reserve(size_t bytes) { return map(bytes, PROT_NONE); }

void * allocate(size_t bytes) {
    void * p = map(bytes, PROT_READ | PROT_WRITE);
    if (p) {
        in_huge_pages(p, bytes);
    }
    return p;
}

// Fewer faults and TLB misses; where there are none, that is no error.
void in_huge_pages(void * memory, size_t bytes) {
    const uintptr_t page = 4095, start = ((uintptr_t)memory + page) & ~page, end = ((uintptr_t)memory + bytes) & ~page;
    if (start < end) {
        madvise((void *)start, end - start, MADV_HUGEPAGE);
    }
}

void release(void * memory, size_t bytes) { munmap(memory, bytes); }

void * aligned_alloc(size_t align, size_t bytes) {
    void * p = nullptr;
    return posix_memalign(&p, align, bytes) == 0 ? p : nullptr;
}

void aligned_free(void * memory) { free(memory); }

file open_file(const char * path, access how, int * error) {
    const int fd = open(path, O_RDONLY | O_CLOEXEC | (how == access::DIRECT ? O_DIRECT : 0));
    if (fd < 0) {
        *error = errno;
        return NO_FILE;
    }
    if (how == access::SCATTERED) {
        posix_fadvise(fd, 0, 0, POSIX_FADV_RANDOM);
    }
    return fd;
}

void close_file(file f) { close((int)f); }

int64_t read_at(file f, void * to, int64_t bytes, int64_t offset) {
    ssize_t n;
    do {
        n = pread((int)f, to, bytes, offset);
    } while (n < 0 && errno == EINTR);
    return n < 0 ? -errno : n;
}

void drop_cache(file f, int64_t offset, int64_t bytes) { posix_fadvise((int)f, offset, bytes, POSIX_FADV_DONTNEED); }

std::string describe(int error) { return strerror(error); }

// ---- signals

struct signals_blocked::mask {
    sigset_t signals;
};

signals_blocked::signals_blocked() : before_(new mask) {
    sigset_t all;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before_->signals);
}

signals_blocked::~signals_blocked() { pthread_sigmask(SIG_SETMASK, &before_->signals, nullptr); }

// ---- the stream

namespace {

// What is mapped: a file without a single byte, so that the mapping costs nothing, whatever its length.
struct cookie {
    std::unique_ptr<stream> bytes;
    int                     empty_fd;
};

ssize_t cookie_read(void * c, char * out, size_t n) { return (ssize_t)((cookie *)c)->bytes->read(out, n); }

int cookie_seek(void * c, off64_t * offset, int whence) {
    const int64_t position = ((cookie *)c)->bytes->seek(*offset, whence);
    if (position < 0) {
        errno = EINVAL;
        return -1;
    }
    *offset = position;
    return 0;
}

int cookie_close(void * c) {
    close(((cookie *)c)->empty_fd);
    delete (cookie *)c;
    return 0;
}

}  // namespace

FILE * open_stream(std::unique_ptr<stream> s) {
    const int fd = memfd_create("moe-gguf", MFD_CLOEXEC);
    if (fd < 0) {
        return nullptr;
    }
    auto *                      c    = new cookie{std::move(s), fd};
    const cookie_io_functions_t io   = {cookie_read, nullptr, cookie_seek, cookie_close};
    FILE *                      file = fopencookie(c, "rb", io);
    if (file == nullptr) {
        cookie_close(c);
        return nullptr;
    }
    setvbuf(file, nullptr, _IOFBF, 1 << 16);
    file->_fileno = fd;  // what fileno() answers and mmap() gets; glibc leaves it to the cookie's owner
    return file;
}

int64_t now_ns() {
    timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

}  // namespace moe::os
