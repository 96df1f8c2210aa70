#include "trunk.h"

#include <algorithm>
#include <cstring>
#include <mutex>

#include "os.h"
#include "proxy.h"
#include "repack.h"

namespace moe {

namespace {

// A repacked tensor is read in pieces of this size, so that the biggest one does not count twice.
constexpr int64_t PIECE_BYTES = 4 << 20;
// Smaller buffers may be parts of a heap, which others are to have back as they were.
constexpr size_t HUGE_BYTES = 32 << 20;

ggml_backend_dev_t cpu() { return ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU); }

ggml_backend_buffer_type_t cpu_type() { return ggml_backend_dev_buffer_type(cpu()); }

ggml_backend_buffer_t allocate(ggml_backend_buffer_type_t type, size_t size) {
    ggml_backend_buffer_t buffer = ggml_backend_buft_alloc_buffer(type, size);
    if (buffer && size > HUGE_BYTES) {
        os::in_huge_pages(ggml_backend_buffer_get_base(buffer), ggml_backend_buffer_get_size(buffer));
    }
    return buffer;
}

size_t type_alignment(ggml_backend_buffer_type_t) { return ggml_backend_buft_get_alignment(cpu_type()); }

// ---- plain: the CPU's own memory, filled by us instead of by llama.cpp

ggml_backend_buffer_t inner(ggml_backend_buffer_t buffer) { return (ggml_backend_buffer_t)buffer->context; }

void   plain_free(ggml_backend_buffer_t buffer) { ggml_backend_buffer_free(inner(buffer)); }
void * plain_base(ggml_backend_buffer_t buffer) { return ggml_backend_buffer_get_base(inner(buffer)); }

void plain_memset(ggml_backend_buffer_t, ggml_tensor * tensor, uint8_t value, size_t offset, size_t size) {
    memset((char *)tensor->data + offset, value, size);
}

void plain_set(ggml_backend_buffer_t buffer, ggml_tensor * tensor, const void * data, size_t offset, size_t size) {
    // While loading, data points into the empty mapping. A tensor that is not the model's (a LoRA
    // adapter's) comes with its bytes.
    if (!((trunk *)buffer_type::owner(buffer->buft))->read(tensor)) {
        memcpy((char *)tensor->data + offset, data, size);
    }
}

void plain_get(ggml_backend_buffer_t, const ggml_tensor * tensor, void * data, size_t offset, size_t size) {
    memcpy(data, (const char *)tensor->data + offset, size);
}

void plain_clear(ggml_backend_buffer_t buffer, uint8_t value) { ggml_backend_buffer_clear(inner(buffer), value); }

const ggml_backend_buffer_i plain_iface = {
    /* .free_buffer   = */ plain_free,
    /* .get_base      = */ plain_base,
    /* .init_tensor   = */ nullptr,
    /* .memset_tensor = */ plain_memset,
    /* .set_tensor    = */ plain_set,
    /* .get_tensor    = */ plain_get,
    /* .set_tensor_2d = */ nullptr,
    /* .get_tensor_2d = */ nullptr,
    /* .cpy_tensor    = */ nullptr,
    /* .clear         = */ plain_clear,
    /* .reset         = */ nullptr,
};

const char * plain_type_name(ggml_backend_buffer_type_t) { return "MOE_TRUNK"; }
bool         plain_type_is_host(ggml_backend_buffer_type_t) { return true; }

ggml_backend_buffer_t plain_type_alloc(ggml_backend_buffer_type_t buft, size_t size) {
    ggml_backend_buffer_t buffer = allocate(cpu_type(), size);
    return buffer ? ggml_backend_buffer_init(buft, plain_iface, buffer, size) : nullptr;
}

const buffer_type_functions plain_type = {
    /* .get_name       = */ plain_type_name,
    /* .alloc_buffer   = */ plain_type_alloc,
    /* .get_alignment  = */ type_alignment,
    /* .get_max_size   = */ nullptr,
    /* .get_alloc_size = */ nullptr,
    /* .is_host        = */ plain_type_is_host,
};

// ---- repacked: what ggml-cpu takes for its own CPU_REPACK buffer, filled by us

struct repacked_buffer {
    ggml_backend_buffer_t inner;
    trunk *               owner;
};

repacked_buffer & repacked_of(ggml_backend_buffer_t buffer) { return *(repacked_buffer *)buffer->context; }

void repacked_free(ggml_backend_buffer_t buffer) {
    ggml_backend_buffer_free(repacked_of(buffer).inner);
    delete &repacked_of(buffer);
}

void * repacked_base(ggml_backend_buffer_t buffer) { return ggml_backend_buffer_get_base(repacked_of(buffer).inner); }

ggml_status repacked_init(ggml_backend_buffer_t buffer, ggml_tensor * tensor) {
    ggml_backend_buffer_t own = repacked_of(buffer).inner;
    return own->iface.init_tensor(own, tensor);
}

void repacked_set(ggml_backend_buffer_t buffer, ggml_tensor * tensor, const void *, size_t, size_t) {
    if (!repacked_of(buffer).owner->read(tensor)) {
        GGML_ABORT("%s is not a tensor of this model", tensor->name);
    }
}

const ggml_backend_buffer_i repacked_iface = {
    /* .free_buffer   = */ repacked_free,
    /* .get_base      = */ repacked_base,
    /* .init_tensor   = */ repacked_init,
    /* .memset_tensor = */ nullptr,
    /* .set_tensor    = */ repacked_set,
    /* .get_tensor    = */ nullptr,
    /* .set_tensor_2d = */ nullptr,
    /* .get_tensor_2d = */ nullptr,
    /* .cpy_tensor    = */ nullptr,
    /* .clear         = */ nullptr,
    /* .reset         = */ nullptr,
};

const char * repacked_type_name(ggml_backend_buffer_type_t) { return "MOE_TRUNK_REPACK"; }

// ggml-cpu knows its repacked tensors by their buffer's type, so the buffer has to carry that type.
ggml_backend_buffer_t repacked_type_alloc(ggml_backend_buffer_type_t buft, size_t size) {
    ggml_backend_buffer_t buffer = allocate(repack_type(), size);
    auto * const          owner  = (trunk *)buffer_type::owner(buft);
    return buffer ? ggml_backend_buffer_init(repack_type(), repacked_iface, new repacked_buffer{buffer, owner}, size) : nullptr;
}

const buffer_type_functions repacked_type = {
    /* .get_name       = */ repacked_type_name,
    /* .alloc_buffer   = */ repacked_type_alloc,
    /* .get_alignment  = */ type_alignment,
    /* .get_max_size   = */ nullptr,
    /* .get_alloc_size = */ nullptr,
    /* .is_host        = */ nullptr,
};

// ---- on a device: its own buffers, which go by their type and functions, so only set_tensor is replaced

using setter = void (*)(ggml_backend_buffer_t, ggml_tensor *, const void *, size_t, size_t);

// Which trunk a buffer is of: there is no place for it in the buffer itself.
struct device_buffers {
    struct entry {
        trunk * owner;
        setter  set;
    };
    std::mutex                                       mutex;
    std::unordered_map<ggml_backend_buffer_t, entry> by_buffer;

