// A test device: ggml-cpu's kernels behind everything that makes a GPU hard.
//
// - Its memory is not host memory, and blocking copies are ordered with no stream.
// - Every backend instance is a stream of its own: one thread that runs what was launched after a
//   random delay.
// - An asynchronous copy reads its source when it runs, and poisons its target before it lands.
// - A graph is captured when it is launched: what is patched afterwards does not count.
// - A graph's uid, once known, promises that it reads the same memory.
// - Events are real, and there is a pinned host type.
//
// So whoever leaves out a wait computes with poison. lag_ignore leaves out a kind of wait on purpose:
// a test that does not fail then does not test it (of those for a whole stream, only the ones for ids). lag_count tells how often each was
// asked for.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <random>
#include <thread>
#include <unordered_map>
#include <utility>
#include <vector>

#include "buffer_type.h"
#include "ggml-alloc.h"
#include "ggml-backend.h"
#include "ggml-cpu.h"
#include "ggml-iface.h"

// ggml's own declaration; only backends that make events know it.
struct ggml_backend_event {
    ggml_backend_dev_t device;
    void *             context;
};

namespace {

enum wait { SYNCHRONIZE, COMPUTE_WAITS, COPY_WAITS, HOST_WAITS, N_WAITS };

std::atomic<int>     ignored{0};   // bits: 1 << wait
std::atomic<int>     lag_us{100};  // at most, before each thing a stream does
std::atomic<int64_t> upload_bytes_per_s{0};
std::atomic<int64_t> asked[N_WAITS];
std::atomic<int64_t> uploaded{0};
std::atomic<int64_t> launched{0}, upload_calls{0};
std::atomic<int>     refuse_pinned{0};

constexpr int POISON = 0xff;  // NaN in every float type

bool asks(wait w) {
    asked[w]++;
    return !(ignored >> w & 1);
}

void delay(size_t bytes = 0) {
    thread_local std::mt19937 random(std::hash<std::thread::id>()(std::this_thread::get_id()));
    const int                 most  = lag_us;
    const int64_t             speed = upload_bytes_per_s;
    int64_t                   us    = most > 0 ? random() % most : 0;
    us += speed > 0 ? (int64_t)bytes * 1000000 / speed : 0;
    if (us > 0) {
        std::this_thread::sleep_for(std::chrono::microseconds(us));
    }
}

ggml_backend_dev_t cpu_device() { return ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU); }

// ---- one stream

class stream {
  public:
    stream() : cpu(ggml_backend_dev_init(cpu_device(), nullptr)) {
        auto * reg = ggml_backend_dev_backend_reg(cpu_device());
        auto   set = (ggml_backend_set_n_threads_t)ggml_backend_reg_get_proc_address(reg, "ggml_backend_set_n_threads");
        set(cpu, 1);
        thread_ = std::thread([this] { run(); });
    }
    ~stream() {
        {
            std::lock_guard<std::mutex> lock(mutex_);
            stop_ = true;
        }
        work_.notify_all();
        thread_.join();
        ggml_backend_free(cpu);
    }
    void push(std::function<void()> what) {
        {
            std::lock_guard<std::mutex> lock(mutex_);
            queue_.push_back(std::move(what));
        }
        work_.notify_all();
    }
    void drain() {
        std::unique_lock<std::mutex> lock(mutex_);
        idle_.wait(lock, [this] { return queue_.empty() && !busy_; });
    }

    ggml_backend_t    cpu;
    std::atomic<bool> computes{false};
    bool              brings_ids = false;  // since it was synchronized last, one thread's
    // By a graph's first node: its uid, and what it read.
    std::unordered_map<const ggml_tensor *, std::pair<uint64_t, std::vector<const void *>>> recorded;

  private:
    void run() {
        std::unique_lock<std::mutex> lock(mutex_);
        for (;;) {
            work_.wait(lock, [this] { return stop_ || !queue_.empty(); });
            if (queue_.empty()) {
                return;
            }
            const auto what = std::move(queue_.front());
            queue_.pop_front();
            busy_ = true;
            lock.unlock();
            delay();
            what();
            lock.lock();
            busy_ = false;
            idle_.notify_all();
        }
    }

