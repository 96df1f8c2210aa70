#include "expert_threads.h"

#include <algorithm>
#include <exception>
#include <new>

#include "ggml-moe.h"
#include "model.h"

namespace moe {

// With fewer, those that end first wait longer for the last one than meeting after each matmul costs.
constexpr size_t PER_THREAD = 8;

struct expert_threads::thread {
    ggml_backend_t backend;  // of this thread alone
    rows           activations;
    graphs         built;
    graphs::round  round;

    thread(ggml_backend_t b, const graphs & inputs, int number) : backend(b), built(b, activations, inputs, number) {}
    ~thread() { ggml_backend_free(backend); }
};

expert_threads::expert_threads(ggml_backend_t inner, rows & memory) : inner_(inner), memory_(memory) {}

expert_threads::~expert_threads() = default;  // where a thread is known

static int64_t largest(const dialogue & said) {
    int n = 0;
    for (const dialogue::entry & e : said.entries) {
        n = std::max(n, e.count);
    }
    return n;
}

static int64_t bytes_of(const chain & c, int64_t n_pairs) { return rows::padded(graphs::round_bytes(c, n_pairs)); }

bool expert_threads::suit(const chain & c, int64_t most_bytes) {
    const dialogue & said = c.model->dialogue;
    const int64_t    n = n_threads(), pairs = largest(said);
    return n > 1 && said.entries.size() >= PER_THREAD * n && n * pairs <= (int64_t)said.pairs.size() &&
           n * bytes_of(c, pairs) <= most_bytes;
}

void expert_threads::prepare(const graphs & inputs) {
    while ((int)threads_.size() < n_threads()) {
        ggml_backend_t b = ggml_backend_init_by_type(GGML_BACKEND_DEVICE_TYPE_CPU, nullptr);
        if (b == nullptr) {
            throw std::bad_alloc();
        }
        set_n_threads(b, 1);
        threads_.push_back(std::make_unique<thread>(b, inputs, (int)threads_.size()));
    }
    if (graph_ == nullptr) {
        const auto each = [](ggml_tensor *, int number, int, void * self) { ((expert_threads *)self)->work(number); };
        graph_          = meta_.begin(1);
        ggml_tensor * t = ggml_custom_4d(meta_.get(), GGML_TYPE_I32, 1, 1, 1, 1, nullptr, 0, each, GGML_N_TASKS_MAX, this);
        t->data         = &output_;
        t->flags |= GGML_TENSOR_FLAG_COMPUTE;
        ggml_graph_add_node(graph_, t);
    }
}

ggml_status expert_threads::run(const chain & c, const graphs & inputs) {
    moe_model & model = *c.model;
    prepare(inputs);
    const int     n    = n_threads();
    const int64_t each = bytes_of(c, largest(model.dialogue));
    memory_.reserve(rows::ROUND, n * each);
    for (int i = 0; i < n; i++) {
        threads_[i]->activations.borrow(memory_.take(each), each);
    }
    c_         = &c;
    status_    = GGML_STATUS_SUCCESS;
    waited_ns_ = n_computed_ = 0;

    const int64_t     t0         = now_ns();
    const ggml_status status     = ggml_backend_graph_compute(inner_, graph_);
    const int64_t     stalled_ns = waited_ns_ / n;
    model.dialogue.stalled(stalled_ns);
    model.stats.stall_ns += stalled_ns;
    model.stats.compute_ns += now_ns() - t0 - stalled_ns;
    model.stats.rounds += n_computed_;
    return status_ != GGML_STATUS_SUCCESS ? status_ : status;
}

// What one thread does until nothing is left to begin.
void expert_threads::work(int number) {
    moe_model &                  model = *c_->model;
    std::unique_lock<std::mutex> lock(mutex_);
    while (status_ == GGML_STATUS_SUCCESS) {
        const int64_t ended = model.reads->ended();
        if (!next_.look(model)) {
            status_ = GGML_STATUS_FAILED;
        } else if (!next_.there.empty()) {
            dialogue::entry & e = model.dialogue.entries[next_.there.front()];
            e.taken             = true;
            lock.unlock();
            const ggml_status status = compute(*threads_[number], e);
            lock.lock();
            status_ = status_ == GGML_STATUS_SUCCESS ? status : status_;
            e.done  = true;
            n_computed_++;
            pending::submit(model);
            model.dialogue.submit_guesses();
        } else if (!next_.any) {
            return;
        } else {
            wait(number, lock, ended);
            continue;
        }
        done_.notify_all();
    }
}

// For a read, if one is under way, else for the slot of an expert that another thread computes.
void expert_threads::wait(int number, std::unique_lock<std::mutex> & lock, int64_t ended) {
    moe_model &   model = *c_->model;
    const int64_t t0    = now_ns();
    if (next_.waiting.empty()) {
        done_.wait(lock);
    } else {
        lock.unlock();
        model.reads->wait_beyond(ended);
        lock.lock();
    }
    waited_ns_ += now_ns() - t0;
    model.record(MOE_EVENT_STALL, c_->layer, t0, number);
}

// Nothing may unwind through ggml's frames.
ggml_status expert_threads::compute(thread & t, const dialogue::entry & e) try {
    const dialogue & said  = c_->model->dialogue;
    const auto       pairs = said.pairs.begin() + e.first;
    t.round.pairs.assign(pairs, pairs + e.count);
    t.round.slots.assign(e.count, 0);
    t.round.experts.assign(e.count, e.expert);
    t.round.copy = e.copy;
    t.round.only = e.slot;
    return t.built.run_round(*c_, t.round);
} catch (const std::exception & error) {
    c_->model->failure.set(ERROR_OTHER, error.what());
    return GGML_STATUS_ALLOC_FAILED;
}

}  // namespace moe
