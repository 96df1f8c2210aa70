#include "model.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <stdexcept>

moe_model::moe_model(const moe_config & config)
    : n_experts(config.n_experts),
      slot_bytes(config.slot_bytes),
      segments_(config.segments, config.segments + config.n_segments),
      tensors_(config.tensors, config.tensors + config.n_tensors),
      header_(config.header, config.header + config.header_bytes),
      stream_bytes_(config.stream_bytes) {
    if (config.abi != MOE_ABI) {
        throw std::runtime_error("the plugin and the Python package are of different versions; reinstall moe-gguf");
    }
    for (int i = 0; i < config.n_files; i++) {
        paths_.emplace_back(config.paths[i]);
    }
    int max_layer = 0;
    for (const auto & t : tensors_) {
        max_layer = std::max(max_layer, t.layer);
    }
    by_layer_.resize(max_layer + 1);
    for (size_t i = 0; i < tensors_.size(); i++) {
        by_name_[tensors_[i].name] = (int)i;
        by_layer_[tensors_[i].layer].push_back(&tensors_[i]);
    }
    moe::read_options options;
    options.lanes        = config.lanes;
    options.direct       = config.direct != 0;
    options.offset_align = config.offset_align;
    options.memory_align = config.memory_align;
    reads                = std::make_unique<moe::reads>(paths_, options);

    arrays_.resize(5 * (size_t)n_experts + 2 * MOE_MAX_GUESSES);
    int32_t * p       = arrays_.data();
    call.experts      = p;
    call.counts       = p + n_experts;
    call.plan_experts = p + 2 * n_experts;
    call.plan_slots   = p + 3 * n_experts;
    call.plan_loads   = p + 4 * n_experts;
    call.guess_keys   = p + 5 * n_experts;
    call.guess_slots  = p + 5 * n_experts + MOE_MAX_GUESSES;
}

moe_model::~moe_model() {
    reads.reset();  // joins the lanes before their destinations go
    if (arena) {
        munmap(arena, (size_t)n_slots * slot_bytes);
    }
}

bool moe_model::allocate_arena(int n) {
    const size_t bytes = (size_t)n * slot_bytes;
    void *       p     = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) {
        return false;
    }
    madvise(p, bytes, MADV_HUGEPAGE);  // the arena is one long-lived block walked linearly: fewer faults and TLB misses
    arena   = (char *)p;
    n_slots = n;
    reads->resize(n);
    return true;
}

const moe_tensor * moe_model::find(const ggml_tensor * weight) const {
    const auto it = by_name_.find(weight->name);
    return it == by_name_.end() ? nullptr : &tensors_[it->second];
}

const std::vector<moe::part> & moe_model::parts_of(int layer, int expert, int slot) {
    parts_.clear();
    for (const moe_tensor * t : by_layer_[layer]) {
        parts_.push_back({t->file, t->offset + expert * t->expert_bytes, t->expert_bytes, arena + slot * slot_bytes + t->slot_offset});
    }
    return parts_;
}

void moe_model::fail(moe::error_kind kind, const std::string & sentence) {
    std::lock_guard<std::mutex> lock(error_mutex);
    error_kind = kind;
    error      = sentence;
}

// ---- the virtual stream: a complete GGUF whose expert ranges cost nothing to "read"

namespace {

struct stream {
    std::vector<moe_segment> segments;
    std::vector<uint8_t>     header;
    std::vector<int>         fds;
    int64_t                  size;
    int64_t                  position = 0;

    ~stream() {
        for (int fd : fds) {
            close(fd);
        }
    }
};

ssize_t stream_read(void * cookie, char * out, size_t n) {
    stream & s = *(stream *)cookie;
    if (s.position >= s.size) {
        return 0;
    }
    const auto it =
        std::upper_bound(s.segments.begin(), s.segments.end(), s.position, [](int64_t at, const moe_segment & g) { return at < g.end; });
    if (it == s.segments.end() || s.position < it->start) {
        errno = EIO;
        return -1;
    }
    const moe_segment & g      = *it;
    const int64_t       inside = s.position - g.start;
    ssize_t             got    = (ssize_t)std::min<int64_t>((int64_t)n, g.end - s.position);
    if (g.source == MOE_SOURCE_MEMORY) {
        memcpy(out, s.header.data() + g.offset + inside, got);
    } else if (g.source == MOE_SOURCE_FILE) {
        do {
            got = pread(s.fds[g.file], out, got, g.offset + inside);
        } while (got < 0 && errno == EINTR);
        if (got == 0) {  // the file ends before its header said: an error, not an end of stream
            errno = EIO;
            return -1;
        }
    }
    // MOE_SOURCE_SKIP leaves `out` as it is: set_tensor of our buffers ignores the data.
    if (got > 0) {
        s.position += got;
    }
    return got;
}

int stream_seek(void * cookie, off64_t * offset, int whence) {
    stream &      s    = *(stream *)cookie;
    const int64_t base = whence == SEEK_SET ? 0 : whence == SEEK_CUR ? s.position : s.size;
    if (base + *offset < 0) {
        errno = EINVAL;
        return -1;
    }
    s.position = base + *offset;
    *offset    = s.position;
    return 0;
}

int stream_close(void * cookie) {
    delete (stream *)cookie;
    return 0;
}

}  // namespace

FILE * moe_model::open_stream() {
    auto s      = std::make_unique<stream>();
    s->segments = segments_;
    s->header   = header_;
    s->size     = stream_bytes_;
    for (const auto & path : paths_) {
        const int fd = open(path.c_str(), O_RDONLY | O_CLOEXEC);
        if (fd < 0) {
            return nullptr;
        }
        s->fds.push_back(fd);
    }
    const cookie_io_functions_t io   = {stream_read, nullptr, stream_seek, stream_close};
    FILE *                      file = fopencookie(s.get(), "rb", io);
    if (file) {
        s.release();
        setvbuf(file, nullptr, _IOFBF, 1 << 16);
    }
    return file;
}