    std::mutex                        mutex_;
    std::condition_variable           work_, idle_;
    std::deque<std::function<void()>> queue_;
    bool                              busy_ = false, stop_ = false;
    std::thread                       thread_;
};

stream & stream_of(ggml_backend_t backend) { return *(stream *)backend->context; }

struct event {
    std::mutex              mutex;
    std::condition_variable changed;
    int64_t                 recorded = 0, done = 0;

    int64_t record() {
        std::lock_guard<std::mutex> lock(mutex);
        return ++recorded;
    }
    int64_t last() {
        std::lock_guard<std::mutex> lock(mutex);
        return recorded;
    }
    void reach(int64_t n) {
        {
            std::lock_guard<std::mutex> lock(mutex);
            done = std::max(done, n);
        }
        changed.notify_all();
    }
    void wait(int64_t n) {
        std::unique_lock<std::mutex> lock(mutex);
        changed.wait(lock, [this, n] { return done >= n; });
    }
};

// ---- buffers

const char * type_name(ggml_backend_buffer_type_t) { return "LAG0"; }
size_t       type_alignment(ggml_backend_buffer_type_t) { return 128; }
bool         type_is_host(ggml_backend_buffer_type_t) { return false; }

// As ggml-cuda: kernels may read the rest of the last 512 elements of a row.
size_t type_alloc_size(ggml_backend_buffer_type_t, const ggml_tensor * t) {
    const int64_t rest = t->ne[0] % 512;
    return ggml_nbytes(t) + (ggml_is_quantized(t->type) && rest ? ggml_row_size(t->type, 512 - rest) : 0);
}

void   buffer_free(ggml_backend_buffer_t buffer) { free(buffer->context); }
void * buffer_base(ggml_backend_buffer_t buffer) { return buffer->context; }
void   buffer_memset(ggml_backend_buffer_t, ggml_tensor * t, uint8_t value, size_t offset, size_t size) {
    memset((char *)t->data + offset, value, size);
}
void buffer_set(ggml_backend_buffer_t, ggml_tensor * t, const void * data, size_t offset, size_t size) {
    memcpy((char *)t->data + offset, data, size);
}
void buffer_get(ggml_backend_buffer_t, const ggml_tensor * t, void * data, size_t offset, size_t size) {
    memcpy(data, (const char *)t->data + offset, size);
}
void buffer_clear(ggml_backend_buffer_t buffer, uint8_t value) { memset(buffer->context, value, buffer->size); }

bool buffer_cpy(ggml_backend_buffer_t, const ggml_tensor * from, ggml_tensor * to) {
    if (from->buffer->iface.free_buffer != buffer_free) {
        return false;
    }
    memcpy(to->data, from->data, ggml_nbytes(from));
    return true;
}

ggml_backend_buffer_t type_alloc(ggml_backend_buffer_type_t type, size_t size) {
    void * memory = nullptr;
    if (posix_memalign(&memory, 128, size + 128) != 0) {
        return nullptr;
    }
    memset(memory, POISON, size);
    ggml_backend_buffer_i iface{};
    iface.free_buffer   = buffer_free;
    iface.get_base      = buffer_base;
    iface.memset_tensor = buffer_memset;
    iface.set_tensor    = buffer_set;
    iface.get_tensor    = buffer_get;
    iface.cpy_tensor    = buffer_cpy;
    iface.clear         = buffer_clear;
    return ggml_backend_buffer_init(type, iface, memory, size);
}

const char *               host_name(ggml_backend_buffer_type_t) { return "LAG_Host"; }
bool                       host_is_host(ggml_backend_buffer_type_t) { return true; }
ggml_backend_buffer_type_t cpu_type() { return ggml_backend_dev_buffer_type(cpu_device()); }
size_t                     host_alignment(ggml_backend_buffer_type_t) { return ggml_backend_buft_get_alignment(cpu_type()); }

