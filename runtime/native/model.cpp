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
      tensors_(config.tensors, config.tensors + config.n_tensors),
      header_(config.header, config.header + config.header_bytes),
      stream_bytes_(config.stream_bytes) {
    for (int i = 0; i < config.n_files; i++) {
        paths_.emplace_back(config.paths[i]);
    }
    trunk_.assign(config.trunk_tensors, config.trunk_tensors + config.n_trunk_tensors);
    for (size_t i = 0; i < trunk_.size(); i++) {
        trunk_by_name_[trunk_[i].name] = (int)i;
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

bool moe_model::read_trunk(const ggml_tensor * tensor) {
    const auto it = trunk_by_name_.find(tensor->name);
    if (it == trunk_by_name_.end()) {
        return false;
    }
    const moe_trunk_tensor & t    = trunk_[it->second];
    const std::string &      path = paths_[t.file];
    const int                fd   = open(path.c_str(), O_RDONLY | O_CLOEXEC);
    ssize_t                  n    = fd < 0 ? -1 : 0;
    for (int64_t done = 0; done < t.n_bytes && n >= 0; done += n) {
        do {
            n = pread(fd, (char *)tensor->data + done, t.n_bytes - done, t.offset + done);
        } while (n < 0 && errno == EINTR);
        if (n == 0) {
            errno = ENODATA;
            n     = -1;
        }
    }
    if (n < 0) {  // set_tensor cannot fail: whoever loads asks for the error afterwards
        fail(moe::ERROR_READ,
             "cannot read " + std::string(t.name) + " from " + path + ": " + (errno == ENODATA ? "the file ended early" : strerror(errno)));
    }
    if (fd >= 0) {
        close(fd);
    }
    return true;
}

// ---- the stream: a header, and behind it address space that only has the right size
//
// llama.cpp's plain loader would copy every expert through a staging buffer (about a second per
// GB) before set_tensor ignores it. Its mmap loader passes a pointer instead, and our two buffer
// types never look at it: the trunk is read by name. So the stream is opened in mmap mode on a
// file descriptor without a single byte, and the mapping costs nothing, whatever its length.

namespace {

struct stream {
    std::vector<uint8_t> header;
    int64_t              size;
    int64_t              position = 0;
    int                  empty_fd = -1;

    ~stream() {
        if (empty_fd >= 0) {
            close(empty_fd);
        }
    }
};

ssize_t stream_read(void * cookie, char * out, size_t n) {
    stream &      s   = *(stream *)cookie;
    const int64_t end = (int64_t)s.header.size();
    if (s.position >= end) {
        memset(out, 0, n);  // read-ahead past the header: nobody looks at it
        n = (size_t)std::min<int64_t>((int64_t)n, s.size - s.position);
    } else {
        n = (size_t)std::min<int64_t>((int64_t)n, end - s.position);
        memcpy(out, s.header.data() + s.position, n);
    }
    s.position += (int64_t)n;
    return (ssize_t)n;
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
    s->header   = header_;
    s->size     = stream_bytes_;
    s->empty_fd = memfd_create("moe-gguf", MFD_CLOEXEC);
    if (s->empty_fd < 0) {
        return nullptr;
    }
    const int                   fd   = s->empty_fd;
    const cookie_io_functions_t io   = {stream_read, nullptr, stream_seek, stream_close};
    FILE *                      file = fopencookie(s.get(), "rb", io);
    if (file) {
        s.release();
        setvbuf(file, nullptr, _IOFBF, 1 << 16);
        file->_fileno = fd;  // what fileno() answers and mmap() gets; glibc leaves it to the cookie's owner
    }
    return file;
}