    entry find(ggml_backend_buffer_t buffer) {
        std::lock_guard<std::mutex> lock(mutex);
        return by_buffer.at(buffer);
    }
};

device_buffers & on_devices() {
    static device_buffers all;
    return all;
}

void device_set(ggml_backend_buffer_t buffer, ggml_tensor * tensor, const void * data, size_t offset, size_t size) {
    const auto of = on_devices().find(buffer);
    if (!of.owner->read_to_device(buffer, tensor)) {
        of.set(buffer, tensor, data, offset, size);
    }
}

ggml_backend_buffer_type_t device_memory(ggml_backend_buffer_type_t buft) {
    return ((trunk *)buffer_type::owner(buft))->memory_of_device();
}

const char * device_type_name(ggml_backend_buffer_type_t buft) { return ggml_backend_buft_name(device_memory(buft)); }
size_t       device_type_alignment(ggml_backend_buffer_type_t buft) { return ggml_backend_buft_get_alignment(device_memory(buft)); }
size_t       device_type_max_size(ggml_backend_buffer_type_t buft) { return ggml_backend_buft_get_max_size(device_memory(buft)); }
bool         device_type_is_host(ggml_backend_buffer_type_t) { return false; }

size_t device_type_alloc_size(ggml_backend_buffer_type_t buft, const ggml_tensor * tensor) {
    return ggml_backend_buft_get_alloc_size(device_memory(buft), tensor);
}

ggml_backend_buffer_t device_type_alloc(ggml_backend_buffer_type_t buft, size_t size) {
    return ((trunk *)buffer_type::owner(buft))->allocate_on_device(size);
}

const buffer_type_functions on_device_type = {
    /* .get_name       = */ device_type_name,
    /* .alloc_buffer   = */ device_type_alloc,
    /* .get_alignment  = */ device_type_alignment,
    /* .get_max_size   = */ device_type_max_size,
    /* .get_alloc_size = */ device_type_alloc_size,
    /* .is_host        = */ device_type_is_host,
};

// The rows of a matrix that one read brings; all of anything else.
int64_t rows_at_once(const moe_trunk_tensor & t, const ggml_tensor * tensor) {
    const int64_t rows = ggml_nrows(tensor);
    return t.repacked ? std::min(rows, std::max<int64_t>(1, PIECE_BYTES / tensor->nb[1] / MAX_INTERLEAVE) * MAX_INTERLEAVE) : rows;
}

constexpr int ENDED_EARLY = -1;

// 0, ENDED_EARLY or the system's number of an error.
int read_exactly(os::file file, char * to, int64_t n_bytes, int64_t offset) {
    for (int64_t done = 0; done < n_bytes;) {
        const int64_t n = os::read_at(file, to + done, n_bytes - done, offset + done);
        if (n <= 0) {
            return n == 0 ? ENDED_EARLY : (int)-n;
        }
        done += n;
    }
    return 0;
}

}  // namespace

