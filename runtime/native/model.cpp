#include "model.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <stdexcept>

#include "repack.h"

// A repacked trunk tensor is read in pieces of this size, so that the biggest one does not count twice.
static constexpr int64_t TRUNK_PIECE_BYTES = 4 << 20;
// No repacked layout interleaves more rows.
static constexpr int64_t MAX_INTERLEAVE = 16;

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
    trunk_data_.resize(trunk_.size());
    n_layers = 0;
    for (const auto & t : tensors_) {
        n_layers = std::max(n_layers, t.layer + 1);
    }
    by_layer_.resize(n_layers);
    for (size_t i = 0; i < tensors_.size(); i++) {
        const moe_tensor & t = tensors_[i];
        by_name_[t.name]     = (int)i;
        by_layer_[t.layer].push_back(&t);
        for (int copy = 0; copy < MOE_COPIES; copy++) {
            const bool repacked = t.type[copy] >= 0 && t.layout[copy] == MOE_LAYOUT_REPACKED;
            traits_.push_back(repacked ? moe::repack_traits((enum ggml_type)t.type[copy], t.ne[0], t.ne[1]) : nullptr);
            if (repacked && traits_.back() == nullptr) {
                throw std::runtime_error(std::string(t.name) + " is in a kernel layout that this machine does not have");
            }
        }
    }
    table_.assign(config.parts, config.parts + config.n_parts);
    first_part_.resize(MOE_COPIES * (size_t)n_layers * n_experts + 1);
    slot_of_.assign(first_part_.size() - 1, -1);
    for (size_t key = 0, i = 0; key < first_part_.size(); key++) {
        first_part_[key] = (int32_t)i;
        while (i < table_.size() && table_[i].key == (int32_t)key) {
            i++;
        }
    }
    transforms_.resize(config.n_transforms);
    for (int i = 0; i < config.n_transforms; i++) {
        transform &  t     = transforms_[i];
        const size_t bytes = (size_t)config.transforms[i].rows * config.transforms[i].block_bytes;
        t.how              = config.transforms[i];
        t.source.assign(t.how.source, t.how.source + 8 * bytes);
        t.flip.assign(t.how.flip, t.how.flip + bytes);
        t.how.source = t.source.data();
        t.how.flip   = t.flip.data();
    }
    moe::read_options options;
    options.lanes        = config.lanes;
    options.direct       = config.direct != 0;
    options.offset_align = config.offset_align;
    options.memory_align = config.memory_align;
    if (!transforms_.empty()) {
        options.finish = [this](int slot, int key) { make_plain(slot, key); };
    }
    reads = std::make_unique<moe::reads>(paths_, options);

    arrays_.resize(7 * (size_t)n_experts + 3 * MOE_MAX_GUESSES);
    chances_.resize(2 * (size_t)n_experts);
    int32_t * p            = arrays_.data();
    call.experts           = p;
    call.counts            = p + n_experts;
    call.plan_experts      = p + 2 * n_experts;
    call.plan_slots        = p + 3 * n_experts;
    call.plan_loads        = p + 4 * n_experts;
    call.guess_keys        = p + 5 * n_experts;
    call.guess_slots       = p + 5 * n_experts + MOE_MAX_GUESSES;
    call.cancelled         = p + 5 * n_experts + 2 * MOE_MAX_GUESSES;
    call.predicted_keys    = p + 5 * n_experts + 3 * MOE_MAX_GUESSES;
    call.predicted_chances = chances_.data();
    settled_hits_.resize(n_layers);
    call.settled_hits = settled_hits_.data();
    call.phase        = MOE_PHASE_PREFILL;
    call.n_sequences  = 1;
}

moe_model::~moe_model() {
    reads.reset();  // joins the lanes before their destinations go
    if (repacked_) {
        ggml_backend_buffer_free(repacked_);
    }
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
    if (std::any_of(traits_.begin(), traits_.end(), [](void * t) { return t != nullptr; })) {
        repacked_ = moe::repack_buffer_over(arena, bytes);
    }
    return true;
}

moe_model::slot_tensor moe_model::in_slots(const moe_tensor & tensor, int copy) const {
    void * traits = traits_[MOE_COPIES * (&tensor - tensors_.data()) + copy];
    return {arena + tensor.slot_offset[copy], (enum ggml_type)tensor.type[copy], traits ? repacked_ : nullptr, traits};
}

const moe_tensor * moe_model::find(const ggml_tensor * weight) const {
    const auto it = by_name_.find(weight->name);
    return it == by_name_.end() ? nullptr : &tensors_[it->second];
}

void moe_model::load(int slot, int key, bool guess) {
    parts_.clear();
    for (int i = first_part_[key]; i < first_part_[key + 1]; i++) {
        const moe_part & p = table_[i];
        parts_.push_back({p.file, p.offset, p.n_bytes, arena + slot * slot_bytes + p.slot_offset});
    }
    reads->submit(slot, key, parts_, guess);
    slot_of_[key] = slot;
}