// As ggml-cuda: where pinned memory is refused, it is pageable memory of the processor, and nothing is said.
ggml_backend_buffer_t host_alloc(ggml_backend_buffer_type_t type, size_t size) {
    ggml_backend_buffer_t buffer = ggml_backend_buft_alloc_buffer(cpu_type(), size);
    if (buffer && !refuse_pinned) {
        buffer->buft = type;
    }
    return buffer;
}

const moe::buffer_type_functions device_functions = {type_name, type_alloc, type_alignment, nullptr, type_alloc_size, type_is_host};
const moe::buffer_type_functions host_functions   = {host_name, host_alloc, host_alignment, nullptr, nullptr, host_is_host};

moe::buffer_type * device_type;
moe::buffer_type * host_type;

// ---- backend

const char * backend_name(ggml_backend_t) { return "LAG0"; }

void backend_free(ggml_backend_t backend) {
    delete &stream_of(backend);
    delete backend;
}

// As cudaMemcpy2D: rows may not overlap.
void backend_set_rows(ggml_backend_t backend, ggml_tensor * t, const void * data, size_t offset, size_t size, size_t n, size_t stride_to,
                      size_t stride_from) {
    GGML_ASSERT(t->buffer->buft == device_type->ggml() && "unsupported buffer type");
    GGML_ASSERT(offset + (n - 1) * stride_to + size <= ggml_nbytes(t));
    GGML_ASSERT(n == 1 || (stride_to >= size && stride_from >= size));
    char * const       to   = (char *)t->data + offset;
    const char * const from = (const char *)data;
    if (t->buffer->usage == GGML_BACKEND_BUFFER_USAGE_WEIGHTS) {
        uploaded += (int64_t)(n * size);
        upload_calls++;
    }
    stream_of(backend).push([=] {
        for (size_t i = 0; i < n; i++) {
            memset(to + i * stride_to, POISON, size);
        }
        delay(n * size);
        for (size_t i = 0; i < n; i++) {
            memcpy(to + i * stride_to, from + i * stride_from, size);
        }
    });
}

void backend_set(ggml_backend_t backend, ggml_tensor * t, const void * data, size_t offset, size_t size) {
    backend_set_rows(backend, t, data, offset, size, 1, 0, 0);
}

void backend_get(ggml_backend_t backend, const ggml_tensor * t, void * data, size_t offset, size_t size) {
    const char * const from       = (const char *)t->data + offset;
    stream_of(backend).brings_ids = t->type == GGML_TYPE_I32;
    stream_of(backend).push([=] { memcpy(data, from, size); });
}

bool backend_copy(ggml_backend_t from, ggml_backend_t to, const ggml_tensor * src, ggml_tensor * dst) {
    if (from != to) {
        return false;
    }
    const void * const source = src->data;
    void * const       target = dst->data;
    const size_t       size   = ggml_nbytes(src);
    stream_of(to).push([=] {
        memset(target, POISON, size);
        delay();
        memcpy(target, source, size);
    });
    return true;
}

void backend_synchronize(ggml_backend_t backend) {
    stream & s = stream_of(backend);
    if (asks(SYNCHRONIZE) || !s.brings_ids) {
        s.drain();
    }
    s.brings_ids = false;
}

bool computes_nothing(const ggml_tensor * t) {
    return t->op == GGML_OP_NONE || t->op == GGML_OP_VIEW || t->op == GGML_OP_RESHAPE || t->op == GGML_OP_PERMUTE ||
           t->op == GGML_OP_TRANSPOSE;
}

// A graph as it was when it was launched: the nodes and what they read, copied.
class capture {
  public:
    explicit capture(ggml_cgraph * graph) {
        const int n = ggml_graph_n_nodes(graph);
        context_    = ggml_init({ggml_graph_overhead_custom(n + 8, false) + 4096, nullptr, true});
        graph_      = ggml_new_graph_custom(context_, n + 8, false);
        for (int i = 0; i < n; i++) {
            const ggml_tensor * node = ggml_graph_node(graph, i);
            ggml_tensor *       copy = copy_of(node);
            for (int j = 0; j < GGML_MAX_SRC; j++) {
                copy->src[j] = node->src[j] ? copy_of(node->src[j]) : nullptr;
            }
            if (!computes_nothing(node)) {
                ggml_graph_add_node(graph_, copy);
            }
        }
    }
    ~capture() { ggml_free(context_); }
    capture(const capture &)             = delete;
    capture & operator=(const capture &) = delete;