trunk::trunk(const moe_config & config, int api_version, proxy * where, failure & why)
    : plain(api_version, plain_type, cpu(), this),
      repacked(api_version, repacked_type, cpu(), this),
      on_device(api_version, on_device_type, where ? where->ggml() : nullptr, this),
      paths_(config.paths, config.paths + config.n_files),
      tensors_(config.trunk_tensors, config.trunk_tensors + config.n_trunk_tensors),
      data_(tensors_.size()),
      device_(where),
      why_(why) {
    for (size_t i = 0; i < tensors_.size(); i++) {
        by_name_[tensors_[i].name] = (int)i;
    }
}

trunk::~trunk() {
    device_buffers &            all = on_devices();
    std::lock_guard<std::mutex> lock(all.mutex);
    for (auto it = all.by_buffer.begin(); it != all.by_buffer.end();) {
        it = it->second.owner == this ? all.by_buffer.erase(it) : std::next(it);
    }
}

ggml_backend_buffer_type_t trunk::memory_of_device() const { return device_->memory(); }

ggml_backend_buffer_t trunk::allocate_on_device(size_t bytes) {
    ggml_backend_buffer_t buffer = ggml_backend_buft_alloc_buffer(memory_of_device(), bytes);
    if (buffer) {
        device_buffers &            all = on_devices();
        std::lock_guard<std::mutex> lock(all.mutex);
        all.by_buffer[buffer]    = {this, buffer->iface.set_tensor};
        buffer->iface.set_tensor = device_set;
    }
    return buffer;
}

bool trunk::read_to_device(ggml_backend_buffer_t buffer, ggml_tensor * tensor) {
    const auto it = by_name_.find(tensor->name);
    if (it == by_name_.end()) {
        return false;
    }
    const moe_trunk_tensor & t     = tensors_[it->second];
    const setter             set   = on_devices().find(buffer).set;
    int                      error = 0;
    const os::file           file  = os::open_file(paths_[t.file].c_str(), os::access::SEQUENTIAL, &error);
    std::vector<char>        piece(std::min(PIECE_BYTES, t.n_bytes));
    for (int64_t done = 0; done < t.n_bytes && error == 0;) {
        const int64_t n = std::min<int64_t>((int64_t)piece.size(), t.n_bytes - done);
        error           = read_exactly(file, piece.data(), n, t.offset + done);
        if (error == 0) {
            set(buffer, tensor, piece.data(), done, n);
        }
        done += n;
    }
    if (file != os::NO_FILE) {
        os::close_file(file);
    }
    report(t, error);
    return true;
}

// set_tensor cannot fail: whoever loads asks for the error afterwards.
void trunk::report(const moe_trunk_tensor & t, int error) {
    if (error != 0) {
        why_.set(ERROR_READ, "cannot read " + std::string(t.name) + " from " + paths_[t.file] + ": " +
                                 (error == ENDED_EARLY ? "the file ended early" : os::describe(error)));
    }
}

bool trunk::read(ggml_tensor * tensor) {
    const auto it = by_name_.find(tensor->name);
    if (it == by_name_.end()) {
        return false;
    }
    // Some architectures (gemma4) have llama.cpp make a tied output matrix a tensor of its own in
    // the same buffer: it is shown the bytes that are there, and its memory is never touched.
    const void * const there = data_[it->second];
    if (there != nullptr) {
        tensor->data = (void *)there;
        return true;
    }
    data_[it->second] = tensor->data;
    report(tensors_[it->second], read_rows(tensors_[it->second], tensor));
    return true;
}

// As read_exactly.
int trunk::read_rows(const moe_trunk_tensor & t, ggml_tensor * tensor) const {
    const int64_t     n_rows = ggml_nrows(tensor), row_bytes = t.n_bytes / n_rows;
    int               error = 0;
    const os::file    file  = os::open_file(paths_[t.file].c_str(), os::access::SEQUENTIAL, &error);
    std::vector<char> plain;
    for (int64_t row = 0, n = rows_at_once(t, tensor); row < n_rows && error == 0; row += n) {
        n               = std::min(n, n_rows - row);
        char * const to = (char *)tensor->data + row * row_bytes;
        if (!t.repacked) {
            error = read_exactly(file, to, n * row_bytes, t.offset + row * row_bytes);
            continue;
        }
        plain.resize(n * row_bytes);
        error = read_exactly(file, plain.data(), n * row_bytes, t.offset + row * row_bytes);
        if (error == 0) {
            repack(tensor->type, tensor->ne[0], tensor->ne[1], n, plain.data(), to);
        }
    }
    if (file != os::NO_FILE) {
        os::close_file(file);
    }
    return error;
}

const void * trunk::data(const char * name) const {
    const auto it = by_name_.find(name);
    return it == by_name_.end() || tensors_[it->second].repacked ? nullptr : data_[it->second];
}

void trunk::forget() { std::fill(data_.begin(), data_.end(), nullptr); }

}  // namespace moe