bool moe_model::predict() {
    gates->observe(call.layer, call.ids, call.n_tokens, call.n_used);
    gates->predict(call.layer, call.x, call.x_stride, call.n_tokens);
    const size_t n   = std::min(gates->predicted.size(), chances_.size());
    bool         any = false;
    for (size_t i = 0; i < n; i++) {
        const auto & guess        = gates->predicted[i];
        const int    key          = key_of(0, guess.layer, guess.expert);
        call.predicted_keys[i]    = key;
        call.predicted_chances[i] = guess.chance;
        any                       = any || !is_loaded(key);
    }
    call.n_predicted = (int32_t)n;
    return any;
}

bool moe_model::fill(const int32_t * keys, const int32_t * slots, int n) {
    for (int i = 0; i < n; i++) {
        if (!is_key(keys[i]) || slots[i] < 0 || slots[i] >= n_slots) {
            fail(moe::ERROR_OTHER, "an expert or a slot to be filled does not exist");
            return false;
        }
    }
    for (int i = 0; i < n; i++) {
        load(slots[i], keys[i], false);
    }
    bool ok = true;
    for (int i = 0; i < n; i++) {
        reads->wait_any({slots[i]});
        ok = reads->state(slots[i]) == moe::slot_state::READY && ok;
    }
    if (!ok) {
        fail(moe::ERROR_READ, reads->last_error());
        reads->abandon({slots, slots + n});
    }
    return ok;
}

// Runs on the lane that read the last byte.
void moe_model::make_plain(int slot, int key) {
    thread_local std::vector<uint8_t> scratch;

    const int copy = key / (n_layers * n_experts), layer = key / n_experts % n_layers;
    for (const moe_tensor * t : by_layer_[layer]) {
        if (t->layout[copy] != MOE_LAYOUT_FOREIGN) {
            continue;
        }
        const auto type = (enum ggml_type)t->type[copy];
        scratch.resize(ggml_row_size(type, t->ne[0]) * t->ne[1]);
        moe::unpack(transforms_[t->transform[copy]].how, t->ne[0] / ggml_blck_size(type), t->ne[1],
                    (uint8_t *)arena + slot * slot_bytes + t->slot_offset[copy], scratch.data());
    }
}

void moe_model::fail(moe::error_kind kind, const std::string & sentence) {
    std::lock_guard<std::mutex> lock(error_mutex);
    error_kind = kind;
    error      = sentence;
}

// The rows of a matrix that one read brings; all of anything else.
static int64_t rows_at_once(const moe_trunk_tensor & where, const ggml_tensor * tensor) {
    const int64_t rows = ggml_nrows(tensor);
    return where.repacked ? std::min(rows, std::max<int64_t>(1, TRUNK_PIECE_BYTES / tensor->nb[1] / MAX_INTERLEAVE) * MAX_INTERLEAVE)
                          : rows;
}

static int read_exactly(int fd, char * to, int64_t n_bytes, int64_t offset) {
    for (int64_t done = 0; done < n_bytes;) {
        const ssize_t n = pread(fd, to + done, n_bytes - done, offset + done);
        if (n == 0) {
            return ENODATA;
        }
        if (n < 0 && errno != EINTR) {
            return errno;
        }
        done += std::max<ssize_t>(n, 0);
    }
    return 0;
}

bool moe_model::read_trunk(ggml_tensor * tensor) {
    const auto it = trunk_by_name_.find(tensor->name);
    if (it == trunk_by_name_.end()) {
        return false;
    }
    // Some architectures (gemma4) have llama.cpp make a tied output matrix a tensor of its own in
    // the same buffer: it is shown the bytes that are there, and its memory is never touched.
    const void * const there = trunk_data_[it->second];
    if (there != nullptr) {
        tensor->data = (void *)there;
        return true;
    }
    trunk_data_[it->second]         = tensor->data;
    const moe_trunk_tensor & t      = trunk_[it->second];
    const std::string &      path   = paths_[t.file];
    const int64_t            n_rows = ggml_nrows(tensor), row_bytes = t.n_bytes / n_rows;
    const int                fd    = open(path.c_str(), O_RDONLY | O_CLOEXEC);
    int                      error = fd < 0 ? errno : 0;
    std::vector<char>        plain;
    for (int64_t row = 0, n = rows_at_once(t, tensor); row < n_rows && error == 0; row += n) {
        n               = std::min(n, n_rows - row);
        char * const to = (char *)tensor->data + row * row_bytes;
        if (!t.repacked) {
            error = read_exactly(fd, to, n * row_bytes, t.offset + row * row_bytes);
            continue;
        }
        plain.resize(n * row_bytes);
        error = read_exactly(fd, plain.data(), n * row_bytes, t.offset + row * row_bytes);
        if (error == 0) {
            moe::repack(tensor->type, tensor->ne[0], tensor->ne[1], n, plain.data(), to);
        }
    }
    if (error != 0) {  // set_tensor cannot fail: whoever loads asks for the error afterwards
        fail(moe::ERROR_READ,
             "cannot read " + std::string(t.name) + " from " + path + ": " + (error == ENODATA ? "the file ended early" : strerror(error)));
    }
    if (fd >= 0) {
        close(fd);
    }
    return true;
}

const void * moe_model::trunk_data(const char * name) const {
    const auto it = trunk_by_name_.find(name);
    return it == trunk_by_name_.end() || trunk_[it->second].repacked ? nullptr : trunk_data_[it->second];
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
    std::fill(trunk_data_.begin(), trunk_data_.end(), nullptr);  // of an earlier load
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