    void compute(ggml_backend_t cpu) {
        if (ggml_graph_n_nodes(graph_) > 0) {
            ggml_backend_graph_compute(cpu, graph_);
        }
    }

  private:
    ggml_tensor * copy_of(const ggml_tensor * t) {
        const auto found = copies_.find(t);
        if (found != copies_.end()) {
            return found->second;
        }
        tensors_.push_back(*t);
        ggml_tensor * copy = &tensors_.back();
        memset(copy->src, 0, sizeof(copy->src));
        copy->view_src = nullptr;
        copies_[t]     = copy;
        return copy;
    }

    ggml_context *                                         context_;
    ggml_cgraph *                                          graph_;
    std::deque<ggml_tensor>                                tensors_;
    std::unordered_map<const ggml_tensor *, ggml_tensor *> copies_;
};

// As ggml-cuda, which launches what it recorded as long as the uid under a first node stays the same.
void check_uid(ggml_backend_t backend, ggml_cgraph * graph) {
    if (graph->uid == 0 || graph->n_nodes == 0) {
        return;
    }
    std::vector<const void *> reads;
    for (int i = 0; i < graph->n_nodes; i++) {
        for (const ggml_tensor * s : graph->nodes[i]->src) {
            reads.push_back(s ? s->data : nullptr);
        }
    }
    auto & [uid, known] = stream_of(backend).recorded[graph->nodes[0]];
    GGML_ASSERT((uid != graph->uid || known == reads) && "a graph of a known uid reads other memory");
    uid   = graph->uid;
    known = std::move(reads);
}

ggml_status backend_compute(ggml_backend_t backend, ggml_cgraph * graph) {
    check_uid(backend, graph);
    const auto captured         = std::make_shared<capture>(graph);
    const auto cpu              = stream_of(backend).cpu;
    stream_of(backend).computes = true;
    launched++;
    stream_of(backend).push([captured, cpu] { captured->compute(cpu); });
    return GGML_STATUS_SUCCESS;
}

void backend_record(ggml_backend_t backend, ggml_backend_event_t which) {
    auto * const  e = (event *)which->context;
    const int64_t n = e->record();
    stream_of(backend).push([e, n] { e->reach(n); });
}

void backend_wait(ggml_backend_t backend, ggml_backend_event_t which) {
    auto * const  e = (event *)which->context;
    const int64_t n = e->last();
    if (asks(stream_of(backend).computes ? COMPUTE_WAITS : COPY_WAITS)) {
        stream_of(backend).push([e, n] { e->wait(n); });
    }
}

ggml_guid guid = {0x6c, 0x61, 0x67, 0x2d, 0x74, 0x65, 0x73, 0x74, 0x2d, 0x64, 0x65, 0x76, 0x69, 0x63, 0x65, 0x31};

// ---- device

const char * device_name(ggml_backend_dev_t) { return "LAG0"; }
const char * device_description(ggml_backend_dev_t) { return "test device"; }
void         device_memory(ggml_backend_dev_t, size_t * free, size_t * total) { *free = *total = (size_t)8 << 30; }

enum ggml_backend_dev_type device_kind(ggml_backend_dev_t) { return GGML_BACKEND_DEVICE_TYPE_GPU; }

void device_props(ggml_backend_dev_t device, ggml_backend_dev_props * props) {
    memset(props, 0, sizeof(*props));
    props->name        = device_name(device);
    props->description = device_description(device);
    props->type        = device_kind(device);
    device_memory(device, &props->memory_free, &props->memory_total);
    props->caps = {/* async */ true, /* host_buffer */ true, /* buffer_from_host_ptr */ false, /* events */ true, /* mmap */ false};
}

