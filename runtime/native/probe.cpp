// Finds out how a file can be read directly, and how fast it can be read at all.
#include <fcntl.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstdlib>
#include <thread>
#include <vector>

#include "moe.h"

void moe_probe_direct(const char * path, moe_probe * probe) {
    *probe       = {};
    const int fd = open(path, O_RDONLY | O_CLOEXEC | O_DIRECT);
    if (fd < 0) {
        return;
    }
    char * memory = nullptr;
    if (posix_memalign((void **)&memory, 4096, 5 * 4096) == 0) {
        // O_DIRECT may be accepted at open and refused at read (tmpfs, overlays): only a read tells.
        // Over several pages, because within one page more alignments pass than really work.
        for (const int offset : {512, 4096}) {
            for (const int align : {32, 512, 4096}) {
                if (!probe->direct && pread(fd, memory + align, 3 * 4096, offset) > 0) {
                    *probe = {1, offset, align, 0};
                }
            }
        }
        free(memory);
    }
    close(fd);
}

double moe_probe_speed(const char * path, const int64_t * offsets, int32_t n, int64_t bytes, int32_t lanes, int32_t direct) {
    const int fd = open(path, O_RDONLY | O_CLOEXEC | (direct ? O_DIRECT : 0));
    if (fd < 0) {
        return 0;
    }
    if (!direct) {  // cold numbers, or the page cache would be measured instead of the disk
        posix_fadvise(fd, 0, 0, POSIX_FADV_RANDOM);
        for (int i = 0; i < n; i++) {
            posix_fadvise(fd, offsets[i], bytes, POSIX_FADV_DONTNEED);
        }
    }
    std::atomic<int>         next{0};
    std::atomic<int64_t>     total{0};
    std::vector<std::thread> threads;
    const auto               t0 = std::chrono::steady_clock::now();
    for (int i = 0; i < lanes; i++) {
        threads.emplace_back([&] {
            char * memory = nullptr;
            if (posix_memalign((void **)&memory, 4096, bytes) != 0) {
                return;
            }
            for (int k; (k = next++) < n;) {
                const ssize_t got = pread(fd, memory, bytes, offsets[k]);
                total += got > 0 ? got : 0;
            }
            free(memory);
        });
    }
    for (auto & t : threads) {
        t.join();
    }
    const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - t0).count();
    close(fd);
    return seconds > 0 ? total / seconds : 0;
}
