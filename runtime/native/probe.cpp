// Finds out how a file can be read directly, and how fast it can be read at all.
#include <atomic>
#include <cstring>
#include <thread>
#include <vector>

#include "moe.h"
#include "os.h"

namespace os = moe::os;

void moe_probe_direct(const char * path, moe_probe * probe) {
    *probe               = {};
    int            error = 0;
    const os::file file  = os::open_file(path, os::access::DIRECT, &error);
    if (file == os::NO_FILE) {
        return;
    }
    char * const memory = (char *)os::aligned_alloc(4096, 5 * 4096);
    if (memory) {
        // A direct file may open and yet refuse to be read (tmpfs, overlays): only a read tells.
        // Over several pages, because within one page more alignments pass than really work.
        for (const int offset : {512, 4096}) {
            for (const int align : {32, 512, 4096}) {
                if (!probe->direct && os::read_at(file, memory + align, 3 * 4096, offset) > 0) {
                    *probe = {1, offset, align, 0};
                }
            }
        }
        os::aligned_free(memory);
    }
    os::close_file(file);
}

double moe_probe_speed(const char * path, const int64_t * offsets, int32_t n, int64_t bytes, int32_t lanes, int32_t direct) {
    int            error = 0;
    const os::file file  = os::open_file(path, direct ? os::access::DIRECT : os::access::SCATTERED, &error);
    if (file == os::NO_FILE) {
        return 0;
    }
    if (!direct) {  // cold numbers, or the page cache would be measured instead of the disk
        for (int i = 0; i < n; i++) {
            os::drop_cache(file, offsets[i], bytes);
        }
    }
    // As slots are: a virtual machine's disk may read into huge pages several times as fast as into others.
    const size_t room   = (size_t)lanes * bytes;
    char * const memory = (char *)os::allocate(room);
    if (memory == nullptr) {
        os::close_file(file);
        return 0;
    }
    memset(memory, 1, room);
    std::atomic<int>         next{0};
    std::atomic<int64_t>     total{0};
    std::vector<std::thread> threads;
    const int64_t            t0 = os::now_ns();
    for (int i = 0; i < lanes; i++) {
        threads.emplace_back([&, to = memory + i * bytes] {
            for (int k; (k = next++) < n;) {
                const int64_t got = os::read_at(file, to, bytes, offsets[k]);
                total += got > 0 ? got : 0;
            }
        });
    }
    for (auto & t : threads) {
        t.join();
    }
    const double seconds = (os::now_ns() - t0) / 1e9;
    os::release(memory, room);
    os::close_file(file);
    return seconds > 0 ? total / seconds : 0;
}