ggml_backend_t device_init(ggml_backend_dev_t device, const char *) {
    auto * backend = new ggml_backend{};
    auto & iface   = backend->iface;

    iface.get_name            = backend_name;
    iface.free                = backend_free;
    iface.set_tensor_async    = backend_set;
    iface.set_tensor_2d_async = backend_set_rows;
    iface.get_tensor_async    = backend_get;
    iface.cpy_tensor_async    = backend_copy;
    iface.synchronize         = backend_synchronize;
    iface.graph_compute       = backend_compute;
    iface.event_record        = backend_record;
    iface.event_wait          = backend_wait;
    backend->guid             = &guid;
    backend->device           = device;
    backend->context          = new stream;
    return backend;
}

ggml_backend_buffer_type_t device_buffer_type(ggml_backend_dev_t) { return device_type->ggml(); }
ggml_backend_buffer_type_t device_host_type(ggml_backend_dev_t) { return host_type->ggml(); }

bool device_supports_op(ggml_backend_dev_t, const ggml_tensor * op) {
    return op->op == GGML_OP_NONE || ggml_backend_dev_supports_op(cpu_device(), op);
}
bool device_supports_buft(ggml_backend_dev_t, ggml_backend_buffer_type_t buft) { return moe::buffer_type::is_named_by(buft, type_name); }
bool device_offload_op(ggml_backend_dev_t, const ggml_tensor * op) { return op->op == GGML_OP_MUL_MAT_ID && op->ne[2] >= 32; }

ggml_backend_event_t device_event_new(ggml_backend_dev_t device) { return new ggml_backend_event{device, new event}; }
void                 device_event_free(ggml_backend_dev_t, ggml_backend_event_t which) {
    delete (event *)which->context;
    delete which;
}
void device_event_synchronize(ggml_backend_dev_t, ggml_backend_event_t which) {
    auto * const e = (event *)which->context;
    if (asks(HOST_WAITS)) {
        e->wait(e->last());
    }
}

ggml_backend_device device;

// ---- registry

const char *       reg_name(ggml_backend_reg_t) { return "LAG"; }
size_t             reg_count(ggml_backend_reg_t) { return 1; }
ggml_backend_dev_t reg_device(ggml_backend_reg_t, size_t) { return &device; }
void *             reg_proc(ggml_backend_reg_t, const char *) { return nullptr; }

}  // namespace

#define API extern "C" __attribute__((visibility("default")))

// Leaves out these kinds of waits, bits of 1 << wait, from now on.
API void lag_ignore(int waits) { ignored = waits; }
API void lag_delay(int us, int64_t bytes_per_s) {
    lag_us             = us;
    upload_bytes_per_s = bytes_per_s;
}
API void lag_refuse_pinned(int refuse) { refuse_pinned = refuse; }
// Since the last call: waits of each kind, bytes of weights copied by streams, graphs launched, calls that copied weights.
API void lag_count(int64_t * counts) {
    for (int w = 0; w < N_WAITS; w++) {
        counts[w] = asked[w].exchange(0);
    }
    counts[N_WAITS]     = uploaded.exchange(0);
    counts[N_WAITS + 1] = launched.exchange(0);
    counts[N_WAITS + 2] = upload_calls.exchange(0);
}

API ggml_backend_reg_t ggml_backend_init(void) {
    const int               version = ggml_backend_reg_get(0)->api_version;
    static ggml_backend_reg reg     = {version, {reg_name, reg_count, reg_device, reg_proc}, nullptr};
    static moe::buffer_type memory(version, device_functions, &device, nullptr);
    static moe::buffer_type pinned(version, host_functions, &device, nullptr);
    device_type = &memory;
    host_type   = &pinned;
    device      = {
        {device_name, device_description, device_memory, device_kind, device_props, device_init, device_buffer_type, device_host_type,
              nullptr, device_supports_op, device_supports_buft, device_offload_op, device_event_new, device_event_free,
              device_event_synchronize},
        &reg,
        nullptr,
    };
    return &reg;
}
